"""Sets of images at the size a run was trained on, for measurements."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdcgan.data import Dataset, open_dataset
from fastdcgan.models import AnyDiscriminator, AnyGenerator
from fastdcgan.pixels import to_floats
from fastdcgan.processor import describe_device
from fastdcgan.versions import versions

BATCH = 256


def open_images(data: str, network: AnyDiscriminator | AnyGenerator) -> Dataset:
    """The set `data` names (as in `fastdcgan train`), at the network's size.

    Raises:
        UserError: no such data, or nothing usable in it.
    """
    return open_dataset(
        data, image_size=network.image_size, channels=network.channels, device=torch.device("cpu"), cache="off"
    )


def pictures_of(data: str, paths: Sequence[Path]) -> list[Path]:
    """Those of the paths that are files in the folder `data`, and so perhaps of the set."""
    folder = os.path.realpath(os.path.expanduser(data))
    return [path for path in paths if path.is_file() and Path(os.path.realpath(path)).is_relative_to(folder)]


def batches(data: Dataset, indices: list[int]) -> Iterator[Tensor]:
    """The images with these numbers, in order, as (n, C, H, W) in -1..1."""
    for first in range(0, len(indices), BATCH):
        yield to_floats(data.take(indices[first : first + BATCH]).permute(0, 3, 1, 2))


def shuffled(count: int, seed: int) -> list[int]:
    """0 .. count - 1 in an order of the seed's."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def circumstances(device: torch.device) -> dict[str, Any]:
    """When and on what something was measured, for its JSON."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": describe_device(str(device)),
        "versions": versions(),
    }
