"""The checks themselves are checked: each planted fault must make them fail, and the unchanged copy must pass."""

from __future__ import annotations

import functools
import importlib
import itertools
import sys
from pathlib import Path

import pytest
import torch

from fastdcgan import kernels

HERE = Path(kernels.__file__).parent
NUMBER = itertools.count()

BATCH_NORM_FAULTS = {
    "none": None,
    "slope's sign, forward": ("z * SLOPE", "z * -SLOPE"),
    "slope's sign, gradient": ("dx * SLOPE", "dx * -SLOPE"),
    "slope's sign, sums": ("dy * SLOPE", "dy * -SLOPE"),
    "no slope in the sums": ("tl.where(z > 0.0, dy, dy * SLOPE)", "dy"),
    "missing 1/M": ("_total(partial_dz_ptr, group, cols, C, SPLITS, CHUNK)[None, :] / rows", "mean"),
    "missing second term": ("dx -= mean_dz + (x - mean) * inverse * mean_dzx", "dx -= mean_dz"),
    "missing weight": ("dx *= inverse * weight", "dx *= inverse"),
    "groups share the first one's sums": ("_total(partial_dzx_ptr, group,", "_total(partial_dzx_ptr, 0,"),
    "groups share the first one's mean": (
        "mean, m2 = _combine(partial_mean_ptr, partial_m2_ptr, group,",
        "mean, m2 = _combine(partial_mean_ptr, partial_m2_ptr, 0,",
    ),
    "last group's dweight only": ("dweight += ", "dweight = "),
    "biased running variance": ("batch_m2 / (rows - 1)", "batch_m2 / rows"),
    "running statistics see the first group twice": (
        "partial_mean_ptr, partial_m2_ptr, each,",
        "partial_mean_ptr, partial_m2_ptr, 0,",
    ),
    "eps outside the root": ("1.0 / tl.sqrt(var + EPS)", "1.0 / (tl.sqrt(var) + 0.003)"),
    "a group's last row left out": ("left = tl.minimum(rows - start", "left = tl.minimum(rows - 1 - start"),
    "splits weigh the same": ("total += away * count", "total += away * ROWS_PER_SPLIT"),
    "a place's values not above its first one": (" x - own, 0.0)", " x, 0.0)"),
    "first channel not written": (
        "act(z, SLOPE).to(y_ptr.dtype.element_ty), mask=mask",
        "act(z, SLOPE).to(y_ptr.dtype.element_ty), mask=mask & (cols > 0)[None, :]",
    ),
}

IMAGE_CONV_FAULTS = {  # and whether it shows in the transposed convolution
    "none": (None, False),
    "none, transposed": (None, True),
    "a line too low": (("(2 * y - 1)[:, None]", "(2 * y)[:, None]"), False),
    "a pixel to the left": (("- (C + LEAD))", "- (2 * C + LEAD))"), False),
    "wrapped around the border": ((" & (across < 2 * WIDTH * C)", ""), False),
    "no slope, forward": (("total * SLOPE)", "total)"), False),
    "no slope, gradient": (("wide * SLOPE)", "wide)"), False),
    "no tanh": (("if TANH:", "if TANH and C > 4:"), True),
    "tanh's gradient of the gradient": (("wide = out.to", "wide = dy.to"), True),
    "parity of the lines": (("line = p + 1 - 2 * dy", "line = 2 - p - 2 * dy"), True),
    "parity of the columns": (("(3 - 3 * q) * C", "3 * q * C"), True),
    "moved over to the wrong side": (("place[:, None] + dx", "place[:, None] - dx"), True),
    "a neighbour from the next line": (
        ("(x[:, None] + dx >= 0) & (x[:, None] + dx < WIDTH)", "x[:, None] + dx >= -1"),
        True,
    ),
    "tiles that do not overlap": (("(BLOCK_ROWS - 2) - 1", "(BLOCK_ROWS - 2)"), True),
    "a neighbour from the next sample": (
        ("(y + dy >= 0) & (y + dy < HEIGHT)", "(row + dy * WIDTH >= 0) & (row + dy * WIDTH < rows)"),
        True,
    ),
    "first block of columns only": (("step % STEPS * BLOCK_COLS", "0"), True),
    "a dropped split": (("split < SPLITS", "split < SPLITS - 1"), False),
    "the last turn only": (("patches, total, input", "patches, input"), False),
    "dw of the first rows only": (("tl.load(coarse_ptr + start", "tl.load(coarse_ptr + start * 0"), True),
}

