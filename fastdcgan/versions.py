"""Versions of what a result depends on."""

from __future__ import annotations

import importlib.metadata
import platform

PACKAGES = ("fastdcgan", "torch", "torchvision", "triton", "nvidia-dali-cuda130", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Of Python and those of PACKAGES that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
