"""What the values of pixels mean, in a file whose format leaves that open and in tensors, and which way up they are."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, TiffImagePlugin
from torch import Tensor

# Tags of TIFF and the values of theirs that matter here.
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339
WHITE_IS_ZERO, SIGNED = 0, 2
TURNS = {  # by EXIF's orientation: what brings a picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Orientations of which the left or the top edge, upright, is the right or the bottom one of the picture as stored.
LEFT_IS_AN_END, TOP_IS_AN_END = (2, 3, 6, 7), (3, 4, 7, 8)


def orientation(picture: Image.Image) -> int:
    """1..8 as in EXIF; 1, "as it is", also where what should say so is damaged: viewers take no notice of that.

    Raises:
        What Pillow raises for damaged pixels, of a PNG, whose EXIF may stand behind them.
    """
    if picture.format == "PNG" and "exif" not in picture.info:
        picture.load()  # as getexif would
    try:
        value = picture.getexif().get(0x0112)
    except Exception:
        return 1
    return value if value in TURNS else 1


def upright(picture: Image.Image) -> Image.Image:
    """As EXIF says that it is to be shown. Not by `ImageOps.exif_transpose`, which writes the rest of EXIF anew, and
    fails where that is damaged."""
    turn = TURNS.get(orientation(picture))
    return picture if turn is None else picture.transpose(turn)


def without_range(picture: Image.Image) -> str:
    """Why nobody can say which of a file's values are black and white; '' for most files."""
    if picture.mode == "F":
        return "floating-point pixels: convert the file to 8 or 16 bits"
    if picture.mode == "L" and _tiff_tag(picture, SAMPLE_FORMAT) == SIGNED:
        return "signed pixels: convert the file to unsigned 8 or 16 bits"
    if picture.mode == "I" and picture.format == "TIFF":  # in other formats older Pillows say "I" of 16 bits
        return "signed or 32-bit pixels: convert the file to 8 bits or unsigned 16"
    return ""


def in_8_bits(picture: Image.Image, file: Image.Image) -> Image.Image:
    """The upper 8 of 12 or 16 bits a pixel, whichever way Pillow names those; other pictures as they are, but for
    premultiplied greys, which Pillow converts to LA alone: as that.

    Args:
        file: what Pillow opened, of which `picture` is a part or a turned copy: a TIFF says how its values are meant.
    """
    if not picture.mode.startswith("I"):
        return picture.convert("LA") if picture.mode == "La" else picture
    bits = 12 if _tiff_tag(file, BITS_PER_SAMPLE) == 12 else 16
    values = np.asarray(picture).clip(0, 2**bits - 1) >> (bits - 8)
    if _tiff_tag(file, PHOTOMETRIC) == WHITE_IS_ZERO:  # which Pillow sees to where there are 8 bits
        values = 255 - values
    return Image.fromarray(values.astype(np.uint8))


def _tiff_tag(file: Image.Image, tag: int) -> int | None:
    """The value of a TIFF's tag, the first of several; None where it has none, and of files in other formats."""
    if not isinstance(file, TiffImagePlugin.TiffImageFile):
        return None
    value = file.tag_v2.get(tag)
    return value[0] if isinstance(value, tuple) else value


def to_floats(images: Tensor) -> Tensor:
    """uint8 0..255 to float32 -1..1; floats, which are in -1..1 already, to float32."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float()


def to_uint8(images: Tensor) -> Tensor:
    """Floats in -1..1 to uint8 0..255, rounded; what lies beyond is cut off."""
    return images.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def as_picture(pixels: Tensor) -> Image.Image:
    """uint8 (C, H, W) -> a picture in mode L, RGB or RGBA."""
    array = pixels.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
