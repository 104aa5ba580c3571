"""`data check`: what it prints and counts."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

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


def test_archives_are_checked_as_well(encoded: Callable[..., bytes], tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("good.jpg", encoded(1))
        archive.writestr("bad.jpg", b"text")
    report = check(str(tmp_path / "set.zip"))
    assert (report.usable, report.unusable) == (1, [("bad.jpg", "not an image (text)")])
