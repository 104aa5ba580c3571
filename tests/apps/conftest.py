"""A tiny run over handwritten digits, trained once for all tests of what people do with a run."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastdcgan.apps.pictures import save, to_picture
from fastdcgan.apps.trained import open_both
from fastdcgan.data import open_dataset

SIZE = 16


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits at 16x16 pixels, width 16, 400 steps: digits can be told from one another."""
    folder = tmp_path_factory.mktemp("apps") / "run"
    flags = "--image-size 16 --gen-width 16 --steps 400 --sample-every 400 --checkpoint-every 400"
    command = [sys.executable, "-m", "fastdcgan", "train", "digits", *flags.split(), "--run-dir", str(folder)]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}  # layers this small gain nothing from threads that share a core
    subprocess.run(command, check=True, capture_output=True, env=alone)
    return folder


@pytest.fixture(scope="session")
def networks(run: Path):
    """(generator, discriminator) of the tiny run, frozen."""
    _, generator, discriminator = open_both(run)
    return generator, discriminator


@pytest.fixture(scope="session")
def digits() -> Tensor:
    """64 real digits (64, 1, 16, 16) in -1..1."""
    data = open_dataset("digits", image_size=(SIZE, SIZE), device=torch.device("cpu"))
    return data.take(range(64)).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.fixture
def digit_files(digits: Tensor, tmp_path: Path) -> list[Path]:
    """Four real digits as PNGs."""
    paths = [tmp_path / f"digit{i}.png" for i in range(4)]
    for path, image in zip(paths, digits, strict=False):
        save(to_picture(image), path)
    return paths


class Full(io.StringIO):
    """Standard output that takes nothing."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def full() -> Full:
    return Full()
