"""Files that are whole or not there, and what is in their way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastdcgan.errors import UserError
from fastdcgan.files import check_out, replace_file


@pytest.mark.parametrize("letter", ["x", "\u00e9"])
def test_the_longest_name_can_be_written(tmp_path: Path, letter: str) -> None:
    path = tmp_path / (letter * (251 // len(letter.encode())) + ".png")
    for content in (b"once", b"again"):
        replace_file(path, content)
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_file_is_kept(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to("folder.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name, what in (("folder.png", "it is a folder"), ("link.png", "it is a folder"), ("pipe.png", "a pipe")):
        with pytest.raises(OSError, match=what):
            replace_file(tmp_path / name, b"new")
    assert (tmp_path / "pipe.png").is_fifo() and (tmp_path / "link.png").is_symlink()
    with pytest.raises(UserError, match=r"pipe\.png is a device or a pipe already: choose another name"):
        check_out(tmp_path / "pipe.png", (".png",))
    assert len(list(tmp_path.iterdir())) == 3
