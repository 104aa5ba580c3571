"""In which order images are seen: one fresh permutation per epoch, joined end to end, shared out among the ranks.

The order is a pure function of (number of files, seed, rank, world size). No loader and no cache has a say in it, so a
position in it is one whole number and a run continues exactly where it stopped. Files found unusable keep their places
and are passed over: whether a file is known to be broken beforehand or breaks later, the others keep their order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdcgan.console import say

Ids = NDArray[np.int64]


@lru_cache(maxsize=4)
def permutation(count: int, seed: int, epoch: int) -> Ids:
    """int64 (count,): the order of epoch number `epoch`.

    Sorted raw generator output rather than `Generator.permutation`: numpy promises that raw bits never change between
    versions, and a checkpoint may outlive a version.
    """
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(count)
    return np.argsort(bits, kind="stable").astype(np.int64)


@lru_cache(maxsize=4)
def random_places(count: int, seed: int, epoch: int) -> NDArray[np.float64]:
    """float64 (count, 2) in 0..1: where each image is cropped in epoch number `epoch` (see pillow_decode.cover_box)."""
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch, 1])).random_raw(2 * count)
    return (bits >> np.uint64(11)).reshape(count, 2).astype(np.float64) * 2.0**-53  # 53 bits: below 1 also as a float


class Order:
    """The endless sequence of image numbers that one rank sees; element k is global element rank + world_size * k."""

    def __init__(self, count: int, seed: int, rank: int = 0, world_size: int = 1, listing: str = "") -> None:
        """`listing` stands for what the numbers mean: a digest of the files' names, or of some images."""
        self.count, self.seed, self.rank, self.world_size, self.listing = count, seed, rank, world_size, listing

    def changed(self, state: dict[str, Any]) -> bool:
        """Whether a position was saved (`Position.state`) for other images than these."""
        known = state["listing"] != ""  # not of decoded images, in checkpoints from before they had one
        return bool(state["count"] != self.count or (known and state["listing"] != self.listing))

    def slice(self, start: int, length: int) -> Ids:
        """int64 (length,): elements start .. start + length - 1 of this rank's sequence."""
        positions = self.rank + self.world_size * np.arange(start, start + length, dtype=np.int64)
        epochs, places = np.divmod(positions, self.count)
        images = np.empty(length, dtype=np.int64)
        numbers, starts = np.unique(epochs, return_index=True)  # positions increase, so an epoch is one stretch
        for epoch, first, last in zip(numbers.tolist(), starts, [*starts[1:], length], strict=True):
            images[first:last] = permutation(self.count, self.seed, epoch)[places[first:last]]
        return images

    def take(self, start: int, length: int, usable: NDArray[np.bool_]) -> tuple[Ids, Ids]:
        """The next `length` usable images from element `start` on.

        Args:
            usable: bool (count,), not all False.

        Returns:
            (images, after), both int64 (length,): after[j] is the element to continue from once images[j] was used.
        """
        images: Ids = np.empty(0, dtype=np.int64)
        after: Ids = np.empty(0, dtype=np.int64)
        while len(images) < length:
            block = self.slice(start, length)
            kept = np.flatnonzero(usable[block])
            images = np.concatenate([images, block[kept]])
            after = np.concatenate([after, start + kept + 1])
            start += length
        return images[:length], after[:length]

    def random_places(self, images: Ids, after: Ids) -> NDArray[np.float64]:
        """float64 (n, 2): where the images that `take` gave are cropped at random.

        Another place every epoch, and, whatever the number of ranks, the same one for an image in an epoch.
        """
        epochs = (self.rank + self.world_size * (after - 1)) // self.count
        places = np.empty((len(images), 2))
        for epoch in np.unique(epochs).tolist():
            these = epochs == epoch
            places[these] = random_places(self.count, self.seed, epoch)[images[these]]
        return places


@dataclass
class Position:
    """How far a stream has come."""

    taken: int = 0  # elements of this rank's order that are used up
    images: int = 0  # images delivered, over all ranks

    def state(self, order: Order, usable: NDArray[np.bool_]) -> dict[str, Any]:
        """JSON-able. `unusable` is part of it, so that a file that has been repaired meanwhile stays left out."""
        return {
            "taken": self.taken,
            "images": self.images,
            "count": order.count,
            "listing": order.listing,
            "world_size": order.world_size,
            "unusable": np.flatnonzero(~usable).tolist(),
        }

    @classmethod
    def resume(cls, order: Order, state: dict[str, Any] | None) -> Position:
        """The position saved in `state`; the beginning where there is none.

        `state` may come from another number of ranks: these begin together where that one was.
        """
        if state is None:
            return cls()
        taken_by_all = state["taken"] * state["world_size"]
        if order.changed(state):
            say(f"the data changed: {order.count} files where there were {state['count']}; going on with a new epoch")
            taken_by_all = -(-taken_by_all // state["count"]) * order.count
        # The first element of this rank, rank + world_size * k, that is not below.
        taken = max(-((order.rank - taken_by_all) // order.world_size), 0)
        return cls(taken, state["images"])
