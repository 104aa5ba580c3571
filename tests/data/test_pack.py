"""Packing: whole or not at all, going on after a kill, and opened again as the same pictures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import fastdcgan
from fastdcgan.data import Dataset, dataset, file_dataset
from fastdcgan.data import pack as packing
from fastdcgan.data.loader import Loader
from fastdcgan.data.pack import pack
from fastdcgan.data.packed import packed_size
from fastdcgan.data.pillow_decode import UnusableImage
from fastdcgan.data.source import why_unreadable
from fastdcgan.errors import UserError

SIZE = (16, 16)
PATH = {"PYTHONPATH": str(Path(str(fastdcgan.__file__)).parent.parent)}


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("set"))


def test_a_packed_set_is_the_set(
    loader: str,
    make_folder: Callable[..., Path],
    opened: Callable[..., Dataset],
    encoded: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    files = {f"{'ab'[k % 2]}/{k:03}.jpg": encoded(k) for k in range(300)}
    files |= {"a/000-bad.jpg": b"", "a/001-breaks.jpg": encoded(1).replace(b"\xff\xdb", b"\xff\xfe")}
    folder = make_folder(0, files)
    out = pack(str(folder), image_size=SIZE, out=tmp_path / "set.npy", loader=loader)
    array = np.load(out, mmap_mode="r")
    data, packed = opened(folder, loader=loader), opened(out)
    assert array.shape == (300, 16, 16, 3)
    assert array.dtype == np.uint8
    assert torch.equal(torch.from_numpy(np.array(array)), torch.cat([images for *_, images in data.pieces(0)]))
    assert torch.equal(packed.take(range(300)), torch.from_numpy(np.array(array)))
    assert (packed.name, packed.count, packed.flip) == ("set", 300, True)
    assert packed.class_names == ["a", "b"]
    assert packed.labels == [0] * 150 + [1] * 150
    stream = packed.stream(64)
    stream.advance()
    assert torch.equal(stream.source[stream.index], torch.from_numpy(array[stream.index.numpy()]))
    assert leftovers(tmp_path) == ["set.npy", "set.npy.json"]


def test_names_can_be_packed_too(tmp_path: Path, opened: Callable[..., Dataset]) -> None:
    out = pack("digits", image_size=SIZE, out=tmp_path / "set")
    assert out == tmp_path / "set.npy"
    digits = opened(out)
    assert (digits.count, digits.channels, digits.flip) == (1797, 1, False)
    assert torch.equal(digits.take([7]), opened("digits").take([7]))


def test_packing_twice_does_nothing_and_never_overwrites(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, out = make_folder(5), tmp_path / "set.npy"
    pack(str(folder), image_size=SIZE, out=out)
    before = out.stat()
    pack(str(folder), image_size=SIZE, out=out)
    assert (out.stat().st_ino, out.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    with pytest.raises(UserError, match="exists and holds something else: delete it or choose another --out"):
        pack(str(folder), image_size=(8, 8), out=out)
    (folder / "good-0000.jpg").unlink()
    with pytest.raises(UserError, match="exists and holds something else"):
        pack(str(folder), image_size=SIZE, out=out)


def test_a_packed_set_that_has_changed_is_packed_anew(tmp_path: Path) -> None:
    for shade in (7, 9):
        np.save(tmp_path / "mine.npy", np.full((5, 16, 16, 1), shade, np.uint8))
        out = tmp_path / f"set-{shade}.npy"
        pack(str(tmp_path / "mine.npy"), image_size=SIZE, out=out)
        assert (np.load(out) == shade).all()
    with pytest.raises(UserError, match="exists and holds something else"):
        pack(str(tmp_path / "mine.npy"), image_size=SIZE, out=tmp_path / "set-7.npy")


def test_other_labels_are_other_content(tmp_path: Path, opened: Callable[..., Dataset]) -> None:
    """So that a set whose labels have changed is packed anew."""
    np.save(tmp_path / "mine.npy", np.full((4, 16, 16, 1), 7, np.uint8))
    contents = []
    for labels in ([0, 0, 1, 1], [0, 1, 1, 1]):
        (tmp_path / "mine.npy.json").write_text(json.dumps({"labels": labels, "class_names": ["a", "b"]}))
        contents.append(opened(tmp_path / "mine.npy").content())
    assert contents[0] != contents[1]


SLOW_PACK = """
import sys, time
from pathlib import Path
from fastdcgan.data import dataset, file_dataset, pack
from fastdcgan.data.loader import Loader
pack.SAVE_EVERY, dataset.PIECE, file_dataset.PIECE = 0.0, 16, 16
as_ever = Loader.read
Loader.read = lambda self, i: (time.sleep(0.01), as_ever(self, i))[1]
pack.pack(sys.argv[1], image_size=(16, 16), out=Path(sys.argv[2]))
"""


def test_a_killed_pack_goes_on_where_it_was(
    make_folder: Callable[..., Path], tmp_path: Path, encoded: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks = {f"good-{k:04}-breaks.jpg": encoded(k).replace(b"\xff\xdb", b"\xff\xfe") for k in (3, 50, 390)}
    folder, out, journal = make_folder(400, breaks), tmp_path / "set.npy", tmp_path / "set.npy.part.json"
    for stop_at in (80, 160):
        run = subprocess.Popen([sys.executable, "-c", SLOW_PACK, str(folder), str(out)], env=os.environ | PATH)
        while not journal.exists() or json.loads(journal.read_text())["next"] < stop_at:
            assert run.poll() is None, "finished before it could be killed"
            time.sleep(0.005)
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert not out.exists()
        assert json.loads(journal.read_text())["broken"] == [3, 51]
    done = json.loads(journal.read_text())["next"]
    reads: list[int] = []
    as_ever = Loader.read
    monkeypatch.setattr(Loader, "read", lambda self, i: (reads.append(i), as_ever(self, i))[1])
    pack(str(folder), image_size=SIZE, out=out)
    assert min(reads) == done
    monkeypatch.undo()
    whole = pack(str(folder), image_size=SIZE, out=tmp_path / "whole.npy", cache_dir=tmp_path / "another")
    assert np.array_equal(np.load(out), np.load(whole))
    assert len(np.load(out)) == 400
    notes = [json.loads(file.with_name(f"{file.name}.json").read_text()) for file in (out, whole)]
    assert notes[0] == notes[1]
    assert len(notes[0]["skipped"]) == 3
    assert leftovers(tmp_path) == ["set.npy", "set.npy.json"]


def test_images_that_are_gone_for_a_while_are_waited_for(
    make_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not left out of the packed set for ever."""
    monkeypatch.setattr(dataset, "PIECE", 4)
    monkeypatch.setattr(file_dataset, "PIECE", 4)
    folder, out = make_folder(12), tmp_path / "set.npy"
    read = Loader.read
    gone = [7]

    def away(loader: Loader, i: int) -> bytes:
        if i in gone:
            raise UnusableImage(why_unreadable(FileNotFoundError()))
        return read(loader, i)

    monkeypatch.setattr(Loader, "read", away)
    with pytest.raises(UserError, match=r"good-0007\.jpg: vanished.*: put it right and give the same command"):
        pack(str(folder), image_size=SIZE, out=out, loader="torch")
    assert not out.exists()
    gone.clear()
    pack(str(folder), image_size=SIZE, out=out, loader="torch")
    assert len(np.load(out)) == 12


