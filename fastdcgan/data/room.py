"""How much memory and disk there is for decoded images, and how many processor cores for decoding."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

# Shares of what is free that --cache auto takes at most.
DEVICE_SHARE, HOST_SHARE, DISK_SHARE = 0.4, 0.5, 0.5


def cores() -> int:
    """Processor cores for this process, shared among the ranks of one machine."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(available // ranks_here(), 1)


def ranks_here() -> int:
    """Training processes on this machine (torchrun says so)."""
    return max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def free_device_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0]


def free_host_bytes() -> int:
    """Memory that can be used without swapping, within a container's limit, for one rank."""
    free = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            free.append(int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except OSError:
        pass
    if not free:  # neither file exists outside Linux
        free.append(
            os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 if hasattr(os, "sysconf") else 4 << 30
        )
    return max(min(free), 0) // ranks_here()


def free_disk_bytes(folder: Path) -> int:
    """Free space where `folder` is or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def in_words(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
