# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""How autograd and torch.compile see `batch_norm_image_conv_transpose`: one operator of its own and a Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdcgan.kernels import batch_norm_act_op as norm_op
from fastdcgan.kernels import image_conv_op as conv_op
from fastdcgan.kernels.batch_norm_act import reference


class BatchNormImageConvTranspose(torch.autograd.Function):
    """The images, arguments as checked in `batch_norm_image_conv_transpose`, with their rows in order (`as_rows`)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
        negative_slope: float,
        weight: Tensor,
    ) -> Tensor:
        y, mean, inverse = norm_op.forward(
            x, norm_weight, norm_bias, running_mean, running_var, momentum, eps, negative_slope, 1
        )
        images = conv_op.up(y, None, weight, 1.0, True)
        ctx.save_for_backward(x, norm_weight, norm_bias, mean, inverse, weight, images)
        ctx.eps, ctx.negative_slope = eps, negative_slope
        return images

    @staticmethod
    def backward(ctx: Any, dimages: Tensor):
        x, norm_weight, norm_bias, mean, inverse, weight, images = ctx.saved_tensors
        eps, slope, needs_dw = ctx.eps, ctx.negative_slope, ctx.needs_input_grad[-1]
        if torch.is_grad_enabled():  # create_graph=True: this gradient will itself be differentiated
            y = reference(x, norm_weight, norm_bias, None, None, True, 0.0, eps, slope, 1)
            dy, dw = conv_op.differentiable_transposed_gradients(dimages, images, y, weight, True, needs_dw)
        else:
            dy = conv_op.down(dimages, images, weight, 1.0)
            norm = (mean, inverse, norm_weight, norm_bias)
            dw = outer_normalized(dimages, images, x, *norm, slope) if needs_dw else None
        dx, dnorm_weight, dnorm_bias = norm_op.gradients(dy, x, norm_weight, norm_bias, mean, inverse, True, eps, slope)
        return dx, dnorm_weight, dnorm_bias, None, None, None, None, None, dw


@torch.library.custom_op("fastdcgan::image_conv_outer_normalized", mutates_args=())
def outer_normalized(
    fine: Tensor,
    fine_out: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    slope: float,
) -> Tensor:
    """`image_conv_op.outer`, whose coarse tensor is BatchNorm and LeakyReLU of x, in one group."""
    norm = (mean, inverse, norm_weight, norm_bias)
    return conv_op.launch_add_splits(conv_op.launch_outer(fine, fine_out, x, None, slope, norm), fine)


@outer_normalized.register_fake
def _(fine, fine_out, x, mean, inverse, norm_weight, norm_bias, slope):
    return conv_op.empty_weight(fine, x.shape[1])
