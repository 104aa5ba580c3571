"""Images of a resident uint8 array to a float batch: gather, horizontal flip, scale to -1..1 and cast, as one."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdcgan.kernels.backend import Backend, use_triton
from fastdcgan.kernels.layout import DTYPES


def uint8_to_float(
    images: Tensor,
    index: Tensor,
    flip: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    backend: Backend = "auto",
) -> Tensor:
    """batch[b] = (images[index[b]] - 127.5) / 127.5, mirrored left to right where flip[b], channels_last.

    0 becomes exactly -1 and 255 exactly 1. No gradient flows to uint8 images.

    Args:
        images: (M, H, W, C) uint8, contiguous.
        index: (B,) int64, in 0..M-1.
        flip: (B,) bool or uint8, non-zero mirrors; None mirrors none.
        dtype: of the result, float32, bfloat16, float16 or float64; the computation is in float32 (float64 for
            float64).
        backend: "auto" (Triton on CUDA tensors, the reference elsewhere), "triton" or "reference".

    Returns:
        (B, C, H, W), channels_last.

    Raises:
        ValueError: shapes, dtypes, devices or layouts that do not fit.
        IndexError: an index out of range, from the reference on a CPU. On a GPU nobody waits to look: the Triton
            kernel reads nothing there and fills that image with NaN.
        RuntimeError: backend="triton" where Triton cannot run.
    """
    _check(images, index, flip, dtype)
    if not use_triton("uint8_to_float", images, backend):
        return reference(images, index, flip, dtype)
    from fastdcgan.kernels.uint8_to_float_triton import gather

    # Made as (B, H, W, C) and viewed, so that the layout is right for one channel too.
    batch = torch.empty((len(index), *images.shape[1:]), dtype=dtype, device=images.device).permute(0, 3, 1, 2)
    gather(images, index.contiguous(), None if flip is None else flip.contiguous(), batch)
    return batch


def reference(images: Tensor, index: Tensor, flip: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The same in torch's own operations."""
    batch = images.index_select(0, index)
    if flip is not None:
        batch = torch.where(flip.bool().view(-1, 1, 1, 1), batch.flip(2), batch)
    computed = batch.to(torch.float64 if dtype == torch.float64 else torch.float32)
    return ((computed - 127.5) * (1 / 127.5)).to(dtype).permute(0, 3, 1, 2)


def _check(images: Tensor, index: Tensor, flip: Tensor | None, dtype: torch.dtype) -> None:
    if images.dim() != 4 or images.dtype != torch.uint8 or not images.is_contiguous():
        raise ValueError(
            f"uint8_to_float: images is (M, H, W, C), uint8, contiguous, not {tuple(images.shape)}, {images.dtype}, "
            f"strides {images.stride()}"
        )
    if dtype not in DTYPES:
        raise ValueError(f"uint8_to_float: dtype is float32, bfloat16, float16 or float64, not {dtype}")
    if index.dim() != 1 or index.dtype != torch.int64 or index.device != images.device:
        raise ValueError(
            f"uint8_to_float: index is (B,), int64, on {images.device}, not {tuple(index.shape)}, {index.dtype}, "
            f"on {index.device}"
        )
    if flip is not None and (
        flip.shape != index.shape or flip.dtype not in (torch.bool, torch.uint8) or flip.device != images.device
    ):
        raise ValueError(
            f"uint8_to_float: flip is ({len(index)},), bool or uint8, on {images.device}, not {tuple(flip.shape)}, "
            f"{flip.dtype}, on {flip.device}"
        )
