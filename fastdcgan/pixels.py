"""What the values in a picture's file mean, where a format leaves that open: for training and the commands alike."""

from __future__ import annotations

import warnings

import numpy as np
from PIL import Image

# Of pictures that are large, which is no fault, or whose EXIF block is cut short, about which nobody can do anything.
warnings.filterwarnings("ignore", module=r"PIL\.")


def without_range(picture: Image.Image) -> str:
    """Why nobody can say which of a file's values are black and white; '' for most files."""
    if picture.mode == "F":
        return "floating-point pixels: convert the file to 8 or 16 bits"
    if picture.mode == "I" and picture.format == "TIFF":  # in other formats older Pillows say "I" of 16 bits
        return "signed or 32-bit pixels: convert the file to 8 bits or unsigned 16"
    return ""


def in_8_bits(picture: Image.Image) -> Image.Image:
    """The upper 8 of 16 bits a pixel, whichever way Pillow names those; other pictures as they are."""
    if not picture.mode.startswith("I"):
        return picture
    return Image.fromarray((np.asarray(picture).clip(0, 65535) >> 8).astype(np.uint8))
