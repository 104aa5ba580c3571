"""Freed memory stays with the process while it trains on a CPU."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from types import SimpleNamespace

import pytest

from fastdcgan.heap import Heap, heap

# 40 MB: glibc gives tensors of more than 32 MB back to the system whatever it has learnt of the process.
SCRIPT = """
import resource, sys, torch
from fastdcgan.heap import heap

def faults(keeps, megabytes=40):
    heap.keeps = keeps
    for turn in range(20):
        if turn == 15:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(megabytes << 18).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

# The 40 MB that are kept by then stay: what glibc keeps of itself is more.
print(faults(False), faults(True), faults(False, 100))
"""


@pytest.fixture(scope="module", autouse=True)
def with_glibc() -> None:
    before, heap.keeps = heap.keeps, True
    keeps, heap.keeps = heap.keeps, before
    if not keeps:
        pytest.skip("the C library is not glibc")


def test_the_next_tensors_need_no_new_pages() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    usual, kept, usual_again = map(int, run.stdout.split())
    large_pages = 5 * 40 // 2  # the fewest that the system could hand out
    assert kept < large_pages / 2
    assert min(usual, usual_again) > large_pages / 2


def test_afterwards_the_c_library_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """It adapts none of these by itself once it was told one of them: all three go back to where it would have been."""
    told: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda parameter, value: told.append((parameter, value)))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    other = Heap()
    other.keeps = True
    assert dict(told) == {-4: 0, -1: -1}, "no block of its own from the system, and nothing trimmed"
    other.keeps = True
    assert len(told) == 2
    other.keeps = False
    assert dict(told) == {-4: 65536, -3: 32 * 2**20, -1: 64 * 2**20} and not other.keeps


def test_another_c_library_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    other = Heap()
    other.keeps = True
    assert not other.keeps