NORMALIZED_FAULTS = {  # of `outer` after BatchNorm
    "none": None,
    "not normalised": ("if NORMALIZE:\n            coarse =", "if NORMALIZE:\n            unused ="),
    "no slope": ("act(z, SLOPE)", "act(z, 1.0)"),
    "first block's statistics": ("mean_ptr + cols", "mean_ptr + cols % BLOCK_COLS"),
    "no bias": ("norm_bias_ptr + cols, mask=cols < K", "norm_bias_ptr + cols, mask=cols < 0"),
}

UINT8_FAULTS = {
    "none": None,
    "mirrored one pixel off": ("WIDTH - 1 - 2 * column", "WIDTH - 2 - 2 * column"),
    "channels mirrored too": (
        "(WIDTH - 1 - 2 * column) * CHANNELS",
        "WIDTH * CHANNELS - 1 - 2 * (offset % (WIDTH * CHANNELS))",
    ),
    "0..1": ("(pixel - 127.5) * (1 / 127.5)", "pixel * (1 / 255)"),
    "255 is not 1": ("(pixel - 127.5) * (1 / 127.5)", "(pixel - 128.0) * (1 / 128)"),
    "no gather": ("image * SIZE", "place * SIZE"),
}

ADAM_FAULTS = {
    "none": None,
    "no bias correction": ("lr / (1 - power1)", "lr"),
    "no second bias correction": ("1 / tl.sqrt(1 - power2)", "tl.sqrt(power2 / power2)"),
    "gradient not squared": ("(1 - BETA2) * g * g", "(1 - BETA2) * g"),
    "copy of the old parameter": ("p.to(LOW)", "(p + 0.05).to(LOW)"),
    "decay and share mixed up": ("(1 - decay).to", "decay.to"),
    "step stands still": ("tl.store(step_ptr, step)", "pass"),
    "first tensor's gradient for all": ("tl.where(reached, all_grad[i], grad)", "grad"),
    "every block starts at 0": ("(block - begin)", "(block - block)"),
    "eps inside the root": ("tl.sqrt_rn(v) * inverse_root + EPS", "tl.sqrt_rn(v + 1e-5) * inverse_root"),
}


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """planted(stem, fault, also): kernels/stem.py with the fault in it, imported under another name."""

    def load(stem, fault, *others):
        number = next(NUMBER)
        monkeypatch.syspath_prepend(tmp_path)
        text = (HERE / f"{stem}.py").read_text()
        if fault is not None:
            assert fault[0] in text, "the fault no longer fits the source"
            text = text.replace(*fault)
        sources = {stem: text} | {other: (HERE / f"{other}.py").read_text() for other in others}
        for name, source in sources.items():
            source = source.replace('"fastdcgan::', f'"planted{number}::')
            source = source.replace(f"from fastdcgan.kernels import {stem} as", f"import planted{number}_{stem} as")
            (tmp_path / f"planted{number}_{name}.py").write_text(source)
        importlib.invalidate_caches()
        modules = [importlib.import_module(f"planted{number}_{name}") for name in sources]
        for name in sources:
            sys.modules.pop(f"planted{number}_{name}")
        return modules[-1]

    return load


def expect(fault, check):
    if fault is None:
        check()
    else:
        with pytest.raises(AssertionError):
            check()


