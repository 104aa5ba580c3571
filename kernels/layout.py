"""How the kernels see tensors: pixels as rows with their channels side by side, and samples in groups."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of images and activations


def as_rows(x: Tensor) -> Tensor:
    """x, or a copy of it, with the channels of a pixel side by side and the pixels in order."""
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)


def in_groups(x: Tensor, groups: int) -> Tensor:
    """(N, C, ...) as (groups, N / groups, C, ...)."""
    return x.unflatten(0, (groups, -1))


def all_but_channels(x: Tensor) -> tuple[int, ...]:
    """The dimensions of `in_groups(x, groups)` that statistics are taken over."""
    return (1, *range(3, x.dim() + 1))


def spread(tensor: Tensor, x: Tensor) -> Tensor:
    """(C,) or (groups, C), to be combined with `in_groups(x, groups)`."""
    return tensor.reshape(-1, 1, x.shape[1], *(1 for _ in x.shape[2:]))
