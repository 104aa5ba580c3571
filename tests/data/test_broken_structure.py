"""Files whose segments do not fit together: DALI's parser, failing among sound files, can end the process."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastdcgan.data import Dataset
from fastdcgan.data.header import JPEG, PNG, Facts, Glimpse, examine, is_plain
from fastdcgan.data.loader import Request

KINDS = {"JPEG": JPEG, "PNG": PNG}


@pytest.mark.parametrize("format", KINDS)
def test_what_dalis_parser_refuses_is_not_plain(format: str, encoded: Callable[..., bytes]) -> None:
    types = pytest.importorskip("nvidia.dali.types")
    draw = random.Random()
    sources = [
        encoded(0, format),
        encoded(1, format, mode="L"),
        encoded(2, format, dpi=(72, 72), comment="a comment", progressive=True, icc_profile=bytes(60)),
    ]
    parse, refused = one_by_one(types), 0
    for _ in range(400):
        data = damaged(draw.choice(sources), draw)
        plain = is_plain(data, KINDS[format], examined(data)[1:3])
        parser_fails = "nvImageCodec failure" in parse(data)
        refused += parser_fails
        assert not (parser_fails and plain), data
    assert refused > 100
    assert all(is_plain(data, KINDS[format], examined(data)[1:3]) for data in sources)


def test_no_marker_of_a_jpeg_that_dalis_parser_refuses_is_plain(encoded: Callable[..., bytes]) -> None:
    """Every marker before the pixels replaced by each of the 256 there are, which draws hit too seldom."""
    parse = one_by_one(pytest.importorskip("nvidia.dali.types"))
    source = encoded(2, dpi=(72, 72), comment="a comment", progressive=True, icc_profile=bytes(60))
    at, refused, data = 2, set(), bytearray(source)
    while source[at + 1] != 0xDA:
        for marker in range(256):
            data[at + 1] = marker
            if "nvImageCodec failure" in parse(bytes(data)):
                refused.add(marker)
                assert not is_plain(bytes(data), JPEG, (24, 30)), (at, marker)
        data[at + 1] = source[at + 1]
        at += 2 + int.from_bytes(source[at + 2 : at + 4])
    assert refused >= {0x00, 0xFF}
    frame = source.index(b"\xff\xc2")
    twice = source[:frame] + source[frame : frame + 19] + source[frame:]
    assert parse(twice) != ""
    assert not is_plain(twice, JPEG, (24, 30))


def test_what_is_remembered_of_a_header_is_the_files_own(encoded: Callable[..., bytes]) -> None:
    """Files that begin alike, up to what looks like the end of a header, and differ behind it."""
    looks_like_the_end = b"\xff\xda\0\x0c" + bytes(40)
    sources = [
        encoded(i, size=size, **options)
        for options in ({}, {"comment": looks_like_the_end}, {"icc_profile": looks_like_the_end})
        for i, size in enumerate([(9, 7), (9, 7), (7, 9), (40, 40)])
    ]
    for data in [*sources, *sources]:
        width, height = Image.open(io.BytesIO(data)).size
        assert examined(data)[:3] == (JPEG, height, width)
        assert is_plain(data, JPEG, (height, width))
        assert not is_plain(data, JPEG, (height + 1, width))
        assert not is_plain(data[:20], JPEG, (height, width))


def damaged(data: bytes, draw: random.Random) -> bytes:
    """One to three bytes changed, lost or added, mostly before the pixels."""
    found = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(8, min(len(found), 700) if draw.random() < 0.85 else len(found))
        found[at : at + draw.choice((1, 1, 1, 20))] = draw.randbytes(draw.choice((0, 1, 1, 1, 5)))
    return bytes(found)


def examined(data: bytes) -> Facts:
    return examine(Glimpse(data, data[-64:], len(data), lambda: data))


def one_by_one(types: Any) -> Callable[[bytes], str]:
    """What DALI says of a file that it decodes alone, where a failure ends the pipeline and no more."""
    import nvidia.dali.fn as fn
    from nvidia.dali.pipeline import Pipeline

    def build() -> Pipeline:
        pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
        with pipeline:
            file: Any = fn.external_source(name="file", dtype=types.UINT8, ndim=1)
            pipeline.set_outputs(fn.decoders.image(file, device="cpu"))
        pipeline.build()
        return pipeline

    pipeline = build()

    def parse(data: bytes) -> str:
        nonlocal pipeline
        pipeline.feed_input("file", [np.frombuffer(data, np.uint8)])
        try:
            pipeline.run()
        except RuntimeError as error:
            pipeline = build()
            return str(error)
        return ""

    return parse


@pytest.mark.parametrize("format", KINDS)
def test_one_such_file_among_many_costs_that_file_at_most(
    format: str, make_folder: Callable[..., Path], opened: Callable[..., Dataset], encoded: Callable[..., bytes]
) -> None:
    pytest.importorskip("nvidia.dali")
    broken = bytearray(encoded(63, format))
    broken[broken.index(b"\xff\xc4" if format == "JPEG" else b"IDAT") - (format == "PNG")] ^= 0x40
    data = opened(make_folder(63, {f"odd.{format.lower()}": bytes(broken)}), loader="dali", cache="off")
    whole, loader = data.take(range(63)), data.loader()
    assert isinstance(loader.fast, np.ndarray)
    for turn in range(20):
        ids = np.random.default_rng(turn).permutation(64)
        loader.fast[:] = True  # as if nothing had been seen when the files were listed
        (decoded,) = loader.decode([Request(ids)])
        assert set(decoded.broken) <= {63}
        for row, i in enumerate(ids):
            assert i == 63 or (decoded.images[row] == whole[i]).all()
