"""Memory made ready ahead of its use."""

from __future__ import annotations

import mmap
import weakref
from pathlib import Path

import numpy as np
import pytest

from fastdcgan.data.prefault import MADV_POPULATE_WRITE, PIECE_BYTES, prefault, prefaulted

SIZE = 16 * PIECE_BYTES


def resident() -> int:
    """Bytes of this process that have memory."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss:"))


def can_populate() -> bool:
    try:
        mmap.mmap(-1, mmap.PAGESIZE).madvise(MADV_POPULATE_WRITE)
    except (OSError, AttributeError):
        return False
    return True


populates = pytest.mark.skipif(not can_populate(), reason="this system makes pages only as they are written")


@populates
def test_pages_are_there_before_the_first_write() -> None:
    # Pages nobody has touched, as np.empty's may have been; and a start that is on no page's edge.
    array = np.frombuffer(mmap.mmap(-1, SIZE + 1), dtype=np.uint8)[1:]
    before = resident()
    prefault(weakref.ref(array))
    assert resident() - before >= SIZE - 2 * PIECE_BYTES  # all but the cut pieces at the two ends
    array[:] = 7
    assert (array == 7).all()


def test_what_is_written_stays() -> None:
    array = np.empty(SIZE, dtype=np.uint8)
    array[: SIZE // 2] = np.arange(SIZE // 2, dtype=np.uint32).astype(np.uint8)
    expected = array[: SIZE // 2].copy()
    prefault(weakref.ref(array))
    assert np.array_equal(array[: SIZE // 2], expected)


def test_writing_while_pages_are_made_loses_nothing() -> None:
    rng = np.random.default_rng()
    for _ in range(5):
        array = prefaulted(SIZE).reshape(-1, 4096)
        rows = rng.permutation(len(array))
        for row in rows:
            array[row] = row % 251
        assert (array == (np.arange(len(array)) % 251)[:, None]).all()


@populates
def test_an_array_that_is_gone_is_left_alone() -> None:
    array = np.empty(SIZE, dtype=np.uint8)
    gone = weakref.ref(array)
    del array
    before = resident()
    prefault(gone)
    assert resident() - before < PIECE_BYTES
