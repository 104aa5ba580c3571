"""What the rest of fastdcgan sees of a set of images: `Dataset` and the `Stream` of batches drawn from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fastdcgan.data.order import Order
from fastdcgan.errors import UserError

LEFT_OUT = "left out since the run began"  # in a continued run the reason for a file that is, whatever was wrong
PIECE = 256  # images that `pieces` hands out together


class Stream(ABC):
    """Batches without end. After `advance()`, `source[index]` is the batch: uint8 (B, H, W, C).

    Neither `source` nor `index` ever moves in memory, so a captured CUDA graph may gather from them. On CUDA, `advance`
    is ordered with the current stream: no synchronisation is needed before the next kernel, nor before `advance`.
    """

    source: torch.Tensor  # uint8 (M, H, W, C), on the device
    index: torch.Tensor  # int64 (B,), on the device
    images: int  # delivered so far, over all ranks

    @abstractmethod
    def advance(self) -> None:
        """Make `source[index]` the next batch."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """JSON-able position; `dataset.stream(batch_size, state)` continues with exactly the batch after this one."""

    @abstractmethod
    def close(self) -> None:
        """Stop the threads and give the memory back. Calling it twice is harmless."""


class Dataset(ABC):
    """A set of usable images, all brought to one size and number of channels."""

    name: str  # names the run: "digits", or the stem of the folder or file
    count: int  # usable images
    channels: int  # 1, 3 or 4
    image_size: tuple[int, int]  # (height, width)
    flip: bool  # whether mirroring left to right is a sensible default
    labels: list[int] | None  # one a usable image, indexing class_names
    class_names: list[str] | None
    skipped: list[tuple[str, str]]  # (file, reason); grows when a file breaks while it is decoded
    _order: Order

    def listed(self) -> tuple[int, str]:
        """How many images there are, usable or not, and a digest of their names or of some: in all processes alike."""
        return self._order.count, self._order.listing

    def changed(self, state: dict[str, Any]) -> bool:
        """Whether a `Stream.state()` is of other images than these."""
        return self._order.changed(state)

    @abstractmethod
    def take(self, indices: Sequence[int]) -> torch.Tensor:
        """uint8 (n, H, W, C) on the CPU: the images with these numbers (0 .. count - 1), in the order asked for."""

    def sample(self, most: int, seed: int) -> torch.Tensor:
        """Up to `most` images drawn at random, as from `take`: the same from the same seed."""
        return self.take(torch.randperm(self.count, generator=torch.Generator().manual_seed(seed))[:most].tolist())

    @abstractmethod
    def content(self) -> str:
        """Names what the images are made from; changes when that changes."""

    def pieces(self, start: int) -> Iterator[tuple[int, int, list[int], torch.Tensor]]:
        """All images from number `start` on, in order, in pieces (start, stop, good, images).

        `good` are the numbers in start .. stop - 1 that could be decoded, `images` their pixels, as from `take`.
        """
        for first in range(start, self.count, PIECE):
            numbers = list(range(first, min(first + PIECE, self.count)))
            yield first, numbers[-1] + 1, numbers, self.take(numbers)

    @abstractmethod
    def stream(self, batch_size: int, state: dict[str, Any] | None = None) -> Stream:
        """Batches of `batch_size` images for this rank, from the beginning or from a `Stream.state()`.

        Raises:
            UserError: the set has fewer usable images than one batch over all ranks.
        """


def require_a_batch(name: str, count: int, batch_size: int, world_size: int) -> None:
    """Raises UserError where `count` images do not make one batch."""
    if batch_size < 1:
        raise UserError(f"batch size {batch_size} is not possible: use 2 or more")
    if count < batch_size * world_size:
        ranks = f" on each of {world_size} ranks" if world_size > 1 else ""
        most = count // world_size
        instead = f"use --batch-size {most} or less, or add images" if most > 1 else "add images"
        raise UserError(f"{name} has {count} usable images, fewer than one batch of {batch_size}{ranks}: {instead}")
