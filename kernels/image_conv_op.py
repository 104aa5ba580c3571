# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""How autograd and torch.compile see the Triton kernels of `image_conv`: three operators and two Functions.

`fine` is (N, C, 2h, 2w), `coarse` (N, K, h, w) and `weight` (K, C, 4, 4). The gradients for the input and for the
weight are operators of their own, so that a gradient nobody asks for is not computed, in a compiled graph either.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from fastdcgan.kernels import image_conv_triton as kernels
from fastdcgan.kernels.layout import as_rows

# Rows of a tile, and programs of `outer`, each of which leaves a partial result to be added: what was fastest on an
# H200, four programs for each of its multiprocessors.
DOWN_ROWS, UP_ROWS, OUTER_ROWS, OUTER_PROGRAMS = 128, 128, 64, 528
SUMMED = 32  # weights of a program of `add_splits`: 128 bytes of every split


class ImageConv(torch.autograd.Function):
    """y of `image_conv`, arguments as checked there, with their rows in order (`as_rows`)."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, negative_slope: float) -> Tensor:
        y = down(images, None, weight, negative_slope)
        ctx.save_for_backward(images, weight, y)
        ctx.negative_slope = negative_slope
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        images, weight, y = ctx.saved_tensors
        slope, (needs_dx, needs_dw, _) = ctx.negative_slope, ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True: this gradient will itself be differentiated
            dz = torch.where(y > 0, dy, dy * slope)
            dx = F.conv_transpose2d(dz, weight, stride=2, padding=1) if needs_dx else None
            dw = conv2d_weight(images, weight.shape, dz, stride=2, padding=1) if needs_dw else None
        else:
            dx = up(dy, y, weight, slope, False) if needs_dx else None
            dw = outer(images, None, dy, y, slope) if needs_dw else None
        return dx, dw, None


class ImageConvTranspose(torch.autograd.Function):
    """y of `image_conv_transpose`, arguments as checked there, with their rows in order (`as_rows`)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        y = up(x, None, weight, 1.0, True)
        ctx.save_for_backward(x, weight, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        x, weight, y = ctx.saved_tensors
        needs_dx, needs_dw = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True: this gradient will itself be differentiated
            return differentiable_transposed_gradients(dy, y, x, weight, needs_dx, needs_dw)
        dx = down(dy, y, weight, 1.0) if needs_dx else None
        dw = outer(dy, y, x, None, 1.0) if needs_dw else None
        return dx, dw


def differentiable_transposed_gradients(dy, y, x, weight, needs_dx: bool, needs_dw: bool):
    """dx and dw of `image_conv_transpose` from torch's own operations, so that they have gradients of their own."""
    dz = dy * (1 - y * y)
    dx = F.conv2d(dz, weight, stride=2, padding=1) if needs_dx else None
    dw = conv2d_weight(dz, weight.shape, x, stride=2, padding=1) if needs_dw else None
    return dx, dw


@torch.library.custom_op("fastdcgan::image_conv_down", mutates_args=())
def down(fine: Tensor, out: Tensor | None, weight: Tensor, slope: float) -> Tensor:
    """LeakyReLU of the convolution of `fine`, or with `out` of dz = fine * (1 - out * out); a slope of 1 is none."""
    return launch_down(fine, out, weight, slope)


@down.register_fake
def _(fine, out, weight, slope):
    return empty_coarse(fine, len(weight))


@torch.library.custom_op("fastdcgan::image_conv_up", mutates_args=())
def up(coarse: Tensor, out: Tensor | None, weight: Tensor, slope: float, tanh: bool) -> Tensor:
    """The transposed convolution of `coarse`, or with `out` of its dz, slope * coarse where out <= 0; then its tanh."""
    return launch_up(coarse, out, weight, slope, tanh)


@up.register_fake
def _(coarse, out, weight, slope, tanh):
    return empty_fine(coarse, weight.shape[1])


@torch.library.custom_op("fastdcgan::image_conv_outer", mutates_args=())
def outer(fine: Tensor, fine_out: Tensor | None, coarse: Tensor, coarse_out: Tensor | None, slope: float) -> Tensor:
    """dweight, with dz in place of `fine` or `coarse` where its output is given, as in `down` and `up`."""
    return launch_add_splits(launch_outer(fine, fine_out, coarse, coarse_out, slope), fine)


@outer.register_fake
def _(fine, fine_out, coarse, coarse_out, slope):
    return empty_weight(fine, coarse.shape[1])


# One launch each, on its tensors' device, for tensors of any layout: `fine` (N, C, 2h, 2w), `coarse` (N, K, h, w), and
# `weight` (K, C, 4, 4). Where the output of an activation is given, what comes in is its gradient.


def launch_down(fine, out, weight, slope: float) -> Tensor:
    fine, weight = as_rows(fine), as_rows(weight)
    coarse = empty_coarse(fine, len(weight))
    rows, grid, constants = launch_constants(coarse, DOWN_ROWS)
    with torch.cuda.device_of(fine):
        kernels.down[grid](
            fine,
            fine if out is None else as_rows(out),
            weight,
            coarse,
            rows,
            TANH_GRADIENT=out is not None,
            SLOPE=slope,
            PRECISION=precision(fine),
            **constants,
            **window(fine),
            num_warps=4,
            num_stages=2,
        )
    return coarse


def launch_up(coarse, out, weight, slope: float, tanh: bool) -> Tensor:
    coarse, weight = as_rows(coarse), as_rows(weight)
    fine = empty_fine(coarse, weight.shape[1])
    rows, _, constants = launch_constants(coarse, UP_ROWS)
    with torch.cuda.device_of(coarse):
        kernels.up[triton.cdiv(rows, constants["BLOCK_ROWS"] - 2),](
            coarse,
            coarse if out is None else as_rows(out),
            weight,
            fine,
            rows,
            C=weight.shape[1],
            LEAKY_GRADIENT=out is not None,
            SLOPE=slope,
            TANH=tanh,
            PRECISION=precision(coarse),
            **constants,
            num_warps=4 if out is None else 8,
            num_stages=2,
        )
    return fine


def launch_outer(fine, fine_out, coarse, coarse_out, slope: float, norm: tuple[Tensor, ...] | None = None) -> Tensor:
    """The partial sums (splits, K, taps) in float32. With `norm`, BatchNorm's mean, inverse deviation, weight and bias,
    (K,) each, `coarse` is its input."""
    fine, coarse = as_rows(fine), as_rows(coarse)
    rows, grid, constants = launch_constants(coarse, OUTER_ROWS, OUTER_PROGRAMS)
    line = window(fine)
    partial = torch.empty((grid[0], coarse.shape[1], 4 * line["WINDOW"]), dtype=torch.float32, device=fine.device)
    with torch.cuda.device_of(fine):
        kernels.outer[grid](
            fine,
            fine if fine_out is None else as_rows(fine_out),
            coarse,
            coarse if coarse_out is None else as_rows(coarse_out),
            *(norm or 4 * [partial]),
            partial,
            rows,
            TANH_GRADIENT=fine_out is not None,
            LEAKY_GRADIENT=coarse_out is not None,
            NORMALIZE=norm is not None,
            SLOPE=slope,
            PRECISION=precision(fine),
            **constants,
            **line,
            num_warps=4,
            num_stages=1,
        )
    return partial


def launch_add_splits(partial, fine) -> Tensor:
    splits, channels, _ = partial.shape
    dweight = empty_weight(fine, channels)
    with torch.cuda.device_of(fine):
        kernels.add_splits[triton.cdiv(dweight.numel(), SUMMED),](
            partial,
            dweight,
            K=channels,
            SPLITS=splits,
            SPLITS_POW2=triton.next_power_of_2(splits),
            BLOCK=SUMMED,
            **window(fine),
            num_warps=8,
        )
    return dweight


def launch_constants(coarse, tallest: int, programs: int | None = None):
    """The rows of the coarse matrix, the grid of a launch, and its constants; `tallest` and `programs` as in `plan`."""
    _, channels, height, width = coarse.shape
    rows = coarse.numel() // channels
    plan = kernels.plan(rows, channels, coarse.element_size(), tallest, programs)
    constants = {
        "HEIGHT": height,
        "WIDTH": width,
        "K": channels,
        "BLOCK_ROWS": plan.block_rows,
        "BLOCK_COLS": plan.block_cols,
    }
    if programs is not None:
        constants["TURNS"] = plan.turns
    return rows, (plan.splits, triton.cdiv(channels, plan.block_cols)), constants


def window(fine):
    """The constants of a gather from `fine`."""
    channels = fine.shape[1]
    lead = channels % 2
    return {"C": channels, "LEAD": lead, "WINDOW": triton.next_power_of_2(4 * channels + lead)}


def precision(tensor) -> str:
    """Of the products: what cuDNN's convolutions would take, whichever of torch's two switches says so."""
    of_float32 = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]  # made when it is asked for
    return "tf32" if tensor.dtype == torch.float32 and of_float32 == "tf32" else "ieee"


# Made as (N, h, w, C) and viewed, so that the layout is right for one channel or one pixel too.


def empty_coarse(fine, channels: int) -> Tensor:
    samples, _, height, width = fine.shape
    shape = (samples, height // 2, width // 2, channels)
    return torch.empty(shape, dtype=fine.dtype, device=fine.device).permute(0, 3, 1, 2)


def empty_fine(coarse, channels: int) -> Tensor:
    samples, _, height, width = coarse.shape
    shape = (samples, 2 * height, 2 * width, channels)
    return torch.empty(shape, dtype=coarse.dtype, device=coarse.device).permute(0, 3, 1, 2)


def empty_weight(fine, channels: int) -> Tensor:
    shape = (channels, 4, 4, fine.shape[1])
    return torch.empty(shape, dtype=fine.dtype, device=fine.device).permute(0, 3, 1, 2)
