"""Whether memory that was freed stays with the process, a switch like those of `torch.backends`."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
KEEPING = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}
# What glibc arrives at by itself once large tensors have been freed.
USUAL = {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 64 << 20}


class Heap:
    """The C library's heap.

    On a CPU every step asks for the same tensors again. glibc gives the large ones back to the system when they are
    freed, and the next step gets them anew page by page: some 40,000 page faults a step at batch 64 and 64x64 pixels.
    """

    _keeps = False

    @property
    def keeps(self) -> bool:
        """True: freed memory is kept for the next step. Setting it does nothing where the C library is not glibc."""
        return self._keeps

    @keeps.setter
    def keeps(self, keeps: bool) -> None:
        if keeps == self._keeps or not sys.platform.startswith("linux"):
            return
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            for parameter, value in (KEEPING if keeps else USUAL).items():
                mallopt(parameter, value)
            self._keeps = keeps


heap = Heap()
