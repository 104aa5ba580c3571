"""The DALI and the torch loader show the same pictures, and both those of Pillow, within stated tolerances."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastdcgan.data import Dataset
from fastdcgan.data.loader import Request, cover_boxes
from fastdcgan.data.pillow_decode import cover_box, decode
from fastdcgan.pixels import upright

# Between the loaders: the same JPEG arithmetic and the same resizing; one level is left for another libjpeg version.
# Against Pillow: its resizing rounds in between, hence two levels.
BETWEEN_LOADERS, AGAINST_PILLOW = 1, 2
SCALED_MEAN = 2.0  # decoding at 1/2, 1/4 or 1/8 averages differently from decoding whole and resizing; 1.7 is seen


@pytest.fixture
def folder(make_folder: Callable[..., Path], encoded: Callable[..., bytes]) -> Path:
    sizes = [(16, 16), (20, 31), (31, 20), (17, 90), (8, 8), (5, 30), (300, 200), (64, 500), (3, 2)]
    files = {f"{k}.jpg": encoded(k, size=size) for k, size in enumerate(sizes)}
    files |= {f"{k}.png": encoded(k, "PNG", size=size) for k, size in enumerate(sizes)}
    files |= {"444.jpg": encoded(20, subsampling=0), "grey.jpg": encoded(21, mode="L")}
    return make_folder(0, files)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(16, 16), (24, 16), (32, 32)])
def test_the_loaders_agree(channels: int, size: tuple[int, int], folder: Path, opened: Callable[..., Dataset]) -> None:
    pytest.importorskip("nvidia.dali")
    pictures = [
        opened(folder, loader=loader, image_size=size, channels=channels).take(range(20)).int()
        for loader in ("dali", "torch")
    ]
    assert (pictures[0] - pictures[1]).abs().max() <= BETWEEN_LOADERS


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(401, 333), (96, 47), (333, 500)])
def test_scaled_decoding_shifts_nothing(size: tuple[int, int], orientation: int) -> None:
    """Of a size that is no multiple of 2, 4 or 8, hence of no whole number of pixels when decoded scaled."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    waves = [np.sin(x / 17 + 1), np.cos(y / 13), np.sin((x + y) / 19)]
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(np.uint8(128 + 100 * np.stack(waves, axis=2))).save(file, "JPEG", quality=95, exif=exif)
    whole = upright(Image.open(file))
    for target in ((16, 16), (20, 12), (12, 20)):
        for place in ((0.5, 0.5), (0.1, 0.93)):
            top, left, height, width = cover_box((whole.height, whole.width), target, place)
            part = whole.crop((left, top, left + width, top + height))
            wanted = np.asarray(part.resize(target[::-1], Image.Resampling.BILINEAR)).astype(int)
            assert abs(decode(file.getvalue(), target, 3, place) - wanted).mean() <= SCALED_MEAN, (target, place)


def test_both_show_what_pillow_shows(loader: str, folder: Path, opened: Callable[..., Dataset]) -> None:
    pictures = opened(folder, loader=loader).take(range(20)).numpy().astype(int)
    for name, picture in zip(sorted(os.listdir(folder)), pictures, strict=True):
        image = Image.open(folder / name).convert("RGB")
        top, left, height, width = cover_box((image.height, image.width), (16, 16))
        part = image.crop((left, top, left + width, top + height)).resize((16, 16), Image.Resampling.BILINEAR)
        difference = abs(picture - np.asarray(part).astype(int))
        if name.endswith(".jpg") and min(image.size) >= 32:
            assert difference.mean() <= SCALED_MEAN, name
        else:
            assert difference.max() <= AGAINST_PILLOW, name


def test_large_pngs_are_left_to_pillow(
    make_folder: Callable[..., Path], opened: Callable[..., Dataset], encoded: Callable[..., bytes]
) -> None:
    """A batch of them, unresized, would take gigabytes."""
    pytest.importorskip("nvidia.dali")
    files = {"large.png": encoded(1, "PNG", (1200, 1100)), "long.png": encoded(2, "PNG", (9000, 100))}
    folder = make_folder(1, files)
    loader = opened(folder, loader="dali").loader()  # type: ignore[attr-defined]
    assert loader.fast.tolist() == [True, False, True]  # of the long one little is shown
    pictures = [opened(folder, loader=name).take(range(3)).int() for name in ("dali", "torch")]
    assert (pictures[0] - pictures[1]).abs().max() <= BETWEEN_LOADERS


def test_a_part_of_a_picture_does_not_hold_the_whole(
    make_folder: Callable[..., Path], opened: Callable[..., Dataset], encoded: Callable[..., bytes]
) -> None:
    """As parts wait for others of their size to be resized together."""
    loader = opened(make_folder(0, {"a.jpg": encoded(1, size=(500, 24))}), loader="torch").loader()  # type: ignore
    part = loader._fast_decode(loader.begin(Request(np.array([0]))), 0, loader.read(0))
    assert part.shape == (24, 24, 3) and part.base is None


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=5),
    target=st.tuples(st.integers(8, 300), st.integers(8, 300)),
    place=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
)
def test_boxes_lie_inside_and_are_the_same_one_by_one(
    sizes: list[tuple[int, int]], target: tuple[int, int], place: tuple[float, float]
) -> None:
    boxes = cover_boxes(np.array(sizes, np.int32), target, np.array([place] * len(sizes)))
    for (height, width), box in zip(sizes, boxes.tolist(), strict=True):
        assert tuple(box) == cover_box((height, width), target, place)
        top, left, box_height, box_width = box
        assert 0 <= top <= top + box_height <= height
        assert 0 <= left <= left + box_width <= width
        assert box_height == height or box_width == width


def test_without_dali_the_torch_loader_steps_in(
    make_folder: Callable[..., Path], opened: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastdcgan.data import file_dataset
    from fastdcgan.errors import UserError

    monkeypatch.setattr(file_dataset, "dali_is_installed", lambda: False)
    folder = make_folder(3)
    assert type(opened(folder).loader()).__name__ == "TorchLoader"  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="--loader dali needs NVIDIA DALI"):
        opened(folder, loader="dali")


def test_many_broken_files_at_once_lose_nothing(
    loader: str, make_folder: Callable[..., Path], opened: Callable[..., Dataset], encoded: Callable[..., bytes]
) -> None:
    extra = {f"good-{k:04}-broken.jpg": encoded(k).replace(b"\xff\xdb", b"\xff\xfe") for k in range(0, 60, 2)}
    extra |= {"large.jpg": encoded(1, size=(300, 300)).replace(b"\xff\xdb", b"\xff\xfe")}
    data = opened(make_folder(60, extra), loader=loader, cache="off")
    alone = opened(make_folder(60, name="alone"), loader=loader)
    good = [images for _, _, _, images in data.pieces(0)]
    assert torch.equal(torch.cat(good), alone.take(range(60)))
    assert len(data.skipped) == 31
