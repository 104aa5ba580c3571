"""Archives that are cut short, damaged, joined or replaced: what is whole is used, the rest is named, nothing hangs."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastdcgan.data import Dataset, open_source
from fastdcgan.data.census import look_at
from fastdcgan.data.pack import pack
from fastdcgan.errors import UserError
from fastdcgan.trainer import report_skipped

MEMBERS = 12


def tar_of(files: dict[str, bytes], format: int = tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


@pytest.fixture
def tar(encoded: Callable[..., bytes]) -> bytes:
    return tar_of({f"{k:02}.png": encoded(k, "PNG") for k in range(MEMBERS)})


def header_at(tar: bytes, number: int) -> int:
    return tarfile.open(fileobj=io.BytesIO(tar)).getmembers()[number].offset


def with_size(tar: bytes, number: int, size: bytes) -> bytes:
    """The same with another size, of 12 bytes, in one member's header."""
    found, at = bytearray(tar), header_at(tar, number)
    found[at + 124 : at + 136] = size
    make_right(found, at)
    return bytes(found)


def make_right(tar: bytearray, at: int) -> None:
    """The checksum of a header."""
    tar[at + 148 : at + 156] = b" " * 8
    tar[at + 148 : at + 156] = b"%06o\0 " % sum(tar[at : at + 512])


