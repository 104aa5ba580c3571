"""Checkpoints of a run: safetensors and JSON, written whole or not at all, checked when they are read.

checkpoints/step-000500/
    generator.safetensors        full-precision weights, plain names
    average.safetensors          the generator's moving average, same names
    discriminator.safetensors
    state.safetensors            optimizers, random state, running sums; with spectral norm D's own weights
    state.json                   step, position in the data, SHA-256 of these and of the other files
checkpoints/best/                a copy of the one whose pictures were nearest to the data
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_in
from safetensors.torch import save_file
from torch import Tensor

from fastdcgan.console import say
from fastdcgan.errors import UserError, first_line

UNFINISHED, REPLACED = ".unfinished", ".replaced"
NO_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS)  # what says that there is no such thing for a folder
LISTINGS = 10  # at most, of a run that replaces its checkpoints while it is looked at
TENSOR_FILES = ("generator", "average", "discriminator", "state")


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by file and name (TENSOR_FILES), and what is not a tensor: `progress`, JSON."""

    tensors: dict[str, dict[str, Tensor]]
    progress: dict[str, Any]


def save(
    run: Path,
    step: int,
    checkpoint: Checkpoint,
    keep: int,
    sound: int | None = None,
    damaged: Collection[Path] = (),
) -> Path:
    """Write `checkpoints/step-<step>` and delete all but the newest `keep`, and the newest that is not after step
    `sound`, to which the run may have to go back. Those known to be `damaged` count for neither.

    It appears under its name complete and on disk, or not at all: a kill or a full disk leaves the older ones.

    Raises:
        OSError: it could not be written; nothing is left of it.
    """
    folder = _place(run, step)
    with _appearing(folder) as unfinished:
        unfinished.mkdir(parents=True)
        digests = {}
        for kind in TENSOR_FILES:
            file = unfinished / f"{kind}.safetensors"
            write_safetensors(checkpoint.tensors[kind], file)
            digests[file.name] = _sha256(file)
        progress = {"step": step, **checkpoint.progress}
        digests["state.json"] = _digest(progress)
        state = json.dumps({**progress, "sha256": digests}, indent=1)
        (unfinished / "state.json").write_text(state + "\n")
    before = [each for each in complete(run) if step_of(each) <= step]  # later ones are damaged
    whole = [each for each in before if each == folder or each not in damaged]
    needed = whole[-keep:] + [each for each in whole if sound is not None and step_of(each) <= sound][-1:]
    for old in set(before) - set(needed):
        _delete(old)
    return folder


def write_safetensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write named tensors as one file, with the permissions that any other has in its folder.

    Raises:
        OSError: it could not be written.
    """
    try:
        save_file({name: _plain(value) for name, value in tensors.items()}, file)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(str(error)) from error
    with suppress(OSError):  # some file systems know no permissions
        file.chmod(file.parent.stat().st_mode & 0o666)  # safetensors writes for its owner alone


def load(folder: Path) -> Checkpoint:
    """Read one checkpoint folder.

    Raises:
        UserError: it is missing, incomplete or damaged, or a link to somewhere else.
    """
    try:
        home = folder.parent.resolve()  # which may itself lie anywhere
        for path in (folder, *(folder / f"{kind}.safetensors" for kind in TENSOR_FILES), folder / "state.json"):
            if not path.resolve().is_relative_to(home):
                raise ValueError(f"{path.name} is a link out of its folder")
        progress = json.loads((folder / "state.json").read_text())
        digests = dict(progress["sha256"])
        if not isinstance(progress["step"], int):
            raise ValueError("its step is not a whole number")
        if digests["state.json"] != _digest(progress):
            raise ValueError("state.json is not what was written")
        if is_numbered(folder) and step_of(folder) != progress["step"]:
            raise ValueError(f"it is of step {progress['step']:,}")
        tensors = {}
        for kind in TENSOR_FILES:
            # Not mapped: what is checked is what is used, and Windows could not delete the file as long as it is.
            content = (folder / f"{kind}.safetensors").read_bytes()
            if digests[f"{kind}.safetensors"] != hashlib.sha256(content).hexdigest():
                raise ValueError(f"{kind}.safetensors is not what was written")
            tensors[kind] = tensors_in(content)
        return Checkpoint(tensors, progress)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"checkpoint {folder} cannot be read: {_reason(error)}") from error


def load_newest(run: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, or else the best, saying which were not; None where there is none at all.

    Raises:
        UserError: there are checkpoints and not one can be read, or they cannot even be listed.
    """
    bring_back(run)
    try:
        for _ in range(LISTINGS):
            folders = _best(run) + complete(run)
            newest = next(_whole(folders), None)
            if folders == _best(run) + complete(run):  # or a run under way has put another in the place of one
                break
    except OSError as error:
        raise UserError(
            f"the checkpoints in {run / 'checkpoints'} cannot be listed ({error.strerror}): put that right first"
        ) from error
    if folders and newest is None:
        raise UserError(
            f"not one checkpoint in {run / 'checkpoints'} can be read: mend what the warnings name (permissions, a"
            " copy), or start again in another --run-dir"
        )
    return newest


def keep_best(run: Path, folder: Path, distance: float) -> bool:
    """Copy the checkpoint to checkpoints/best unless the one there is as near or nearer; whether it was copied.

    Raises:
        OSError: it could not be written, or the one that is there not be read.
    """
    best = run / "checkpoints" / "best"
    if not math.isfinite(distance):
        return False
    try:
        if load(best).progress["distance_to_data"] <= distance:
            return False
    except KeyError:
        say(f"note: {best} was measured otherwise, by an earlier version: the checkpoint at this step takes its place")
    except TypeError:
        pass
    except UserError as error:  # there is none, or none that can be used
        if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
            raise error.__cause__ from None  # what cannot be read just now may well be sound
    with _appearing(best) as unfinished:
        unfinished.mkdir()
        for file in folder.iterdir():
            shutil.copyfile(file, unfinished / file.name)  # without its permissions, which some file systems refuse
    return True


