"""How much memory and disk there is for decoded images, and how many processor cores for decoding."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from fastdcgan.cores import CGROUPS, allowed_cores
from fastdcgan.errors import number_in

CGROUP_V1 = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_")
# Shares of what is free that --cache auto takes at most.
DEVICE_SHARE, HOST_SHARE, DISK_SHARE = 0.4, 0.5, 0.5


def cores() -> int:
    """Processor cores for this process, shared among the ranks of one machine."""
    return max(allowed_cores() // ranks_here(), 1)


def ranks_here() -> int:
    """Training processes on this machine (torchrun says so)."""
    return max(number_in("LOCAL_WORLD_SIZE", 1), 1)


def fits_on_device(size: int, device: torch.device) -> bool:
    """Whether --cache auto keeps so many bytes in the memory of a GPU."""
    return size <= DEVICE_SHARE * free_device_bytes(device)


def fits_on_host(size: int) -> bool:
    """Whether --cache auto keeps so many bytes in this machine's memory."""
    return size <= HOST_SHARE * free_host_bytes()


def fits_on_disk(size: int, folder: Path) -> bool:
    """Whether --cache auto keeps so many bytes in a folder."""
    return size <= DISK_SHARE * free_disk_bytes(folder)


def free_device_bytes(device: torch.device) -> int:
    torch.cuda.empty_cache()  # what PyTorch has kept of earlier runs' memory is free too
    return torch.cuda.mem_get_info(device)[0]


def free_host_bytes() -> int:
    """Memory that can be used without swapping, within a container's limit, for one rank."""
    free = [*left_in_container("memory.max", "memory.current", ""), *left_in_container(*CGROUP_V1)]
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
    if not free:  # not Linux
        free.append(
            os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 if hasattr(os, "sysconf") else 4 << 30
        )
    return max(min(free), 0) // ranks_here()


def left_in_container(limit: str, used: str, prefix: str) -> Iterator[int]:
    """The bytes that a container's limit leaves; none where there is no limit.

    What is cached of files that were read counts as used, but gives way.

    Args:
        limit, used: files below `CGROUPS`.
        prefix: of memory.stat's entries.
    """
    try:
        most, taken = (int((CGROUPS / file).read_text()) for file in (limit, used))
    except (OSError, ValueError):  # no such file, or "max"
        return
    entries: dict[str, str] = {}
    with suppress(OSError):
        lines = (CGROUPS / limit).with_name("memory.stat").read_text().splitlines()
        entries = dict(line.split(maxsplit=1) for line in lines)
    yield most - taken + sum(int(entries.get(f"{prefix}{which}_file", 0)) for which in ("active", "inactive"))


def free_disk_bytes(folder: Path) -> int:
    """Free space where `folder` is or will be."""
    while not os.path.exists(folder):
        folder = folder.parent
    return shutil.disk_usage(folder).free


def in_words(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
