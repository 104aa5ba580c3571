"""Folders of every shape, and what a person is told when there is nothing to train on."""

from __future__ import annotations

import inspect
import os
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdcgan.data import Dataset, open_source
from fastdcgan.data.header import IMAGE_SUFFIXES
from fastdcgan.data.source import FolderSource, printable
from fastdcgan.errors import UserError


def test_class_names_come_from_the_innermost_folder_and_duplicates_are_one(
    make_folder: Callable[..., Path], opened: Callable[..., Dataset], encoded: Callable[..., bytes]
) -> None:
    data = opened(
        make_folder(0, {"train/cat/1.jpg": encoded(1), "train/dog/1.jpg": encoded(2), "test/cat/1.jpg": encoded(3)})
    )
    assert data.class_names == ["cat", "dog"]
    assert data.labels == [0, 0, 1]  # test/cat, train/cat, train/dog
    assert data.name == "pictures"


def test_one_name_in_two_ways_of_writing_is_one_class(
    make_folder: Callable[..., Path], opened: Callable[..., Dataset], encoded: Callable[..., bytes]
) -> None:
    """As macOS and others write an é."""
    names = ("train/caf\u00e9/1.jpg", "test/cafe\u0301/2.jpg", "train/dog/3.jpg")
    data = opened(make_folder(0, {name: encoded(k) for k, name in enumerate(names)}))
    assert data.class_names == ["caf\u00e9", "dog"]
    assert data.labels is not None and sorted(data.labels) == [0, 0, 1]


def test_a_flat_folder_has_no_labels(make_folder: Callable[..., Path], opened: Callable[..., Dataset]) -> None:
    data = opened(make_folder(3))
    assert data.labels is None
    assert data.class_names is None


def test_labels_skip_what_is_skipped(
    make_folder: Callable[..., Path], opened: Callable[..., Dataset], encoded: Callable[..., bytes]
) -> None:
    files = {"a/1.jpg": encoded(1), "a/2.jpg": b"", "b/1.jpg": encoded(2), "b/2.jpg": encoded(3)}
    assert opened(make_folder(0, files)).labels == [0, 1, 1]


def test_hidden_files_are_left_out_without_a_word(
    make_folder: Callable[..., Path], opened: Callable[..., Dataset], encoded: Callable[..., bytes]
) -> None:
    extra = {".hidden.jpg": b"x", "._good.jpg": b"x", ".thumbs/1.jpg": encoded(1), "__MACOSX/1.jpg": b"x"}
    data = opened(make_folder(3, extra | {"notes.txt": b"hello", "labels.csv": b"1,2"}))
    assert (data.count, data.skipped) == (3, [])


def test_images_without_a_suffix_are_known_by_how_they_begin(
    make_folder: Callable[..., Path], opened: Callable[..., Dataset], encoded: Callable[..., bytes]
) -> None:
    formats = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"]
    files = {format.lower(): encoded(k, format) for k, format in enumerate(formats)}
    files |= {"codestream": encoded(8, "JPEG2000", no_jp2=True), "p4": encoded(9, "PPM", mode="1")}
    files |= {"p1": b"P1\n2 2\n0 1 1 0\n", "p2": b"P2\n2 1\n255\n0 255\n", "p3": b"P3 1 1 255 9 90 200\n"}
    data = opened(make_folder(0, files | {"text": b"not an image"}))
    assert (data.count, data.skipped) == (len(files), [])


@pytest.mark.parametrize("container", ["folder", "zip", "tar"])
def test_raw_files_of_cameras_are_no_images(
    container: str, make_folder: Callable[..., Path], encoded: Callable[..., bytes], tmp_path: Path
) -> None:
    """They begin like TIFFs, and what a reader of TIFFs finds in them is a thumbnail."""
    raw = {name: encoded(1, "TIFF") for name in ("a.nef", "b.DNG", "c.cr2", "d.arw")}
    folder = make_folder(2, raw | {"notes.txt": b"P1 4 a start", "whole": encoded(1, "TIFF")})
    path = {"folder": folder, "zip": tmp_path / "set.zip", "tar": tmp_path / "set.tar"}[container]
    if container != "folder":
        shutil.make_archive(str(path.with_suffix("")), container, folder)
    names = [PurePosixPath(name).name for name in open_source(str(path)).names]
    assert sorted(names) == ["good-0000.jpg", "good-0001.jpg", "whole"]


