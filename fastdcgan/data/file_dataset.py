"""Images in files, decoded once where there is room to keep them."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdcgan.console import say
from fastdcgan.data import room
from fastdcgan.data.census import Census, look_at, remember, take_census
from fastdcgan.data.dataset import LEFT_OUT, PIECE, Dataset, Stream, require_a_batch
from fastdcgan.data.feed import DecodeFeed, Feed, StoreFeed, Usable, select, sound_rows
from fastdcgan.data.loader import Loader, Pixels, Request
from fastdcgan.data.order import Ids, Order, Position, random_places
from fastdcgan.data.prefault import prefaulted
from fastdcgan.data.source import PASSING, EncodedSource
from fastdcgan.data.store import DiskStore, Shape, Store, is_whole
from fastdcgan.data.streams import HostStream, ResidentStream, StagedStream
from fastdcgan.errors import UserError
from fastdcgan.files import printable, short
from fastdcgan.signals import signals_afterwards

PIXELS_VERSION = 3  # raise it when other files are taken, or decoded to other pixels: kept images are then made anew


class FileDataset(Dataset):
    """The usable files of an `EncodedSource`."""

    def __init__(
        self,
        name: str,
        source: EncodedSource,
        *,
        image_size: tuple[int, int],
        channels: int | None,
        device: torch.device,
        seed: int,
        loader: str,
        cache: str,
        cache_dir: Path,
        crop: str,
        strict: bool,
        rank: int,
        world_size: int,
    ) -> None:
        self.name, self.image_size = name, image_size
        self._source, self._device, self._seed, self._strict = source, device, seed, strict
        self._cache, self._cache_dir, self._crop = cache, cache_dir, crop
        self._loader_name = "dali" if loader == "dali" or (loader == "auto" and dali_is_installed()) else "torch"
        if loader == "dali" and not dali_is_installed():
            raise UserError("--loader dali needs NVIDIA DALI: pip install nvidia-dali-cuda130, or use --loader torch")
        self._verdicts = None if cache == "off" else cache_dir / "verdicts"
        self._ahead = self._host_memory_ahead(channels)
        self._census: Census = take_census(source, room.cores(), self._verdicts)
        reasons = self._census.reasons | self._census.oversized(image_size)
        self.skipped = source.unusable + [(printable(source.names[i]), reasons[i]) for i in sorted(reasons)]
        if strict and self.skipped:
            raise UserError(f"{self.skipped[0][0]}: {self.skipped[0][1]} (--strict stops at the first unusable file)")
        usable = np.ones(len(source), dtype=bool)
        usable[list(reasons)] = False
        self._numbers: Ids = np.flatnonzero(usable)  # take(i) is file number _numbers[i]
        self.count = len(self._numbers)
        if self.count == 0:
            first = f"{self.skipped[0][0]}: {self.skipped[0][1]}"
            raise UserError(f"none of the {len(source)} images in {source.path} can be used; the first: {first}")
        has_colour = bool(self._census.colour[self._numbers].any())
        self.channels = channels or (3 if has_colour else 1)
        self.flip = has_colour
        classes = source.classes()
        self.labels = [classes[0][i] for i in self._numbers] if classes else None
        self.class_names = classes[1] if classes else None
        self._usable = Usable(usable, self._on_broken)
        listing = hashlib.sha256(os.fsencode("\n".join(source.names))).hexdigest()[:16]
        self._order = Order(len(source), seed, rank, world_size, listing)
        self._needed = 1  # images without which no stream can go on
        self._store: Store | None = None
        self._store_chosen = False
        self._warned_of_gone = False  # that files have gone, of which only the first is named

    @property
    def shape(self) -> Shape:
        """Of the kept images: one row a file, usable or not, so that a file that breaks later moves no other."""
        return (len(self._source), *self.image_size, self.channels)

    def take(self, indices: Sequence[int]) -> torch.Tensor:
        """See `Dataset.take`. In the place of a file that breaks only now stands the next usable image of its class."""
        wanted = self._numbers[np.asarray(indices, dtype=np.int64)]
        taken = torch.empty((len(wanted), *self.shape[1:]), dtype=torch.uint8)
        store = self._store
        missing = np.ones(len(wanted), dtype=bool) if store is None else ~store.present[wanted]
        if store is not None:
            taken[torch.from_numpy(~missing)] = store.read(wanted[~missing])
        rows = np.flatnonzero(missing)
        while len(rows):
            requests = (self._request(wanted[rows[start : start + PIECE]]) for start in range(0, len(rows), PIECE))
            done, broken = 0, []
            for decoded in self.loader().decode(requests):
                these = rows[done : done + len(decoded.ids)]
                taken[torch.from_numpy(these)] = decoded.images.cpu()
                done += len(these)
                self._usable.drop(decoded.broken)
                broken += [row for row, i in zip(these, decoded.ids, strict=True) if int(i) in decoded.broken]
            for row in broken:
                wanted[row] = self._numbers[self._stand_in(int(np.searchsorted(self._numbers, wanted[row])))]
            rows = np.array(broken, dtype=np.int64)
        return taken

    def sample(self, most: int, seed: int) -> torch.Tensor:
        """As `Dataset.sample`, and the same whether files are known to be broken or turn out to be."""
        files = torch.randperm(len(self._source), generator=torch.Generator().manual_seed(seed)).numpy()
        while True:
            sound = self._usable.mask.copy()
            images = self.take(np.searchsorted(self._numbers, files[sound[files]][:most]).tolist())
            if np.array_equal(sound, self._usable.mask):
                return images

    def _request(self, ids: Ids) -> Request:
        """These files as the first epoch shows them."""
        random = self._crop == "random"
        return Request(ids, random_places(len(self._source), self._seed, 0)[ids] if random else None)

    def _stand_in(self, index: int) -> int:
        """The next index after a broken one with a usable image, of the same class where there is one."""
        following = [(index + step) % self.count for step in range(1, self.count)]
        usable = [i for i in following if self._usable.mask[self._numbers[i]]]
        if not usable:
            raise UserError(f"none of the {self.count} images in {self._source.path} can be decoded")
        alike = [i for i in usable if self.labels is None or self.labels[i] == self.labels[index]]
        return (alike or usable)[0]

    def content(self) -> str:
        return f"{self._source.fingerprint()} {self._crop} {self._seed * (self._crop == 'random')} {self._loader_name}"

    def pieces(self, start: int) -> Iterator[tuple[int, int, list[int], torch.Tensor]]:
        requests = (self._request(self._numbers[first : first + PIECE]) for first in range(start, self.count, PIECE))
        for decoded in self.loader().decode(requests):
            self._usable.drop(decoded.broken)
            rows = sound_rows(decoded)
            good = (start + rows).tolist()
            stop = start + len(decoded.ids)
            yield start, stop, good, select(decoded.images, rows).cpu()
            start = stop

    def stream(self, batch_size: int, state: dict[str, Any] | None = None) -> Stream:
        self._leave_out_again(state, batch_size * self._order.world_size)
        require_a_batch(self.name, int(self._usable.mask.sum()), batch_size, self._order.world_size)
        self._needed = max(self._needed, batch_size * self._order.world_size)
        position = Position.resume(self._order, state)
        if not self._store_chosen:
            self._store, self._store_chosen = self._choose_store(), True
        loader = self.loader()
        request = max(batch_size, loader.together)
        if self._store is not None:
            stored = StoreFeed(self._order, position.taken, self._usable, self._store, loader, request)
            if self._store.array.device == self._device:
                return ResidentStream(stored, batch_size, position)
            feed: Feed = stored
        else:
            random = self._crop == "random"
            feed = DecodeFeed(self._order, position.taken, self._usable, loader, request, random_crop=random)
        shape = (batch_size, *self.shape[1:])
        if self._device.type == "cuda":
            return StagedStream(feed, shape, self._device, position)
        return HostStream(feed, shape, position)

    def _leave_out_again(self, state: dict[str, Any] | None, needed: int) -> None:
        """A continued run leaves out what it left out before, so that the order stays the same; but not where fewer
        than `needed` images were left, as when a disk was gone for a while."""
        if state and not self._order.changed(state):
            sound = [i for i in state["unusable"] if self._usable.mask[i]]  # no verdict on them: a matter of this run
            if self._usable.mask.sum() - len(sound) < needed:
                say(f"{len(sound):,} images that could not be used can be used again")
                return
            for i in sound:
                self._usable.mask[i] = False
                self.skipped.append((printable(self._source.names[i]), LEFT_OUT))

    def loader(self) -> Loader:
        """A new loader for these images."""
        options: dict[str, Any] = {
            "image_size": self.image_size,
            "channels": self.channels,
            "threads": room.cores(),
        }
        if self._loader_name == "dali":
            with signals_afterwards():  # an import that Ctrl-C cuts short leaves half of DALI in the process
                from fastdcgan.data.dali_loader import DaliLoader
            return DaliLoader(self._source, self._census, device=self._device, **options)
        from fastdcgan.data.torch_loader import TorchLoader

        return TorchLoader(self._source, self._census, **options)

    def _on_broken(self, broken: dict[int, str]) -> None:
        for i, reason in broken.items():
            name = printable(self._source.names[i])
            self.skipped.append((name, reason))
            if self._strict:
                raise UserError(f"{name}: {reason} (--strict stops at the first unusable file)")
            if reason.startswith(PASSING) and not self._warned_of_gone:
                say(f"warning: {name}: {reason}; what cannot be read is left out for the rest of the run")
                self._warned_of_gone = True
            self._census.drop(i, reason)
        if self._verdicts is not None:
            remember(self._census, self._source, self._verdicts)
        left = int(self._usable.mask.sum())
        if left < self._needed:
            raise UserError(
                f"only {left} images of {self.name} can be decoded, too few for one batch; the last that cannot:"
                f" {self.skipped[-1][0]}: {self.skipped[-1][1]}"
            )

    def _host_memory_ahead(self, channels: int | None) -> Pixels | None:
        """Memory for the images, where they will be kept in host memory: made ready while the files are looked at.

        None where they will not. Of as many channels as the first image has, if it is not known; `_choose_store` sees.
        """
        if self._device.type != "cpu" or self._crop == "random" or self._cache not in ("auto", "host"):
            return None
        pixels = len(self._source) * self.image_size[0] * self.image_size[1]
        size = pixels * (channels or (3 if look_at(self._source, 0)[0].colour else 1))
        return prefaulted(size) if room.fits_on_host(size) else None

    def _choose_store(self) -> Store | None:
        """Where decoded images are kept; None for nowhere, also where every epoch crops them in another place."""
        if self._crop == "random":
            return None
        ahead, self._ahead = self._ahead, None
        size, mode, on_device = int(np.prod(self.shape, dtype=np.int64)), self._cache, self._device.type == "cuda"
        on_disk = self._cache_dir / "images" / f"{short(self.name)}-{self._key()}.npy"
        if mode == "auto" and is_whole(on_disk, self._source.fingerprint()):
            with suppress(OSError):  # that may only be read, or without room to make it anew
                kept = DiskStore(on_disk, self.shape, self._source.fingerprint())
                present = kept.present.copy()  # before the pixels: somebody may be filling it anew
                fits = on_device and room.fits_on_device(size, self._device)
                return Store(kept.array.to(self._device), present) if fits else kept
        if ahead is not None and ahead.nbytes == size:
            return Store.empty(torch.from_numpy(ahead.reshape(self.shape)))
        del ahead  # before anyone asks what is free
        if mode == "auto":
            if on_device and room.fits_on_device(size, self._device):
                mode = "device"
            elif room.fits_on_host(size):
                mode = "host"
            elif room.fits_on_disk(size, on_disk.parent):
                mode = "disk"
                say(f"keeping {room.in_words(size)} of decoded images in {on_disk}: too much for the memory")
            else:
                say(f"decoding every epoch anew: {room.in_words(size)} of decoded images fit neither memory nor disk")
                mode = "off"
        if mode == "off":
            return None
        if mode == "disk":
            try:
                return DiskStore(on_disk, self.shape, self._source.fingerprint())
            except OSError as error:
                if self._cache == "auto":
                    say(f"decoding every epoch anew: cannot keep images in {on_disk.parent} ({error.strerror})")
                    return None
                what = f"cannot keep {room.in_words(size)} of decoded images in {on_disk.parent} ({error.strerror})"
                raise UserError(f"{what}: choose another --cache-dir, or --cache off") from None
        target = self._device if mode == "device" else torch.device("cpu")
        free = room.free_device_bytes(target) if target.type == "cuda" else room.free_host_bytes()
        if size > free:
            what = f"the decoded images need {room.in_words(size)}, more than the {room.in_words(free)} that are free"
            raise UserError(f"{what}: use --cache disk, --cache off or a smaller --image-size")
        if target.type == "cpu":
            return Store.empty(torch.from_numpy(prefaulted(size).reshape(self.shape)))
        return Store.empty(torch.empty(self.shape, dtype=torch.uint8, device=target))

    def _key(self) -> str:
        """Names the kept images: one file for each path, size and way of decoding."""
        parts = (self._source.path.absolute(), self.image_size, self.channels, self._loader_name, PIXELS_VERSION)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def dali_is_installed() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False
