"""The facts about every file of a source, gathered in a few seconds before training and remembered in the cache."""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import PIL
from numpy.typing import NDArray

from fastdcgan import heic
from fastdcgan.console import progress
from fastdcgan.data.header import UNUSABLE, Facts, examine, unusable
from fastdcgan.data.pillow_decode import MOST_PIXELS, cover_box, too_many_pixels
from fastdcgan.data.source import MOST_ENCODED_BYTES, PASSING, TOO_LARGE, EncodedSource, why_unreadable

FILES_AT_ONCE = 256
QUICK = 50e-6  # seconds a file: it comes from memory, and threads would only take turns at the interpreter
SHOW_PROGRESS_FROM = 20_000  # files; fewer are done before a bar could be read
FORMAT = f"5 {PIL.__version__} {heic.VERSION}"  # of the remembered verdicts; raise it when `examine` judges differently


class Census:
    """One entry a file of the source, in its order."""

    def __init__(
        self,
        kind: NDArray[np.uint8],
        sizes: NDArray[np.int32],
        colour: NDArray[np.bool_],
        encoded_bytes: NDArray[np.int64],
        reasons: dict[int, str],
    ) -> None:
        self.kind = kind  # uint8 (n,): UNUSABLE, JPEG, PNG or OTHER of header.py
        self.sizes = sizes  # int32 (n, 2): height and width as shown
        self.colour = colour  # bool (n,)
        self.encoded_bytes = encoded_bytes  # int64 (n,)
        self.reasons = reasons  # file number -> why it is unusable

    @classmethod
    def empty(cls, count: int) -> Census:
        sizes = np.zeros((count, 2), np.int32)
        return cls(np.zeros(count, np.uint8), sizes, np.zeros(count, bool), np.zeros(count, np.int64), {})

    @property
    def usable(self) -> NDArray[np.bool_]:
        """bool (n,)"""
        return self.kind != UNUSABLE

    def enter(self, numbers: Sequence[int], looks: Sequence[tuple[Facts, int]]) -> None:
        """What `look_at` found of these files."""
        self.kind[numbers] = [facts.kind for facts, _ in looks]
        self.sizes[numbers] = np.array([(facts.height, facts.width) for facts, _ in looks]).reshape(-1, 2)
        self.colour[numbers] = [facts.colour for facts, _ in looks]
        self.encoded_bytes[numbers] = [encoded_bytes for _, encoded_bytes in looks]
        for i, (facts, _) in zip(numbers, looks, strict=True):
            self.reasons.pop(i, None)
            if facts.kind == UNUSABLE:
                self.reasons[i] = facts.reason

    def drop(self, i: int, reason: str) -> None:
        self.kind[i] = UNUSABLE
        self.reasons[i] = reason

    def oversized(self, image_size: tuple[int, int]) -> dict[int, str]:
        """JPEGs that even scaled decoding would not bring below the limit at this image size: {file number: reason}."""
        reasons = {}
        pixels = self.sizes[:, 0].astype(np.int64) * self.sizes[:, 1]
        for i in np.flatnonzero(self.usable & (pixels > MOST_PIXELS)).tolist():
            height, width = (int(side) for side in self.sizes[i])
            _, _, box_height, box_width = cover_box((height, width), image_size)
            shrink = min(box_height / image_size[0], box_width / image_size[1])
            scale = next((scale for scale in (8, 4, 2) if shrink >= scale), 1)
            if pixels[i] > MOST_PIXELS * scale**2:
                reasons[i] = too_many_pixels(height, width)
        return reasons


def look_at(source: EncodedSource, i: int) -> tuple[Facts, int]:
    """(facts, encoded bytes) of file i, whatever happens."""
    try:
        glimpse = source.glimpse(i)
        if glimpse.size > MOST_ENCODED_BYTES:
            return unusable(TOO_LARGE), glimpse.size
        return examine(glimpse), glimpse.size
    except OSError as error:
        return unusable(why_unreadable(error)), 0


def take_census(source: EncodedSource, threads: int, folder: Path | None) -> Census:
    """Look at every file, or recall what was found when nothing has changed since.

    Args:
        threads: how many files are looked at at once.
        folder: where verdicts are remembered, None to remember nothing.
    """
    count = len(source)
    census = _recall(_verdicts_file(source, folder), count) if folder else None
    if census is not None:
        waiting = [i for i, reason in census.reasons.items() if reason.startswith(PASSING)]
    else:
        census = Census.empty(count)
        waiting = list(range(count))
    found = census

    def look(start: int) -> int:
        numbers = waiting[start : start + FILES_AT_ONCE]
        found.enter(numbers, [look_at(source, i) for i in numbers])
        return len(numbers)

    started = time.perf_counter()
    first = look(0)
    quick = time.perf_counter() - started < QUICK * first
    with ThreadPoolExecutor(threads) as pool:
        # A thread besides the first grows its heap page by page, and would wait each time for the one that makes
        # memory ready (prefault.py).
        done = (map if quick else pool.map)(look, range(FILES_AT_ONCE, len(waiting), FILES_AT_ONCE))
        if len(waiting) < SHOW_PROGRESS_FROM:
            list(done)
        else:
            with progress("looking at the images", count, "files") as advance:
                advance(first)
                for number in done:
                    advance(number)
    if folder and waiting:
        remember(census, source, folder)
    return census


def remember(census: Census, source: EncodedSource, folder: Path) -> None:
    """Save the verdicts whole or not at all; a cache that cannot be written is no reason to stop."""
    with suppress(OSError):
        memory = _verdicts_file(source, folder)
        temporary = memory.with_name(f".{memory.name}.{os.getpid()}")
        memory.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                np.savez(
                    file,
                    format=FORMAT,
                    kind=census.kind,
                    sizes=census.sizes,
                    colour=census.colour,
                    encoded_bytes=census.encoded_bytes,
                    reasons=np.frombuffer(json.dumps(census.reasons).encode(), np.uint8),
                )
            os.replace(temporary, memory)
        finally:
            temporary.unlink(missing_ok=True)


def _verdicts_file(source: EncodedSource, folder: Path) -> Path:
    key = hashlib.sha256(os.fsencode(f"{source.path.absolute()} {source.fingerprint()}")).hexdigest()
    return folder / f"{key[:32]}.npz"


def _recall(memory: Path, count: int) -> Census | None:
    try:
        with np.load(memory) as saved:
            if str(saved["format"]) != FORMAT or len(saved["kind"]) != count:
                return None
            reasons = {int(i): reason for i, reason in json.loads(saved["reasons"].tobytes()).items()}
            return Census(saved["kind"], saved["sizes"], saved["colour"], saved["encoded_bytes"], reasons)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, EOFError, BadZipFile, zlib.error):
        return None  # none yet, or a damaged one
