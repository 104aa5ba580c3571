"""What the first bytes of a file say about the image in it: cheap enough to ask of every file before training starts.

JPEG and PNG headers are read here, in a few microseconds; everything else is asked of Pillow.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import PurePosixPath
from typing import NamedTuple

from fastdcgan.data import pillow_decode
from fastdcgan.data.pillow_decode import EMPTY, MOST_PIXELS, UnusableImage, too_many_pixels

# Kinds; OTHER is left to Pillow: alpha, palettes, CMYK, 16 bits, rotation, WebP...
UNUSABLE, JPEG, PNG, OTHER = range(4)

IMAGE_SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".webp",
        ".gif",
        ".bmp",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".avif",
        ".jp2",
        ".j2k",
        ".jpx",
        ".tga",
        ".pcx",
        ".qoi",
        ".dds",
        ".sgi",
        ".heic",
        ".heif",
        ".hif",
    ]
)
TURNED_BY_XMP = re.compile(rb"tiff:Orientation(?:=\"|>)[2-8]")  # as Pillow has it, where EXIF says nothing
# JPEG markers that no segment of a plain file has: nothing, filling, its end, frames neither baseline nor progressive
NO_SEGMENT = frozenset(b"\x00\xff\xd9\xc3\xc5\xc6\xc7\xc9\xca\xcb\xcd\xce\xcf")
# Chunks of a PNG's text in which Pillow finds that it is turned: EXIF as ImageMagick writes it, and XMP in other chunks
# or compressed.
ASKS_PILLOW = re.compile(
    rb"(?:tEXt|zTXt|iTXt)(?:Raw profile type exif|exif)\0|zTXtXML:com\.adobe\.xmp\0|iTXtXML:com\.adobe\.xmp\0[^\0]"
)
MOST_BOXES = 1000  # at the top of a HEIC or AVIF, which has three or four
LONGEST_HEADER, HEADERS = 4096, 512  # bytes of a JPEG's header, and how many of them, that are worth remembering
MAGIC = re.compile(  # text can begin with the letters of a BMP or of a PPM
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|BM....\0\0\0\0|P[56]\s[\d#]|RIFF....WEBP|....ftyp(?:avif|hei[cxms]|hev[cxms]|mif1|msf1)"
    rb"|\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51\0",
    re.DOTALL,
)
# What other files begin with as well, whose names have a suffix: raw files of cameras as TIFFs, text as PNMs.
MAGIC_OF_SEVERAL = re.compile(rb"II\*\0|MM\0\*|P[1-4]\s[\d#]")


class Facts(NamedTuple):
    """One file, as far as its header tells."""

    kind: int
    height: int = 0  # as shown, that is after an EXIF rotation
    width: int = 0
    colour: bool = False  # False: shades of grey only
    reason: str = ""  # why an UNUSABLE file is that


class Glimpse(NamedTuple):
    """The part of a file that `examine` needs; `whole` reads all of it, for the few files that must be looked at."""

    head: bytes
    tail: bytes
    size: int
    whole: Callable[[], bytes]


def unusable(reason: str) -> Facts:
    return Facts(UNUSABLE, reason=reason)


def has_image_magic(name: str, head: bytes) -> bool:
    """Whether a file starts like an image (for files whose name does not say so)."""
    if MAGIC.match(head):
        return True
    return MAGIC_OF_SEVERAL.match(head) is not None and not PurePosixPath(name).suffix


def examine(glimpse: Glimpse) -> Facts:
    """The facts about one file. Never raises for what is in the file; OSError passes through."""
    head = glimpse.head
    if glimpse.size == 0:
        return unusable(EMPTY)
    facts = None
    if head.startswith(b"\xff\xd8\xff"):
        facts = _jpeg_once(_header(head)) or _jpeg(head)
        if facts is None and glimpse.size > len(head):
            facts = _jpeg(glimpse.whole())  # long metadata pushed the frame header out of sight
        complete = b"\xff\xd9" in glimpse.tail
    elif head.startswith(b"\x89PNG\r\n\x1a\n"):
        facts = _png(head, whole=len(head) == glimpse.size)
        complete = b"IEND" in glimpse.tail
    elif head[:4] == b"RIFF":
        complete = glimpse.size >= int.from_bytes(head[4:8], "little")
    elif head.startswith(b"GIF8"):
        complete = b"\x3b" in glimpse.tail
    elif head[4:8] == b"ftyp":  # HEIC and AVIF
        data = glimpse.whole()
        facts, complete = _ask_pillow(data), _boxes_are_whole(data)
    else:
        complete = True
    if facts is None:
        facts = _ask_pillow(glimpse.whole())
    if facts.kind != UNUSABLE and not complete:  # probably cut short: only decoding tells
        reason = pillow_decode.fault(glimpse.whole())
        return unusable(reason) if reason else facts._replace(kind=OTHER)
    return facts


def is_plain(data: bytes, kind: int, size: tuple[int, int]) -> bool:
    """Whether a whole file is still what `examine` found, a JPEG or PNG of (height, width) `size` as shown, and every
    segment of it is where the one before says: DALI can crash on others, where Pillow finds what is wrong.

    Asked of every file once more as it is decoded, hence in as few steps as there are.
    """
    if kind == PNG:
        facts = _png(data, whole=True)
        return facts is not None and facts[:3] == (PNG, *size)
    return _leads_to_pixels_once(_header(data), size) or _leads_to_pixels(data, size)


def _header(jpeg: bytes) -> bytes:
    """What comes before the pixels, or less where that is long. Whoever finds it whole knows as much as from the file.

    One program wrote most sets, with the same header in every file: those are walked through once (`lru_cache`).
    """
    return jpeg[: jpeg.find(b"\xff\xda", 0, LONGEST_HEADER) + 4]


def _leads_to_pixels(data: bytes, size: tuple[int, int]) -> bool:
    """Whether a JPEG's segments follow one another up to the pixels, with a frame of (height, width) `size`."""
    frame, at, last = b"\x08" + struct.pack(">HH", *size), 2, len(data) - 4
    found = False
    while at <= last and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xDA:
            return found and data[:2] == b"\xff\xd8"
        if 0xC0 <= marker <= 0xC2:
            if found or data[at + 4 : at + 9] != frame or data[at + 9 : at + 10] not in (b"\x01", b"\x03"):
                return False
            found = True
        elif marker in NO_SEGMENT:
            return False
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    return False


