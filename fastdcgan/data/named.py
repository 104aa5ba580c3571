"""Sets known by name that torchvision can download: brought to one size in memory; CelebA stays a folder of files."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastdcgan.data.embedded import with_channels
from fastdcgan.data.pillow_decode import cover_box
from fastdcgan.errors import UserError, first_line

RESIZE_AT_ONCE = 1024


class Known(NamedTuple):
    torchvision_name: str
    options: dict[str, str | bool]
    channels: int
    flip: bool  # digits and house numbers read differently in a mirror
    files: str  # what to put where if it cannot be downloaded: under {cache_dir}/datasets


KNOWN = {
    "mnist": Known(
        "MNIST", {"train": True}, 1, False, "MNIST/raw/train-images-idx3-ubyte (and train-labels-idx1-ubyte)"
    ),
    "fashion-mnist": Known(
        "FashionMNIST",
        {"train": True},
        1,
        False,
        "FashionMNIST/raw/train-images-idx3-ubyte (and train-labels-idx1-ubyte)",
    ),
    "cifar10": Known("CIFAR10", {"train": True}, 3, True, "cifar-10-python.tar.gz"),
    "svhn": Known("SVHN", {"split": "train"}, 3, False, "train_32x32.mat"),
    "celeba": Known("CelebA", {"split": "all"}, 3, True, "celeba/img_align_celeba.zip and its list_*.txt files"),
}


def fetch(name: str, folder: Path) -> object:
    """The torchvision dataset, downloaded to `folder` where it is not there yet.

    Raises:
        UserError: it cannot be downloaded; says which file to put where.
    """
    import torchvision.datasets

    known = KNOWN[name]
    kind = getattr(torchvision.datasets, known.torchvision_name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): give another --cache-dir") from None
    try:
        return kind(str(folder), download=True, **known.options)
    except ImportError as error:
        raise UserError(f"{name} needs one more package ({error.name}): pip install {error.name}") from None
    except Exception as error:  # urllib, http, gdown, checksum and quota errors have no common class
        what = f"{name} cannot be downloaded ({first_line(error)})"
        raise UserError(f"{what}: fetch it yourself and put {known.files} into {folder}") from None


def arrays(
    name: str, folder: Path, image_size: tuple[int, int], channels: int
) -> tuple[NDArray[np.uint8], list[int], list[str]]:
    """(uint8 (n, H, W, C), labels, class names) of a set other than celeba. Raises UserError as `fetch` does."""
    dataset = fetch(name, folder)
    pictures = np.asarray(dataset.data)  # type: ignore[attr-defined]
    if pictures.ndim == 3:
        pictures = pictures[..., None]
    elif pictures.shape[1] == 3:  # SVHN is channels first
        pictures = pictures.transpose(0, 2, 3, 1)
    labels = dataset.labels if name == "svhn" else dataset.targets  # type: ignore[attr-defined]
    class_names = list(getattr(dataset, "classes", [str(digit) for digit in range(10)]))
    return resized(pictures, image_size, channels), [int(label) for label in labels], class_names


def resized(pictures: NDArray[np.uint8], image_size: tuple[int, int], channels: int) -> NDArray[np.uint8]:
    """uint8 (n, h, w, 1 or 3) -> uint8 (n, H, W, channels): centre crop to the proportions, then resize."""
    top, left, height, width = cover_box((pictures.shape[1], pictures.shape[2]), image_size)
    pictures = with_channels(pictures[:, top : top + height, left : left + width], channels)
    if (height, width) == image_size:
        return pictures
    large = np.empty((len(pictures), *image_size, channels), dtype=np.uint8)
    for start in range(0, len(pictures), RESIZE_AT_ONCE):
        part = torch.from_numpy(pictures[start : start + RESIZE_AT_ONCE]).permute(0, 3, 1, 2)
        part = torch.nn.functional.interpolate(part, image_size, mode="bilinear", antialias=True)
        large[start : start + RESIZE_AT_ONCE] = part.permute(0, 2, 3, 1).numpy()
    return large
