"""Where images come from, whether they are sound, and how they reach the device. `open_dataset` is the way in."""

from __future__ import annotations

import difflib
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdcgan.console import say
from fastdcgan.data.dataset import Dataset, Stream
from fastdcgan.data.packed import open_packed, packed_size
from fastdcgan.dataset_names import NAMES
from fastdcgan.errors import UserError
from fastdcgan.files import expand_braces

if TYPE_CHECKING:
    import torch

    from fastdcgan.data.source import EncodedSource

__all__ = ["NAMES", "Dataset", "Stream", "open_dataset", "packed_size"]


def open_dataset(
    source: str,
    *,
    image_size: tuple[int, int],
    channels: int | None = None,
    device: torch.device,
    seed: int = 0,
    loader: str = "auto",
    cache: str = "auto",
    cache_dir: Path | None = None,
    crop: str = "centre",
    strict: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Dataset:
    """Open a set of images by name or by path.

    Args:
        source: "digits", "fake", "mnist", "fashion-mnist", "cifar10", "svhn", "celeba", or the path of a folder of
            images, a .zip of images, WebDataset .tar shards (one file, a folder of them, or a pattern such as
            "train-{000..099}.tar"), an LSUN LMDB, or a .npy made by `data pack`.
        image_size: (height, width) that the shorter side is resized to and the rest is cropped to.
        channels: 1 (grey), 3 (colour, transparency on white) or 4 (with transparency); None for what the data has.
        device: where batches are delivered.
        seed: of the order of the images, of the random crop, and of "fake".
        loader: "dali", "torch", or "auto", DALI where it is installed.
        cache: where decoded images are kept for later epochs: "device", "host", "disk", "off", or "auto", the first
            of these in which they take up only part of what is free.
        cache_dir: for downloads, kept images and verdicts on files; None for fastdcgan in ~/.cache, or in
            XDG_CACHE_HOME.
        crop: of oblong files, "centre", or "random": another place every epoch, drawn from the seed, so such images
            are decoded every time and never kept. `Dataset.take` shows them as the first epoch does.
        strict: make the first unusable file an error instead of leaving it out.
        rank, world_size: which share of each batch `stream` delivers.

    Raises:
        UserError: no such name or path, or nothing usable in it; one line saying what to do.
    """
    import torch

    if crop == "random" and cache not in ("auto", "off"):
        raise UserError(f"--crop random is another crop every epoch, which --cache {cache} cannot keep: leave one out")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    cache_dir = cache_dir or default_cache_dir()
    placed: dict[str, Any] = {"device": device, "seed": seed, "cache": cache, "rank": rank, "world_size": world_size}
    if source in NAMES and source != "celeba":
        return _named(source, image_size, channels, cache_dir, placed)
    path = Path(os.path.expanduser(source))
    if path.suffix == ".npy" and path.is_file():
        if crop == "random":
            raise UserError(f"{path} holds pictures that are cropped already: leave --crop random out")
        return open_packed(path, image_size, channels, **placed)
    from fastdcgan.data.file_dataset import FileDataset

    name, place = path.stem.split("{")[0].strip("-_.") or "images", source
    if source == "celeba":
        from fastdcgan.data.named import fetch

        fetch(source, cache_dir / "datasets")
        place = str(cache_dir / "datasets" / "celeba" / "img_align_celeba")
    return FileDataset(
        name,
        open_source(place),
        image_size=image_size,
        channels=channels,
        loader=loader,
        cache_dir=cache_dir,
        crop=crop,
        strict=strict,
        **placed,
    )


def _named(
    name: str, image_size: tuple[int, int], channels: int | None, cache_dir: Path, placed: dict[str, Any]
) -> Dataset:
    """A set that fits in memory as it is."""
    from fastdcgan.data import embedded
    from fastdcgan.data.array_dataset import ArrayDataset

    if name == "digits":
        flip, (array, labels, class_names) = False, embedded.digits(image_size, channels or 1)
    elif name == "fake":
        flip, (array, labels, class_names) = True, embedded.fake(image_size, channels or 3, placed["seed"])
    else:
        from fastdcgan.data import named

        known = named.KNOWN[name]
        flip = known.flip
        array, labels, class_names = named.arrays(name, cache_dir / "datasets", image_size, channels or known.channels)
    return ArrayDataset(name, array, name, flip=flip, labels=labels, class_names=class_names, **placed)


def open_source(data: str) -> EncodedSource:
    """The encoded images at a path.

    Raises:
        UserError: nothing there, or nothing that holds images.
    """
    from fastdcgan.data.archives import LmdbSource, TarSource, ZipSource
    from fastdcgan.data.header import IMAGE_SUFFIXES
    from fastdcgan.data.source import FolderSource

    path = Path(os.path.expanduser(data))  # Path.expanduser raises where there is no such user
    if "{" in data and not path.exists():
        shards = []
        for shard in expand_braces(os.path.expanduser(data)):  # which may stand for very many
            if not os.path.isfile(shard):
                raise UserError(f"the pattern {data} names {shard}, which does not exist: correct the braces")
            shards.append(Path(shard))
        return TarSource(path, shards)
    try:
        if path.is_dir():
            if (path / "data.mdb").is_file():
                return LmdbSource(path)
            # What an entry is costs more to ask than its name: a large folder of images is asked nothing.
            entries = [entry for entry in path.iterdir() if entry.name[0] != "."]
            shards = sorted(entry for entry in entries if entry.suffix == ".tar" and entry.is_file())
            if not shards or any(entry.suffix.lower() in IMAGE_SUFFIXES and entry.is_file() for entry in entries):
                return FolderSource(path)
            if any(entry.is_dir() for entry in entries):
                with suppress(UserError):  # no images there: in the shards, then
                    folder = FolderSource(path)
                    say(f"{path}: taking the images in its folders, and not what is in its .tar files")
                    return folder
            return TarSource(path, shards)
        if path.is_file():
            with open(path, "rb"):
                pass
            if path.suffix.lower() == ".zip":
                return ZipSource(path)
            if path.suffix.lower() == ".tar":
                return TarSource(path, [path])
            if path.suffix.lower() == ".mdb":
                return LmdbSource(path)
            raise UserError(
                f"{path} is not a set of images: give a folder, a .zip, .tar shards, an LMDB or a packed .npy"
            )
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
    nearest = difflib.get_close_matches(data, NAMES, n=1)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    raise UserError(f"there is no dataset or path named {data}: {hint}Names are {', '.join(NAMES)}; else give a path")


def default_cache_dir() -> Path:
    """~/.cache/fastdcgan, or where XDG_CACHE_HOME says; among the temporary files where a user has no home, as in some
    containers."""
    folder = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if folder.startswith("~"):
        return Path(tempfile.gettempdir()) / f"fastdcgan-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
    return Path(folder) / "fastdcgan"
