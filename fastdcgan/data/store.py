"""Decoded images kept for later epochs: on the device, in host memory, or in one memory-mapped file."""

from __future__ import annotations

import io
import json
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fastdcgan.data.order import Ids
from fastdcgan.files import lock, replace_file

Shape = tuple[int, int, int, int]


class Store:
    """uint8 (n, H, W, C) with a note of which rows are there."""

    def __init__(self, array: torch.Tensor, present: NDArray[np.bool_]) -> None:
        self.array, self.present = array, present
        self._host = array.numpy() if array.device.type == "cpu" else None

    @classmethod
    def empty(cls, array: torch.Tensor) -> Store:
        """One that is to be filled."""
        return cls(array, np.zeros(len(array), dtype=bool))

    @classmethod
    def complete(cls, array: NDArray[np.uint8]) -> Store:
        """A finished array, possibly a read-only memory map."""
        return cls(_as_tensor(array), np.ones(len(array), dtype=bool))

    def write(self, ids: Ids, images: torch.Tensor) -> None:
        """Keep these images, uint8 (n, H, W, C) on any device. On CUDA, ordered with the current stream."""
        if self._host is not None:
            self._host[ids] = images.cpu().numpy()
        else:
            rows = torch.from_numpy(ids).pin_memory().to(self.array.device, non_blocking=True)
            if images.device.type == "cpu":
                images = images.pin_memory()
            self.array.index_copy_(0, rows, images.to(self.array.device, non_blocking=True))
        self.present[ids] = True

    def read(self, ids: Ids) -> torch.Tensor:
        """uint8 (n, H, W, C) on the CPU, a copy."""
        if self._host is not None:
            return torch.from_numpy(self._host[ids])
        return self.array[torch.from_numpy(ids).to(self.array.device)].cpu()

    def finish(self) -> None:
        """Called once when the last row has been written."""


class DiskStore(Store):
    """A .npy file that fills up while it is used, and is found again, full or not, by the next run.

    Several processes may fill one file: each row has one right content, and `present`, too, is shared between them. The
    note beside it says whose images they are, and once they are all there, which could not be had.
    """

    def __init__(self, path: Path, shape: Shape, fingerprint: str) -> None:
        """Open what an earlier run left at `path`, if it was made from the same sources; otherwise begin anew.

        Raises:
            OSError: no space, or not writable.
        """
        self._path, self._rows, self._note = path, path.with_suffix(".rows"), path.with_suffix(".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            opened = None
            with suppress(ValueError, IndexError, TypeError):  # damaged
                opened = self._open(shape, fingerprint)
            if opened is None:
                for file in (self._path, self._rows, self._note):
                    file.unlink(missing_ok=True)
                opened = self._open(shape, fingerprint)
            array, present = opened
            super().__init__(_as_tensor(array), present)
            self._mine = self._path.stat().st_ino

    def _open(self, shape: Shape, fingerprint: str) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        note = read_json(self._note)
        if is_whole(self._path, fingerprint):
            present = np.ones(shape[0], dtype=bool)
            present[note["absent"]] = False
            return _load(self._path, shape, "c"), present
        # After a power failure rows may be missing that are noted as present: trust only what this boot wrote.
        fresh = {"fingerprint": fingerprint, "boot": _boot_id()}
        if note != fresh or not (self._path.exists() and self._rows.exists()):
            self._rows.unlink(missing_ok=True)
            self._path.unlink(missing_ok=True)
            write_json(self._note, fresh)
            _make(self._path, shape)
            _make(self._rows, shape[:1])
        return _load(self._path, shape, "r+"), _load(self._rows, shape[:1], "r+").view(bool)

    def finish(self) -> None:
        # A disk that is full, or a folder that is gone: the next run decodes once more.
        with suppress(OSError), _locked(self._path.with_suffix(".lock")):
            note = read_json(self._note)
            # Another process may have finished it, or begun anew because the sources have changed.
            if "absent" in note or not self._path.exists() or self._path.stat().st_ino != self._mine:
                return
            with open(self._path, "rb+") as file:
                os.fsync(file.fileno())
            write_json(self._note, note | {"absent": np.flatnonzero(~self.present).tolist()})
            self._rows.unlink(missing_ok=True)  # which Windows refuses, where it is mapped


def is_whole(path: Path, fingerprint: str) -> bool:
    """Whether all images of these sources are in a `DiskStore`'s file."""
    note = read_json(path.with_suffix(".json"))
    return os.path.exists(path) and note.get("fingerprint") == fingerprint and "absent" in note


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time (where the system has file locks)."""
    with open(path, "w") as file:
        lock(file, wait=True)
        yield


def reserve(file: Any, size: int) -> None:
    """Claim disk space now: writing to a memory map on a full disk would end the process with SIGBUS.

    Raises:
        OSError: not enough space, or over a limit on file sizes.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        file.truncate(size)


def _make(path: Path, shape: tuple[int, ...]) -> None:
    """A .npy of zeros, made whole or not at all."""
    temporary = path.with_name(path.name + ".new")
    try:
        with open(temporary, "wb") as file:
            file.write(npy_header(shape))
            reserve(file, file.tell() + math.prod(shape))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _load(path: Path, shape: tuple[int, ...], mode: Literal["c", "r+"]) -> NDArray[np.uint8]:
    """A .npy as a memory map. Raises ValueError where it is not as `_make` makes it."""
    header = npy_header(shape)
    with open(path, "rb") as file:
        if file.read(len(header)) != header or path.stat().st_size != len(header) + math.prod(shape):
            raise ValueError(f"{path} is damaged, or holds something else")
    return np.memmap(path, np.uint8, mode, len(header), shape)


def npy_header(shape: tuple[int, ...]) -> bytes:
    """The beginning of a .npy file with uint8 of this shape."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return header.getvalue()


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return f"process {os.getpid()}"


def _as_tensor(array: NDArray[np.uint8]) -> torch.Tensor:
    if array.flags.writeable:
        return torch.from_numpy(array)
    # torch has no read-only tensors and warns about this one; nothing writes to a finished store.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, {} where there is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file whole or not at all."""
    replace_file(path, json.dumps(content).encode())
