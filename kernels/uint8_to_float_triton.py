# mypy: disable-error-code="misc,no-untyped-def,no-untyped-call,untyped-decorator"
"""The Triton kernel of `uint8_to_float`: each program writes one run of one image's values."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@torch.library.custom_op("fastdcgan::uint8_to_float", mutates_args=("out",))
def gather(images: Tensor, index: Tensor, flip: Tensor | None, out: Tensor) -> None:
    """Fill `out` (B, C, H, W), dense channels_last, as `uint8_to_float` says."""
    count, channels, height, width = out.shape
    if out.numel() == 0:
        return
    with torch.cuda.device_of(images):
        grid = (count, triton.cdiv(height * width * channels, BLOCK))
        gather_and_scale[grid](
            images,
            index,
            images if flip is None else flip.view(torch.uint8),
            out,
            len(images),
            HEIGHT=height,
            WIDTH=width,
            CHANNELS=channels,
            FLIPPED=flip is not None,
            COMPUTED=tl.float64 if out.dtype == torch.float64 else tl.float32,
            BLOCK=BLOCK,
            num_warps=4,
        )


@gather.register_fake
def _(images, index, flip, out):
    return None


@triton.jit
def gather_and_scale(
    images_ptr,  # [M, HEIGHT, WIDTH, CHANNELS] uint8
    index_ptr,  # [B] int64
    flip_ptr,  # [B] uint8
    out_ptr,  # [B, HEIGHT, WIDTH, CHANNELS]
    M,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    FLIPPED: tl.constexpr,
    COMPUTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    SIZE: tl.constexpr = HEIGHT * WIDTH * CHANNELS
    place = tl.program_id(0).to(tl.int64)
    image = tl.load(index_ptr + place)
    offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < SIZE
    source = offset
    if FLIPPED:
        column = offset // CHANNELS % WIDTH
        mirrored = offset + (WIDTH - 1 - 2 * column) * CHANNELS
        source = tl.where(tl.load(flip_ptr + place) != 0, mirrored, offset)
    image = tl.broadcast_to(image, offset.shape)
    exists = (image >= 0) & (image < M)
    pixel = tl.load(images_ptr + image * SIZE + source, mask=inside & exists, other=0).to(COMPUTED)
    value = tl.where(exists, (pixel - 127.5) * (1 / 127.5), float("nan"))
    tl.store(out_ptr + place * SIZE + offset, value.to(out_ptr.dtype.element_ty), mask=inside)