@pytest.mark.parametrize("name", BATCH_NORM_FAULTS)
def test_batch_norm_act(planted, monkeypatch, check_batch_norm_act, name):
    operator = planted("batch_norm_act_triton", BATCH_NORM_FAULTS[name], "batch_norm_act_op")
    operator.kernels.plan = lambda rows, channels, groups: operator.kernels.Plan(16, 16, 2, -(-rows // 32))

    def operation(x, *channels, training, momentum, eps, negative_slope, groups):
        return operator.BatchNormAct.apply(x, *channels, training, momentum, eps, negative_slope, groups)

    expect(
        BATCH_NORM_FAULTS[name],
        lambda: check_batch_norm_act(operation, (4, 5, 5, 5), groups=2, slope=0.2, mean=3.0, std=0.05),
    )


@pytest.mark.parametrize("name", IMAGE_CONV_FAULTS)
def test_image_conv(planted, check_image_conv, name):
    fault, transposed = IMAGE_CONV_FAULTS[name]
    operator = planted("image_conv_triton", fault, "image_conv_op")

    def plan(rows, channels, itemsize, tallest, programs):
        return operator.kernels.Plan(16, 16, 2 if programs else 1, -(-rows // (32 if programs else 16)))

    operator.kernels.plan = plan
    operation = operator.ImageConvTranspose.apply if transposed else operator.ImageConv.apply
    expect(fault, lambda: check_image_conv(operation, transposed, (3, 3, 10, 14), 20))


@pytest.mark.parametrize("name", NORMALIZED_FAULTS)
def test_outer_after_batch_norm(planted, device, assert_close, monkeypatch, name):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    operator = planted("image_conv_triton", NORMALIZED_FAULTS[name], "image_conv_op")
    operator.kernels.plan = lambda rows, *_: operator.kernels.Plan(16, 16, 2, -(-rows // 32))
    fine, x = (
        torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
        for shape in ((3, 3, 10, 14), (3, 20, 5, 7))
    )
    norm = tuple(torch.rand(20, device=device) + 0.5 for _ in range(4))
    found = operator.launch_add_splits(operator.launch_outer(fine, None, x, None, 0.2, norm), fine)
    mean, inverse, weight, bias = (each.double()[:, None, None] for each in norm)
    y = torch.nn.functional.leaky_relu((x.double() - mean) * inverse * weight + bias, 0.2)
    expected = torch.nn.grad.conv2d_weight(fine.double(), (20, 3, 4, 4), y, stride=2, padding=1)
    expect(NORMALIZED_FAULTS[name], lambda: assert_close("dw", found, expected, "sum"))


@pytest.mark.parametrize("name", UINT8_FAULTS)
def test_uint8_to_float(planted, device, assert_close, name):
    gather = planted("uint8_to_float_triton", UINT8_FAULTS[name]).gather
    images = torch.randint(0, 256, (5, 7, 6, 3), dtype=torch.uint8, device=device)
    index, flip = torch.tensor([4, 0, 2], device=device), torch.tensor([True, False, True], device=device)
    out = torch.empty((3, 7, 6, 3), device=device).permute(0, 3, 1, 2)
    gather(images, index, flip, out)
    expected = kernels.uint8_to_float(images, index, flip, backend="reference")
    expect(UINT8_FAULTS[name], lambda: assert_close("batch", out, expected))


@pytest.mark.parametrize("name", ADAM_FAULTS)
def test_adam_step(planted, check_adam, name):
    launch = planted("adam_step_triton", ADAM_FAULTS[name]).launch

    def operation(params, grads, exp_avgs, exp_avg_sqs, step, *, lr, betas, copies, emas, ema_decay):
        with torch.no_grad():
            grads = [torch.empty_like(p, dtype=g.dtype).copy_(g) for p, g in zip(params, grads, strict=True)]
            launch(params, grads, exp_avgs, exp_avg_sqs, step, lr, betas, 1e-8, copies, emas, ema_decay)

    check = functools.partial(check_adam, operation, [(3000,), (8, 4, 4, 4), (7,)], copied=(1,), averaged=(0, 2))
    expect(ADAM_FAULTS[name], check)
