"""How many images a second reach the training step: ImageFolder + DataLoader against every way of fastdcgan.

    python -m fastdcgan.bench.data_path --data DIR [--image-size 64] [--device cuda] --json OUT

DIR is a folder of images, which are delivered to the device. The ways are measured in turn, several rounds, and medians
are compared, so that a machine that gets busier slows them all. First epochs decode; "cache" gathers batches from kept
images. A virtual machine may have to fetch new memory from its host piece by piece, which can take as long as decoding:
"memory at hand" is a first epoch whose kept images get memory that was in use a moment before, as on a machine of one's
own. On a GPU, DALI decodes files of some size there.
"""

from __future__ import annotations

import argparse
import functools
import mmap
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from fastdcgan.bench.environment import command_line, describe, write_result
from fastdcgan.bench.roofline import synchronize
from fastdcgan.data import Dataset, open_dataset
from fastdcgan.data.dataset import Stream
from fastdcgan.data.file_dataset import dali_is_installed

CACHE_SECONDS = 1.0


class FlatImageFolder(ImageFolder):  # type: ignore[misc]  # torchvision has no types
    """ImageFolder that accepts a flat folder as well: the whole folder is one class."""

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        names = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir()) or ["."]
        return names, {name: i for i, name in enumerate(names)}


def usual_images(data: Path, image_size: tuple[int, int]) -> FlatImageFolder:
    """Decoded, resized, cropped from the centre, as float tensors in -1..1: what the usual loader loads."""
    steps = [
        transforms.Resize(min(image_size)),
        transforms.CenterCrop(image_size),
        transforms.ToTensor(),
        transforms.Normalize(0.5, 0.5),
    ]
    return FlatImageFolder(str(data), transforms.Compose(steps))


def image_folder(data: Path, size: int, batch: int, most: int, device: torch.device) -> float:
    """images/s of the usual loader with two workers."""
    started, delivered = time.perf_counter(), 0
    dataset = usual_images(data, (size, size))
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=batch, shuffle=True, num_workers=2)
    for images, _ in loader:
        images.to(device, non_blocking=True)
        delivered += len(images)
        if delivered >= most:
            break
    synchronize(device)
    return delivered / (time.perf_counter() - started)


def opened(data: Path, size: int, loader: str, cache: str, cache_dir: str, device: torch.device) -> Dataset:
    return open_dataset(
        str(data),
        image_size=(size, size),
        channels=3,
        device=device,
        loader=loader,
        cache=cache,
        cache_dir=Path(cache_dir),
    )


def first_epoch(
    data: Path,
    size: int,
    batch: int,
    most: int,
    device: torch.device,
    loader: str,
    cache: str,
    memory_at_hand: bool = False,
) -> float:
    """images/s from nothing, as in the first epoch of a first run: listing and looking at the files included."""
    with TemporaryDirectory() as cache_dir:
        started, delivered = time.perf_counter(), 0
        dataset = opened(data, size, loader, cache, cache_dir, device)
        if memory_at_hand:
            paused = time.perf_counter()
            np.empty(dataset.count * size * size * 3, dtype=np.uint8)[:: mmap.PAGESIZE] = 1
            started += time.perf_counter() - paused
        stream = dataset.stream(batch)
        while delivered < most:
            stream.advance()
            stream.source.index_select(0, stream.index)
            delivered += batch
        synchronize(device)
        rate = delivered / (time.perf_counter() - started)
        stream.close()
    return rate


def from_cache(stream: Stream) -> float:
    """images/s of uint8 batches gathered from kept images."""
    started, delivered = time.perf_counter(), 0
    while time.perf_counter() - started < CACHE_SECONDS:
        stream.advance()
        stream.source.index_select(0, stream.index)
        delivered += len(stream.index)
    synchronize(stream.source.device)
    return delivered / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--images", type=int, default=10_000, help="at most this many images per measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)  # for all ways alike: torch's threads are for training, and nothing trains here
    data, size, batch, device = options.data, options.image_size, options.batch_size, options.device
    kept_in = "host" if device.type == "cpu" else "device"

    with TemporaryDirectory() as cache_dir:
        kept = opened(data, size, "auto", kept_in, cache_dir, device)
        batch = min(batch, kept.count)
        most = min(options.images, kept.count // batch * batch)
        stream = kept.stream(batch)
        for _ in range(2 * kept.count // batch + 1):
            stream.advance()

        ways: dict[str, Callable[[], float]] = {
            "ImageFolder + DataLoader(num_workers=2)": lambda: image_folder(data, size, batch, most, device)
        }
        for loader in ("dali", "torch") if dali_is_installed() else ("torch",):
            first = functools.partial(first_epoch, data, size, batch, most, device, loader)
            way = f"--loader {loader} --cache"
            ways[f"{way} {kept_in}, first epoch"] = functools.partial(first, kept_in)
            if device.type == "cpu":
                ways[f"{way} host, first epoch, memory at hand"] = functools.partial(first, "host", memory_at_hand=True)
            ways[f"{way} off, first epoch"] = functools.partial(first, "off")
        ways["cache"] = functools.partial(from_cache, stream)
        rates: dict[str, list[float]] = {name: [] for name in ways}
        about = {
            "measured": "data path",
            "data": data.name,
            "images": most,
            "files": kept.count,
            "image_size": size,
            "batch_size": batch,
        }
        for _ in range(options.rounds):
            for name, measure in ways.items():
                rates[name].append(measure())
            rows = compared(rates)
            write_result(options.json, describe(device, command_line("data_path")) | about | {"ways": rows})
    for row in rows:
        print(f"{row['images_per_second']:>10,} images/s  x{row['ratio']:<7} {row['way']}")


def compared(rates: dict[str, list[float]]) -> list[dict[str, Any]]:
    """images/s of each way, the median of its rounds, and its ratio to the first way's."""
    medians = {way: statistics.median(found) for way, found in rates.items()}
    baseline = next(iter(medians.values()))
    return [
        {
            "way": way,
            "images_per_second": round(medians[way]),
            "ratio": round(medians[way] / baseline, 2),
            "all": [round(rate) for rate in found],
        }
        for way, found in rates.items()
    ]


if __name__ == "__main__":
    main()
