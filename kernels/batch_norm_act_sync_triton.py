"""The steps of `batch_norm_act_sync` with the kernels of `batch_norm_act_triton`, each launched for itself.

A kernel that combines the partial results of many programs is given one partial result: that of all processes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdcgan.kernels import batch_norm_act_triton as kernels
from fastdcgan.kernels.batch_norm_act_op import launch_plan


def moments(x: Tensor, groups: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    plan, rows, grid, cut = launch_plan(x, groups, dtype)
    partial_mean, partial_m2 = torch.empty((2, groups, plan.splits, x.shape[1]), dtype=dtype, device=x.device)
    kernels.statistics[grid](x, partial_mean, partial_m2, rows, **cut)
    share = plan.turns * plan.block_rows
    counts = (rows - share * torch.arange(plan.splits, device=x.device)).clamp(max=share).to(dtype)[:, None]
    first = partial_mean[:, :1]
    mean = first + ((partial_mean - first) * counts).sum(1, keepdim=True) / rows
    m2 = (partial_m2 + (partial_mean - mean).square() * counts).sum(1)
    return mean.flatten(1), m2


def normalize(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, negative_slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    groups, channels = mean.shape
    _, rows, grid, cut = launch_plan(x, groups, weight.dtype)
    y, out_mean, inverse = torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean)
    nobodys = mean.new_zeros((2, channels))  # the kernel's running statistics, for those of the run moved already
    kernels.normalize[grid](
        x,
        y,
        weight,
        bias,
        *nobodys.unbind(0),
        mean.contiguous(),
        (var * rows).contiguous(),
        out_mean,
        inverse,
        rows,
        GROUPS=groups,
        SPLITS_POW2=1,
        TRAINING=True,
        MOMENTUM=0.0,
        EPS=eps,
        SLOPE=negative_slope,
        **cut | {"SPLITS": 1},
    )
    return y, out_mean, inverse


def sums(
    x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, negative_slope: float
) -> Tensor:
    """(2, groups, C): sums of dz and of dz times the normalised x, over the rows of this process."""
    groups, channels = mean.shape
    plan, rows, grid, cut = launch_plan(x, groups, weight.dtype)
    partial = weight.new_empty((2, groups, plan.splits, channels))
    kernels.sums[grid](x, dy, weight, bias, mean, inverse, *partial.unbind(0), rows, SLOPE=negative_slope, **cut)
    return partial.sum(2)


def gradient(
    x: Tensor,
    dy: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    inverse: Tensor,
    mean_dz: Tensor,
    mean_dzx: Tensor,
    negative_slope: float,
) -> Tensor:
    groups, channels = mean.shape
    _, rows, grid, cut = launch_plan(x, groups, weight.dtype)
    dx, nobodys = torch.empty_like(x), weight.new_empty((2, channels))
    kernels.gradient[grid](
        x,
        dy,
        dx,
        weight,
        bias,
        mean,
        inverse,
        (mean_dz * rows).contiguous(),
        (mean_dzx * rows).contiguous(),
        *nobodys.unbind(0),
        rows,
        GROUPS=groups,
        SPLITS_POW2=1,
        TRAINING=True,
        SLOPE=negative_slope,
        **cut | {"SPLITS": 1},
    )
    return dx
