"""A packed set: one .npy of decoded images, and beside it a small JSON with labels, class names and origin."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from fastdcgan.data.array_dataset import ArrayDataset
from fastdcgan.data.store import read_json
from fastdcgan.errors import UserError


def note_path(path: Path) -> Path:
    """set.npy -> set.npy.json"""
    return path.with_name(path.name + ".json")


def packed_size(data: str) -> str | None:
    """HEIGHTxWIDTH of the images in a packed set; None where `data` is none (`open_packed` says what is wrong)."""
    path = Path(os.path.expanduser(data))
    if path.suffix != ".npy" or not path.is_file():
        return None
    try:
        shape = np.load(path, mmap_mode="r").shape
    except Exception:
        return None
    return f"{shape[1]}x{shape[2]}" if len(shape) == 4 else None


def open_packed(path: Path, image_size: tuple[int, int], channels: int | None, **placed: Any) -> ArrayDataset:
    """The set as a memory map.

    Raises:
        UserError: it is not uint8 (n, H, W, C), or has another size or other channels than asked for.
    """
    try:
        array = np.load(path, mmap_mode="r")
    except Exception as error:  # numpy takes a broken header for Python source, and a size from it as it stands
        raise UserError(f"{path} cannot be read ({error}): pack it again with fastdcgan data pack") from None
    if (
        not isinstance(array, np.ndarray)  # a .npz by another name
        or array.ndim != 4
        or array.dtype != np.uint8
        or array.shape[3] not in (1, 3, 4)
        or not array.flags.c_contiguous
        or not array.size
    ):
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "several arrays"
        what = f"{path} holds {found}, not uint8 (images, height, width, channels), one image after the other"
        raise UserError(f"{what}: make it with fastdcgan data pack")
    height, width = array.shape[1:3]
    if (height, width) != image_size:
        size = str(height) if height == width else f"{height}x{width}"
        raise UserError(f"{path} holds images of {height} x {width} pixels: use --image-size {size}, or pack it again")
    if channels not in (None, array.shape[3]):
        raise UserError(
            f"{path} holds images of {array.shape[3]} channels: use --channels {array.shape[3]}, or pack it again"
        )
    note = read_json(note_path(path))
    flip = bool(note.get("flip", array.shape[3] >= 3))
    labels, class_names = note.get("labels"), note.get("class_names")
    whole = isinstance(labels, list) and len(labels) == len(array) and isinstance(class_names, list | None)
    if not whole:  # none, or the note of another array
        labels = class_names = None
    status = path.stat()
    content = f"{path.stem} {status.st_size} {status.st_mtime_ns}"
    return ArrayDataset(path.stem, array, content, flip=flip, labels=labels, class_names=class_names, **placed)
