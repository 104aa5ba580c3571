"""The convolutions at a DCGAN's ends, between images and the first feature maps, each with its activation as one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdcgan.kernels.backend import Backend, use_triton
from fastdcgan.kernels.layout import DTYPES, as_rows

MOST_CHANNELS = 4  # of an image, for the Triton implementation: RGB and one more


def image_conv(images: Tensor, weight: Tensor, *, negative_slope: float, backend: Backend = "auto") -> Tensor:
    """y = act(conv2d(images, weight, stride=2, padding=1)), act(z) = z for z > 0 and negative_slope * z elsewhere.

    Differentiable twice. The Triton implementation saves images, weight and y, gives the same bits every time, computes
    no gradient that is not needed, and falls back to plain torch operations when a gradient is itself to be
    differentiated (`create_graph=True`). Its float32 products are TF32 where cuDNN's would be
    (`torch.backends.cudnn.conv.fp32_precision`); sums are in float32.

    Args:
        images: (N, C, 2h, 2w), not empty; float32, bfloat16, float16 or float64. The Triton implementation is for C up
            to 4 and not for float64; it works on channels_last and copies any other layout to that first.
        weight: (K, C, 4, 4), of images' dtype; the layout as for images.
        negative_slope: 0 is ReLU, 0.2 the DCGAN discriminator's LeakyReLU; not negative.
        backend: "auto" (Triton on CUDA tensors that it is for and that have 16 bits a value, for which it was measured,
            on GPUs from Ampere on; the reference elsewhere), "triton" or "reference".

    Returns:
        y (N, K, h, w) of images' dtype: channels_last from the Triton implementation.

    Raises:
        ValueError: shapes, dtypes, devices or a slope that do not fit.
        RuntimeError: backend="triton" where Triton cannot run, or for what it is not for.
    """
    if not negative_slope >= 0:
        raise ValueError(f"image_conv: negative_slope is 0 or more, not {negative_slope}")
    check("image_conv", "images", images, weight, weight.shape[1:2])
    if images.shape[2] % 2 or images.shape[3] % 2:
        raise ValueError(f"image_conv: images is (N, C, 2h, 2w), not {tuple(images.shape)}")
    if runs_triton("image_conv", images, weight, backend):
        from fastdcgan.kernels.image_conv_op import ImageConv

        y: Tensor = ImageConv.apply(as_rows(images), as_rows(weight), negative_slope)
        return y
    return reference(images, weight, negative_slope)


def image_conv_transpose(x: Tensor, weight: Tensor, *, backend: Backend = "auto") -> Tensor:
    """y = tanh(conv_transpose2d(x, weight, stride=2, padding=1)), from feature maps to images.

    Differentiable, and implemented, as `image_conv` is: x, weight and y are saved.

    Args:
        x: (N, K, h, w), not empty; float32, bfloat16, float16 or float64.
        weight: (K, C, 4, 4), of x's dtype. The Triton implementation is for C up to 4.
        backend: as for `image_conv`.

    Returns:
        y (N, C, 2h, 2w) of x's dtype: channels_last from the Triton implementation.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        RuntimeError: backend="triton" where Triton cannot run, or for what it is not for.
    """
    check("image_conv_transpose", "x", x, weight, weight.shape[0:1])
    if runs_triton("image_conv_transpose", x, weight, backend):
        from fastdcgan.kernels.image_conv_op import ImageConvTranspose

        y: Tensor = ImageConvTranspose.apply(as_rows(x), as_rows(weight))
        return y
    return reference_transpose(x, weight)


def reference(images: Tensor, weight: Tensor, negative_slope: float) -> Tensor:
    """`image_conv` in torch's own operations."""
    z = F.conv2d(images, weight, stride=2, padding=1).to(images.dtype)  # autocast's convolution may have another one
    return F.leaky_relu(z, negative_slope, inplace=True)


def reference_transpose(x: Tensor, weight: Tensor) -> Tensor:
    """`image_conv_transpose` in torch's own operations."""
    return F.conv_transpose2d(x, weight, stride=2, padding=1).to(x.dtype).tanh_()


def runs_triton(operation: str, tensor: Tensor, weight: Tensor, backend: Backend) -> bool:
    fits = weight.shape[1] <= MOST_CHANNELS and tensor.dtype != torch.float64
    if backend == "triton" and not fits:
        raise RuntimeError(
            f'{operation}: backend="triton" is for up to {MOST_CHANNELS} image channels and not for float64; '
            f"these are {weight.shape[1]}, {tensor.dtype}"
        )
    measured = fits and tensor.element_size() == 2 and not spills(tensor.device.type, tensor.device.index)
    return use_triton(operation, tensor, backend if measured or backend != "auto" else "reference")


def spills(device: str, index: int | None) -> bool:
    """Whether the kernels would not fit the registers of this GPU: one from before Ampere."""
    return device == "cuda" and torch.cuda.get_device_capability(index) < (8, 0)


spills._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as backend.log_once


def check(operation: str, name: str, tensor: Tensor, weight: Tensor, channels: torch.Size) -> None:
    if weight.dim() != 4 or weight.shape[2:] != (4, 4) or not weight.numel():
        raise ValueError(f"{operation}: weight is (K, C, 4, 4), not {tuple(weight.shape)}")
    if tensor.dim() != 4 or tensor.shape[1:2] != channels or not tensor.numel():
        raise ValueError(
            f"{operation}: {name} has 4 dimensions, {channels[0]} channels for this weight, and is not empty; it is "
            f"{tuple(tensor.shape)}"
        )
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{operation}: {name} is float32, bfloat16, float16 or float64, not {tensor.dtype}")
    if weight.dtype != tensor.dtype or weight.device != tensor.device:
        raise ValueError(
            f"{operation}: weight is {tensor.dtype}, on {tensor.device}, as {name} is, not {weight.dtype}, on "
            f"{weight.device}"
        )