def test_a_journal_without_its_rows_is_not_believed(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, out = make_folder(5), tmp_path / "set.npy"
    whole = np.load(pack(str(folder), image_size=SIZE, out=out))
    note = json.loads((tmp_path / "set.npy.json").read_text())
    journal = {"fingerprint": note["fingerprint"], "next": 5, "broken": [], "skipped": []}
    (tmp_path / "set.npy.part.json").write_text(json.dumps(journal))
    out.unlink()
    assert np.array_equal(np.load(pack(str(folder), image_size=SIZE, out=out)), whole)


def test_what_was_begun_of_another_set_is_begun_anew(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Else the first rows would be that one's pictures."""
    folder, out = make_folder(5), tmp_path / "set.npy"
    whole = np.load(pack(str(folder), image_size=SIZE, out=tmp_path / "whole.npy"))
    (tmp_path / "set.npy.part").write_bytes(bytes(9999))
    journal = {"fingerprint": "another's", "next": 3, "broken": [1], "skipped": [["its.jpg", "truncated"]]}
    (tmp_path / "set.npy.part.json").write_text(json.dumps(journal))
    assert np.array_equal(np.load(pack(str(folder), image_size=SIZE, out=out)), whole)
    assert json.loads((tmp_path / "set.npy.json").read_text())["skipped"] == []


LIMITED = """
import resource, sys
from pathlib import Path
from fastdcgan.data.pack import pack
from fastdcgan.data.packed import packed_size
from fastdcgan.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    pack(sys.argv[1], image_size=(64, 64), out=Path(sys.argv[2]))
except UserError as error:
    print(error)
"""


def test_no_room_on_the_disk_leaves_nothing_behind(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("resource")
    command = [sys.executable, "-c", LIMITED, str(make_folder(20)), str(tmp_path / "set.npy")]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | PATH, check=True)
    assert "cannot write" in run.stdout
    assert "choose another --out" in run.stdout
    assert run.stdout.count("\n") == 1
    assert leftovers(tmp_path) == []


def test_two_at_once_are_refused(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    part = tmp_path / "set.npy.part"
    with open(part, "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is packing"):
            pack(str(make_folder(3)), image_size=SIZE, out=tmp_path / "set.npy")


def test_opening_with_other_wishes_says_what_the_file_holds(
    make_folder: Callable[..., Path], tmp_path: Path, opened: Callable[..., Dataset]
) -> None:
    out = pack(str(make_folder(5)), image_size=SIZE, out=tmp_path / "set.npy")
    with pytest.raises(UserError, match="holds images of 16 x 16 pixels: use --image-size 16"):
        opened(out, image_size=(32, 32))
    with pytest.raises(UserError, match="holds images of 3 channels: use --channels 3"):
        opened(out, channels=1)
    np.save(tmp_path / "other.npy", np.zeros((5, 16, 16, 3)))
    with pytest.raises(UserError, match="holds float64"):
        opened(tmp_path / "other.npy")


@pytest.mark.parametrize(
    "damage", ["text", "header", "negative", "cut", "no images", "columns first", "several", "pickle"]
)
def test_files_that_are_no_packed_set(damage: str, tmp_path: Path, opened: Callable[..., Dataset]) -> None:
    path = tmp_path / "set.npy"
    images = np.zeros((5, 16, 16, 3), np.uint8)
    np.save(path, {"no images": images[:0], "columns first": np.asfortranarray(images)}.get(damage, images))
    if damage == "text":
        path.write_bytes(b"x")
    if damage == "header":
        path.write_bytes(path.read_bytes().replace(b"{", b"}"))
    if damage == "negative":
        path.write_bytes(path.read_bytes().replace(b"(5, ", b"(-5,"))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    if damage == "several":
        np.savez(path.open("wb"), a=images)
    if damage == "pickle":
        np.save(path, np.array([{}]), allow_pickle=True)
    with pytest.raises(UserError, match="data pack") as raised:
        opened(path)
    assert "\n" not in str(raised.value)


def test_a_note_that_says_nonsense_is_not_believed(tmp_path: Path, opened: Callable[..., Dataset]) -> None:
    np.save(tmp_path / "set.npy", np.zeros((5, 16, 16, 3), np.uint8))
    for labels in ("5", '{"a": 1}', '"abcde"', "[1]"):
        (tmp_path / "set.npy.json").write_text(f'{{"labels": {labels}, "class_names": ["a"]}}')
        assert opened(tmp_path / "set.npy").labels is None
    (tmp_path / "set.npy.json").write_text(f'{{"labels": {[0] * 5}, "class_names": 5}}')
    assert opened(tmp_path / "set.npy").labels is None


def test_a_folder_is_not_packed_into(tmp_path: Path, make_folder: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="is a folder"):
        pack(str(make_folder(3)), image_size=SIZE, out=tmp_path)


def test_what_was_packed_is_said(
    tmp_path: Path, make_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = make_folder(5, {"bad.jpg": b"text"}), tmp_path / "set"
    assert pack(str(folder), image_size=SIZE, out=out) == tmp_path / "set.npy"
    assert f"{out}.npy: 5 images; 1 cannot be used: {out}.npy.json says which" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"end it in \.npy"):
        pack(str(folder), image_size=SIZE, out=tmp_path / "set.txt")


def test_a_plain_array_without_a_note_is_a_set_too(tmp_path: Path, opened: Callable[..., Dataset]) -> None:
    np.save(tmp_path / "mine.npy", np.full((5, 16, 16, 1), 7, np.uint8))
    data = opened(tmp_path / "mine.npy")
    assert (data.count, data.channels, data.labels, data.flip) == (5, 1, None, False)


def test_a_packed_set_is_flipped_as_what_it_was_packed_from(tmp_path: Path, opened: Callable[..., Dataset]) -> None:
    """Digits read differently in a mirror, also in colour."""
    assert not opened(pack("digits", image_size=SIZE, channels=3, out=tmp_path / "set.npy")).flip


def test_strict_packs_nothing_where_one_file_is_broken(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"bad\.jpg: .*--strict"):
        pack(str(make_folder(5, {"bad.jpg": b"text"})), image_size=SIZE, out=tmp_path / "set.npy", strict=True)
    assert leftovers(tmp_path) == []


def test_rows_are_on_the_disk_before_the_journal_and_the_name_say_so(
    make_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, write, replace = os.fsync, packing.write_json, os.replace

    def note(name: str, whole: Callable[..., object]) -> Callable[..., object]:
        return lambda *arguments: (done.append(name), whole(*arguments))[1]

    def write_json(path: Path, content: dict[str, object]) -> None:
        if content.get("next"):
            done.append("journal")
        write(path, content)

    monkeypatch.setattr(os, "fsync", note("sync", sync))
    monkeypatch.setattr(packing, "write_json", write_json)
    monkeypatch.setattr(packing.os, "replace", note("replace", replace))
    pack(str(make_folder(5)), image_size=SIZE, out=tmp_path / "set.npy")
    written = [each for each in done if each != "replace"]
    assert written == ["sync", "journal", "sync"]
    assert done[-1] == "replace"


def test_a_packed_set_is_whole_and_has_its_note_when_it_gets_its_name(
    make_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, replace, shapes = tmp_path / "set.npy", os.replace, []

    def look(source: Path, target: Path) -> None:
        if target == out:
            shapes.append(np.load(source).shape)
            assert (tmp_path / "set.npy.json").exists() and not (tmp_path / "set.npy.part.json").exists()
        replace(source, target)

    monkeypatch.setattr(packing.os, "replace", look)
    pack(str(make_folder(5)), image_size=SIZE, out=out)
    assert shapes == [(5, 16, 16, 3)]


def test_a_set_packed_with_other_channels_is_something_else(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, out = make_folder(3), tmp_path / "set.npy"
    pack(str(folder), image_size=SIZE, out=out)
    with pytest.raises(UserError, match="holds something else"):
        pack(str(folder), image_size=SIZE, out=out, channels=1)


def test_a_packed_set_in_the_home_folder_says_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    np.save(tmp_path / "set.npy", np.zeros((5, 16, 24, 3), np.uint8))
    assert packed_size("~/set.npy") == packed_size(str(tmp_path / "set.npy")) == "16x24"


def test_pictures_with_alpha_are_a_set_and_two_channels_are_none(
    tmp_path: Path, opened: Callable[..., Dataset]
) -> None:
    for channels in (3, 4):
        np.save(tmp_path / "set.npy", np.zeros((5, 16, 16, channels), np.uint8))
        data = opened(tmp_path / "set.npy")
        assert (data.channels, data.flip) == (channels, True)
    np.save(tmp_path / "set.npy", np.zeros((5, 16, 16, 2), np.uint8))
    with pytest.raises(UserError, match="not uint8"):
        opened(tmp_path / "set.npy")


def test_the_size_to_ask_for_is_height_by_width(tmp_path: Path, opened: Callable[..., Dataset]) -> None:
    np.save(tmp_path / "set.npy", np.zeros((5, 16, 24, 3), np.uint8))
    with pytest.raises(UserError, match="16 x 24 pixels: use --image-size 16x24,"):
        opened(tmp_path / "set.npy")


def test_a_torn_note_is_none(tmp_path: Path, opened: Callable[..., Dataset]) -> None:
    np.save(tmp_path / "set.npy", np.zeros((5, 16, 16, 3), np.uint8))
    (tmp_path / "set.npy.json").write_bytes(b'{"labels": [0, \xff')
    assert opened(tmp_path / "set.npy").labels is None


def test_what_is_no_packed_set_has_no_size(tmp_path: Path) -> None:
    """`open_packed` says what is wrong with it."""
    (tmp_path / "set.npy").write_bytes(b"x")
    np.save(tmp_path / "flat.npy", np.zeros(5, np.uint8))
    assert [packed_size(str(tmp_path / f"{name}.npy")) for name in ("set", "flat", "none")] == [None] * 3
