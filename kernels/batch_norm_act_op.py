# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""How autograd and torch.compile see the Triton kernels of `batch_norm_act`: two operators and a Function."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdcgan.kernels import batch_norm_act_triton as kernels
from fastdcgan.kernels.batch_norm_act import as_rows


class BatchNormAct(torch.autograd.Function):
    """y of `batch_norm_act`, arguments as checked there.

    x has its rows in order already (`as_rows`): a copy made in here would have no history, and the gradient of the
    gradient would miss it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        training: bool,
        momentum: float,
        eps: float,
        negative_slope: float,
        groups: int,
    ) -> Tensor:
        groups = groups if training else 1
        y, mean, inverse = forward(
            x, weight, bias, running_mean, running_var, training, momentum, eps, negative_slope, groups
        )
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        ctx.training, ctx.eps, ctx.negative_slope = training, eps, negative_slope
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        x, weight, bias, mean, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: this gradient will itself be differentiated
            gradients = differentiable_gradients(
                x, dy, weight, bias, mean, inverse, ctx.training, ctx.eps, ctx.negative_slope
            )
        else:
            gradients = backward(x, dy, weight, bias, mean, inverse, ctx.training, ctx.negative_slope)
        return *gradients, None, None, None, None, None, None, None


@torch.library.custom_op("fastdcgan::batch_norm_act_forward", mutates_args=("running_mean", "running_var"))
def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    negative_slope: float,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean (groups, C) and inverse deviation (groups, C); groups is 1 in evaluation mode."""
    channels = x.shape[1]
    plan = kernels.plan(x.numel() // (channels * groups), channels, groups)
    with torch.cuda.device_of(x):
        return launch_forward(
            x, weight, bias, running_mean, running_var, training, momentum, eps, negative_slope, groups, plan
        )


@forward.register_fake
def _(x, weight, bias, running_mean, running_var, training, momentum, eps, negative_slope, groups):
    mean = weight.new_empty((groups, x.shape[1]))
    return torch.empty_like(as_rows(x)), mean, torch.empty_like(mean)


@torch.library.custom_op("fastdcgan::batch_norm_act_backward", mutates_args=())
def backward(
    x: Tensor,
    dy: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    inverse: Tensor,
    training: bool,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias."""
    groups, channels = mean.shape
    plan = kernels.plan(x.numel() // (channels * groups), channels, groups)
    with torch.cuda.device_of(x):
        return launch_backward(x, dy, weight, bias, mean, inverse, training, negative_slope, plan)


@backward.register_fake
def _(x, dy, weight, bias, mean, inverse, training, negative_slope):
    return torch.empty_like(as_rows(x)), torch.empty_like(weight), torch.empty_like(bias)


def launch_forward(
    x, weight, bias, running_mean, running_var, training, momentum, eps, negative_slope, groups, plan: kernels.Plan
) -> tuple[Tensor, Tensor, Tensor]:
    x = as_rows(x)
    y = torch.empty_like(x)
    rows, channels = x.numel() // (x.shape[1] * groups), x.shape[1]
    mean = weight.new_empty((groups, channels))
    inverse = torch.empty_like(mean)
    partial_mean = weight.new_empty((groups, plan.splits, channels))
    partial_m2 = torch.empty_like(partial_mean)
    grid, cut = _grid_and_cut(plan, channels, groups, weight.dtype)
    if training:
        kernels.statistics[grid](x, partial_mean, partial_m2, rows, **cut)
    kernels.normalize[grid](
        x,
        y,
        weight,
        bias,
        running_mean,
        running_var,
        partial_mean,
        partial_m2,
        mean,
        inverse,
        rows,
        GROUPS=groups,
        SPLITS_POW2=triton.next_power_of_2(plan.splits),
        TRAINING=training,
        MOMENTUM=momentum,
        EPS=eps,
        SLOPE=negative_slope,
        **cut,
    )
    return y, mean, inverse


def launch_backward(
    x, dy, weight, bias, mean, inverse, training, negative_slope, plan: kernels.Plan
) -> tuple[Tensor, Tensor, Tensor]:
    x, dy = as_rows(x), as_rows(dy)
    dx, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
    groups, channels = mean.shape
    rows = x.numel() // (channels * groups)
    partial_dz = weight.new_empty((groups, plan.splits, channels))
    partial_dzx = torch.empty_like(partial_dz)
    grid, cut = _grid_and_cut(plan, channels, groups, weight.dtype)
    kernels.sums[grid](x, dy, weight, bias, mean, inverse, partial_dz, partial_dzx, rows, SLOPE=negative_slope, **cut)
    kernels.gradient[grid](
        x,
        dy,
        dx,
        weight,
        bias,
        mean,
        inverse,
        partial_dz,
        partial_dzx,
        dweight,
        dbias,
        rows,
        GROUPS=groups,
        SPLITS_POW2=triton.next_power_of_2(plan.splits),
        TRAINING=training,
        SLOPE=negative_slope,
        **cut,
    )
    return dx, dweight, dbias


def differentiable_gradients(
    x, dy, weight, bias, mean, inverse, training, eps, negative_slope
) -> tuple[Tensor, Tensor, Tensor]:
    """The same three gradients from torch's own operations, so that they have gradients of their own."""
    groups, channels = mean.shape
    shape = (groups, x.shape[0] // groups, channels, *x.shape[2:])
    over = tuple(i for i in range(len(shape)) if i not in (0, 2))
    x_, dy_ = (tensor.to(weight.dtype).reshape(shape) for tensor in (x, dy))

    def spread(tensor: Tensor) -> Tensor:  # (C,) or (groups, C) against `shape`
        return tensor.reshape(-1, 1, channels, *(1 for _ in x.shape[2:]))

    if training:
        x_ = x_ - x_.mean(over, keepdim=True)
        inverse = (x_.square().mean(over, keepdim=True) + eps).rsqrt()
    else:
        x_, inverse = x_ - spread(mean), spread(inverse)
    normalized = x_ * inverse
    dz = torch.where(normalized * spread(weight) + spread(bias) > 0, dy_, dy_ * negative_slope)
    dx = dz
    if training:
        dx = dz - dz.mean(over, keepdim=True) - normalized * (dz * normalized).mean(over, keepdim=True)
    dx = dx * inverse * spread(weight)
    return (
        dx.reshape(x.shape).to(x.dtype),
        (dz * normalized).sum((0, *over)),
        dz.sum((0, *over)),
    )


def launch_plan(x, groups: int, accumulator: torch.dtype):
    """The plan for x (N, C, ...) in `groups` groups, the rows of a group, and the launches' grid and constants."""
    channels = x.shape[1]
    rows = x.numel() // (channels * groups)
    plan = kernels.plan(rows, channels, groups)
    return plan, rows, *_grid_and_cut(plan, channels, groups, accumulator)


def _grid_and_cut(plan: kernels.Plan, channels: int, groups: int, accumulator: torch.dtype):
    grid = (plan.splits, triton.cdiv(channels, plan.block_cols), groups)
    cut = {
        "C": channels,
        "SPLITS": plan.splits,
        "TURNS": plan.turns,
        "BLOCK_ROWS": plan.block_rows,
        "BLOCK_COLS": plan.block_cols,
        "ACCUMULATOR": tl.float64 if accumulator == torch.float64 else tl.float32,
        "num_warps": plan.num_warps,
    }
    return grid, cut
