"""What most kernels compile to for sm_90 gives the right numbers and has no hazards, interpreted without a GPU."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from fastdcgan.kernels.backend import INTERPRETING, TRITON_MISSING

if INTERPRETING or TRITON_MISSING:
    pytest.skip("needs a process that compiles kernels", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastdcgan.kernels import batch_norm_act, batch_norm_act_op, image_conv_op, uint8_to_float, uint8_to_float_triton
from fastdcgan.kernels.plan import Plan

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
ptx = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("ptx.py"))))  # tests are no package


@pytest.fixture
def device(monkeypatch):
    """Launches on CPU tensors are compiled for sm_90 and interpreted; gives `change`, applied to their PTX, and the
    `hazards` found."""
    target = GPUTarget("cuda", 90, 32)
    monkeypatch.setattr(
        driver,
        "_active",
        SimpleNamespace(
            get_current_target=lambda: target, get_current_device=lambda: 90, get_current_stream=lambda device=0: 0
        ),
    )
    run = JITFunction.run
    found = SimpleNamespace(change=str, hazards=[])

    def interpreted(self, *arguments, grid, warmup, **options):
        compiled = run(self, *arguments, grid=grid, warmup=True, **options)
        bound = dict(zip(self.arg_names, arguments, strict=False)) | options
        try:
            found.hazards += ptx.launch(compiled, bound, grid, found.change)
        except ptx.Unknown as unknown:
            pytest.skip(f"another release of Triton compiles to what is not known here: {unknown}")

    monkeypatch.setattr(JITFunction, "run", interpreted)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return found


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("shape", "groups", "dtype", "cut"),
    [
        ((4, 17, 3, 3), 1, torch.float32, None),
        ((8, 64, 4, 4), 2, torch.bfloat16, None),
        ((8, 64, 9, 9), 2, torch.bfloat16, Plan(64, 64, 3, 2)),  # as large layers are cut: copies run ahead
        ((16, 40, 9, 9), 1, torch.float16, Plan(16, 64, 1, 81)),  # more splits than are combined at once
    ],
    ids=str,
)
def test_batch_norm_act(device, assert_close, shape, groups, dtype, cut):
    x, dy = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype)
    weight, bias, running_mean, running_var = (torch.rand(shape[1]) + 0.5 for _ in range(4))
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    exact_running = running_mean.double(), running_var.double()
    cut = cut or batch_norm_act_op.plan_for(x, groups)
    y, mean, inverse = batch_norm_act_op.launch_forward(
        x, weight, bias, running_mean, running_var, True, 0.1, 1e-5, 0.2, groups, cut
    )
    found = batch_norm_act_op.launch_backward(x, dy, torch.empty_like(x), weight, bias, mean, inverse, True, 0.2, cut)
    if cut.splits < 10:  # the many programs of the other take half a minute
        dx = dy.clone()
        batch_norm_act_op.launch_backward(x, dx, dx, weight, bias, mean, inverse, True, 0.2, cut)
        assert torch.equal(dx, found[0]), "in the place of dy"
    expected = batch_norm_act(
        *exact, *exact_running, training=True, negative_slope=0.2, groups=groups, backend="reference"
    )
    gradients = torch.autograd.grad(expected, exact, dy.double())
    assert_close("y", y, expected)
    for name, actual, right in zip(
        ("running mean", "running variance"), (running_mean, running_var), exact_running, strict=True
    ):
        assert_close(name, actual, right)
    for name, actual, right in zip(("dx", "dweight", "dbias"), found, gradients, strict=True):
        assert_close(name, actual, right)
    assert device.hazards == []


@pytest.mark.parametrize(
    ("shape", "features", "programs", "dtype"),
    [
        ((3, 3, 10, 14), 64, 264, torch.float16),
        ((3, 3, 14, 18), 64, 1, torch.bfloat16),  # two tiles a program
        ((3, 4, 6, 10), 5, 264, torch.bfloat16),
        ((1, 3, 10, 14), 64, 264, torch.float32),  # as TF32
    ],
    ids=str,
)
def test_image_conv(device, assert_close, monkeypatch, shape, features, programs, dtype):
    """All seven launches; of `outer` with one tile a program and with several."""
    monkeypatch.setattr(image_conv_op, "OUTER_PROGRAMS", programs)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    room = {"tolerance": 2e-3} if dtype == torch.float32 else {}  # two factors, of each of which 2**-10 may be cut off
    samples, channels, height, width = shape
    images, image_out = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype).tanh()
    maps, map_out = (draw(samples, features, height // 2, width // 2, dtype=dtype) for _ in range(2))
    weight = draw(features, channels, 4, 4, dtype=dtype) / 7
    d_images = (images.float() * (1 - image_out.float().square())).to(dtype).double()
    d_maps = torch.where(map_out > 0, maps.float(), 0.2 * maps.float()).to(dtype).double()
    w = weight.double()
    norm = tuple(torch.rand(features) + 0.5 for _ in range(4))
    mean, inverse, norm_weight, norm_bias = (each[:, None, None] for each in norm)
    normalized = F.leaky_relu((maps.float() - mean) * (inverse * norm_weight) + norm_bias, 0.2)

    def conv(x):
        return F.conv2d(x, w, stride=2, padding=1)

    def transposed(x):
        return F.conv_transpose2d(x, w, stride=2, padding=1)

    def outer(x, y):
        return torch.nn.grad.conv2d_weight(x, w.shape, y, stride=2, padding=1)

    op = image_conv_op
    for name, found, expected in (
        ("conv", op.launch_down(images, None, weight, 0.2), F.leaky_relu(conv(images.double()), 0.2)),
        ("conv dx", op.launch_up(maps, map_out, weight, 0.2, False), transposed(d_maps)),
        (
            "conv dw",
            op.launch_add_splits(op.launch_outer(images, None, maps, map_out, 0.2), images),
            outer(images.double(), d_maps),
        ),
        ("transposed", op.launch_up(maps, None, weight, 1.0, True), transposed(maps.double()).tanh()),
        ("transposed dx", op.launch_down(images, image_out, weight, 1.0), conv(d_images)),
        (
            "transposed dw",
            op.launch_add_splits(op.launch_outer(images, image_out, maps, None, 1.0), images),
            outer(d_images, maps.double()),
        ),
        (
            "transposed dw, after BatchNorm",
            op.launch_add_splits(op.launch_outer(images, image_out, maps, None, 0.2, norm), images),
            outer(d_images, normalized.to(dtype).double()),
        ),
    ):
        assert_close(name, found, expected, **room)
    assert device.hazards == []


def test_uint8_to_float(device):
    images = torch.randint(0, 256, (5, 6, 10, 3), dtype=torch.uint8)
    index, flip = torch.tensor([4, 0, 2]), torch.tensor([True, False, True])
    out = draw(3, 3, 6, 10, dtype=torch.bfloat16)
    uint8_to_float_triton.gather(images, index, flip, out)
    assert torch.equal(out, uint8_to_float(images, index, flip, dtype=torch.bfloat16, backend="reference"))


@pytest.mark.parametrize("missing", ["bar.sync", "fence.proxy.async"])
def test_what_is_missing_is_found(device, missing):
    """Without a barrier, or without the fence before a product, the numbers may still be right: hazards are not."""
    device.change = lambda text: re.sub(rf"{re.escape(missing)}[^;]*;", "", text)
    image_conv_op.launch_up(
        draw(3, 64, 5, 7, dtype=torch.bfloat16), None, draw(64, 3, 4, 4, dtype=torch.bfloat16), 1.0, True
    )
    assert device.hazards
    assert all(("fence" if missing.startswith("fence") else "barrier") in hazard for hazard in device.hazards)
