"""The experiments of bench/next_kernels.py give the right numbers. Two of three need a GPU: programs side by side."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")

from fastdcgan.bench import next_kernels
from fastdcgan.kernels import batch_norm_act
from fastdcgan.kernels.backend import INTERPRETING

CASES = [  # samples, channels in, channels out, height and width of x, groups, multiprocessors
    (4, 16, 24, (8, 8), 2, 132),
    (6, 32, 16, (8, 12), 1, 1),  # one program takes all tiles, the last one cut short
    (12, 16, 130, (8, 8), 3, 4),  # channels beyond one block; tiles that end inside a sample
    (1, 64, 8, (4, 4), 1, 132),
]
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETING)  # its product of bfloat16 is wrong


def drawn(samples, channels_in, channels_out, size, dtype, device, mean=0.0):
    x = torch.randn(samples, channels_in, *size, device=device) + mean
    weight = torch.randn(channels_out, channels_in, 4, 4, device=device) / (16 * channels_in) ** 0.5
    parameters = [torch.randn(channels_out, device=device) for _ in range(4)]
    parameters[3] = parameters[3].square() + 0.5
    return *(t.to(dtype, memory_format=torch.channels_last) for t in (x, weight)), parameters


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_convolution_and_its_statistics(device, assert_close, monkeypatch, case, dtype):
    *shape, groups, multiprocessors = case
    monkeypatch.setattr(next_kernels, "MULTIPROCESSORS", multiprocessors)
    x, weight, parameters = drawn(*shape, dtype, device, mean=3.0)
    y, _, shared = next_kernels.convolution(x, weight, groups, statistics=True)
    assert shared.turns > 1 or multiprocessors == 132
    assert_close("convolution", y, F.conv2d(x.double(), weight.double(), stride=2, padding=1))

    given = [p.clone() for p in parameters]
    z = next_kernels.epilogue(x, weight, parameters, groups)
    exact = [p.double() for p in given]
    truth = batch_norm_act(y.double(), *exact, groups=groups, backend="reference", **next_kernels.OPTIONS)
    assert_close("BatchNorm and LeakyReLU", z, truth)
    assert_close("running_mean", parameters[2], exact[2], "sum")
    assert_close("running_var", parameters[3], exact[3], "sum")


@pytest.mark.skipif(INTERPRETING, reason="the interpreter runs one program after another")
@pytest.mark.parametrize("one_launch", [False, True], ids=["dependent", "cooperative"])
def test_the_other_launches_give_the_shipped_bits(device, one_launch):
    x, _, parameters = drawn(64, 64, 64, (16, 16), torch.bfloat16, device)
    counter = torch.zeros(1, dtype=torch.int32, device=device) if one_launch else None
    given = [p.clone() for p in parameters]
    for _ in range(20):  # the counter goes on from launch to launch
        y = next_kernels.in_turn(x, parameters, 2, counter)
        assert torch.equal(y, batch_norm_act(x, *given, groups=2, backend="triton", **next_kernels.OPTIONS))
        assert all(torch.equal(a, b) for a, b in zip(parameters, given, strict=True))
