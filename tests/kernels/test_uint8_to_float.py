"""The reference of uint8_to_float: values, layout, and its errors."""

from __future__ import annotations

import pytest
import torch

from fastdcgan.kernels import uint8_to_float


def test_every_value():
    images = torch.arange(256, dtype=torch.uint8).view(4, 4, 4, 4)
    index = torch.arange(4)
    batch = uint8_to_float(images, index)
    assert batch.dtype == torch.float32 and batch.is_contiguous(memory_format=torch.channels_last)
    assert batch.min() == -1 and batch.max() == 1
    torch.testing.assert_close(batch.double(), images.double().permute(0, 3, 1, 2) / 127.5 - 1, rtol=0, atol=1e-7)
    exact = uint8_to_float(images, index, dtype=torch.float64)
    torch.testing.assert_close(exact, images.double().permute(0, 3, 1, 2) / 127.5 - 1, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_gather_and_mirror(dtype):
    images = torch.randint(0, 256, (5, 3, 4, 2), dtype=torch.uint8)
    index, flip = torch.tensor([4, 0, 0]), torch.tensor([1, 0, 1], dtype=torch.uint8)
    batch = uint8_to_float(images, index, flip, dtype=dtype)
    whole = uint8_to_float(images, torch.arange(5), dtype=dtype)
    assert torch.equal(batch, torch.stack([whole[4].flip(2), whole[0], whole[0].flip(2)]))
    assert torch.equal(batch, uint8_to_float(images, index, flip.bool(), dtype=dtype))
    assert torch.equal(batch, uint8_to_float(images, index, 255 * flip, dtype=dtype))


def test_one_channel_is_channels_last_too():
    images = torch.randint(0, 256, (4, 6, 5, 1), dtype=torch.uint8)
    batch = uint8_to_float(images, torch.tensor([3, 1]))
    assert batch.shape == (2, 1, 6, 5) and batch.permute(0, 2, 3, 1).is_contiguous()


def test_compile():
    images = torch.randint(0, 256, (4, 6, 5, 3), dtype=torch.uint8)
    index, flip = torch.tensor([2, 0]), torch.tensor([False, True])
    compiled = torch.compile(lambda i, f: uint8_to_float(images, i, f), fullgraph=True)
    assert torch.equal(compiled(index, flip), uint8_to_float(images, index, flip))


def test_errors():
    images = torch.zeros((4, 6, 5, 3), dtype=torch.uint8)
    index = torch.tensor([0, 1])
    for message, wrong in {
        "images is": lambda: uint8_to_float(images.float(), index),
        "images is .* contiguous": lambda: uint8_to_float(images.transpose(1, 2), index),
        "index is": lambda: uint8_to_float(images, index.int()),
        "flip is": lambda: uint8_to_float(images, index, torch.zeros(4, dtype=torch.bool)),
        "dtype is": lambda: uint8_to_float(images, index, dtype=torch.int32),
        "index is .* on meta": lambda: uint8_to_float(images, index.to("meta")),
    }.items():
        with pytest.raises(ValueError, match=message):
            wrong()
    with pytest.raises(IndexError):
        uint8_to_float(images, torch.tensor([4]))
