"""What the kernel tests share: the device, poisoned outputs, comparison with float64, and whole-operation checks.

`equivalence/` holds the tests of the Triton kernels. They run where kernels can: in a process started with
TRITON_INTERPRET=1 on CPU tensors (`test_interpreter.py` starts one), and on a GPU in the main process.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdcgan.kernels import batch_norm_act
from fastdcgan.kernels.tolerances import TOLERANCES

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
EQUIVALENCE = Path(__file__).parent / "equivalence"


def pytest_collection_modifyitems(items):
    if INTERPRETING:
        return
    for item in items:
        if EQUIVALENCE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and EQUIVALENCE in item.path.parents and not torch.cuda.is_available():
        pytest.skip("needs a GPU; test_interpreter.py runs the same test in the interpreter")


@pytest.fixture
def device() -> str:
    return "cpu" if INTERPRETING else "cuda"


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """Every torch.empty is full of NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def assert_close():
    """assert_close(name, actual, expected, quantity, scale): within the table's tolerance for actual's dtype."""

    def check(name, actual, expected, quantity="output", scale=None, tolerance=None):
        assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
        limit = TOLERANCES[actual.dtype][quantity].relative_error if tolerance is None else tolerance
        difference = actual.detach().double() - expected.detach().double()
        size = expected.detach().double().norm() if scale is None else scale.detach().double().norm()
        error = (difference.norm() / size.clamp_min(1e-30)).item()
        assert error <= limit, (
            f"{name}: relative error {error:.2e} over {limit:.2e}; largest difference {difference.abs().max():.3e}, "
            f"{torch.isnan(difference).sum()} NaN of {difference.numel()}"
        )

    return check


@pytest.fixture
def check_batch_norm_act(device, assert_close):
    return functools.partial(_check_batch_norm_act, device, assert_close)


@pytest.fixture
def check_batch_norm_act_reference(assert_close):
    return functools.partial(_check_batch_norm_act, "cpu", assert_close)


