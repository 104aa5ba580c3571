"""A generator's last two layers as one operation, which does not keep the tensor between them."""

from __future__ import annotations

from torch import Tensor

from fastdcgan.kernels.backend import Backend
from fastdcgan.kernels.batch_norm_act import batch_norm_act
from fastdcgan.kernels.batch_norm_act import check as check_norm
from fastdcgan.kernels.batch_norm_act import runs_triton as norm_runs_triton
from fastdcgan.kernels.image_conv import check as check_conv
from fastdcgan.kernels.image_conv import image_conv_transpose
from fastdcgan.kernels.image_conv import runs_triton as conv_runs_triton
from fastdcgan.kernels.layout import as_rows


def batch_norm_image_conv_transpose(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    negative_slope: float = 0.0,
    backend: Backend = "auto",
) -> Tensor:
    """image_conv_transpose(batch_norm_act(x, ...), weight) in training mode.

    The tensor between the two, as large as x and the largest that a generator makes, is not kept for the backward pass
    where both run their Triton kernels: the kernel of weight's gradient makes it again while it loads x, with the same
    bits. Differentiable twice.

    Args:
        x: (N, K, h, w), as for both operations.
        norm_weight, norm_bias, running_mean, running_var, momentum, eps, negative_slope: as for `batch_norm_act`.
        weight: (K, C, 4, 4), as for `image_conv_transpose`.
        backend: as for both operations.

    Returns:
        (N, C, 2h, 2w) of x's dtype.

    Raises:
        ValueError, RuntimeError: as both operations.
    """
    check_norm(x, (norm_weight, norm_bias, running_mean, running_var), True, momentum, 1, eps, negative_slope)
    check_conv("image_conv_transpose", "x", x, weight, weight.shape[0:1])
    if norm_runs_triton(x, True, 1, backend) and conv_runs_triton("image_conv_transpose", x, weight, backend):
        from fastdcgan.kernels.batch_norm_image_conv_op import BatchNormImageConvTranspose

        images: Tensor = BatchNormImageConvTranspose.apply(
            as_rows(x),
            norm_weight,
            norm_bias,
            running_mean,
            running_var,
            momentum,
            eps,
            negative_slope,
            as_rows(weight),
        )
        return images
    y = batch_norm_act(
        x,
        norm_weight,
        norm_bias,
        running_mean,
        running_var,
        training=True,
        momentum=momentum,
        eps=eps,
        negative_slope=negative_slope,
        backend=backend,
    )
    return image_conv_transpose(y, weight, backend=backend)