def test_a_file_of_no_kind_that_cannot_be_read_is_no_image(
    make_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(2, {"notes": b"private"})

    def refuse(path: Path, *rest: object, **options: object) -> object:
        if Path(path).name == "notes":
            raise PermissionError(13, "Permission denied", str(path))
        return open(path, *rest, **options)  # type: ignore[call-overload]

    monkeypatch.setattr("fastdcgan.data.source.open", refuse, raising=False)  # not chmod: tests may run as root
    assert FolderSource(folder).names == ["good-0000.jpg", "good-0001.jpg"]


def test_links_are_followed_and_loops_end(make_folder: Callable[..., Path], opened: Callable[..., Dataset]) -> None:
    folder, elsewhere = make_folder(3), make_folder(2, name="elsewhere")
    (folder / "loop").symlink_to(folder)
    (folder / "deeper").mkdir()
    (folder / "deeper" / "up").symlink_to(folder.parent)  # leads back to `folder`, and to `elsewhere`
    (folder / "self.jpg").symlink_to("self.jpg")
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    data = opened(folder)
    assert data.count == 5
    assert elsewhere.exists()
    assert sorted(data.skipped) == [("gone.jpg", "broken link"), ("self.jpg", "broken link")]


def test_a_link_that_leads_nowhere_and_names_no_image_is_none(
    make_folder: Callable[..., Path], opened: Callable[..., Dataset]
) -> None:
    folder = make_folder(2)
    for name in ("notes.txt", "latest"):
        (folder / name).symlink_to("nowhere")
    data = opened(folder, strict=True)
    assert (data.count, data.skipped) == (2, [])


def test_a_folder_that_cannot_be_read_is_named(
    make_folder: Callable[..., Path],
    opened: Callable[..., Dataset],
    encoded: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, scandir = make_folder(3, {"private/a.jpg": encoded(9)}), os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "private":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # not chmod: tests may run as root
    data = opened(folder)
    assert (data.count, data.skipped) == (3, [("private", "folder cannot be read (Permission denied)")])


names = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=("Cs", "Cc")), min_size=1, max_size=12
).filter(lambda name: name not in (".", "..") and len(name.encode()) < 100)
paths = st.lists(names, min_size=1, max_size=4).map("/".join)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(paths, st.sampled_from([".jpg", ".JPEG", ".png", ".txt", ""])), max_size=12))
def test_a_folder_of_any_shape_lists_each_visible_image_once(files: list[tuple[str, str]]) -> None:
    png = b"\x89PNG\r\n\x1a\n"
    with tempfile.TemporaryDirectory() as name:
        root, wanted = Path(name), set()
        for stem, suffix in files:
            relative = stem + suffix
            try:
                (root / relative).parent.mkdir(parents=True, exist_ok=True)
                if (root / relative).is_dir():
                    continue
                (root / relative).write_bytes(b"just text" if suffix == ".txt" else png)
            except (FileExistsError, NotADirectoryError):
                continue  # one name is a file here and a folder there
            hidden = any(part.startswith(".") or part == "__MACOSX" for part in relative.split("/"))
            is_image = suffix != ".txt" or PurePosixPath(relative).suffix.lower() in IMAGE_SUFFIXES
            if not hidden and is_image:
                wanted.add(relative)
        wanted = {path for path in wanted if (root / path).is_file()}
        if not wanted:
            with pytest.raises(UserError, match="no images in the folder"):
                FolderSource(root)
            return
        source = FolderSource(root)
        assert source.names == sorted(wanted)
        assert source.unusable == []
        assert [source.read(i) for i in range(len(source))] == [(root / path).read_bytes() for path in source.names]