def keep_if_best(run: Path, saved: Checkpoint) -> None:
    """`keep_best` for a checkpoint that was loaded: a kill may have come before it.

    Raises:
        OSError: it could not be written.
    """
    folder, distance = _place(run, saved.progress["step"]), saved.progress.get("distance_to_data")
    if distance is not None and folder.exists():
        keep_best(run, folder, distance)


def load_sound(run: Path, step: int) -> Checkpoint | None:
    """The newest whole checkpoint up to `step`, or else the best if it is so old, deleting those after it; None,
    deleting nothing, if there is none."""
    older = _best(run) + [folder for folder in complete(run) if step_of(folder) <= step]
    sound = next((found for found in _whole(older) if found.progress["step"] <= step), None)
    if sound is not None:
        for later in [folder for folder in complete(run) if step_of(folder) > sound.progress["step"]]:
            _delete(later)
    return sound


def complete(run: Path) -> list[Path]:
    """The run's checkpoint folders, oldest first.

    Raises:
        OSError: they cannot be listed: a run that has some must not be taken for one that has none.
    """
    place = run / "checkpoints"
    try:
        found = [place / name for name in os.listdir(place)]
    except FileNotFoundError:
        if place.is_symlink():  # to a disk that is not there at the moment
            raise
        return []
    return sorted(filter(is_numbered, found), key=step_of)


def is_numbered(folder: Path) -> bool:
    """Whether it is named as a checkpoint's folder is, `step-<number>`."""
    return folder.name.startswith("step-") and folder.name[5:].isdigit()


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder, `step-<number>`."""
    return int(folder.name[5:])


def remove_unfinished(run: Path) -> None:
    """Delete what a killed run left half-written, or had replaced."""
    for folder in (run / "checkpoints").glob(f".*{UNFINISHED}"):
        shutil.rmtree(folder, ignore_errors=True)
    for replaced, folder in _replaced(run):
        if (folder / "state.json").exists():
            shutil.rmtree(replaced, ignore_errors=True)


def bring_back(run: Path) -> None:
    """Give a checkpoint its name back that was to be replaced when the run was killed; or, where it was half deleted,
    the one that was to replace it. Where there is a whole one, the run may be under way and about to replace it."""
    for replaced, folder in _replaced(run):
        with suppress(OSError):  # it is not there; or of a run that can only be read
            if "state.json" not in os.listdir(folder):
                shutil.rmtree(folder)
        if not folder.exists():
            with suppress(OSError):
                replaced.rename(folder)


def _replaced(run: Path) -> list[tuple[Path, Path]]:
    """The folders that have stepped aside (see `_put`), and the names that they had."""
    found = (run / "checkpoints").glob(f".*{REPLACED}")
    return [(each, each.with_name(each.name[1 : -len(REPLACED)])) for each in found]


def _best(run: Path) -> list[Path]:
    """The folder of the best checkpoint, which is older than the others, if there is one."""
    best = run / "checkpoints" / "best"
    return [best] if best.exists() else []


def _whole(folders: list[Path]) -> Iterator[Checkpoint]:
    """The checkpoints in these folders that can be read, the last folder's first, saying which cannot."""
    for folder in reversed(folders):
        try:
            yield load(folder)
        except UserError as error:
            if folder.exists():
                say(f"warning: {error}; trying the one before")


def _delete(folder: Path) -> None:
    """Take a checkpoint's name first, so that whoever looks at the run meanwhile does not find half of it."""
    nameless = folder.with_name(f".{folder.name}{UNFINISHED}")
    with suppress(OSError):
        folder.rename(nameless)
    shutil.rmtree(folder if folder.exists() else nameless, ignore_errors=True)


def _place(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A path to make a folder at, which then appears as `folder`, complete and on the disk.

    Raises:
        OSError: it could not be written; nothing is left of it.
    """
    unfinished = folder.with_name(f".{folder.name}{UNFINISHED}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        yield unfinished
        for file in [*unfinished.iterdir(), unfinished]:
            _sync(file)
        _put(unfinished, folder)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        bring_back(folder.parent.parent)
        raise


def _put(finished: Path, folder: Path) -> None:
    """Give a finished folder its name. One that has it already (the same step again, after a stop or a resume from an
    older one) steps aside first, and is only deleted when the new one is there: a kill leaves one of the two."""
    replaced = folder.with_name(f".{folder.name}{REPLACED}")
    while finished.exists():
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            try:
                folder.rename(replaced)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                # overlayfs does not move what is of the image below: the new one waits there until that is deleted.
                finished = finished.rename(replaced)
                (folder / "state.json").unlink(missing_ok=True)  # from here on a kill leaves the new one
                shutil.rmtree(folder)
        try:
            finished.rename(folder)
        except OSError:
            if not folder.exists():  # else whoever reads the run meanwhile took it for killed, and brought that back
                raise
    _sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _plain(value: Tensor) -> Tensor:
    """On the CPU and contiguous: a file has no memory formats."""
    return value.detach().to("cpu", copy=False).contiguous(memory_format=torch.contiguous_format)


def _digest(progress: dict[str, Any]) -> str:
    """The digest of what state.json says beside the digests, whatever its white space."""
    rest = {name: value for name, value in progress.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Have the file's or folder's content on the disk before going on."""
    if sys.platform == "win32":  # which has no such thing for a folder, nor for what is open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error} is missing"
    if isinstance(error, OSError) and error.filename:
        return f"{Path(error.filename).name}: {error.strerror}"
    return first_line(error)
