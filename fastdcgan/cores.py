"""How many processor cores this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")  # where a container finds its limits


def allowed_cores() -> int:
    """Those it may run on, or fewer where a container limits their time: as many as that time fills, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # versions 2 and 1
        try:
            quota, period = map(int, " ".join((CGROUPS / file).read_text() for file in files).split())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        if quota > 0 and period > 0:
            cores = min(cores, math.ceil(quota / period))
    return cores
