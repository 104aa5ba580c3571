"""How batches reach the device: they lie there, are written to one host buffer, or are staged on the GPU one ahead."""

from __future__ import annotations

import queue
import threading
from typing import Any

import torch

from fastdcgan.data.dataset import Stream
from fastdcgan.data.feed import Feed, StoreFeed
from fastdcgan.data.order import Ids, Position

INDICES_AT_ONCE = 1 << 16  # image numbers sent to the device in one go, once all images are there
SLOTS = 3  # batches decoded or gathered ahead of their copy into `source`


class FedStream(Stream):
    """What the others have in common: images come from a `Feed`, which is at `position`."""

    def __init__(self, feed: Feed, position: Position) -> None:
        self._feed, self._position = feed, position
        self.images = position.images

    def _delivered(self, cursor: int) -> None:
        """Remember that `source[index]` is the batch before `cursor`."""
        self._position.taken = cursor
        self._position.images += len(self.index) * self._feed.order.world_size
        self.images = self._position.images

    def state(self) -> dict[str, Any]:
        return self._position.state(self._feed.order, self._feed.usable.mask)

    def close(self) -> None:
        self._feed.close()


class ResidentStream(FedStream):
    """`source` is the whole set; only `index` changes."""

    _feed: StoreFeed

    def __init__(self, feed: StoreFeed, batch_size: int, position: Position) -> None:
        super().__init__(feed, position)
        self.source = feed.store.array
        self.index = torch.zeros(batch_size, dtype=torch.int64, device=self.source.device)
        self._upcoming = self.index[:0]  # image numbers on the device, not yet used
        self._after: list[int] = []  # the cursor behind each batch of them

    def advance(self) -> None:
        if not self._after:
            self._look_ahead()
        batch_size = len(self.index)
        self.index.copy_(self._upcoming[:batch_size])
        self._upcoming = self._upcoming[batch_size:]
        self._delivered(self._after.pop(0))

    def _look_ahead(self) -> None:
        batch_size = len(self.index)
        most = min(INDICES_AT_ONCE, self._feed.order.count) if self._feed.complete else batch_size
        batches = max(most // batch_size, 1)
        ids, after = self._feed.rows(batches * batch_size)
        self._upcoming = _to_device(ids, self.index.device)
        self._after = after[batch_size - 1 :: batch_size].tolist()


class HostStream(FedStream):
    """`source` is one batch in host memory, written anew each time: a set that fits nowhere, on the CPU."""

    def __init__(self, feed: Feed, shape: tuple[int, ...], position: Position) -> None:
        """`shape`: (B, H, W, C)"""
        super().__init__(feed, position)
        self.source = torch.empty(shape, dtype=torch.uint8)
        self.index = torch.arange(shape[0])

    def advance(self) -> None:
        self._delivered(self._feed.fill(self.source))


class StagedStream(FedStream):
    """`source` is two batches on the GPU: the step reads one half while a copy stream fills the other.

    A thread fills slots (pinned host memory; GPU memory where the GPU decodes) ahead of time. `advance` never waits
    for the GPU; it waits for the thread only where decoding is slower than training.
    """

    def __init__(self, feed: Feed, shape: tuple[int, ...], device: torch.device, position: Position) -> None:
        """`shape`: (B, H, W, C)"""
        super().__init__(feed, position)
        batch_size = shape[0]
        self.source = torch.empty((2 * batch_size, *shape[1:]), dtype=torch.uint8, device=device)
        self._halves = torch.arange(2 * batch_size, device=device).view(2, batch_size)
        self.index = self._halves[0].clone()
        self._device = device
        self._copy_stream = torch.cuda.Stream(device)
        self._copied = [torch.cuda.Event(), torch.cuda.Event()]
        self._cursors = [0, 0]  # behind the batch in each half
        self._empty: queue.Queue[tuple[torch.Tensor, torch.cuda.Event]] = queue.Queue()
        self._full: queue.Queue[tuple[torch.Tensor, torch.cuda.Event, int] | BaseException] = queue.Queue()
        for _ in range(SLOTS):
            slot = torch.empty(shape, dtype=torch.uint8, device=feed.device, pin_memory=feed.device.type == "cpu")
            self._empty.put((slot, torch.cuda.Event()))
        self._closed = False
        self._half = 1
        self._thread = threading.Thread(target=self._fill_slots, name="fill slots", daemon=True)
        torch.cuda.current_stream(device).synchronize()  # `source` and slots may be memory that is still in use there
        self._failed: BaseException | None = None  # why there will be no further batch
        try:
            self._thread.start()
            self._stage(0)
            if self._failed is not None:
                raise self._failed
        except BaseException:  # such as Ctrl-C: nobody else has this object yet, to close it
            self.close()
            raise

    def advance(self) -> None:
        if self._failed is not None:
            raise self._failed
        self._half = 1 - self._half
        compute = torch.cuda.current_stream(self._device)
        # Everything that read the other half, one step ago, is already queued on `compute`: copy behind it.
        self._copy_stream.wait_stream(compute)
        compute.wait_event(self._copied[self._half])
        self.index.copy_(self._halves[self._half])
        self._delivered(self._cursors[self._half])
        self._stage(1 - self._half)

    def _stage(self, half: int) -> None:
        """Queue the copy of the next batch into one half of `source`; where none comes, the next `advance` says why."""
        filled = self._full.get()
        if isinstance(filled, BaseException):
            self._failed = filled
            return
        slot, copied, self._cursors[half] = filled
        batch_size = len(self.index)
        with torch.cuda.stream(self._copy_stream):
            self.source[half * batch_size : (half + 1) * batch_size].copy_(slot, non_blocking=True)
            self._copied[half].record()
            copied.record()
        self._empty.put((slot, copied))

    def _fill_slots(self) -> None:
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.Stream(self._device)):
                while not self._closed:
                    slot, copied = self._empty.get()
                    if self._closed:
                        return
                    copied.synchronize()  # the copy out of this slot is done; an event never recorded counts as done
                    cursor = self._feed.fill(slot)
                    torch.cuda.current_stream().synchronize()  # where the GPU decodes, the slot is written by it
                    self._full.put((slot, copied, cursor))
        except BaseException as error:  # handed to the caller of advance()
            self._full.put(error)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._empty.put((torch.empty(0), torch.cuda.Event()))  # wakes the thread
            if self._thread.ident is not None:  # it has been started
                self._thread.join()
            self._copy_stream.synchronize()  # `source` may be freed now: nothing must be writing to it
            super().close()


def _to_device(numbers: Ids, device: torch.device) -> torch.Tensor:
    """Image numbers as a device tensor, without waiting for the GPU (the caching allocator keeps the pinned copy)."""
    tensor = torch.from_numpy(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