def _check_batch_norm_act(
    device,
    assert_close,
    operation,
    shape,
    dtype=torch.float32,
    groups=1,
    slope=0.2,
    training=True,
    mean=0.0,
    std=1.0,
    constant_channel=False,
    statistics_error=0.0,  # of the mean, in deviations, where float32 cannot hold it
):
    """y, gradients and running statistics of `operation`, which has batch_norm_act's signature, against float64.

    The truth is written out here, from the textbook's formulas.
    """
    torch.seed()
    channels = shape[1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*size, dtype=wide):
        return torch.randn(size, device=device, dtype=torch.float64).to(dtype)

    x = draw(*shape, dtype=torch.float64) * std + mean
    if constant_channel:
        x[:, 0] = 3.0
    x = x.to(dtype)
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    weight, bias, dy = draw(channels), draw(channels), draw(*shape, dtype=dtype)
    running_mean, running_var = draw(channels), draw(channels).square() + 0.5
    expected_running = [running_mean.double(), running_var.double()]
    momentum, eps = 0.3, 4e-5  # neither the default

    # The truth: (groups, N / groups, C, H * W), each group on its own.
    parts = x.double().reshape(groups, shape[0] // groups, channels, -1)
    count = parts.shape[1] * parts.shape[3]
    if training:
        mu = parts.mean((1, 3))
        var = (parts - mu[:, None, :, None]).square().mean((1, 3))
        for g in range(groups):
            for k, batch in enumerate((mu[g], var[g] * count / (count - 1))):
                expected_running[k] = expected_running[k] * (1 - momentum) + batch * momentum
    else:
        mu, var = (s.double().expand(groups, channels) for s in (running_mean, running_var))
    w, b = (p.double()[None, None, :, None] for p in (weight, bias))
    inverse = (var + eps).rsqrt()[:, None, :, None]
    normalized = (parts - mu[:, None, :, None]) * inverse
    z = normalized * w + b
    # A gradient is one-sided at the kink; leave out what float32 may put on the other side of it.
    kink = z.abs() < 1e-4 + statistics_error * w.abs()
    dy = torch.where(kink.reshape(shape), 0.0, dy.double()).to(dtype)
    dz = dy.double().reshape(parts.shape)
    dz = torch.where(z > 0, dz, slope * dz)
    terms = dz * w * inverse
    dx = terms
    if training:
        dx = terms - terms.mean((1, 3), keepdim=True)
        dx = dx - normalized * (terms * normalized).mean((1, 3), keepdim=True)

    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = operation(
        *leaves,
        running_mean,
        running_var,
        training=training,
        momentum=momentum,
        eps=eps,
        negative_slope=slope,
        groups=groups,
    )
    gradients = torch.autograd.grad(y, leaves, dy)

    assert y.dtype == dtype and gradients[0].dtype == dtype
    if len(shape) == 4:
        assert y.is_contiguous(memory_format=torch.channels_last)
    room = {"tolerance": 3 * statistics_error} if statistics_error else {}
    truth = torch.where(z > 0, z, slope * z)
    usual = torch.where(z > 0, 1.0, slope) * ((normalized * w).square() + b.square()).sqrt()  # where they do not cancel
    assert_close("y", y, truth.reshape(shape), scale=torch.maximum(truth.abs(), usual), **room)
    assert_close("dx", gradients[0], dx.reshape(shape), scale=terms, **room)
    over = (0, 1, 3)
    spread = (dz * normalized).abs().sum(over)
    assert_close("dweight", gradients[1], (dz * normalized).sum(over), "sum", scale=spread, **room)
    assert_close("dbias", gradients[2], dz.sum(over), "sum", scale=dz.abs().sum(over))
    assert_close("running_mean", running_mean, expected_running[0], "sum", scale=expected_running[0].abs() + std)
    assert_close("running_var", running_var, expected_running[1], "sum", **room)


@pytest.fixture
def check_sync(assert_close, tmp_path):
    """check(shape, dtype, groups, backend): two processes with half a batch each against one with all of it."""

    def check(shape, dtype=torch.float32, groups=1, backend="reference", compiled=False):
        channels, wide = shape[1], torch.float64 if dtype == torch.float64 else torch.float32
        options = {"negative_slope": 0.2, "momentum": 0.3, "eps": 0.3, "backend": backend}
        joint = {
            "x": (torch.randn(shape) * 2 + 3).to(dtype),
            "dy": torch.randn(shape).to(dtype),
            **{name: torch.rand(channels, dtype=wide) + 0.5 for name in ("weight", "bias", "running_var")},
            "running_mean": torch.randn(channels, dtype=wide),
            "groups": groups,
            "compiled": compiled,
            "options": options,
        }
        torch.save(joint, tmp_path / "joint.pt")
        worker = Path(__file__).parent / "one_of_two.py"
        processes = [
            subprocess.Popen([sys.executable, worker, tmp_path, str(rank)], stderr=subprocess.PIPE, text=True)
            for rank in range(2)
        ]
        for process in processes:
            errors = process.communicate(timeout=120)[1]
            assert process.returncode == 0, errors
        found = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2)]

        names = ("x", "weight", "bias", "running_mean", "running_var", "dy")
        exact = {name: joint[name].double() for name in names}
        leaves = [exact[name].requires_grad_() for name in ("x", "weight", "bias")]
        options = options | {"backend": "reference"}
        y = batch_norm_act(
            *leaves, exact["running_mean"], exact["running_var"], training=True, groups=groups, **options
        )
        dx, dweight, dbias = torch.autograd.grad(y, leaves, exact["dy"])

        def together(of_rank):  # the halves of every group side by side again
            return torch.stack([part.unflatten(0, (groups, -1)) for part in of_rank], 1).flatten(0, 2)

        assert_close("y", together([each[0] for each in found]), y)
        assert_close("dx", together([each[1] for each in found]), dx)
        assert_close("dweight", found[0][2] + found[1][2], dweight, "sum")
        assert_close("dbias", found[0][3] + found[1][3], dbias, "sum")
        for each in found:
            assert_close("running_mean", each[4], exact["running_mean"], "sum")
            assert_close("running_var", each[5], exact["running_var"], "sum")
        assert all(torch.equal(a, b) for a, b in zip(found[0][4:], found[1][4:], strict=True)), "the same bits"

    return check


