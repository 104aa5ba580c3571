"""Encoded files to uint8 pixels: what the DALI and the torch loader have in common.

A loader takes the numbers of the images wanted, batch after batch, and gives the pixels back in the same order, working
a little ahead. A file that cannot be decoded costs that file: it is reported, and its row is to be left out.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from fastdcgan.data import pillow_decode
from fastdcgan.data.census import Census
from fastdcgan.data.header import JPEG, OTHER, UNUSABLE
from fastdcgan.data.order import Ids
from fastdcgan.data.pillow_decode import LARGE_PIXELS, UnusableImage
from fastdcgan.data.source import EncodedSource, why_unreadable

BATCHES_AHEAD = 2  # begun before they are asked for

Pixels = NDArray[np.uint8]
Item = TypeVar("Item")
Begun = TypeVar("Begun")

# Images decoded together: every request costs as long as decoding some 20 small images, hence many of them; few large
# ones, since the first batch waits for the first request, and three requests are in memory.
FEWEST_TOGETHER, MOST_TOGETHER, PIXELS_TOGETHER = 64, 256, 4 << 20
AT_ONCE = 16  # images one thread reads or decodes before the next thread may have the interpreter


class Request(NamedTuple):
    """Images wanted together."""

    ids: Ids  # int64 (n,): their numbers
    places: NDArray[np.float64] | None = None  # (n, 2) in 0..1: where each is cropped (see cover_box); None: centre


@dataclass
class Decoded:
    """The pixels of one request."""

    ids: Ids  # int64 (n,): the image numbers, as requested
    places: NDArray[np.float64]  # (n, 2): where each is cropped
    boxes: NDArray[np.int32]  # (n, 4): the same as top, left, height, width of the part that is shown
    images: torch.Tensor  # uint8 (n, H, W, C); the rows of broken files mean nothing
    broken: dict[int, str] = field(default_factory=dict)  # image number -> reason


class Loader(ABC):
    """Decodes the images of one source to one size."""

    device = torch.device("cpu")  # where the pixels come into being

    def __init__(
        self,
        source: EncodedSource,
        census: Census,
        *,
        image_size: tuple[int, int],
        channels: int,
        threads: int,
    ) -> None:
        self.source, self.census, self.image_size, self.channels = source, census, image_size, channels
        self.threads = threads
        self.centre = cover_boxes(census.sizes, image_size)  # int32 (n, 4): `Decoded.boxes` of all, cropped centrally
        # bool (n,): files for the fast decoder. The rest goes to Pillow: what is odd, and the JPEGs at least twice as
        # large as needed, because libjpeg's scaled decoding, which only Pillow offers, beats any full decoding.
        scaled = (census.kind == JPEG) & (self.centre[:, 2:] >= 2 * np.array(image_size)).all(axis=1)
        # Pillow also decodes the largest, one at a time, so that a batch of them does not fill the memory.
        pixels = census.sizes.prod(axis=1, dtype=np.int64)
        self.moderate = pixels <= LARGE_PIXELS
        typical = max(int(np.median(pixels)), 1)
        self.together = min(max(PIXELS_TOGETHER // typical, FEWEST_TOGETHER), MOST_TOGETHER)
        self.fast = (census.kind != OTHER) & (census.kind != UNUSABLE) & ~scaled & self.moderate

    @abstractmethod
    def decode(self, requests: Iterable[Request]) -> Iterator[Decoded]:
        """One `Decoded` for each request, in order. Closing the iterator stops the work."""

    def begin(self, request: Request) -> Decoded:
        """A request with nothing decoded yet."""
        ids, places = request
        images = torch.empty((len(ids), *self.image_size, self.channels), dtype=torch.uint8)
        if places is None:
            return Decoded(ids, np.full((len(ids), 2), 0.5), self.centre[ids], images)
        return Decoded(ids, places, cover_boxes(self.census.sizes[ids], self.image_size, places), images)

    def read(self, i: int) -> bytes:
        """The encoded file. Raises UnusableImage."""
        try:
            return self.source.read(i)
        except OSError as error:
            raise UnusableImage(why_unreadable(error)) from None

    def each(self, decoded: Decoded, rows: Ids, work: Callable[[int, bytes], None]) -> None:
        """work(row, encoded file) for each of these rows; one that raises UnusableImage is entered as broken."""
        for row in rows.tolist():
            i = int(decoded.ids[row])
            try:
                work(row, self.read(i))
            except UnusableImage as fault:
                decoded.broken[i] = str(fault)

    def pillow(self, decoded: Decoded, row: int, data: bytes) -> Pixels:
        """uint8 (H, W, C): what is to be in this row. Raises UnusableImage."""
        top, left = decoded.places[row].tolist()
        return pillow_decode.decode(data, self.image_size, self.channels, (top, left))


def cover_boxes(
    sizes: NDArray[np.int32], target: tuple[int, int], places: NDArray[np.float64] | float = 0.5
) -> NDArray[np.int32]:
    """`pillow_decode.cover_box` of many images: int32 (n, 4) from sizes int32 (n, 2) and places float64 (n, 2)."""
    height, width = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    wide = width * target[0] >= height * target[1]
    box_height = np.where(wide, height, np.maximum(1, np.rint(width * target[0] / target[1])))
    box_width = np.where(wide, np.maximum(1, np.rint(height * target[1] / target[0])), width)
    place = np.broadcast_to(places, (len(sizes), 2))
    top, left = (height - box_height) * place[:, 0], (width - box_width) * place[:, 1]
    return np.stack([top, left, box_height, box_width], axis=1).astype(np.int32)


def enter_resized(out: Pixels, rows: Sequence[int], parts: Sequence[Pixels] | Pixels) -> None:
    """Resize the parts and put them into these rows of `out`.

    Args:
        out: uint8 (n, H, W, C).
        parts: uint8 (h, w, 1 or 3) each, in one array where they have one size. Those of one size are resized
            together, by torch: several times as fast as one by one, and the same for every loader.
    """
    if isinstance(parts, np.ndarray):
        _enter_resized_alike(out, rows, parts)
        return
    by_size: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for k, part in enumerate(parts):
        by_size[part.shape].append(k)
    for numbers in by_size.values():
        _enter_resized_alike(out, [rows[k] for k in numbers], np.stack([parts[k] for k in numbers]))


def _enter_resized_alike(out: Pixels, rows: Sequence[int], images: Pixels) -> None:
    """The same for parts of one size, (k, h, w, 1 or 3)."""
    image_size = out.shape[1:3]
    if images.shape[1:3] != image_size:
        channels_last = torch.from_numpy(images).permute(0, 3, 1, 2)  # three times as fast as channels first
        resized = torch.nn.functional.interpolate(channels_last, image_size, mode="bilinear", antialias=True)
        images = resized.permute(0, 2, 3, 1).numpy()
    out[rows, ..., : images.shape[3]] = images
    if out.shape[3] == 4:
        out[rows, ..., 3] = 255


def in_pieces(pool: ThreadPoolExecutor, work: Callable[[Ids], None], ids: Ids) -> list[Future[None]]:
    """`work` on pieces of `ids`, in the pool."""
    return [pool.submit(work, ids[start : start + AT_ONCE]) for start in range(0, len(ids), AT_ONCE)]


@contextmanager
def decoding_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads to decode in. At the end what has begun in them is not waited for: an abandoned generator ends wherever
    Python collects garbage, also while a thread starts.
    """
    pool = ThreadPoolExecutor(count, thread_name_prefix="decode")
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def ahead(begin: Callable[[Item], Begun], items: Iterable[Item]) -> Iterator[Begun]:
    """`begin(item)` for each item, called up to BATCHES_AHEAD items before its result is handed out."""
    begun: deque[Begun] = deque()
    for item in items:
        begun.append(begin(item))
        if len(begun) > BATCHES_AHEAD:
            yield begun.popleft()
    yield from itertools.chain(begun)
