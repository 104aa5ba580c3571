"""Generated images of every kind, and short ways to open and read data sets."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastdcgan.data import Dataset, open_dataset
from fastdcgan.data.file_dataset import dali_is_installed

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """torch's threads and the decoding threads would fight for the cores of a small test machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def nothing_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a set too large for its files to be held in memory between the first look at them and their decoding."""
    monkeypatch.setattr("fastdcgan.data.source.KEPT_BYTES", 0)


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], AbstractContextManager[None]]:
    """with unreadable("a.jpg"): files of that name may not be read; not by chmod, as tests may run as root."""

    @contextmanager
    def refusing(name: str) -> Iterator[None]:
        as_ever = os.open

        def refuse(path: str, *rest: int) -> int:
            if str(path).endswith(name):
                raise PermissionError(13, "Permission denied", path)
            return as_ever(path, *rest)

        with monkeypatch.context() as patched:
            patched.setattr(os, "open", refuse)
            yield

    return refusing


@pytest.fixture(params=["dali", "torch"])
def loader(request: pytest.FixtureRequest) -> str:
    if request.param == "dali" and not dali_is_installed():
        pytest.skip("DALI is not installed")
    return str(request.param)


@pytest.fixture(scope="session")
def picture() -> Callable[..., Image.Image]:
    """picture(number, size=(30, 24), mode="RGB"): a smooth picture that differs with its number; size is (w, h).

    At 16 x 16 pixels the default size is decoded by the loader's fast decoder, twice the size by Pillow, scaled.
    """

    def make(number: int = 0, size: tuple[int, int] = (30, 24), mode: str = "RGB") -> Image.Image:
        x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
        waves = [np.sin(3 * x * (k + 1) + 2 * y + number * 0.37 * (k + 1)) for k in range(3)]
        colour = Image.fromarray(np.uint8(127 + 120 * np.stack(waves, axis=2)))
        return colour.convert(mode)

    return make


@pytest.fixture(scope="session")
def encoded(picture: Callable[..., Image.Image]) -> Callable[..., bytes]:
    """encoded(number, format="JPEG", size=(30, 24), mode="RGB", **options): the bytes of a picture's file."""

    def encode(
        number: int = 0, format: str = "JPEG", size: tuple[int, int] = (30, 24), mode: str = "RGB", **options: Any
    ) -> bytes:
        file = io.BytesIO()
        picture(number, size, mode).save(file, format, **options)
        return file.getvalue()

    return encode


@pytest.fixture
def make_folder(tmp_path: Path, encoded: Callable[..., bytes]) -> Callable[..., Path]:
    """make_folder(12): a folder of that many good JPEGs; make_folder(12, {"bad.jpg": b"..."}) adds files."""

    def make(count: int, extra: dict[str, bytes] | None = None, name: str = "pictures") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for number in range(count):
            (folder / f"good-{number:04}.jpg").write_bytes(encoded(number))
        for path, data in (extra or {}).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        return folder

    return make


@pytest.fixture
def opened() -> Callable[..., Dataset]:
    """open_dataset on the CPU at 16 x 16 pixels, where nothing else is said."""

    def open_it(source: str | Path, **options: Any) -> Dataset:
        return open_dataset(str(source), **({"image_size": (16, 16), "device": CPU} | options))

    return open_it


@pytest.fixture
def batches() -> Callable[..., list[torch.Tensor]]:
    """batches(stream, n): copies of its next n batches."""

    def read(stream: Any, count: int) -> list[torch.Tensor]:
        found = []
        for _ in range(count):
            stream.advance()
            found.append(stream.source.index_select(0, stream.index).clone())
        return found

    return read


@pytest.fixture(scope="session")
def huge_png() -> Callable[[int, int], bytes]:
    """huge_png(w, h): a well-formed grey PNG of w x h black pixels, made without ever holding them."""

    def make(width: int, height: int) -> bytes:
        def chunk(name: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

        squeeze = zlib.compressobj(9)
        rows = bytes(64 * (width + 1))
        body = b"".join(squeeze.compress(rows) for _ in range(height // 64))
        body += squeeze.compress(bytes((height % 64) * (width + 1))) + squeeze.flush()
        header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")

    return make