@pytest.fixture
def check_image_conv(device, assert_close, monkeypatch):
    """check(operation, transposed, shape of the images, features, ...): y, dx and dw against float64, without TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return functools.partial(_check_image_conv, device, assert_close)


def _check_image_conv(
    device,
    assert_close,
    operation,  # operation(input, weight, slope), without the slope where transposed
    transposed,
    shape,
    features,
    dtype=torch.float32,
    slope=0.2,
    tolerance=None,
):
    torch.seed()
    samples, channels, height, width = shape

    def draw(*size):
        drawn = torch.randn(size, device=device).to(dtype)
        return drawn.contiguous(memory_format=torch.channels_last)

    coarse = (samples, features, height // 2, width // 2)
    x, dy = (draw(*coarse), draw(*shape)) if transposed else (draw(*shape), draw(*coarse))
    # So that z is about 1, or 0.5 into tanh, which would leave no gradient far out.
    weight = draw(features, channels, 4, 4) / ((16 * features) ** 0.5 if transposed else (16 * channels) ** 0.5)

    exact = [tensor.double().requires_grad_() for tensor in (x, weight)]
    convolve = torch.nn.functional.conv_transpose2d if transposed else torch.nn.functional.conv2d
    z = convolve(*exact, stride=2, padding=1)
    if transposed:
        y = z.tanh()
        dz = dy.double() * (1 - y.square())
    else:
        y = torch.where(z > 0, z, slope * z)
        dy = torch.where(z.abs() < 1e-4, 0.0, dy.double()).to(dtype)  # a gradient is one-sided at the kink
        dz = torch.where(z > 0, dy.double(), slope * dy.double())
    dx, dw = torch.autograd.grad(z, exact, dz)
    # How large each is where its terms do not happen to cancel.
    squares = [tensor.detach().square().requires_grad_() for tensor in exact]
    z_squared = convolve(*squares, stride=2, padding=1)
    usual = [each.sqrt() for each in (z_squared, *torch.autograd.grad(z_squared, squares, dz.square()))]
    scales = [torch.maximum(right.abs(), each) for right, each in zip((y, dx, dw), usual, strict=True)]

    leaves = [tensor.requires_grad_() for tensor in (x, weight)]
    found = operation(*leaves) if transposed else operation(*leaves, slope)
    gradients = torch.autograd.grad(found, leaves, dy)

    for tensor in (found, *gradients):
        assert tensor.dtype == dtype and tensor.permute(0, 2, 3, 1).is_contiguous()
    assert_close("y", found, y, scale=scales[0], tolerance=tolerance)
    assert_close("dx", gradients[0], dx, scale=scales[1], tolerance=tolerance)
    # A 16-bit dz is rounded before it is summed, and dw after: what `output` allows, not `sum`.
    sums = "sum" if dtype == torch.float32 else "output"
    assert_close("dw", gradients[1], dw, sums, scale=scales[2], tolerance=tolerance)


@pytest.fixture
def check_adam(device, assert_close):
    """check(operation, shapes, ...): six updates with changing learning rate and average against float64."""

    def check(operation, shapes, low=torch.bfloat16, low_grads=(), copied=(), averaged=(), betas=(0.5, 0.999)):
        def strided(tensor):
            return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor

        params = [strided(torch.randn(shape, device=device)).requires_grad_() for shape in shapes]
        exp_avgs, exp_avg_sqs = ([torch.zeros_like(p) for p in params] for _ in range(2))
        step, lr, decay = (
            torch.zeros((), device=device),
            torch.tensor(1e-3, device=device),
            torch.zeros((), device=device),
        )
        copies = [torch.empty_like(p, dtype=low) if i in copied else None for i, p in enumerate(params)]
        emas = [p.detach().clone() if i in averaged else None for i, p in enumerate(params)]

        truth = [p.detach().double().clone() for p in params]
        optimizer = torch.optim.Adam(truth, lr=1e-3, betas=betas, fused=True)
        true_emas = [p.clone() for p in truth]
        for turn in range(6):
            lr.fill_(1e-3 / (turn + 1)), decay.fill_(turn / 6)
            grads = [
                torch.randn(shape, device=device).to(low if i in low_grads else torch.float32)
                for i, shape in enumerate(shapes)
            ]
            operation(
                params,
                grads,
                exp_avgs,
                exp_avg_sqs,
                step,
                lr=lr,
                betas=betas,
                copies=copies,
                emas=emas,
                ema_decay=decay,
            )
            for p, grad in zip(truth, grads, strict=True):
                p.grad = torch.empty_like(p).copy_(grad)
            optimizer.param_groups[0]["lr"] = 1e-3 / (turn + 1)
            optimizer.step()
            for ema, p in zip(true_emas, truth, strict=True):
                ema.mul_(turn / 6).add_(p.detach(), alpha=1 - turn / 6)
        assert step.item() == 6
        for i, p in enumerate(truth):
            state = optimizer.state[p]
            assert_close(f"parameter {i}", params[i], p, "update")
            assert_close(f"exp_avg {i}", exp_avgs[i], state["exp_avg"], "update")
            assert_close(f"exp_avg_sq {i}", exp_avg_sqs[i], state["exp_avg_sq"], "update")
            if copies[i] is not None:
                assert_close(f"copy {i}", copies[i], p, "update")
            if emas[i] is not None:
                assert_close(f"ema {i}", emas[i], true_emas[i], "update")

    return check
