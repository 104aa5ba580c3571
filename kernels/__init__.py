"""Fused Triton operations: each is an eager reference, a Triton kernel and one function that picks between them.

`batch_norm_image_conv_transpose` joins two of them, and has those for its reference.
"""

if __name__ != "fastdcgan.kernels":
    raise ImportError(f"import this package as fastdcgan.kernels, not as {__name__}")

from fastdcgan.kernels.adam_step import adam_step
from fastdcgan.kernels.batch_norm_act import batch_norm_act
from fastdcgan.kernels.batch_norm_image_conv import batch_norm_image_conv_transpose
from fastdcgan.kernels.image_conv import image_conv, image_conv_transpose
from fastdcgan.kernels.uint8_to_float import uint8_to_float

__all__ = [
    "adam_step",
    "batch_norm_act",
    "batch_norm_image_conv_transpose",
    "image_conv",
    "image_conv_transpose",
    "uint8_to_float",
]
