"""Memory for a large array, made ready by a thread while others still list, decode and train."""

from __future__ import annotations

import ctypes
import sys
import weakref
from threading import Thread

import numpy as np
from numpy.typing import NDArray

MADV_POPULATE_WRITE = 23  # Linux 5.14: give these pages memory as a write would, and leave what is in them alone
PIECE_BYTES = 256 << 10  # for one piece others wait that ask the system for memory


def prefaulted(size: int) -> NDArray[np.uint8]:
    """uint8 (size,) as from np.empty (which asks for large pages), whose pages a thread is making ready.

    Otherwise each page comes into being at the first write to it, and whoever writes waits: a fifth of the time in
    which small images are decoded, and longer than that on virtual machines that get their memory piece by piece.
    """
    array = np.empty(size, dtype=np.uint8)
    Thread(target=prefault, args=(weakref.ref(array),), name="prefault", daemon=True).start()
    return array


def prefault(array: weakref.ref[NDArray[np.uint8]]) -> None:
    """Give memory to every whole piece of an array, until it is gone; its content stays, also while it is written to.

    Does nothing where the system cannot: pages then come into being as they are written.
    """
    if not sys.platform.startswith("linux") or (found := array()) is None:
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start, size = found.ctypes.data, found.nbytes
    del found
    for piece in range(-(-start // PIECE_BYTES) * PIECE_BYTES, start + size - PIECE_BYTES + 1, PIECE_BYTES):
        held = array()  # for as long as the system is at work on its memory
        if held is None or madvise(piece, PIECE_BYTES, MADV_POPULATE_WRITE) != 0:
            return
        del held
