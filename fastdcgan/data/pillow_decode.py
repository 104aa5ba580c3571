"""One image through Pillow: what every other decoder is measured against, and the judge of what is broken.

It handles what the fast decoders do not: transparency, palettes, CMYK, 16 bits, EXIF rotation, animations (their first
frame), and JPEGs much larger than needed, which libjpeg decodes at 1/2, 1/4 or 1/8 of their size for a fraction of
the time.
"""

from __future__ import annotations

import io
import math
import threading

import numpy as np
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError

from fastdcgan import heic  # whose format is then registered too
from fastdcgan.errors import first_line
from fastdcgan.pixels import LEFT_IS_AN_END, TOP_IS_AN_END, in_8_bits, orientation, upright, without_range

# Pillow refuses more than this as a decompression bomb; as 8-bit colour it is half a gigabyte.
MOST_PIXELS = 178_956_970
LARGE_PIXELS = 16_000_000  # images that unpack to more take turns, so threads do not multiply the memory

LOSSLESS_FRAME = b"\xff\xc3"  # of a JPEG that libjpeg decodes, but not scaled
PNG_DEPTH = 24  # where a PNG says how many bits a pixel has

EMPTY = "empty file (0 bytes)"

NO_MEMORY = "too large for the memory that is free"

# Sound pictures come with more text, or with a longer colour profile, than the 1 MiB that Pillow unpacks of each.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

_one_large_image = threading.Lock()
FORMATS = [name for name in Image.OPEN if name != "EPS"]  # which Pillow would have another program, Ghostscript, draw


class UnusableImage(Exception):
    """The bytes are not an image that can be used; the message says why, in a few words."""


def too_many_pixels(height: int, width: int) -> str:
    return f"too large: {width} x {height} pixels (possibly a decompression bomb)"


def cover_box(
    size: tuple[int, int], target: tuple[int, int], place: tuple[float, float] = (0.5, 0.5)
) -> tuple[int, int, int, int]:
    """The largest part of an image that has the target's proportions: (top, left, height, width), in whole pixels.

    Args:
        size, target: (height, width) of the image and of what it becomes.
        place: where the part lies, from (0, 0), top left, to (1, 1), bottom right; (0.5, 0.5) is the centre.
    """
    height, width = size
    if width * target[0] >= height * target[1]:
        box_height, box_width = height, max(1, round(height * target[1] / target[0]))
    else:
        box_height, box_width = max(1, round(width * target[0] / target[1])), width
    return int((height - box_height) * place[0]), int((width - box_width) * place[1]), box_height, box_width


def decode(
    data: bytes, image_size: tuple[int, int], channels: int, place: tuple[float, float] = (0.5, 0.5)
) -> NDArray[np.uint8]:
    """The cover box of an image, resized with antialiasing: uint8 (H, W, channels).

    channels 1 converts to luma and 3 to RGB, both on white where the image is transparent; 4 keeps the transparency.

    Raises:
        UnusableImage: with the reason.
    """
    try:
        try:
            return _decode(data, image_size, channels, place)
        except OSError:
            if LOSSLESS_FRAME not in data:
                raise
            return _decode(data, image_size, channels, place, whole=True)
    except UnusableImage:
        raise
    except Exception as error:  # Pillow's plugins raise almost anything on broken files
        raise UnusableImage(_reason(error, data)) from error


def measure(data: bytes) -> tuple[int, int, bool]:
    """(height, width, whether it has colour) as shown, from the header alone. Raises UnusableImage."""
    try:
        image = _open(data)
        turned = orientation(image) >= 5
    except UnusableImage:
        raise
    except Exception as error:
        raise UnusableImage(_reason(error, data)) from error
    large = image.width * image.height > MOST_PIXELS
    if large and not (image.format == "JPEG" and not image.info.get("progressive")):
        raise UnusableImage(too_many_pixels(image.height, image.width))
    size = image.size if turned else image.size[::-1]
    return size[0], size[1], image.mode not in ("1", "L", "LA", "La", "I") and not image.mode.startswith("I;16")


def traits(name: str, data: bytes) -> list[str]:
    """Decodes a file once and says in a few words what it is: its format, and what about it is out of the ordinary.

    Raises:
        UnusableImage: with the reason.
    """
    decode(data, (8, 8), 3)
    image = _open(data)
    found = [image.format or "unknown"]
    suffix = name[name.rfind(".") :].lower()
    if Image.registered_extensions().get(suffix, image.format) != image.format and image.format != "MPO":
        found.append("named as another format")
    if image.mode in ("1", "L", "LA", "La"):
        found.append("grey")
    if image.mode.startswith("I"):
        found.append("16 bits")
    if image.mode == "CMYK":
        found.append("CMYK")
    if image.mode in ("RGBA", "LA", "La", "PA") or "transparency" in image.info:
        found.append("transparent")
    if _is_animated(image) and image.format != "MPO":
        found.append("animated (its first frame is used)")
    if orientation(image) != 1:
        found.append("rotated by EXIF")
    return found


def fault(data: bytes) -> str:
    """Why the image cannot be decoded, '' where it can."""
    try:
        decode(data, (8, 8), 3)
    except UnusableImage as error:
        return str(error)
    return ""


