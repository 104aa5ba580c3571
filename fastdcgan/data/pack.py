"""`data pack`: decode a whole set ahead of time into one .npy that training memory-maps."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fastdcgan.console import progress, say
from fastdcgan.data import open_dataset
from fastdcgan.data.dataset import Dataset
from fastdcgan.data.packed import note_path
from fastdcgan.data.room import in_words
from fastdcgan.data.source import PASSING
from fastdcgan.data.store import npy_header, read_json, reserve, write_json
from fastdcgan.errors import UserError
from fastdcgan.files import lock

HEADER_BYTES = 128  # of `npy_header`, whatever the count, which is put right at the end
SAVE_EVERY = 1.0  # seconds between notes of how far it has come


def pack(
    data: str,
    *,
    image_size: tuple[int, int],
    out: Path,
    channels: int | None = None,
    loader: str = "auto",
    strict: bool = False,
    cache_dir: Path | None = None,
) -> Path:
    """Write the usable images of `data` to `out`: uint8 (n, H, W, C) for `numpy.load(out, mmap_mode="r")`.

    Labels, class names and what was left out go to a small JSON beside it (`set.npy.json`). `out` appears whole or not
    at all. Interrupted, even killed, it goes on where it was when the same command is given again.

    Args:
        data, image_size, channels, loader, strict, cache_dir: see `fastdcgan.data.open_dataset`.

    Raises:
        UserError: as `open_dataset`; `out` exists with other content, cannot be written, or does not fit on the disk.
    """
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: give the name of a file, such as {out / 'set.npy'}")
    if out.suffix not in ("", ".npy"):
        raise UserError(f"--out {out} is not possible: end it in .npy")
    out = out.with_suffix(".npy")
    dataset = open_dataset(
        data,
        image_size=image_size,
        channels=channels,
        device=torch.device("cpu"),
        loader=loader,
        cache="off",  # without remembered verdicts: the numbers of the images must be the same after an interruption
        cache_dir=cache_dir,
        strict=strict,
    )
    asked = (dataset.content(), dataset.count, image_size, dataset.channels)
    fingerprint = hashlib.sha256(repr(asked).encode()).hexdigest()
    if out.exists():
        if read_json(note_path(out)).get("fingerprint") != fingerprint:
            raise UserError(f"{out} exists and holds something else: delete it or choose another --out")
        say(f"{out} is there already and up to date")
        return out
    part, journal = out.with_name(out.name + ".part"), out.with_name(out.name + ".part.json")
    row_bytes = image_size[0] * image_size[1] * dataset.channels
    try:
        with _alone(part, out) as file:
            done = read_json(journal) if file.seek(0, os.SEEK_END) else {}
            if done.get("fingerprint") != fingerprint:
                done = {"fingerprint": fingerprint, "next": 0, "broken": [], "skipped": []}
                write_json(journal, done)
            try:
                reserve(file, HEADER_BYTES + dataset.count * row_bytes)
            except OSError:
                _let_go(file)
                part.unlink()
                journal.unlink()
                raise
            _write_rows(file, journal, done, dataset, row_bytes)
            count = dataset.count - len(done["broken"])
            file.truncate(HEADER_BYTES + count * row_bytes)
            file.seek(0)
            header = npy_header((count, *image_size, dataset.channels))
            assert len(header) == HEADER_BYTES
            file.write(header)
            file.flush()
            os.fsync(file.fileno())
            write_json(note_path(out), _note(dataset, done))
            journal.unlink()  # first: a journal without its part would vouch for rows that are not there
            _let_go(file)
            os.replace(part, out)
    except OSError as error:
        need = in_words(HEADER_BYTES + dataset.count * row_bytes)
        raise UserError(f"cannot write {out} ({error.strerror}), which takes {need}: choose another --out") from None
    without = (
        f"; {len(done['skipped']):,} cannot be used: {note_path(out)} says which and why" if done["skipped"] else ""
    )
    say(f"{out}: {count:,} images{without}")
    return out


def _write_rows(file: BinaryIO, journal: Path, done: dict[str, Any], dataset: Dataset, row_bytes: int) -> None:
    """Append the images from number done["next"] on; `done` and the journal keep up with what is safely on disk."""
    file.seek(HEADER_BYTES + (done["next"] - len(done["broken"])) * row_bytes)
    saved, known = time.monotonic(), len(dataset.skipped)
    with progress("packing", dataset.count) as advance:
        advance(done["next"])
        for start, stop, good, images in dataset.pieces(done["next"]):
            for name, reason in dataset.skipped[known:]:
                if reason.startswith(PASSING):
                    raise UserError(f"{name}: {reason}: put it right and give the same command to go on, or remove it")
            known = len(dataset.skipped)
            file.write(images.numpy().data)
            done["broken"] += sorted(set(range(start, stop)) - set(good))
            done["next"] = stop
            done["skipped"] = list(dict.fromkeys((name, reason) for name, reason in done["skipped"] + dataset.skipped))
            advance(stop - start)
            if time.monotonic() - saved > SAVE_EVERY or stop == dataset.count:
                file.flush()
                os.fsync(file.fileno())  # first the rows, then the note that says they are there
                write_json(journal, done)
                saved = time.monotonic()


def _note(dataset: Dataset, done: dict[str, Any]) -> dict[str, Any]:
    broken = set(done["broken"])
    labels = dataset.labels and [label for i, label in enumerate(dataset.labels) if i not in broken]
    return {
        "fingerprint": done["fingerprint"],
        "name": dataset.name,
        "flip": dataset.flip,
        "labels": labels,
        "class_names": dataset.class_names,
        "skipped": done["skipped"],
    }


@contextmanager
def _alone(part: Path, out: Path) -> Iterator[BinaryIO]:
    """The unfinished file, open for reading and writing, locked against a second `pack` (where files can be locked)."""
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    with open(part, "rb+") as file:
        try:
            lock(file, wait=False)
        except BlockingIOError:
            raise UserError(f"another process is packing into {out}: wait for it, or choose another --out") from None
        yield file


def _let_go(file: BinaryIO) -> None:
    """Windows renames and deletes no file that is open. Elsewhere the lock lasts until the file has its name."""
    if sys.platform == "win32":
        file.close()
