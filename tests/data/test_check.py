"""`data check`: what it prints and counts."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdcgan.data import Dataset
from fastdcgan.data.check import check


def test_the_table_and_the_list(
    make_folder: Callable[..., Path], encoded: Callable[..., bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    extra = {
        "grey.png": encoded(1, "PNG", mode="L"),
        "wrong.jpg": encoded(1, "PNG"),
        "clear.png": encoded(1, "PNG", mode="LA"),
        "print.jpg": encoded(1, mode="CMYK"),
        "cut.jpg": encoded(1, size=(200, 200))[:-500],
        "empty.jpg": b"",
    }
    folder = make_folder(1200, extra)
    (folder / "lost.jpg").symlink_to("nowhere")
    report = check(str(folder))
    assert (report.files, report.usable) == (1207, 1204)
    assert report.traits == {
        "JPEG": 1201,
        "PNG": 3,
        "grey": 2,
        "transparent": 1,
        "named as another format": 1,
        "CMYK": 1,
    }
    assert report.unusable == [
        ("lost.jpg", "broken link"),
        ("cut.jpg", "truncated"),
        ("empty.jpg", "empty file (0 bytes)"),
    ]
    printed = capsys.readouterr()
    lines = [" ".join(line.split()) for line in printed.out.splitlines()]
    assert lines[:3] == ["1,207 files", "1,204 usable", "1,201 JPEG"]
    assert lines[-4:] == [
        "3 unusable",
        "lost.jpg: broken link",
        "cut.jpg: truncated",
        "empty.jpg: empty file (0 bytes)",
    ]
    assert "checking: 1,206 of 1,206 files" in printed.err


def test_a_film_with_damage_behind_its_first_picture(make_folder: Callable[..., Path]) -> None:
    frames = [Image.effect_noise((20, 16), 99) for _ in range(3)]
    film = io.BytesIO()
    frames[0].save(film, "GIF", save_all=True, append_images=frames[1:])
    whole = film.getvalue()
    cuts = {f"{at}.gif": whole[:at] + b";" for at in range(len(whole) // 2, len(whole) - 1, 7)}
    report = check(str(make_folder(0, cuts)))
    assert report.usable == len(cuts) and report.traits["animated (its first frame is used)"] > 0


@pytest.mark.usefixtures("nothing_held")
def test_the_largest_file_is_the_same_as_for_training(
    make_folder: Callable[..., Path],
    encoded: Callable[..., bytes],
    opened: Callable[..., Dataset],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = make_folder(2, {"large.bmp": encoded(1, "BMP", size=(300, 300)), "grows.jpg": encoded(2)})
    monkeypatch.setattr("fastdcgan.data.source.MOST_ENCODED_BYTES", 100_000)
    monkeypatch.setattr("fastdcgan.data.census.MOST_ENCODED_BYTES", 100_000)
    assert check(str(folder)).unusable == [("large.bmp", "larger than 1 GiB")]
    data = opened(folder, cache="off")
    assert data.skipped == [("large.bmp", "larger than 1 GiB")]
    with open(folder / "grows.jpg", "ab") as file:
        file.write(bytes(200_000))
    data.take(range(3))
    assert data.skipped[1:] == [("grows.jpg", "larger than 1 GiB")]


def test_what_is_out_of_the_ordinary_is_counted(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folder(1)
    for orientation in (1, 2, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (9, 8)).save(folder / f"turned-{orientation}.jpg", exif=exif)
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(folder / "deep.png")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "film.gif", save_all=True, append_images=frames[1:])
    assert check(str(folder)).traits == {
        "JPEG": 4,
        "PNG": 1,
        "GIF": 1,
        "rotated by EXIF": 2,
        "16 bits": 1,
        "animated (its first frame is used)": 1,
    }


def test_photos_of_several_pictures_and_one_transparent_colour_are_known(make_folder: Callable[..., Path]) -> None:
    """Cameras name the former, MPO, as JPEGs."""
    folder = make_folder(1)
    photos = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    photos[0].save(folder / "photo.jpg", "MPO", save_all=True, append_images=photos[1:])
    photos[0].save(folder / "clear.png", transparency=(0, 0, 255))
    assert check(str(folder)).traits == {"JPEG": 1, "MPO": 1, "PNG": 1, "transparent": 1}


def test_what_cannot_be_read_is_named(
    make_folder: Callable[..., Path], unreadable: Callable[[str], AbstractContextManager[None]]
) -> None:
    folder = make_folder(3)
    with unreadable("good-0001.jpg"):
        report = check(str(folder))
    assert (report.files, report.usable, report.unusable) == (3, 2, [("good-0001.jpg", "no permission to read it")])


def test_archives_are_checked_as_well(encoded: Callable[..., bytes], tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("good.jpg", encoded(1))
        archive.writestr("bad.jpg", b"text")
    report = check(str(tmp_path / "set.zip"))
    assert (report.usable, report.unusable) == (1, [("bad.jpg", "not an image (text)")])


def test_a_broken_entry_of_an_archive_is_named(encoded: Callable[..., bytes], tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(3):
            archive.writestr(f"{number}.jpg", encoded(number))
        place = archive.infolist()[1].header_offset
    content = bytearray(path.read_bytes())
    content[place] = 0
    path.write_bytes(content)
    report = check(str(path))
    assert report.unusable == [("1.jpg", "broken in the zip: no header where one should be")]
