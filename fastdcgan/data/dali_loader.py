"""Decoding with NVIDIA DALI, on the CPU or with the GPU's JPEG decoder.

DALI is fed with encoded bytes in our own order, so the order, the sharding and the position in them are the same for
every loader, and a pipeline has no state worth keeping. That matters because one broken image kills a pipeline for
good: it is then replaced by a new one, the images that were in it are decoded again without the culprit, and none is
lost. A file whose very structure is broken would end the process, so those never reach it (`header.is_plain`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.tensors as tensors
import nvidia.dali.types
import torch
from nvidia.dali.pipeline import Pipeline

from fastdcgan.console import say
from fastdcgan.data.header import JPEG, PNG, is_plain
from fastdcgan.data.loader import Decoded, Loader, Pixels, Request, ahead, decoding_threads, enter_resized, in_pieces
from fastdcgan.data.order import Ids
from fastdcgan.data.pillow_decode import UnusableImage
from fastdcgan.errors import first_line

Pictures = list[Any] | Pixels

types: Any = nvidia.dali.types  # its names are made at run time, where type checkers do not see them
LARGE_PNG = 1 << 20  # pixels; above, DALI, which holds whole batches unresized, takes gigabytes and is no faster
GPU_DECODE_FROM_BYTES = 16_384  # a typical file this large is worth sending to the GPU's decoder


@functools.cache
def decodes_on(gpu: int) -> bool:
    """Whether DALI, which may be for another CUDA than torch, can decode on this GPU: found out by trying, and said."""
    try:
        pipeline = Pipeline(batch_size=1, num_threads=1, device_id=gpu, prefetch_queue_depth=1)
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            pipeline.set_outputs(fn.decoders.image(encoded, device="mixed"))
        pipeline.build()
    except RuntimeError as error:
        say(f"DALI cannot decode on the GPU, so the CPU does: {first_line(error)}")
        return False
    return True


@dataclass
class _Batch:
    """A request that the pool is at work on."""

    decoded: Decoded
    reading: list[Future[None]]  # of the files for DALI, into `encoded`, or by Pillow, into `decoded`
    decoding: list[Future[None]]  # of all others, by Pillow, into `decoded`
    encoded: dict[int, bytes]  # row -> file

    def rows(self) -> list[int]:
        """The rows that DALI decodes, in the order in which it gets them."""
        return sorted(self.encoded)


class DaliLoader(Loader):
    """DALI for plain JPEG and PNG, Pillow for the rest."""

    def __init__(self, *args: Any, device: torch.device, **kwargs: Any) -> None:
        """Arguments of `Loader`; on a CUDA `device`, sets of large files are decoded there."""
        super().__init__(*args, **kwargs)
        self.fast &= ~((self.census.kind == PNG) & (self.centre[:, 2:].prod(axis=1, dtype=np.int64) > LARGE_PNG))
        if self.channels == 1:  # DALI's grey of a colour PNG is not Pillow's (that of a JPEG is the file's own)
            self.fast &= ~((self.census.kind == PNG) & self.census.colour)
        large = bool(np.median(self.census.encoded_bytes) >= GPU_DECODE_FROM_BYTES)
        if device.type == "cuda" and large and decodes_on(device.index or 0):
            self.device = device
        if self.device.type == "cuda":  # the GPU decodes large JPEGs whole faster than the CPU decodes them scaled
            self.fast |= (self.census.kind == JPEG) & self.moderate
            self._copy_stream = torch.cuda.Stream(self.device)
        self._pipeline: Pipeline | None = None
        self._max_batch = 0

    def decode(self, requests: Iterable[Request]) -> Iterator[Decoded]:
        def begin(request: Request) -> _Batch:
            decoded, fast = self.begin(request), self.fast[request.ids]
            encoded: dict[int, bytes] = {}
            return _Batch(
                decoded,
                in_pieces(pool, lambda rows: self._read_rows(decoded, rows, encoded), np.flatnonzero(fast)),
                in_pieces(pool, lambda rows: self._decode_rows(decoded, rows), np.flatnonzero(~fast)),
                encoded,
            )

        def start(batch: _Batch) -> _Batch:
            for piece in batch.reading:
                piece.result()
            if batch.encoded:
                self._feed(batch, batch.rows())
            return batch

        with decoding_threads(self.threads) as pool:
            try:
                running: _Batch | None = None
                for batch in ahead(begin, requests):
                    if running is None:
                        running = start(batch)
                        continue
                    # The next batch is in DALI while this one is resized and used.
                    collected = self._collect(running)
                    done, running = running, start(batch)
                    yield self._finish(done, collected)
                if running is not None:
                    yield self._finish(running, self._collect(running))
            finally:
                self._pipeline = None

    def _read_rows(self, decoded: Decoded, rows: Ids, encoded: dict[int, bytes]) -> None:
        """Collect these rows' files for DALI; one that is not as it should be is decoded with Pillow."""
        kinds, sizes = self.census.kind[decoded.ids], self.census.sizes[decoded.ids]
        images = decoded.images.numpy()

        def enter(row: int, data: bytes) -> None:
            if is_plain(data, int(kinds[row]), tuple(sizes[row].tolist())):
                encoded[row] = data
            else:
                images[row] = self.pillow(decoded, row, data)

        self.each(decoded, rows, enter)

    def _decode_rows(self, decoded: Decoded, rows: Ids) -> None:
        """Decode these rows' files with Pillow."""
        images = decoded.images.numpy()

        def decode(row: int, data: bytes) -> None:
            images[row] = self.pillow(decoded, row, data)

        self.each(decoded, rows, decode)

    def _feed(self, batch: _Batch, rows: list[int]) -> None:
        """Start decoding these rows in the pipeline; a file it cannot take shows in `_outputs`."""
        if self._pipeline is None or len(rows) > self._max_batch:
            self._max_batch = max(len(rows), self._max_batch)
            self._pipeline = self._build(self._max_batch)
        # Made here, not by feed_input, which looks at every array for whose it might be: twice as long.
        encoded = tensors.TensorListCPU([tensors.TensorCPU(batch.encoded[row]) for row in rows])
        self._pipeline.feed_input("encoded", encoded)
        self._pipeline.feed_input("anchor", batch.decoded.boxes[rows, :2])
        self._pipeline.feed_input("shape", batch.decoded.boxes[rows, 2:])
        self._pipeline.schedule_run()

    def _build(self, max_batch: int) -> Pipeline:
        device_id = self.device.index or 0 if self.device.type == "cuda" else None
        pipeline = Pipeline(batch_size=max_batch, num_threads=self.threads, device_id=device_id, prefetch_queue_depth=1)
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=device_id is None)
            anchor = fn.external_source(name="anchor", dtype=types.INT32, ndim=1)
            shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
            image: Any = fn.decoders.image_slice(
                encoded,
                anchor,
                shape,
                axes=(0, 1),
                device="cpu" if device_id is None else "mixed",
                output_type=types.GRAY if self.channels == 1 else types.RGB,
                adjust_orientation=False,  # what is turned is Pillow's: where DALI turned it, the slice would not fit
                jpeg_fancy_upsampling=True,  # as libjpeg does by default, hence Pillow and torchvision
            )
            if device_id is not None:
                image = fn.resize(image, size=self.image_size, interp_type=types.INTERP_LINEAR, antialias=True)
            pipeline.set_outputs(image)  # on the CPU torch resizes: twice as fast, and the same as the torch loader
        pipeline.build()
        return pipeline

    def _collect(self, batch: _Batch) -> Pictures:
        """What DALI made of the batch, one picture each of `batch.rows()`; the broken ones are entered as such."""
        if not batch.encoded:
            return []
        pictures = self._outputs()
        if pictures is None:
            pictures = self._decode_around_the_broken(batch, batch.rows())
        return pictures

    def _outputs(self) -> Pictures | None:
        """A copy of what the pipeline made; None where it died of a broken image.

        numpy uint8 (h, w, 1 or 3) each, not yet resized, from the CPU, one array where all have one size; a list of
        torch uint8 (H, W, 1 or 3) from the GPU.
        """
        assert self._pipeline is not None
        try:
            (output,) = self._pipeline.share_outputs()
        except RuntimeError:
            self._pipeline = None
            return None
        if self.device.type == "cpu":
            dense = output.is_dense_tensor()
            copied = np.array(output.as_tensor()) if dense else [np.array(picture) for picture in output]
        else:
            # share_outputs has waited for DALI's stream. The copy runs on a stream of its own, so that waiting for it,
            # before DALI may reuse the memory, does not wait for the training step.
            with torch.cuda.device(self.device), torch.cuda.stream(self._copy_stream):
                pixels = torch.utils.dlpack.from_dlpack(output.as_tensor()).clone()
                self._copy_stream.synchronize()
            pixels.record_stream(torch.cuda.current_stream(self.device))
            copied = list(pixels)
        self._pipeline.release_outputs()
        return copied

    def _decode_around_the_broken(self, batch: _Batch, rows: list[int]) -> Pictures:
        """These rows in halves, until every image DALI cannot decode stands alone; those are left to Pillow."""
        if len(rows) > 1:
            half = len(rows) // 2
            pictures: list[Any] = []
            for part in (rows[:half], rows[half:]):
                self._feed(batch, part)
                of_part = self._outputs()
                if of_part is None:
                    of_part = self._decode_around_the_broken(batch, part)
                pictures.extend(of_part)
            return pictures
        (row,) = rows
        i = int(batch.decoded.ids[row])
        self.fast[i] = False
        try:
            picture = self.pillow(batch.decoded, row, batch.encoded[row])[..., : min(self.channels, 3)]
        except UnusableImage as fault:
            batch.decoded.broken[i] = str(fault)
            picture = np.zeros((*self.image_size, min(self.channels, 3)), dtype=np.uint8)
        return [picture] if self.device.type == "cpu" else [torch.from_numpy(picture.copy()).to(self.device)]

    def _finish(self, batch: _Batch, pictures: Pictures) -> Decoded:
        """Enter DALI's pictures beside Pillow's."""
        for piece in batch.decoding:
            piece.result()
        decoded = batch.decoded
        if not len(pictures):
            return decoded
        if self.device.type == "cpu":
            enter_resized(decoded.images.numpy(), batch.rows(), pictures)
            return decoded
        decoded.images = decoded.images.to(self.device)
        rows = torch.tensor(batch.rows(), device=self.device)
        decoded.images[rows, ..., : pictures[0].shape[2]] = torch.stack(list(pictures))
        if self.channels == 4:
            decoded.images[rows, ..., 3] = 255
        return decoded
