"""The reference of batch_norm_act against torch's modules, its errors, and the choice of an implementation."""

from __future__ import annotations

import functools
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastdcgan.kernels import backend, batch_norm_act

# The package's attribute of that name is the function.
module = sys.modules["fastdcgan.kernels.batch_norm_act"]
RESULTS = Path(__file__).parents[2] / "bench" / "results"
reference = functools.partial(batch_norm_act, backend="reference")


def channels(count, dtype=torch.float32):
    return [torch.rand(count, dtype=dtype) + 0.5 for _ in range(4)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_float64(check_batch_norm_act_reference, dtype, training):
    check_batch_norm_act_reference(reference, (8, 7, 5, 3), dtype, groups=2, training=training)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
def test_as_that_many_calls_of_the_modules(groups, slope):
    x = torch.randn(8, 6, 4, 4).contiguous(memory_format=torch.channels_last)
    norm, act = nn.BatchNorm2d(6, eps=0.3), nn.LeakyReLU(slope)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    running = norm.running_mean.clone(), norm.running_var.clone()
    y = reference(x, norm.weight, norm.bias, *running, training=True, eps=0.3, negative_slope=slope, groups=groups)
    expected = torch.cat([act(norm(part)) for part in x.chunk(groups)])
    assert torch.equal(y, expected) and y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(running[0], norm.running_mean) and torch.equal(running[1], norm.running_var)
    norm.eval()
    y = reference(x, norm.weight, norm.bias, *running, training=False, eps=0.3, negative_slope=slope, groups=groups)
    assert torch.equal(y, act(norm(x)))


def test_gradients_of_gradients():
    x = torch.randn(4, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    running = channels(3, torch.float64)[:2]

    def run(x, weight, bias):
        return reference(x, weight, bias, *(r.clone() for r in running), training=True, negative_slope=0.2, groups=2)

    assert torch.autograd.gradcheck(run, (x, weight, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, weight, bias), fast_mode=True)


def test_compile_sees_through_it():
    """One graph: what Inductor generates for both directions, with eager's numbers and statistics."""
    x = torch.randn(8, 6, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias, running_mean, running_var = channels(6)
    weight.requires_grad_()

    def run(operation, running):
        y = operation(x, weight, bias, *running, training=True, negative_slope=0.2, groups=2)
        return [y, *torch.autograd.grad(y.square().sum(), (x, weight)), *running]

    expected = run(reference, [running_mean.clone(), running_var.clone()])
    compiled = torch.compile(batch_norm_act, fullgraph=True)
    actual = run(compiled, [running_mean.clone(), running_var.clone()])
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


def test_errors():
    x, parameters = torch.randn(4, 6, 3, 3), channels(6)
    for message, wrong in {
        "N, C, H, W": lambda: reference(x[0], *parameters, training=True),
        "not torch.int32": lambda: reference(x.int(), *parameters, training=True),
        "weight is": lambda: reference(x, parameters[0][:5], *parameters[1:], training=True),
        "running_var is": lambda: reference(x, *parameters[:3], parameters[3].bfloat16(), training=True),
        "groups=3 does not divide N=4": lambda: reference(x, *parameters, training=True, groups=3),
        "groups=0": lambda: reference(x, *parameters, training=True, groups=0),
        "more than one value": lambda: reference(x[:, :, :1, :1], *parameters, training=True, groups=4),
        "negative_slope is": lambda: reference(x, *parameters, training=True, negative_slope=-0.2),
        "eps is": lambda: reference(x, *parameters, training=True, eps=0.0),
        "eps is .* never below": lambda: reference(x, *parameters, training=False, eps=-1.0),
        "momentum is": lambda: reference(x, *parameters, training=True, momentum=2.0),
        "bias is .* strides .2": lambda: reference(
            x, parameters[0], torch.zeros(12)[::2], *parameters[2:], training=True
        ),
        "backend is": lambda: batch_norm_act(x, *parameters, training=True, backend="cuda"),
    }.items():
        with pytest.raises(ValueError, match=message):
            wrong()


@pytest.mark.skipif(backend.INTERPRETING, reason="here Triton does run on a CPU")
def test_triton_on_a_cpu_is_refused_and_says_what_to_do(monkeypatch):
    x = torch.randn(4, 6, 3, 3)
    monkeypatch.setattr(backend, "TRITON_MISSING", None)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        batch_norm_act(x, *channels(6), training=True, backend="triton")
    monkeypatch.setattr(backend, "TRITON_MISSING", "ImportError: nothing there")
    with pytest.raises(RuntimeError, match="nothing there"):
        batch_norm_act(x, *channels(6), training=True, backend="triton")
    batch_norm_act(x, *channels(6), training=True)


def test_the_choice_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(backend, "_logged", set())
    with caplog.at_level(logging.INFO, logger="fastdcgan.kernels"):
        for _ in range(3):
            batch_norm_act(torch.randn(4, 6, 3, 3), *channels(6), training=True)
    assert caplog.messages == ["batch_norm_act on cpu runs its reference implementation"]


def test_the_log_says_why_a_gpu_does_without_triton(caplog, monkeypatch):
    monkeypatch.setattr(backend, "_logged", set())
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    with caplog.at_level(logging.INFO, logger="fastdcgan.kernels"):
        for missing in ("ImportError: nothing there", None):
            monkeypatch.setattr(backend, "TRITON_MISSING", missing)
            assert backend.use_triton("adam_step", on_gpu, "auto") == (missing is None)
            assert not backend.use_triton("adam_step", torch.zeros(1), "auto")
    assert caplog.messages == [
        "adam_step on cuda runs its reference implementation (no Triton: ImportError: nothing there)",
        "adam_step on cpu runs its reference implementation",
        "adam_step on cuda runs its triton implementation",
    ]


def test_the_layers_left_to_the_compiler_are_those_it_was_measured_faster_on():
    microseconds = {}
    for row in json.loads((RESULTS / "h200-batch-norm-all-layers.json").read_text())["rows"]:
        assert (row["groups"], row["dtype"]) == (1, "bf16")
        batch, channels, height, width = row["shape"]
        if row["pass"] == "both" and row["timer"] == "graph":
            microseconds[batch * height * width, channels, row["variant"]] = row["ms"]
    layers = {(rows, channels) for rows, channels, _ in microseconds}
    faster = {layer for layer in layers if microseconds[*layer, "compiled"] < microseconds[*layer, "fused"]}
    assert set(module.COMPILED_IS_FASTER) == faster


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_layer_is_left_to_the_compiler_inside_torch_compile_alone(caplog, monkeypatch, dynamic):
    """On CPU tensors, as if Triton were theirs: the choice, not what is chosen."""
    monkeypatch.setattr(module, "COMPILED_IS_FASTER", ((64, 6),))
    monkeypatch.setattr(backend, "_logged", set())

    def choices(x):
        left = module._left_to_the_compiler
        asked = (x, True, 1), (x, False, 1), (x, True, 2), (x.float(), True, 1)
        return x + 1, [left(*question) for question in asked]

    compiled = torch.compile(choices, fullgraph=True, backend="eager", dynamic=dynamic)
    layer, taller, wider = (
        torch.zeros(*shape, dtype=torch.bfloat16) for shape in ((4, 6, 4, 4), (5, 6, 4, 4), (4, 7, 4, 4))
    )
    with caplog.at_level(logging.INFO, logger="fastdcgan.kernels"):
        assert choices(layer)[1] == [False] * 4
        assert compiled(layer)[1] == [True, False, False, False]
        assert compiled(taller)[1] == compiled(wider)[1] == [False] * 4
    assert caplog.messages == [
        "batch_norm_act leaves 64 rows of 6 channels to torch.compile, which was measured faster"
    ]
