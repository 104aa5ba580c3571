"""HEIC, in which iPhones save photographs: Pillow reads it where the package pillow-heif is installed."""

from __future__ import annotations

import re

try:
    import pillow_heif
except ImportError:
    VERSION = ""
else:
    pillow_heif.register_heif_opener()
    VERSION = pillow_heif.__version__

NEEDED = "HEIC, which needs one more package: pip install pillow-heif"
BRANDS = re.compile(rb"....ftyp(?:hei[cxms]|hev[cxms]|mif1|msf1)", re.DOTALL)  # ISO 23008-12


def why_unread(head: bytes) -> str:
    """Why a file that begins so cannot be read here, '' where HEIC is not the reason."""
    return NEEDED if not VERSION and BRANDS.match(head) else ""
