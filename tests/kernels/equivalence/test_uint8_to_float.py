"""The Triton kernel of uint8_to_float against its reference and against a loop over pixels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdcgan.kernels import uint8_to_float
from fastdcgan.kernels.tolerances import TOLERANCES
from fastdcgan.kernels.uint8_to_float_triton import gather

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    count=st.integers(1, 6),
    height=st.integers(1, 20),
    width=st.integers(1, 33),
    channels=st.sampled_from([1, 2, 3, 4]),
    dtype=st.sampled_from(DTYPES),
    flipped=st.sampled_from([None, torch.bool, torch.uint8]),
)
def test_against_a_loop(device, assert_close, count, height, width, channels, dtype, flipped):
    images = torch.randint(0, 256, (5, height, width, channels), dtype=torch.uint8)
    index = torch.randint(0, 5, (count,))
    flip = None if flipped is None else torch.randint(0, 2, (count,)).to(flipped)
    expected = []
    for b in range(count):
        image = images[index[b]].double()
        image = image.flip(1) if flip is not None and flip[b] else image
        expected.append(((image - 127.5) / 127.5).permute(2, 0, 1))
    arguments = [None if t is None else t.to(device) for t in (images, index, flip)]
    actual = uint8_to_float(*arguments, dtype=dtype, backend="triton")
    assert actual.permute(0, 2, 3, 1).is_contiguous()
    assert_close("batch", actual.cpu(), torch.stack(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_ends_are_exact_and_every_value_is_the_reference_s(device, dtype):
    images = torch.arange(256, dtype=torch.uint8, device=device).view(1, 16, 16, 1)
    index = torch.zeros(1, dtype=torch.int64, device=device)
    actual = uint8_to_float(images, index, dtype=dtype, backend="triton").flatten()
    assert actual[0] == -1 and actual[255] == 1
    expected = uint8_to_float(images, index, dtype=dtype, backend="reference").flatten()
    if dtype in (torch.float32, torch.float64):
        assert torch.equal(actual, expected)
    else:  # the interpreter truncates to bfloat16
        step = TOLERANCES[dtype]["output"].relative_error
        torch.testing.assert_close(actual, expected, rtol=step, atol=0)


def test_index_and_flip_may_lie_anywhere(device):
    images = torch.randint(0, 256, (10, 6, 5, 3), dtype=torch.uint8, device=device)
    index, flip = (
        torch.arange(10, device=device)[::2],
        torch.tensor([1, 1, 0, 0, 1, 0, 0, 1, 1, 1], device=device).bool(),
    )
    for which in ((index, flip[::2]), (index[:1].expand(5), flip[1:2].expand(5))):
        actual, expected = (uint8_to_float(images, *which, backend=backend) for backend in ("triton", "reference"))
        assert torch.equal(actual, expected)


def test_whatever_is_not_zero_mirrors(device):
    images = torch.randint(0, 256, (4, 6, 5, 3), dtype=torch.uint8, device=device)
    index, flip = torch.arange(4, device=device), torch.tensor([0, 1, 2, 255], dtype=torch.uint8, device=device)
    expected = uint8_to_float(images, index, flip != 0, backend="reference")
    assert torch.equal(uint8_to_float(images, index, flip, backend="triton"), expected)


def test_an_index_out_of_range_is_nan_and_touches_nothing(device):
    images = torch.randint(0, 256, (4, 6, 5, 3), dtype=torch.uint8, device=device)
    batch = uint8_to_float(images, torch.tensor([1, 4, -1, 2**40], device=device), backend="triton")
    assert batch[0].isfinite().all() and batch[1:].isnan().all()


def test_opcheck_and_compile(device):
    images = torch.randint(0, 256, (4, 6, 5, 3), dtype=torch.uint8, device=device)
    index, flip = torch.tensor([3, 0], device=device), torch.tensor([True, False], device=device)
    out = torch.empty((2, 3, 6, 5), device=device).contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(gather, (images, index, flip, out))
    backend = "aot_eager" if device == "cpu" else "inductor"
    compiled = torch.compile(
        lambda i, f: uint8_to_float(images, i, f, backend="triton") * 2, fullgraph=True, backend=backend
    )
    assert torch.equal(compiled(index, flip), uint8_to_float(images, index, flip, backend="reference") * 2)
