"""Images that are already decoded: an array in memory, or a packed .npy file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastdcgan.data import room
from fastdcgan.data.dataset import Dataset, Stream, require_a_batch
from fastdcgan.data.feed import StoreFeed, Usable
from fastdcgan.data.order import Order, Position
from fastdcgan.data.store import Store
from fastdcgan.data.streams import ResidentStream, StagedStream
from fastdcgan.errors import UserError

SAMPLED = 64  # images that tell one set from another of as many


class ArrayDataset(Dataset):
    """A finished uint8 array (n, H, W, C), in memory or memory-mapped."""

    def __init__(
        self,
        name: str,
        array: NDArray[np.uint8],
        content: str,
        *,
        device: torch.device,
        seed: int,
        flip: bool,
        cache: str = "auto",
        labels: list[int] | None = None,
        class_names: list[str] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """`content` names the array as `Dataset.content` does. `cache` decides only whether the set is copied to a CUDA
        device: not for "host", "disk" and "off".
        """
        self.name, self.flip, self.labels, self.class_names = name, flip, labels, class_names
        self.count, height, width, self.channels = array.shape
        self.image_size = (height, width)
        self.skipped = []
        self._content, self._device, self._cache = content, device, cache
        few = array[np.linspace(0, self.count - 1, SAMPLED).astype(np.int64)]
        listing = hashlib.sha256(few.tobytes()).hexdigest()[:16]
        self._order = Order(self.count, seed, rank, world_size, listing)
        self._usable = Usable(np.ones(self.count, dtype=bool), lambda broken: None)
        self._host = Store.complete(array)
        self._store: Store | None = None

    def take(self, indices: Sequence[int]) -> torch.Tensor:
        return self._host.read(np.asarray(indices, dtype=np.int64))

    def content(self) -> str:
        return f"{self._content} {self.labels}"

    def stream(self, batch_size: int, state: dict[str, Any] | None = None) -> Stream:
        require_a_batch(self.name, self.count, batch_size, self._order.world_size)
        if self._store is None:
            self._store = self._on_device() if self._device.type == "cuda" else self._host
        position = Position.resume(self._order, state)
        feed = StoreFeed(self._order, position.taken, self._usable, self._store, None, batch_size)
        if self._store.array.device == self._device:
            return ResidentStream(feed, batch_size, position)
        return StagedStream(feed, (batch_size, *self._host.array.shape[1:]), self._device, position)

    def _on_device(self) -> Store:
        """The whole set on the GPU where it may and fits, else where it is."""
        size = self._host.array.nbytes
        if self._cache == "device" and size > (free := room.free_device_bytes(self._device)):
            what = f"the images need {room.in_words(size)}, more than the {room.in_words(free)} that are free"
            raise UserError(f"{what} on the GPU: use --cache auto or --cache host")
        if self._cache == "device" or (self._cache == "auto" and room.fits_on_device(size, self._device)):
            return Store(self._host.array.to(self._device), self._host.present)
        return self._host
