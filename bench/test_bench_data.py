"""Images a second of each way through the data path, on small generated files. Run with --benchmark-only.

`extra_info["images_per_second"]` of each is the median. `bench/data_path.py` compares the same ways on real images.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from fastdcgan.data import open_dataset, open_source
from fastdcgan.data.census import take_census
from fastdcgan.data.check import check
from fastdcgan.data.file_dataset import dali_is_installed
from fastdcgan.data.pack import pack

SIZE, BATCH, ROUNDS = 64, 50, 3
COUNTS = {"small": 2000, "photo": 50}
SIDES = {"small": (32, 32), "photo": (500, 375)}

needs_dali = pytest.mark.skipif(not dali_is_installed(), reason="DALI is not installed")
LOADERS = [pytest.param("dali", marks=needs_dali), "torch"]


@pytest.fixture(scope="module", autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """torch's threads are for training, and nothing trains here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["small", "photo"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`class/NNNN.jpg`: as many files as COUNTS says, of a size and detail like CIFAR-10's, or like photographs'."""
    width, height = SIDES[request.param]
    root = tmp_path_factory.mktemp(request.param)
    (root / "class").mkdir()
    random = np.random.default_rng(0)
    for number in range(COUNTS[request.param]):
        coarse = Image.fromarray(random.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        (root / "class" / f"{number:04}.jpg").write_bytes(file.getvalue())
    return root


@pytest.fixture
def rate(benchmark: Any, folder: Path) -> Callable[[Callable[[], object]], None]:
    """Time something that goes through every image of the folder once."""

    def measure(work: Callable[[], object]) -> None:
        benchmark.pedantic(work, rounds=ROUNDS, warmup_rounds=1)
        benchmark.extra_info["images_per_second"] = round(COUNTS[kind(folder)] / benchmark.stats.stats.median)

    return measure


def kind(folder: Path) -> str:
    return folder.name.rstrip("0123456789")


def epoch(folder: Path, cache_dir: Path, **options: Any) -> None:
    size, device = (SIZE, SIZE), torch.device("cpu")
    stream = open_dataset(str(folder), image_size=size, device=device, cache_dir=cache_dir, **options).stream(BATCH)
    for _ in range(COUNTS[kind(folder)] // BATCH):
        stream.advance()
        stream.source.index_select(0, stream.index)
    stream.close()


def test_image_folder_and_data_loader(folder: Path, rate: Callable[..., None]) -> None:
    """The usual loader, to compare with: two workers."""
    steps = [
        transforms.Resize(SIZE),
        transforms.CenterCrop(SIZE),
        transforms.ToTensor(),
        transforms.Normalize(0.5, 0.5),
    ]

    def one_epoch() -> None:
        loader = DataLoader(ImageFolder(str(folder), transforms.Compose(steps)), BATCH, shuffle=True, num_workers=2)
        for _ in loader:
            pass

    rate(one_epoch)


@pytest.mark.parametrize("cache", ["host", "disk", "off"])
@pytest.mark.parametrize("loader", LOADERS)
def test_first_epoch(
    loader: str, cache: str, folder: Path, rate: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """From nothing: listing, looking at the files, decoding, and keeping the images if they are kept."""
    rate(lambda: epoch(folder, tmp_path_factory.mktemp("cache"), loader=loader, cache=cache))


def test_from_the_cache(folder: Path, rate: Callable[..., None], tmp_path: Path) -> None:
    """Batches of uint8 images that are there already."""
    data = open_dataset(
        str(folder), image_size=(SIZE, SIZE), device=torch.device("cpu"), cache="host", cache_dir=tmp_path
    )
    stream = data.stream(BATCH)
    for _ in range(COUNTS[kind(folder)] // BATCH):
        stream.advance()

    def one_epoch() -> None:
        for _ in range(COUNTS[kind(folder)] // BATCH):
            stream.advance()
            stream.source.index_select(0, stream.index)

    rate(one_epoch)


def test_looking_at_the_files(folder: Path, rate: Callable[..., None]) -> None:
    """What `train` does before the first batch."""
    rate(lambda: take_census(open_source(str(folder)), 2, None))


def test_data_check(folder: Path, rate: Callable[..., None]) -> None:
    rate(lambda: check(str(folder)))


@pytest.mark.parametrize("loader", LOADERS)
def test_data_pack(
    loader: str, folder: Path, rate: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> None:
    def packed() -> None:
        there = tmp_path_factory.mktemp("pack")
        pack(str(folder), image_size=(SIZE, SIZE), out=there / "set.npy", loader=loader, cache_dir=there)

    rate(packed)