def _jpeg(data: bytes) -> Facts | None:
    """Facts from a JPEG's segments up to the pixels, None where they do not suffice."""
    at, orientation, adobe_transform, frame = 2, 0, -1, None
    while at + 4 <= len(data):
        marker = data[at + 1]
        if data[at] != 0xFF or marker == 0xFF:
            return None
        if marker == 0xDA:
            if frame is None or (frame[2] == 3 and adobe_transform == 0):
                return None
            height, width, components = frame
            if orientation >= 5:
                height, width = width, height
            return Facts(JPEG if orientation <= 1 else OTHER, height, width, components == 3)
        length = (data[at + 2] << 8) | data[at + 3]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if at + 10 > len(data):
                return None
            precision, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
            baseline, progressive = marker in (0xC0, 0xC1), marker == 0xC2
            plain = (baseline or progressive) and precision == 8 and components in (1, 3) and height and width
            if not plain or frame is not None:
                return None
            # Only a baseline image can be decoded at 1/8 size without holding all of it.
            if height * width > (MOST_PIXELS * 64 if baseline else MOST_PIXELS):
                return unusable(too_many_pixels(height, width))
            frame = height, width, components
        elif marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            if orientation:  # a second block, which Pillow takes for a part of the first
                return None
            orientation = _exif_orientation(data[at + 10 : at + 2 + length])
        elif marker == 0xE1 and TURNED_BY_XMP.search(data, at + 4, at + 2 + length):
            return None
        elif marker == 0xEE and data[at + 4 : at + 9] == b"Adobe" and length >= 14 and at + 16 <= len(data):
            adobe_transform = data[at + 15]
        elif marker == 0xD9:
            return None
        at += 2 + length
    return None


_jpeg_once, _leads_to_pixels_once = lru_cache(HEADERS)(_jpeg), lru_cache(HEADERS)(_leads_to_pixels)


def _exif_orientation(tiff: bytes) -> int:
    """1..8; 1, "as it is", where the EXIF block is absent or broken."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 10:
        return 1
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    if start + 2 > len(tiff):
        return 1
    (entries,) = struct.unpack_from(order + "H", tiff, start)
    for at in range(start + 2, min(start + 2 + 12 * entries, len(tiff) - 11), 12):
        tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, at)
        if tag == 0x0112:
            return int(value) if 1 <= value <= 8 else 1
    return 1


def _png(head: bytes, whole: bool) -> Facts | None:
    """Facts from a PNG's chunks up to the pixels, or of the whole file, None where Pillow should look."""
    if len(head) < 33 or head[8:16] != b"\0\0\0\rIHDR":
        return None
    width, height, depth, colour_type, _, _, interlaced = struct.unpack_from(">IIBBBBB", head, 16)
    if width * height > MOST_PIXELS:
        return unusable(too_many_pixels(height, width))
    if depth != 8 or colour_type not in (0, 2) or interlaced or not width or not height:
        return None
    at, facts, pixels = 8, Facts(PNG, height, width, colour_type == 2), False
    while at + 8 <= len(head):
        length, name = struct.unpack_from(">I4s", head, at)
        pixels = pixels or name == b"IDAT"
        if not pixels and zlib.crc32(head[at + 4 : at + 8 + length]) != int.from_bytes(head[at + 8 + length :][:4]):
            return None  # Pillow takes such a file for broken, DALI does not
        if name in (b"tRNS", b"eXIf", b"acTL") or ASKS_PILLOW.match(head, at + 4):
            return None
        if name in (b"tEXt", b"iTXt") and TURNED_BY_XMP.search(head, at + 8, at + 8 + length):
            return None
        at += 12 + length
        if name == b"IEND" or (pixels and not whole):
            return facts if not whole or at <= len(head) else None
    return None


def _boxes_are_whole(data: bytes) -> bool:
    """Whether a file's boxes (ISO 14496-12, section 4.2) end where it ends."""
    at = 0
    for _ in range(MOST_BOXES):
        if at >= len(data):
            break
        size = int.from_bytes(data[at : at + 4])
        if size == 0:  # to the file's end, wherever that was
            return True
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16])
        at += max(size, 8)
    return at == len(data)


def _ask_pillow(data: bytes) -> Facts:
    try:
        height, width, colour = pillow_decode.measure(data)
    except UnusableImage as fault:
        return unusable(str(fault))
    return Facts(OTHER, height, width, colour)