def test_small_files_are_read_once_until_they_are_decoded(
    make_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(4)
    contents = [(folder / f"good-000{i}.jpg").read_bytes() for i in range(4)]
    monkeypatch.setattr("fastdcgan.data.source.KEPT_BYTES", len(contents[0]) + len(contents[1]))
    source = FolderSource(folder)
    for i in range(4):
        assert source.glimpse(i).whole() == contents[i]
    for i in range(4):
        (folder / f"good-000{i}.jpg").write_bytes(b"changed")
    assert [source.read(i) for i in range(4)] == [*contents[:2], b"changed", b"changed"]  # there is room for two
    assert [source.read(i) for i in range(4)] == [b"changed"] * 4  # handed out once
    source.glimpse(2)
    (folder / "good-0002.jpg").write_bytes(b"again")
    assert source.read(2) == b"changed"  # and the room is free again


def test_the_fingerprint_changes_with_every_change(make_folder: Callable[..., Path]) -> None:
    folder = make_folder(3)
    prints = [FolderSource(folder).fingerprint(), FolderSource(folder).fingerprint()]
    assert prints[0] == prints[1]
    (folder / "good-0000.jpg").rename(folder / "other.jpg")
    prints.append(FolderSource(folder).fingerprint())
    os.utime(folder / "other.jpg", ns=(1, 1))
    prints.append(FolderSource(folder).fingerprint())
    (folder / "other.jpg").unlink()
    prints.append(FolderSource(folder).fingerprint())
    assert len(set(prints)) == 4


def test_a_file_of_another_size_and_the_same_time_is_noticed(make_folder: Callable[..., Path]) -> None:
    """As programs write that keep a file's time."""
    folder = make_folder(2)
    file, before = folder / "good-0000.jpg", FolderSource(folder).fingerprint()
    time = file.stat().st_mtime_ns
    file.write_bytes(file.read_bytes() + b"more")
    os.utime(file, ns=(time, time))
    assert FolderSource(folder).fingerprint() != before


def test_names_can_always_be_printed() -> None:
    assert printable(os.fsdecode(b"caf\xe9.jpg")) == "caf\\xe9.jpg"
    assert printable("фото.jpg") == "фото.jpg"
    assert printable("a\tb\n\x1b[31m.jpg") == "a\\tb\\n\\x1b[31m.jpg"


def test_a_run_among_the_images_is_left_out(
    make_folder: Callable[..., Path], opened: Callable[..., Dataset], encoded: Callable[..., bytes]
) -> None:
    run = {"runs/a/config.json": b"{}", "runs/a/.lock": b"", "runs/a/samples/real.png": encoded(format="PNG")}
    folder = make_folder(3, run)
    assert (opened(folder).count, opened(folder / "runs" / "a" / "samples").count) == (3, 1)


def test_a_run_that_is_named_is_a_folder_as_any(
    make_folder: Callable[..., Path], opened: Callable[..., Dataset], encoded: Callable[..., bytes]
) -> None:
    run = {"config.json": b"{}", ".lock": b"", "samples/real.png": encoded(format="PNG")}
    assert opened(make_folder(0, run)).count == 1


def test_a_tar_beside_images_does_not_hide_them(
    make_folder: Callable[..., Path], opened: Callable[..., Dataset], encoded: Callable[..., bytes]
) -> None:
    assert opened(make_folder(3, {"notes.tar": b"x"})).count == 3
    assert opened(make_folder(0, {"odd.tar/a.jpg": encoded(), "b/c.jpg": encoded(1)}, "another")).count == 2


def test_a_home_is_found_and_hidden_shards_are_not(
    make_folder: Callable[..., Path],
    opened: Callable[..., Dataset],
    encoded: Callable[..., bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_folder(3)
    (tmp_path / "shards").mkdir()
    for name in ("s-0.tar", "s-1.tar"):
        with tarfile.open(tmp_path / "shards" / name, "w") as archive:
            archive.add(tmp_path / "pictures" / "good-0000.jpg", "a.jpg")
    (tmp_path / "shards" / "._s-0.tar").write_bytes(b"what macOS adds")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert opened("~/pictures").count == 3
    assert opened("~/shards").count == 2
    assert opened("~/shards/s-{0..1}.tar").count == 2


def test_the_case_of_the_suffix_of_an_archive_does_not_matter(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folder(1)
    with zipfile.ZipFile(tmp_path / "SET.ZIP", "w") as archive:
        archive.write(folder / "good-0000.jpg", "a.JPG")
    with tarfile.open(tmp_path / "SET.TAR", "w") as tar:
        tar.add(folder / "good-0000.jpg", "a.JPG")
    assert [open_source(str(tmp_path / name)).names for name in ("SET.ZIP", "SET.TAR")] == [["a.JPG"], ["a.JPG"]]


def test_a_tar_beside_folders_of_images_does_not_hide_them(
    make_folder: Callable[..., Path],
    opened: Callable[..., Dataset],
    encoded: Callable[..., bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = make_folder(0, {"images/a.jpg": encoded(1), "images/b.jpg": encoded(2)})
    with tarfile.open(folder / "previews.tar", "w") as archive:
        archive.add(folder / "images" / "a.jpg", "preview.jpg")
    assert opened(folder).count == 2 and "taking the images in its folders" in capsys.readouterr().err
    for image in (folder / "images").iterdir():
        image.unlink()
    assert opened(folder).count == 1 and capsys.readouterr().err == ""


def test_what_only_begins_like_an_image_is_none(make_folder: Callable[..., Path]) -> None:
    """Text can begin with the letters of a BMP or a PPM, and a link to nowhere can be of anything."""
    texts = {"BMW.txt": b"BMW series 3, 200 pictures\n", "labels.csv": b"P5,P6,P7\n", "more.csv": b"P6 front\n"}
    images = {"bitmap": bytes.fromhex("424d1234567800000000") + bytes(60), "pixmap": b"P6 1 1 255 abc"}
    folder = make_folder(1, texts | images)
    (folder / "notes.md").symlink_to("gone.md")
    (folder / "photo.jpg").symlink_to("gone.jpg")
    source = FolderSource(folder)
    assert source.names == ["bitmap", "good-0000.jpg", "pixmap"]
    assert source.unusable == [("photo.jpg", "broken link")]


def test_verdicts_are_of_one_folder(make_folder: Callable[..., Path], opened: Callable[..., Dataset]) -> None:
    """Two folders whose files have the same names, sizes and times, as unpacked archives may have."""
    good, bad = make_folder(3, name="good"), make_folder(3, name="bad")
    file = bad / "good-0001.jpg"
    file.write_bytes(b"x" * file.stat().st_size)
    for each in (*good.iterdir(), *bad.iterdir()):
        os.utime(each, (0, 0))
    assert opened(bad).count == 2
    assert opened(good).count == 3


def test_other_files_in_the_same_number_are_noticed(
    make_folder: Callable[..., Path],
    opened: Callable[..., Dataset],
    batches: Callable[..., list[torch.Tensor]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = make_folder(6, {"good-0001.jpg": b""})
    stream = opened(folder).stream(2)
    batches(stream, 1)
    state = stream.state()
    (folder / "good-0000.jpg").rename(folder / "last.jpg")
    data = opened(folder)
    data.stream(2, state)
    assert "the data changed" in capsys.readouterr().err
    assert [name for name, _ in data.skipped] == ["good-0001.jpg"]


def test_thousands_of_files_that_break_in_a_row(
    make_folder: Callable[..., Path], opened: Callable[..., Dataset], encoded: Callable[..., bytes]
) -> None:
    folder = make_folder(1)
    broken = encoded(1, "PNG", size=(8, 8))
    at = broken.index(b"IDAT") + 8
    (folder / "a.png").write_bytes(broken[:at] + bytes(20) + broken[at + 20 :])
    for k in range(1500):
        os.link(folder / "a.png", folder / f"a{k}.png")
    data = opened(folder, loader="torch")
    assert torch.equal(data.take([0])[0], opened(make_folder(1, name="alone"), loader="torch").take([0])[0])
    assert len(data.skipped) == 1501


def test_folders_in_folders_without_end(make_folder: Callable[..., Path], encoded: Callable[..., bytes]) -> None:
    folder = make_folder(1)
    deep = "d/" * 300
    (folder / deep).mkdir(parents=True)
    (folder / deep / "a.jpg").write_bytes(encoded(1))
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)  # or so many folders that pytest cannot delete them
    try:
        assert FolderSource(folder).names == [f"{deep}a.jpg", "good-0000.jpg"]
    finally:
        sys.setrecursionlimit(before)


def test_mistakes_are_answered_in_one_line(
    make_folder: Callable[..., Path], opened: Callable[..., Dataset], tmp_path: Path
) -> None:
    empty = make_folder(0, name="empty")
    texts = make_folder(0, {"a.txt": b"hello", "b.csv": b"1"}, "texts")
    broken = make_folder(0, {"a.jpg": b"", "b.jpg": b""}, "broken")
    single = tmp_path / "single.jpg"
    single.write_bytes(b"x")
    not_zip = tmp_path / "not.zip"
    not_zip.write_bytes(b"x")
    cases = {
        "digit": "did you mean digits",
        "~nobody-of-this-name/photos": "no dataset or path named",
        str(tmp_path / "absent"): "no dataset or path named",
        str(empty): "it is empty",
        str(texts): "only .csv, .txt files",
        str(broken): "none of the 2 images .* a.jpg: empty file",
        str(single): "give a folder",
        str(not_zip): "not a readable zip",
        str(tmp_path / "shard-{0..2}.tar"): "shard-0.tar, which does not exist",
    }
    for source, message in cases.items():
        with pytest.raises(UserError, match=message) as raised:
            opened(source)
        assert "\n" not in str(raised.value)


def test_too_few_images_for_a_batch(make_folder: Callable[..., Path], opened: Callable[..., Dataset]) -> None:
    data = opened(make_folder(5))
    with pytest.raises(UserError, match="5 usable images, fewer than one batch of 6: use --batch-size 5 or less"):
        data.stream(6)
    with pytest.raises(UserError, match="one batch of 3 on each of 2 ranks: use --batch-size 2 or less"):
        opened(data_path(data), world_size=2).stream(3)
    data.stream(5).advance()


def data_path(data: Dataset) -> str:
    return str(data._source.path)  # type: ignore[attr-defined]


def test_images_that_broke_do_not_count_for_a_batch(
    make_folder: Callable[..., Path], opened: Callable[..., Dataset], encoded: Callable[..., bytes]
) -> None:
    """Although they were usable when the set was opened."""
    broken = {f"breaks-{k}.jpg": encoded(k).replace(b"\xff\xdb", b"\xff\xfe") for k in range(3)}
    data = opened(make_folder(5, broken))
    data.take(range(8))
    assert len(data.skipped) == 3
    with pytest.raises(UserError, match="has 5 usable images, fewer than one batch of 6"):
        data.stream(6)
    data.stream(5).advance()


@pytest.mark.usefixtures("nothing_held")
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_loses_too_many_images_says_so(
    ranks: int, make_folder: Callable[..., Path], opened: Callable[..., Dataset], loader: str
) -> None:
    """For one batch in each of its processes."""
    folder = make_folder(6)
    stream = opened(folder, loader=loader, world_size=ranks).stream(6 // ranks)
    (folder / "good-0000.jpg").unlink()
    with pytest.raises(UserError, match="only 5 images of pictures can be decoded"):
        for _ in range(9):  # it may be another process's turn to show that image
            stream.advance()


def test_a_path_is_found_before_a_name_is_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("digit").mkdir()
    with pytest.raises(UserError, match="no images in the folder digit"):
        open_source("digit")


def test_a_file_that_grew_since_it_was_listed_is_read_whole(make_folder: Callable[..., Path]) -> None:
    source = FolderSource(make_folder(1))
    with open(source.path / source.names[0], "ab") as file:
        file.write(b"more")
    assert source.read(0) == (source.path / source.names[0]).read_bytes()


def test_a_sample_is_of_the_same_files_where_others_break(
    make_folder: Callable[..., Path], opened: Callable[..., Dataset], encoded: Callable[..., bytes]
) -> None:
    """The run that goes on, or is started again, is compared with what it was compared with before."""
    breaks = encoded(1).replace(b"\xff\xdb", b"\xff\xfe")  # only when it is decoded
    folder = make_folder(12, {f"breaks-{i}.jpg": breaks for i in range(12)})
    data = opened(folder)
    before = data.sample(4, 1)
    assert len(before) == 4 and not torch.equal(before, data.sample(4, 2))
    known = opened(folder)
    assert known.count < data.count and torch.equal(known.sample(4, 1), before)
    shown = {tuple(image.flatten().tolist()) for image in before}
    other = next(i for i in range(known.count) if tuple(known.take([i]).flatten().tolist()) not in shown)
    (folder / known._source.names[known._numbers[other]]).write_bytes(b"")
    assert torch.equal(opened(folder).sample(4, 1), before)
    digits = opened("digits")
    assert torch.equal(digits.sample(4, 1), digits.sample(4, 1)) and not digits.sample(4, 1).equal(digits.sample(4, 2))
