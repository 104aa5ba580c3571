"""fastdcgan: train a DCGAN on your own images, fast.

from fastdcgan import TrainConfig, train, load_run
run = train(TrainConfig(data="photos", image_size=64, compile=True))
with torch.no_grad():
    images = load_run(run).generator(torch.randn(16, 100))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdcgan.apps.export import from_pretrained
    from fastdcgan.config import TrainConfig
    from fastdcgan.errors import UserError
    from fastdcgan.models import Discriminator, Generator
    from fastdcgan.runs import load_run
    from fastdcgan.trainer import Interrupted, train

__all__ = [
    "Discriminator",
    "Generator",
    "Interrupted",
    "TrainConfig",
    "UserError",
    "from_pretrained",
    "load_run",
    "train",
]

_HOME = {
    "Discriminator": "fastdcgan.models",
    "Generator": "fastdcgan.models",
    "Interrupted": "fastdcgan.trainer",
    "TrainConfig": "fastdcgan.config",
    "UserError": "fastdcgan.errors",
    "from_pretrained": "fastdcgan.apps.export",
    "load_run": "fastdcgan.runs",
    "train": "fastdcgan.trainer",
}


def __dir__() -> list[str]:
    """What there is to complete, also before it is used."""
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `fastdcgan --help` must not wait for torch."""
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("fastdcgan")
    if name not in _HOME:
        raise AttributeError(f"module 'fastdcgan' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)
