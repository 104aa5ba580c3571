# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""How autograd and torch.compile see the Triton kernels of `batch_norm_act`: four operators and a Function."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdcgan.kernels import batch_norm_act_triton as kernels
from fastdcgan.kernels.layout import all_but_channels, as_rows, in_groups, spread
from fastdcgan.kernels.plan import Plan


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
        if training:
            found = forward(x, weight, bias, running_mean, running_var, momentum, eps, negative_slope, groups)
        else:
            found = evaluate(x, weight, bias, running_mean, running_var, eps, negative_slope)
        y, mean, inverse = found
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        ctx.training, ctx.eps, ctx.negative_slope = training, eps, negative_slope
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        x, weight, bias, mean, inverse = ctx.saved_tensors
        found = gradients(dy, x, weight, bias, mean, inverse, ctx.training, ctx.eps, ctx.negative_slope)
        return *found, None, None, None, None, None, None, None


def gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    inverse: Tensor,
    training: bool,
    eps: float,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias, for the backward method of a Function."""
    if torch.is_grad_enabled():  # create_graph=True: this gradient will itself be differentiated
        return differentiable_gradients(x, dy, weight, bias, mean, inverse, training, eps, negative_slope)
    if torch.compiler.is_compiling():
        # In dy's place, which is one tensor less in memory: Inductor makes the copy only where dy has another use.
        # (Without asking for one, autograd would hand out what is written over as dy in its other places too.)
        dx = as_rows(dy).clone()
        dweight, dbias = backward_in_place(x, dx, weight, bias, mean, inverse, training, negative_slope)
        return dx, dweight, dbias
    found: tuple[Tensor, Tensor, Tensor] = backward(x, dy, weight, bias, mean, inverse, training, negative_slope)
    return found


@torch.library.custom_op("fastdcgan::batch_norm_act_forward", mutates_args=("running_mean", "running_var"))
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
) -> tuple[Tensor, Tensor, Tensor]:
    """In training mode: y, mean (groups, C) and inverse deviation (groups, C)."""
    plan = plan_for(x, groups)
    return launch_forward(x, weight, bias, running_mean, running_var, True, momentum, eps, negative_slope, groups, plan)


@forward.register_fake
def _(x, weight, bias, running_mean, running_var, momentum, eps, negative_slope, groups):
    mean = weight.new_empty((groups, x.shape[1]))
    return torch.empty_like(as_rows(x)), mean, torch.empty_like(mean)


@torch.library.custom_op("fastdcgan::batch_norm_act_evaluate", mutates_args=())
def evaluate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """In evaluation mode: y, mean (1, C) and inverse deviation (1, C)."""
    plan = plan_for(x, 1)
    return launch_forward(x, weight, bias, running_mean, running_var, False, 0.0, eps, negative_slope, 1, plan)


@evaluate.register_fake
def _(x, weight, bias, running_mean, running_var, eps, negative_slope):
    mean = weight.new_empty((1, x.shape[1]))
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
    x, dy = as_rows(x), as_rows(dy)
    return launch_backward(
        x, dy, torch.empty_like(x), weight, bias, mean, inverse, training, negative_slope, plan_for(x, len(mean))
    )


@backward.register_fake
def _(x, dy, weight, bias, mean, inverse, training, negative_slope):
    return torch.empty_like(as_rows(x)), torch.empty_like(weight), torch.empty_like(bias)


@torch.library.custom_op("fastdcgan::batch_norm_act_backward_in_place", mutates_args=("dy",))
def backward_in_place(
    x: Tensor,
    dy: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    inverse: Tensor,
    training: bool,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    """dweight and dbias; dy, whose rows are in order (`as_rows`), becomes dx."""
    assert as_rows(dy) is dy
    plan = plan_for(x, len(mean))
    return launch_backward(as_rows(x), dy, dy, weight, bias, mean, inverse, training, negative_slope, plan)[1:]


@backward_in_place.register_fake
def _(x, dy, weight, bias, mean, inverse, training, negative_slope):
    return torch.empty_like(weight), torch.empty_like(bias)


def launch_forward(
    x, weight, bias, running_mean, running_var, training, momentum, eps, negative_slope, groups, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and mean and inverse deviation (groups, C), which the backward pass needs."""
    x = as_rows(x)
    if training:
        partial = launch_statistics(x, groups, weight.dtype, plan)
    else:
        partial = (weight.new_empty((groups, 1, x.shape[1])),) * 2  # not read
    return launch_normalize(
        x, weight, bias, running_mean, running_var, partial, training, momentum, eps, negative_slope, plan
    )


