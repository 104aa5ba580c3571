"""Images of a resident uint8 array to a float batch: gather, horizontal flip, scale to -1..1 and cast, as one."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdcgan.kernels.backend import Backend, use_triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def uint8_to_float(
    images: Tensor,
    index: Tensor | None = None,
    flip: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """out[b] = (images[index[b]] - 127.5) / 127.5, mirrored left to right where flip[b], as a channels_last batch.

    0 becomes exactly -1 and 255 exactly 1. No gradient flows to uint8 images.

    Args:
        images: (M, H, W, C) uint8, contiguous.
        index: (B,) int64, in 0..M-1; None takes every image in order (B = M).
        flip: (B,) bool or uint8, non-zero mirrors; None mirrors none.
        dtype: of the result, float32 (default), bfloat16, float16 or float64; the computation is in float32
            (float64 for float64). With `out` it is out's, and need not be given.
        out: (B, C, H, W), dense channels_last, written in place; a slice of a larger batch's first dimension is one.
        backend: "auto" (Triton on CUDA tensors, the reference elsewhere), "triton" or "reference".

    Returns:
        (B, C, H, W), channels_last; `out` where it was given.

    Raises:
        ValueError: shapes, dtypes, devices or layouts that do not fit.
        IndexError: an index out of range, from the reference on a CPU. On a GPU nobody waits to look: the Triton
            kernel reads nothing there and fills that image with NaN.
        RuntimeError: backend="triton" where Triton cannot run.
    """
    if out is not None and dtype not in (None, out.dtype):
        raise ValueError(f"uint8_to_float: dtype={dtype}, but out is {out.dtype}")
    dtype = out.dtype if out is not None else dtype or torch.float32
    _check(images, index, flip, dtype, out)
    if out is None:
        count = len(images) if index is None else len(index)
        _, height, width, channels = images.shape
        # Made as (B, H, W, C) and viewed, so that the layout is right for one channel too.
        out = torch.empty((count, height, width, channels), dtype=dtype, device=images.device).permute(0, 3, 1, 2)
    if use_triton("uint8_to_float", images, backend):
        from fastdcgan.kernels.uint8_to_float_triton import gather

        gather(images, *(given if given is None else given.contiguous() for given in (index, flip)), out)
        return out
    return reference(images, index, flip, out)


def reference(images: Tensor, index: Tensor | None, flip: Tensor | None, out: Tensor) -> Tensor:
    """The same in torch's own operations; writes and returns `out`."""
    batch = images if index is None else images.index_select(0, index)
    if flip is not None:
        batch = torch.where(flip.bool().view(-1, 1, 1, 1), batch.flip(2), batch)
    computed = batch.to(torch.float64 if out.dtype == torch.float64 else torch.float32)
    return out.copy_(((computed - 127.5) * (1 / 127.5)).permute(0, 3, 1, 2))


def _check(images: Tensor, index: Tensor | None, flip: Tensor | None, dtype: torch.dtype, out: Tensor | None) -> None:
    if images.dim() != 4 or images.dtype != torch.uint8 or not images.is_contiguous():
        raise ValueError(
            f"uint8_to_float: images is (M, H, W, C), uint8, contiguous, not {tuple(images.shape)}, {images.dtype}, "
            f"strides {images.stride()}"
        )
    if dtype not in DTYPES:
        raise ValueError(f"uint8_to_float: dtype is float32, bfloat16, float16 or float64, not {dtype}")
    if index is not None and (index.dim() != 1 or index.dtype != torch.int64 or index.device != images.device):
        raise ValueError(
            f"uint8_to_float: index is (B,), int64, on {images.device}, not {tuple(index.shape)}, {index.dtype}, "
            f"on {index.device}"
        )
    count = len(images) if index is None else len(index)
    if flip is not None and (
        flip.shape != (count,) or flip.dtype not in (torch.bool, torch.uint8) or flip.device != images.device
    ):
        raise ValueError(
            f"uint8_to_float: flip is ({count},), bool or uint8, on {images.device}, not {tuple(flip.shape)}, "
            f"{flip.dtype}, on {flip.device}"
        )
    _, height, width, channels = images.shape
    if out is not None and (
        out.shape != (count, channels, height, width)
        or out.device != images.device
        or not out.permute(0, 2, 3, 1).is_contiguous()
    ):
        raise ValueError(
            f"uint8_to_float: out is ({count}, {channels}, {height}, {width}), channels_last, on {images.device}, not "
            f"{tuple(out.shape)}, strides {out.stride()}, on {out.device}"
        )