# what is done to a tar of twelve members: how many of them are left, what is said of the shard
DAMAGE: dict[str, tuple[Callable[[bytes], bytes], int, str]] = {
    "a byte of a header": (
        lambda t: t[: (at := header_at(t, 7)) + 3] + b"\xff" + t[at + 4 :],
        7,
        "broken behind 06.png (a damaged header)",
    ),
    "a header of zeros": (
        lambda t: t[: (at := header_at(t, 7))] + bytes(512) + t[at + 512 :],
        7,
        "broken behind 06.png (more follows its end mark",
    ),
    "another archive appended": (lambda t: t + t, MEMBERS, "broken behind 11.png (more follows its end mark"),
    "cut in a header": (lambda t: t[: header_at(t, 7) + 300], 7, "broken behind 06.png (it ends without an end mark)"),
    "cut between members": (lambda t: t[: header_at(t, 7)], 7, "broken behind 06.png (it ends without an end mark)"),
    "a size below zero": (lambda t: with_size(t, 7, b"\xff" * 10 + b"\xfe\x00"), 7, "behind 06.png (a negative size)"),
    "a size beyond all bounds": (lambda t: with_size(t, 7, b"\x80\x01" + bytes(10)), 7, "broken behind 0"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_lost_behind_damage_in_a_tar_is_said(
    kind: str, tar: bytes, tmp_path: Path, opened: Callable[..., Dataset]
) -> None:
    """tarfile takes most damage for the end of the archive."""
    damage, left, said = DAMAGE[kind]
    (tmp_path / "set.tar").write_bytes(damage(tar))
    data = opened(tmp_path / "set.tar")
    assert data.count == left
    assert said in dict(data.skipped)["set.tar"]
    with pytest.raises(UserError, match=r"set\.tar: .*--strict"):
        opened(tmp_path / "set.tar", strict=True)


def test_a_whole_tar_is_no_damaged_one(tar: bytes, tmp_path: Path, opened: Callable[..., Dataset]) -> None:
    for padding in (0, 10 << 10, 3 << 20):
        (tmp_path / "set.tar").write_bytes(tar + bytes(padding))
        data = opened(tmp_path / "set.tar")
        assert (data.count, data.skipped) == (MEMBERS, [])


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_damage_anywhere_is_an_answer_not_an_accident(
    format: int, encoded: Callable[..., bytes], tmp_path: Path
) -> None:
    whole = tar_of(
        {f"{'long' * 20 + '/' + 'long' * 10 if k == 1 else ''}{k}.jpg": encoded(k, size=(8, 8)) for k in range(3)},
        format,
    )
    random, path = torch.Generator().manual_seed(format), tmp_path / "set.tar"
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(int(torch.randint(1, 4, (), generator=random))):
            at = int(torch.randint(len(whole) // 512, (), generator=random)) * 512  # the header of a member, or data
            damaged[at + int(torch.randint(200, (), generator=random))] = int(torch.randint(256, (), generator=random))
            make_right(damaged, at)  # or every header would be refused
        path.write_bytes(damaged)
        try:
            source = open_source(str(path))
        except UserError:
            continue
        for i in range(len(source)):
            look_at(source, i)


def test_a_damaged_shard_is_named_in_one_line(tar: bytes, tmp_path: Path, opened: Callable[..., Dataset]) -> None:
    """Also behind a name that has two of them, or that is no text."""
    names = {"a.jpg": b"x", "b\nc\udcff.jpg": b"x", "d.jpg": b"x"}
    shard = tar_of(names | {f"{k}.png": tar for k in "ef"})
    (tmp_path / "set.tar").write_bytes(shard[: header_at(shard, 2) + 100])
    source = open_source(str(tmp_path / "set.tar"))
    report_skipped(source.unusable, tmp_path)
    assert (tmp_path / "skipped.txt").read_text() == (
        "set.tar\tthe shard is broken behind b\\nc\\xff.jpg (it ends without an end mark)\n"
    )


def test_shards_of_one_name_in_two_folders_are_told_apart(
    encoded: Callable[..., bytes], tmp_path: Path, opened: Callable[..., Dataset]
) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.tar").write_bytes(tar_of({"0.jpg": b"text", "1.jpg": encoded(1)}))
    data = opened(tmp_path / "{a,b}" / "x.tar")
    assert [name for name, _ in data.skipped] == [f"{tmp_path}/{folder}/x.tar/0.jpg" for folder in "ab"]


def test_odd_names_in_a_zip(encoded: Callable[..., bytes], tmp_path: Path, opened: Callable[..., Dataset]) -> None:
    """No name at all, and a folder's end as old programs on Windows write it."""
    nameless = zipfile.ZipInfo("x")
    nameless.filename = ""
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name in ("a\\1.jpg", "b\\2.jpg", "__MACOSX\\._2.jpg"):
            archive.writestr(name, encoded(1))
        archive.writestr(nameless, b"")
    data = opened(tmp_path / "set.zip")
    assert (data.count, data.class_names, data.skipped) == (2, ["a", "b"], [])


def zip_of(path: Path, numbers: range, encoded: Callable[..., bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for place, number in enumerate(numbers):
            archive.writestr(f"{place:02}.png", encoded(number, "PNG", size=(16, 16)))
    return path


def test_what_an_archive_was_is_not_kept_for_what_took_its_place(
    encoded: Callable[..., bytes],
    tmp_path: Path,
    opened: Callable[..., Dataset],
    batches: Callable[..., list[torch.Tensor]],
) -> None:
    path = zip_of(tmp_path / "set.zip", range(8), encoded)
    before = opened(path, cache="disk")
    os.replace(zip_of(tmp_path / "new.zip", range(20, 28), encoded), path)
    batches(before.stream(4), 4)  # of the old one, which is still open; and keeps them
    after, right = opened(path), opened(path, cache="off").take(range(8))
    batches(after.stream(4), 4)
    assert torch.equal(after.take(range(8)), right)


def test_what_was_packed_of_an_archive_is_not_taken_for_what_took_its_place(
    encoded: Callable[..., bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastdcgan.data import file_dataset

    path, out = zip_of(tmp_path / "set.zip", range(8), encoded), tmp_path / "set.npy"
    zip_of(tmp_path / "new.zip", range(20, 28), encoded)
    take_census = file_dataset.take_census

    def slowly(*given: object) -> object:
        found = take_census(*given)  # type: ignore[arg-type]
        os.replace(tmp_path / "new.zip", path)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(file_dataset, "take_census", slowly)
        pack(str(path), image_size=(16, 16), out=out)
    with pytest.raises(UserError, match="holds something else"):
        pack(str(path), image_size=(16, 16), out=out)


def test_a_shard_that_took_anothers_place_is_not_read_at_its_places(
    tar: bytes, tmp_path: Path, opened: Callable[..., Dataset]
) -> None:
    path = tmp_path / "set.tar"
    path.write_bytes(tar)
    data = opened(path, cache="off")
    data._source._shard.cache_clear()  # type: ignore[attr-defined]  # as of many shards
    (tmp_path / "new.tar").write_bytes(tar[512:] + bytes(512))
    os.replace(tmp_path / "new.tar", path)
    with pytest.raises(UserError, match="the archive was replaced after it was listed"):
        data.stream(4).advance()
