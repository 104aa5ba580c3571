"""What a measurement depends on: device, driver, versions, date, commit and command. Every result carries it."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fastdcgan.processor import native_bf16
from fastdcgan.versions import versions

REPOSITORY = Path(__file__).resolve().parent.parent


def describe(device: torch.device, command: str) -> dict[str, Any]:
    """Device, versions, date, commit and the command that repeats the measurement, as JSON has them."""
    return {
        "device": device_facts(device),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "command": command,
    }


def command_line(module: str) -> str:
    """The command that this process, `python -m fastdcgan.bench.MODULE ...`, was started with."""
    return shlex.join(["python", "-m", f"fastdcgan.bench.{module}", *sys.argv[1:]])


def device_facts(device: torch.device) -> dict[str, Any]:
    """Name, kind and what else its speed depends on."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "kind": "cuda",
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "driver": nvidia_driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return {
        "kind": "cpu",
        "name": cpu_name(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "native_bf16": native_bf16(),
        # At the end of the measurement; above `threads` it was disturbed.
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def nvidia_driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def commit() -> str | None:
    """The checkout's commit, with a + where measured files were changed since; in a copy without git, $COMMIT."""

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        measured = ("fastdcgan/*.py", "fastdcgan/*.c", "kernels", "bench/*.py")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *measured)
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT")


def write_result(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
