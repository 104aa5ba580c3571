"""The steps of `batch_norm_act_sync` with the kernels of `batch_norm_act_triton`, each launched for itself.

A kernel that combines the partial results of many programs is given one partial result: that of all processes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdcgan.kernels import batch_norm_act_op as op


def moments(x: Tensor, groups: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of each group's channels in this process: (groups, C) each, of `dtype`."""
    plan = op.plan_for(x, groups)
    partial_mean, partial_m2 = op.launch_statistics(x, groups, dtype, plan)
    rows, share = x.numel() // (x.shape[1] * groups), plan.turns * plan.block_rows
    counts = (rows - share * torch.arange(plan.splits, device=x.device)).clamp(max=share).to(dtype)[:, None]
    first = partial_mean[:, :1]
    mean = first + ((partial_mean - first) * counts).sum(1, keepdim=True) / rows
    m2 = (partial_m2 + (partial_mean - mean).square() * counts).sum(1)
    return mean.flatten(1), m2


def normalize(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, negative_slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y, of x's shape and dtype, mean and inverse deviation (groups, C); `mean` and `var` are of all processes."""
    groups, channels = mean.shape
    rows = x.numel() // (channels * groups)
    nobodys_mean, nobodys_var = mean.new_zeros((2, channels)).unbind(0)  # the run's own have moved already
    joint = mean[:, None].contiguous(), (var * rows)[:, None].contiguous()
    return op.launch_normalize(
        x, weight, bias, nobodys_mean, nobodys_var, joint, True, 0.0, eps, negative_slope, op.plan_for(x, groups)
    )


def sums(
    x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, negative_slope: float
) -> Tensor:
    """(2, groups, C): sums of dz and of dz times the normalised x, over the rows of this process."""
    plan = op.plan_for(x, len(mean))
    return torch.stack(
        [part.sum(1) for part in op.launch_sums(x, dy, weight, bias, mean, inverse, negative_slope, plan)]
    )


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
    """dx, of x's shape and dtype; `mean_dz` and `mean_dzx`, (groups, C), are over the rows of all processes."""
    groups, channels = mean.shape
    rows = x.numel() // (channels * groups)
    joint = (mean_dz * rows)[:, None].contiguous(), (mean_dzx * rows)[:, None].contiguous()
    plan = op.plan_for(x, groups)
    dx = torch.empty_like(x)
    op.launch_gradient(x, dy, dx, weight, bias, mean, inverse, joint, True, negative_slope, plan)
    return dx