def _open(data: bytes) -> Image.Image:
    file = io.BytesIO(data)
    if data.startswith(b"\xff\xd8"):
        # Not through Image.open, which refuses large images that scaled decoding handles well.
        return JpegImagePlugin.jpeg_factory(file, None)
    image = Image.open(file, formats=FORMATS)
    if why := without_range(image):
        raise UnusableImage(why)
    if image.format == "PNG" and image.mode == "L" and isinstance(key := image.info.get("transparency"), int):
        # Pillow spreads 2 and 4 bits a pixel over 0..255, but not the grey that is transparent.
        image.info["transparency"] = key * 255 // (2 ** data[PNG_DEPTH] - 1)
    return image


def _is_animated(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # it has more frames, and they are damaged
        return True


def _decode(
    data: bytes, image_size: tuple[int, int], channels: int, place: tuple[float, float], whole: bool = False
) -> NDArray[np.uint8]:
    """As `decode`, but raises whatever Pillow raises.

    Args:
        whole: decode a JPEG in its full size.
    """
    image = _open(data)
    shown = image.size if orientation(image) >= 5 else image.size[::-1]
    scale = 1.0 if whole else _scale_down(image, shown, image_size, channels)
    if image.width * image.height > MOST_PIXELS:
        raise UnusableImage(too_many_pixels(image.height, image.width))
    if image.width * image.height > LARGE_PIXELS:
        with _one_large_image:
            return _finish(image, shown, scale, image_size, channels, place)
    return _finish(image, shown, scale, image_size, channels, place)


def _scale_down(image: Image.Image, shown: tuple[int, int], image_size: tuple[int, int], channels: int) -> float:
    """Have a JPEG decoded at 1/2, 1/4 or 1/8 of its size where that is enough: which of 1, 2, 4 and 8 it is.

    Args:
        shown: its (height, width), upright.
    """
    _, _, box_height, box_width = cover_box(shown, image_size)
    shrink = min(box_height / image_size[0], box_width / image_size[1])
    if not isinstance(image, JpegImagePlugin.JpegImageFile) or shrink < 2:
        return 1
    width, height = image.size
    # Pillow picks the smallest of 1/2, 1/4 and 1/8 that is not below the size asked for.
    least = (math.ceil(width / shrink - 1e-6), math.ceil(height / shrink - 1e-6))
    drafted = image.draft("L" if channels == 1 else "RGB", least)
    return width / drafted[1][2] if drafted else 1


def _finish(
    image: Image.Image,
    shown: tuple[int, int],
    scale: float,
    image_size: tuple[int, int],
    channels: int,
    place: tuple[float, float],
) -> NDArray[np.uint8]:
    """Load the image and bring its part to size.

    Args:
        shown: its whole (height, width), upright.
        scale: how many times smaller it is decoded.
    """
    image.load()
    file, turn = image, orientation(image)
    image = upright(image)
    if scale == 1:  # a format may have said it otherwise before it was loaded, as of a turned TIFF
        shown = image.height, image.width
    top, left, height, width = (side / scale for side in cover_box(shown, image_size, place))
    # Of a size that is no multiple of the scale, the last column and row of pixels reach beyond the picture's edge.
    if turn in LEFT_IS_AN_END:
        left += image.width - shown[1] / scale
    if turn in TOP_IS_AN_END:
        top += image.height - shown[0] / scale
    x, y = math.floor(left), math.floor(top)
    around = (x, y, math.ceil(left + width), math.ceil(top + height))  # a pixel may be shown in part
    if around != (0, 0, *image.size):
        image = image.crop(around)
    image = _with_channels(image, file, channels)
    box = (left - x, top - y, left - x + width, top - y + height)
    image = image.resize(image_size[::-1], Image.Resampling.BILINEAR, box)
    return np.asarray(image).reshape(*image_size, channels)


def _with_channels(image: Image.Image, file: Image.Image, channels: int) -> Image.Image:
    """See `decode` of the channels and `in_8_bits` of the file."""
    clear = image.info.get("transparency") if image.mode.startswith("I") else None
    hidden = None if clear is None else np.asarray(image) == clear  # the one of 65,536 greys that is transparent
    image = in_8_bits(image, file)
    if hidden is not None:
        image.putalpha(Image.fromarray(np.where(hidden, 0, 255).astype(np.uint8)))
    transparent = image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info
    if channels == 4:
        return image.convert("RGBA")
    if transparent:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    wanted = "L" if channels == 1 else "RGB"
    if image.mode == "LAB":  # which Pillow converts to RGB alone
        image = image.convert("RGB")
    return image if image.mode == wanted else image.convert(wanted)


def _reason(error: Exception, data: bytes) -> str:
    if not data:
        return EMPTY
    if isinstance(error, Image.DecompressionBombError):
        return "too large (possibly a decompression bomb)"
    if isinstance(error, MemoryError):
        return NO_MEMORY
    if isinstance(error, UnidentifiedImageError) or (isinstance(error, SyntaxError) and len(data) < 64):
        if why := heic.why_unread(data):
            return why
        start = data[:512]
        is_text = not any(byte < 9 or 13 < byte < 32 for byte in start)
        return "not an image (text)" if is_text else "not an image in a known format"
    reason = first_line(error)
    cut_short = "truncated" in reason.lower() or "end of file" in reason.lower()
    return "truncated" if cut_short else f"broken ({reason})"
