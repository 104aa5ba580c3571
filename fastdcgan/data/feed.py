"""The next images of an order, decoded where that is still to be done."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import torch

from fastdcgan.data.loader import Decoded, Loader, Request
from fastdcgan.data.order import Ids, Order
from fastdcgan.data.store import Store


class Usable:
    """Which files of a set can be used, shared by all its streams; shrinks when a file breaks while it is decoded."""

    def __init__(
        self, mask: np.ndarray[tuple[int], np.dtype[np.bool_]], on_broken: Callable[[dict[int, str]], None]
    ) -> None:
        self.mask = mask  # bool (n,)
        self._on_broken = on_broken

    def drop(self, broken: dict[int, str]) -> None:
        """Raises what `on_broken` raises: UserError under --strict, or when too few images are left."""
        new = {i: reason for i, reason in broken.items() if self.mask[i]}
        if new:
            self.mask[list(new)] = False
            self._on_broken(new)


class Feed(ABC):
    """Walks along an order; `cursor` is the element it stands before."""

    device: torch.device  # where `fill` finds the images, hence where it best writes to

    def __init__(self, order: Order, cursor: int, usable: Usable) -> None:
        self.order, self.cursor, self.usable = order, cursor, usable

    @abstractmethod
    def fill(self, out: torch.Tensor) -> int:
        """Write the next len(out) images to `out`, uint8 (B, H, W, C); returns the new cursor."""

    @abstractmethod
    def close(self) -> None:
        """Stop decoding."""


class StoreFeed(Feed):
    """Images that lie in a store, after decoding those that do not yet."""

    def __init__(
        self, order: Order, cursor: int, usable: Usable, store: Store, loader: Loader | None, request: int
    ) -> None:
        """`loader` may be None where the store is complete; `request` is how many images are decoded together."""
        super().__init__(order, cursor, usable)
        self.store, self._request, self.device = store, request, store.array.device
        self.complete = self._nothing_missing()
        self._decoded = loader.decode(self._missing(cursor)) if loader and not self.complete else None

    def rows(self, count: int) -> tuple[Ids, Ids]:
        """The next `count` image numbers, whose rows are then in the store; and the cursor behind each."""
        while True:
            ids, after = self.order.take(self.cursor, count, self.usable.mask)
            if self.complete or self.store.present[ids].all():
                self.cursor = int(after[-1])
                return ids, after
            self._decode_some()

    def fill(self, out: torch.Tensor) -> int:
        ids, _ = self.rows(len(out))
        if self.store.array.device.type == "cpu":
            np.take(self.store.array.numpy(), ids, axis=0, out=out.numpy(), mode="clip")  # "clip" writes unbuffered
        else:
            put(out, self.store.read(ids))
        return self.cursor

    def close(self) -> None:
        if self._decoded is not None:
            self._decoded.close()  # type: ignore[attr-defined]
            self._decoded = None

    def _decode_some(self) -> None:
        decoded = next(self._decoded, None) if self._decoded else None
        if decoded is None:  # all was asked for; what is still absent was decoded by another stream or is broken
            self.complete = True
            return
        self.usable.drop(decoded.broken)
        good = sound_rows(decoded)
        self.store.write(decoded.ids[good], select(decoded.images, good))
        if self._nothing_missing():
            self.complete = True
            self.close()
            self.store.finish()

    def _nothing_missing(self) -> bool:
        return not (self.usable.mask & ~self.store.present).any()

    def _missing(self, cursor: int) -> Iterator[Request]:
        """Requests for the images that are not in the store, in the order in which they will be needed."""
        requested = self.store.present | ~self.usable.mask
        waiting: Ids = np.empty(0, dtype=np.int64)
        while not requested.all():
            block = self.order.slice(cursor, self._request)
            cursor += self._request
            new = block[~(requested[block] | self.store.present[block])]  # another stream may have brought some
            new = new[np.sort(np.unique(new, return_index=True)[1])]  # a small set may come up twice in a block
            requested[block] = True
            waiting = np.concatenate([waiting, new])
            if len(waiting) >= self._request:
                yield Request(waiting[: self._request])
                waiting = waiting[self._request :]
        if len(waiting):
            yield Request(waiting)


class DecodeFeed(Feed):
    """Images decoded every time they come up: for sets that fit nowhere, and for crops that are new every epoch."""

    def __init__(
        self, order: Order, cursor: int, usable: Usable, loader: Loader, request: int, *, random_crop: bool
    ) -> None:
        super().__init__(order, cursor, usable)
        self.device, self._random_crop = loader.device, random_crop
        self._cursors: deque[Ids] = deque()  # for the requests under way: the cursor behind each image
        self._decoded = loader.decode(self._requests(cursor, request))
        self._ready: torch.Tensor | None = None  # decoded, not yet handed out
        self._after: Ids = np.empty(0, dtype=np.int64)

    def fill(self, out: torch.Tensor) -> int:
        filled = 0
        while filled < len(out):
            if self._ready is None or not len(self._ready):
                decoded = next(self._decoded)
                self.usable.drop(decoded.broken)
                good = sound_rows(decoded)
                self._ready = select(decoded.images, good)
                self._after = self._cursors.popleft()[good]
            part = min(len(out) - filled, len(self._ready))
            if part:
                put(out[filled : filled + part], self._ready[:part])
                self.cursor = int(self._after[part - 1])
            self._ready, self._after = self._ready[part:], self._after[part:]
            filled += part
        return self.cursor

    def close(self) -> None:
        self._decoded.close()  # type: ignore[attr-defined]

    def _requests(self, cursor: int, request: int) -> Iterator[Request]:
        while True:
            ids, after = self.order.take(cursor, request, self.usable.mask)
            cursor = int(after[-1])
            self._cursors.append(after)
            yield Request(ids, self.order.random_places(ids, after) if self._random_crop else None)


def sound_rows(decoded: Decoded) -> Ids:
    """int64: the rows of `decoded` that hold images."""
    if not decoded.broken:
        return np.arange(len(decoded.ids))
    return np.flatnonzero(~np.isin(decoded.ids, list(decoded.broken)))


# On the CPU these use numpy: torch would use its threads, which then get in the way of those that decode.


def select(images: torch.Tensor, rows: Ids) -> torch.Tensor:
    """These rows, in increasing order and not repeated, of uint8 (n, H, W, C); no copy where they are all."""
    if len(rows) == len(images):
        return images
    if images.device.type == "cpu":
        return torch.from_numpy(images.numpy()[rows])
    return images[torch.from_numpy(rows).to(images.device)]


def put(out: torch.Tensor, images: torch.Tensor) -> None:
    """out[:] = images"""
    if out.device.type == images.device.type == "cpu":
        out.numpy()[...] = images.numpy()
    else:
        out.copy_(images)
