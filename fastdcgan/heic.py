"""HEIC, in which iPhones save photographs: Pillow reads it where the package pillow-heif is installed."""

from __future__ import annotations

import re

from PIL import Image

# Registers Pillow's own formats: now, as doing it lazily is not safe from several threads, and first, as pillow-heif
# would take some AVIF for its own, and fail.
Image.init()
try:
    import pillow_heif
except Exception:  # it is not there, or does not go with this Pillow
    VERSION = ""
else:
    pillow_heif.register_heif_opener()
    VERSION = pillow_heif.__version__

NEEDED = "HEIC, which needs one more package: pip install pillow-heif"
BRANDS = re.compile(rb"....ftyp(?:hei[cxms]|hev[cxms]|mif1|msf1)", re.DOTALL)  # ISO 23008-12
LOOKED_AT = 64  # bytes: with the other brands that a file names


def why_unread(head: bytes) -> str:
    """Why a file that begins so cannot be read here, '' where HEIC is not the reason."""
    if VERSION or not BRANDS.match(head) or b"avif" in head[:LOOKED_AT]:
        return ""
    return NEEDED
