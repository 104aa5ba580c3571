"""Decoding with torchvision and Pillow in threads: for machines without DALI."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch

from fastdcgan.data.header import JPEG
from fastdcgan.data.loader import Decoded, Loader, Pixels, Request, ahead, decoding_threads, enter_resized, in_pieces
from fastdcgan.data.order import Ids


class TorchLoader(Loader):
    """torchvision's decoder for plain JPEG, Pillow for the rest: torchvision's for PNG can crash on a broken file."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Arguments of `Loader`."""
        super().__init__(*args, **kwargs)
        self.fast &= self.census.kind == JPEG

    def decode(self, requests: Iterable[Request]) -> Iterator[Decoded]:
        with decoding_threads(self.threads) as pool:

            def begin(request: Request) -> tuple[Decoded, list[Future[None]]]:
                decoded = self.begin(request)
                work = in_pieces(pool, lambda rows: self._decode_rows(decoded, rows), np.arange(len(decoded.ids)))
                return decoded, work

            for decoded, work in ahead(begin, requests):
                for piece in work:
                    piece.result()
                yield decoded

    def _decode_rows(self, decoded: Decoded, rows: Ids) -> None:
        """Decode these rows of the request into `decoded`."""
        images = decoded.images.numpy()
        to_resize: dict[int, Pixels] = {}

        def decode(row: int, data: bytes) -> None:
            part = self._fast_decode(decoded, row, data) if self.fast[decoded.ids[row]] else None
            if part is None:
                images[row] = self.pillow(decoded, row, data)
            else:
                to_resize[row] = part

        self.each(decoded, rows, decode)
        enter_resized(images, list(to_resize), list(to_resize.values()))

    def _fast_decode(self, decoded: Decoded, row: int, data: bytes) -> Pixels | None:
        """uint8 (h, w, 1 or 3): the part of this row's image that is shown; None where torchvision cannot."""
        from torchvision.io import ImageReadMode, decode_jpeg

        mode = ImageReadMode.GRAY if self.channels == 1 else ImageReadMode.RGB
        top, left, height, width = decoded.boxes[row].tolist()
        try:
            image = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=mode)
        except RuntimeError:
            return None
        if image.shape[1:] != tuple(self.census.sizes[decoded.ids[row]]):  # rewritten since it was looked at
            return None
        part: Pixels = image.permute(1, 2, 0).numpy()[top : top + height, left : left + width]
        return part.copy() if 2 * part.size < image.numel() else part  # a small part must not hold all in memory