def launch_backward(
    x, dy, dx, weight, bias, mean, inverse, training, negative_slope, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, in the tensor of that name, dweight and dbias (C,)."""
    partial = launch_sums(x, dy, weight, bias, mean, inverse, negative_slope, plan)
    return launch_gradient(x, dy, dx, weight, bias, mean, inverse, partial, training, negative_slope, plan)


# One launch each, on x's device, for x, dy and dx with their rows in order (`as_rows`); dx may be dy. What the first
# launch of a pass leaves for the second is `partial`: two of (groups, splits, C), of the plan's splits or of one that
# stands for all.


def launch_statistics(x, groups: int, accumulator: torch.dtype, plan: Plan) -> tuple[Tensor, Tensor]:
    """partial: means and sums of squared deviations."""
    rows, grid, constants = launch_constants(plan, x, groups, plan.splits, accumulator)
    mean = torch.empty((groups, plan.splits, x.shape[1]), dtype=accumulator, device=x.device)
    m2 = torch.empty_like(mean)
    with torch.cuda.device_of(x):
        kernels.statistics[grid](x, mean, m2, rows, **constants)
    return mean, m2


def launch_normalize(
    x, weight, bias, running_mean, running_var, partial, training, momentum, eps, negative_slope, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    groups, splits, channels = partial[0].shape
    y, mean = torch.empty_like(x), weight.new_empty((groups, channels))
    inverse = torch.empty_like(mean)
    rows, grid, constants = launch_constants(plan, x, groups, splits, weight.dtype)
    with torch.cuda.device_of(x):
        kernels.normalize[grid[0] + 1, *grid[1:]](
            x,
            y,
            weight,
            bias,
            running_mean,
            running_var,
            *partial,
            mean,
            inverse,
            rows,
            GROUPS=groups,
            CHUNK=min(64, triton.next_power_of_2(splits)),
            TRAINING=training,
            MOMENTUM=momentum,
            EPS=eps,
            SLOPE=negative_slope,
            **constants,
        )
    return y, mean, inverse


def launch_sums(x, dy, weight, bias, mean, inverse, negative_slope, plan: Plan) -> tuple[Tensor, Tensor]:
    """partial: sums of dz and of dz times the normalised x."""
    groups, channels = mean.shape
    dz = weight.new_empty((groups, plan.splits, channels))
    dzx = torch.empty_like(dz)
    rows, grid, constants = launch_constants(plan, x, groups, plan.splits, weight.dtype)
    with torch.cuda.device_of(x):
        kernels.sums[grid](x, dy, weight, bias, mean, inverse, dz, dzx, rows, SLOPE=negative_slope, **constants)
    return dz, dzx


def launch_gradient(
    x, dy, dx, weight, bias, mean, inverse, partial, training, negative_slope, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    groups, splits, _ = partial[0].shape
    rows, grid, constants = launch_constants(plan, x, groups, splits, weight.dtype)
    with torch.cuda.device_of(x):
        kernels.gradient[grid[0] + 1, *grid[1:]](
            x,
            dy,
            dx,
            weight,
            bias,
            mean,
            inverse,
            *partial,
            dweight,
            dbias,
            rows,
            GROUPS=groups,
            CHUNK=min(64, triton.next_power_of_2(splits)),
            TRAINING=training,
            SLOPE=negative_slope,
            **constants,
        )
    return dx, dweight, dbias


def differentiable_gradients(
    x, dy, weight, bias, mean, inverse, training, eps, negative_slope
) -> tuple[Tensor, Tensor, Tensor]:
    """The same three gradients from torch's own operations, so that they have gradients of their own."""
    over = all_but_channels(x)
    x_, dy_ = (in_groups(tensor.to(weight.dtype), len(mean)) for tensor in (x, dy))
    scale, shift = spread(weight, x), spread(bias, x)
    if training:
        x_ = x_ - x_.mean(over, keepdim=True)
        inverse = (x_.square().mean(over, keepdim=True) + eps).rsqrt()
    else:
        x_, inverse = x_ - spread(mean, x), spread(inverse, x)
    normalized = x_ * inverse
    dz = torch.where(normalized * scale + shift > 0, dy_, dy_ * negative_slope)
    dx = dz
    if training:
        dx = dz - dz.mean(over, keepdim=True) - normalized * (dz * normalized).mean(over, keepdim=True)
    dx = dx * inverse * scale
    return (
        dx.reshape(x.shape).to(x.dtype),
        (dz * normalized).sum((0, *over)),
        dz.sum((0, *over)),
    )


def plan_for(x, groups: int) -> Plan:
    """The plan for x (N, C, ...) in `groups` groups."""
    channels = x.shape[1]
    return kernels.plan(x.numel() // (channels * groups), channels, groups)


def launch_constants(plan: Plan, x, groups: int, splits: int, accumulator: torch.dtype):
    """The rows of a group, the grid, and the constants of a launch that writes or reads `splits` partial results."""
    channels = x.shape[1]
    grid = (plan.splits, triton.cdiv(channels, plan.block_cols), groups)
    constants = {
        "C": channels,
        "SPLITS": splits,
        "TURNS": plan.turns,
        "BLOCK_ROWS": plan.block_rows,
        "BLOCK_COLS": plan.block_cols,
        # Staged tiles of float64 would take more shared memory than consumer GPUs have.
        "STAGES": 1 if accumulator == torch.float64 else kernels.STAGES,
        "ACCUMULATOR": tl.float64 if accumulator == torch.float64 else tl.float32,
        "num_warps": kernels.WARPS,
    }
    return x.numel() // (channels * groups), grid, constants
