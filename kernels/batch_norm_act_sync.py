# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""`batch_norm_act` in training mode with statistics over the batches of all processes of a `torch.distributed` run.

Each direction has one exchange, between its two passes over the data: forward every process's mean and squared
deviations, backward its two sums, a few numbers a channel and group. They are gathered and added up in the order of
the ranks, so every process arrives at the same bits. The passes themselves are those of the Triton kernels on a GPU
and torch's own operations elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastdcgan.kernels.layout import all_but_channels, as_rows, in_groups, spread


class SyncBatchNormAct(torch.autograd.Function):
    """y of `batch_norm_act(..., training=True, sync=True)`, arguments as checked there; differentiable once."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
        negative_slope: float,
        groups: int,
        triton: bool,
    ) -> Tensor:
        y, mean, inverse = forward(
            x, weight, bias, running_mean, running_var, momentum, eps, negative_slope, groups, triton
        )
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        ctx.negative_slope, ctx.triton = negative_slope, triton
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor):
        x, weight, bias, mean, inverse = ctx.saved_tensors
        gradients = backward(x, dy, weight, bias, mean, inverse, ctx.negative_slope, ctx.triton)
        return *gradients, None, None, None, None, None, None, None


@torch.library.custom_op("fastdcgan::sync_batch_norm_act_forward", mutates_args=("running_mean", "running_var"))
def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    negative_slope: float,
    groups: int,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and of all processes mean (groups, C) and inverse deviation (groups, C)."""
    x = as_rows(x)
    rows = x.numel() // (x.shape[1] * groups)
    if triton:
        from fastdcgan.kernels import batch_norm_act_sync_triton as fused

        own = fused.moments(x, groups, weight.dtype)
    else:
        own = moments(x, groups, weight.dtype)
    means, m2s = gather(torch.stack(own)).unbind(1)  # (processes, groups, C) each
    everyone = rows * len(means)
    # Relative to the first mean, as in the kernels: a sum of large near-equal numbers would lose what tells them apart.
    mean = means[0] + (means - means[0]).mean(0)
    var = (m2s.sum(0) + rows * (means - mean).square().sum(0)) / everyone
    for group_mean, group_var in zip(mean, var, strict=True):  # as that many batches one after another would
        running_mean.lerp_(group_mean, momentum)
        running_var.lerp_(group_var * (everyone / (everyone - 1)), momentum)
    if triton:
        return fused.normalize(x, weight, bias, mean, var, eps, negative_slope)
    inverse = (var + eps).rsqrt()
    z = (in_groups(x, groups).to(weight.dtype) - spread(mean, x)) * spread(inverse * weight, x) + spread(bias, x)
    y = torch.where(z > 0, z, z * negative_slope).to(x.dtype).reshape(x.shape)
    return as_rows(y), mean, inverse


@forward.register_fake
def _(x, weight, bias, running_mean, running_var, momentum, eps, negative_slope, groups, triton):
    mean = weight.new_empty((groups, x.shape[1]))
    return torch.empty_like(as_rows(x)), mean, torch.empty_like(mean)


@torch.library.custom_op("fastdcgan::sync_batch_norm_act_backward", mutates_args=())
def backward(
    x: Tensor,
    dy: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    inverse: Tensor,
    negative_slope: float,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx of the sum of all processes' losses; dweight and dbias of this process's share of them."""
    x, dy = as_rows(x), as_rows(dy)
    groups, channels = mean.shape
    rows = x.numel() // (channels * groups)
    if triton:
        from fastdcgan.kernels import batch_norm_act_sync_triton as fused

        own = fused.sums(x, dy, weight, bias, mean, inverse, negative_slope)
    else:
        normalized = (in_groups(x, groups).to(weight.dtype) - spread(mean, x)) * spread(inverse, x)
        dy_ = in_groups(dy, groups).to(weight.dtype)
        dz = torch.where(normalized * spread(weight, x) + spread(bias, x) > 0, dy_, dy_ * negative_slope)
        over = all_but_channels(x)
        own = torch.stack((dz.sum(over), (dz * normalized).sum(over)))
    mean_dz, mean_dzx = (gather(own).mean(0) / rows).unbind(0)  # (groups, C), over the rows of all processes
    if triton:
        dx = fused.gradient(x, dy, weight, bias, mean, inverse, mean_dz, mean_dzx, negative_slope)
    else:
        dx = dz - spread(mean_dz, x) - normalized * spread(mean_dzx, x)
        dx = as_rows((dx * spread(inverse * weight, x)).to(x.dtype).reshape(x.shape))
    return dx, own[1].sum(0), own[0].sum(0)


@backward.register_fake
def _(x, dy, weight, bias, mean, inverse, negative_slope, triton):
    return torch.empty_like(as_rows(x)), torch.empty_like(weight), torch.empty_like(bias)


def gather(own: Tensor) -> Tensor:
    """Every process's `own`, in the order of the ranks: (processes, *own.shape)."""
    everyone = own.new_empty((dist.get_world_size(), *own.shape))
    dist.all_gather(list(everyone.unbind(0)), own.contiguous())
    return everyone


def moments(x: Tensor, groups: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of each group's channels: (groups, C) each."""
    parts = in_groups(x, groups).to(dtype)
    over = all_but_channels(x)
    mean = parts.mean(over, keepdim=True)
    return mean.flatten(1), (parts - mean).square().sum(over)
