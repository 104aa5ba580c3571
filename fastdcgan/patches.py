"""A k4 s2 p1 convolution by im2col and one matrix product, for grids too small for a direct convolution on a CPU.

On a 4x4 output grid a direct convolution on a CPU reaches about half the speed of a matrix product (its inner loop runs
along rows of 4 pixels); copying the 4x4 patches out first costs a tenth of what that gains. In float32 they are taken
on Intel's processors alone: matrix products come from MKL, which was the slower of the two on AMD with AVX-512 (with
AVX2, where it is not, most of these convolutions are Winograd's). `unfold` and `fold` are each other's transpose, so
each is the other's gradient, to any order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdcgan import derivatives

WIDEST_GRID = 7  # output columns up to which the matrix product is faster


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


FAST_SGEMM = _is_intel()  # of the processor alone, never measured: the bits of a resumed run depend on it


def are_faster(x: Tensor, columns: int) -> bool:
    """Whether patches are faster than the direct convolution of x, on a smaller grid of so many columns."""
    wanted = not x.is_cuda and columns <= WIDEST_GRID and (FAST_SGEMM or x.dtype != torch.float32)
    return wanted and derivatives.are_ordinary()


class _Unfold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0, 1, 1, 1, 1))
        return padded.unfold(1, 4, 2).unfold(2, 4, 2).permute(0, 1, 2, 4, 5, 3).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return fold(grads[0])


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, patches: Tensor) -> Tensor:
        n, h, w, _, _, c = patches.shape
        # Row 4y+r of a patch grid lands on row 2y+r: split r into (pair, parity) and add the pairs, shifted by one.
        parts = patches.view(n, h, w, 2, 2, 2, 2, c)
        summed = sum(
            F.pad(parts[:, :, :, i, :, j], (0, 0, 0, 0, 0, 0, j, 1 - j, i, 1 - i)) for i in range(2) for j in range(2)
        )
        padded = summed.permute(0, 1, 3, 2, 4, 5).reshape(n, 2 * h + 2, 2 * w + 2, c)  # type: ignore[union-attr]
        return padded[:, 1:-1, 1:-1].contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return unfold(grads[0])


def unfold(x: Tensor) -> Tensor:
    """x (N, 2h, 2w, C) -> the 4x4 patches at stride 2 and padding 1, (N, h, w, 4, 4, C)."""
    patches: Tensor = _Unfold.apply(x)
    return patches


def fold(patches: Tensor) -> Tensor:
    """The transpose of `unfold`: patches (N, h, w, 4, 4, C) added up where they overlap, (N, 2h, 2w, C)."""
    x: Tensor = _Fold.apply(patches)
    return x


def conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """`torch.nn.functional.conv2d(x, weight, stride=2, padding=1)` for a 4x4 kernel; channels-last in and out."""
    n, c_in, height, width = x.shape
    rows = unfold(x.permute(0, 2, 3, 1)).view(-1, 16 * c_in)
    y = rows @ weight.permute(0, 2, 3, 1).reshape(len(weight), -1).t()
    return y.view(n, height // 2, width // 2, -1).permute(0, 3, 1, 2)


def conv_transpose2d(x: Tensor, weight: Tensor) -> Tensor:
    """`torch.nn.functional.conv_transpose2d(x, weight, stride=2, padding=1)` for a 4x4 kernel; channels-last too."""
    n, c_in, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(-1, c_in) @ weight.permute(0, 2, 3, 1).reshape(c_in, -1)
    return fold(rows.view(n, height, width, 4, 4, -1)).permute(0, 3, 1, 2)
