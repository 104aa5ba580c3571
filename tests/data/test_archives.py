"""Zip files, WebDataset shards and LMDBs give the same pictures as the folder they were made from."""

from __future__ import annotations

import io
import os
import tarfile
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdcgan.data import Dataset, archives
from fastdcgan.data.archives import LmdbSource, TarSource, ZipSource
from fastdcgan.data.pack import pack
from fastdcgan.data.source import HEAD_BYTES, TAIL_BYTES
from fastdcgan.errors import UserError
from fastdcgan.files import expand_braces

FILES = 7


@pytest.fixture
def files(encoded: Callable[..., bytes]) -> dict[str, bytes]:
    """Good files of two classes; one longer than what is looked at first."""
    found = {f"{'ab'[k % 2]}/{k}.jpg": encoded(k) for k in range(FILES - 1)}
    found["b/long.jpg"] = encoded(9, size=(900, 700), quality=100, subsampling=0)
    assert len(found["b/long.jpg"]) > 65536
    return found


@pytest.fixture
def from_folder(
    files: dict[str, bytes], make_folder: Callable[..., Path], opened: Callable[..., Dataset]
) -> Callable[[str], torch.Tensor]:
    folder = make_folder(0, files, "as-folder")
    return lambda loader: opened(folder, loader=loader).take(range(FILES))


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip(
    compression: int,
    loader: str,
    files: dict[str, bytes],
    from_folder: Callable[[str], torch.Tensor],
    opened: Callable[..., Dataset],
    tmp_path: Path,
) -> None:
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr("__MACOSX/a/._0.jpg", b"x")
        archive.writestr("notes.txt", b"hello")
        archive.writestr("./.hidden.jpg", b"x")
        archive.writestr("a/bad.jpg", b"text, not a picture")
    data = opened(path, loader=loader)
    assert (data.name, data.count, data.class_names) == ("set", FILES, ["a", "b"])
    assert data.skipped == [("a/bad.jpg", "not an image (text)")]
    assert torch.equal(data.take(range(FILES)), from_folder(loader))
    stream = data.stream(FILES)
    stream.advance()
    stream.close()


def test_a_zip_with_damaged_entries_costs_those_entries(
    opened: Callable[..., Dataset], files: dict[str, bytes], tmp_path: Path, loader: str
) -> None:
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        places = [entry.header_offset for entry in archive.infolist()]
    content = bytearray(path.read_bytes())
    content[places[1] + 60 : places[1] + 90] = bytes(30)  # inside the compressed data
    content[places[2]] = 0  # the local header
    path.write_bytes(content)
    data = opened(path, loader=loader)
    assert data.count == FILES - 2
    assert all(reason.startswith("broken in the zip") for _, reason in data.skipped)


def test_images_without_a_suffix_are_known_by_how_they_begin_in_archives_too(
    files: dict[str, bytes], opened: Callable[..., Dataset], tmp_path: Path
) -> None:
    """As in folders; and neither text nor what cannot be unpacked is taken for one."""
    image, noise = files["b/1.jpg"], np.random.default_rng(0).bytes(3000)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("stored", image)
        archive.writestr("packed.JPG_large", image + bytes(5000), zipfile.ZIP_DEFLATED)
        archive.writestr("noise", noise, zipfile.ZIP_DEFLATED)
        archive.writestr("empty", b"", zipfile.ZIP_DEFLATED)
        archive.writestr("other method", image, zipfile.ZIP_BZIP2)
        place = archive.infolist()[2].header_offset + 30 + len("noise")
    whole = bytearray((tmp_path / "set.zip").read_bytes())
    whole[place : place + 8] = b"\xff" * 8  # no stream of that begins so
    (tmp_path / "set.zip").write_bytes(whole)
    with tarfile.open(tmp_path / "set.tar", "w") as shard:
        for name, data in {"stored": image, "packed.JPG_large": image, "noise": noise, "empty": b""}.items():
            add(shard, name, data)
    for name in ("set.zip", "set.tar"):
        data = opened(tmp_path / name)
        assert (data.count, data.skipped) == (2, [])


def test_what_unpacks_to_more_than_a_file_may_hold_is_left_out(
    encoded: Callable[..., bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However small it is in the archive."""
    monkeypatch.setattr(archives, "MOST_ENCODED_BYTES", 10_000)
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.jpg", encoded() + bytes(20_000))
        archive.writestr("good.jpg", encoded())
        assert archive.infolist()[0].compress_size < 10_000
    source = ZipSource(tmp_path / "set.zip")
    assert (source.names, source.unusable) == (["good.jpg"], [("bomb.jpg", "larger than 1 GiB")])


def test_encrypted_entries_are_named(files: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the flag in the first entry of the directory
    path.write_bytes(content)
    source = ZipSource(path)
    assert len(source) == FILES - 1
    assert source.unusable == [(next(iter(files)), "encrypted")]


@pytest.mark.parametrize(("compression", "name"), [(zipfile.ZIP_BZIP2, "bzip2"), (zipfile.ZIP_LZMA, "LZMA")])
def test_a_zip_that_cannot_be_read_in_place_says_why(compression: int, name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w", compression) as archive:
        archive.writestr("a.jpg", b"x")
    with pytest.raises(UserError, match=rf"a\.jpg is compressed \({name}\)"):
        ZipSource(tmp_path / "set.zip")


def test_links_in_a_tar_are_named(files: dict[str, bytes], tmp_path: Path, opened: Callable[..., Dataset]) -> None:
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        for name, data in files.items():
            add(archive, name, data)
        for name, kind in (("a/soft.jpg", tarfile.SYMTYPE), ("a/hard.jpg", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a/0.jpg"
            archive.addfile(member)
    data = opened(tmp_path / "set.tar")
    assert data.count == FILES
    assert data.skipped == [("a/soft.jpg", "a link inside the archive"), ("a/hard.jpg", "a link inside the archive")]


def test_a_shard_cut_short_in_a_label_gives_its_images(
    files: dict[str, bytes], tmp_path: Path, opened: Callable[..., Dataset]
) -> None:
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as archive:
        for k, data in enumerate(files.values()):
            add(archive, f"{k}.jpg", data)
            add(archive, f"{k}.cls", b"7")
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b"6.cls") + 512])  # its header is there, its content is not
    assert (opened(path).count, opened(path).labels) == (FILES, None)


def test_a_label_is_of_the_image_with_its_key(
    files: dict[str, bytes], tmp_path: Path, opened: Callable[..., Dataset]
) -> None:
    """Which in WebDataset is what comes before the first dot; but one with the whole name comes first."""
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as archive:
        for name, label in (
            ("./a/1.input.jpg", "./a/1.cls"),
            ("./a/2.v1.jpg", "./a/2.v1.cls"),
            ("b.c/3.jpg", "b.c/3.cls"),
        ):
            add(archive, name, files["a/0.jpg"])
            add(archive, label, label[-6:-4].encode())
        add(archive, "./a/2.cls", b"no")
    data = opened(path)
    assert data.class_names == ["/1", "/3", "v1"] and data.labels == [0, 2, 1]


def test_a_label_is_a_number_whatever_blanks_are_around_it(
    files: dict[str, bytes], tmp_path: Path, opened: Callable[..., Dataset]
) -> None:
    """As those that other programs write end in a line's end."""
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as archive:
        for k, label in enumerate((b"10\n", b" 9\r\n", b"10")):
            add(archive, f"{k}.jpg", files["a/0.jpg"])
            add(archive, f"{k}.cls", label)
    data = opened(path)
    assert (data.class_names, data.labels) == (["9", "10"], [1, 0, 1])


def test_one_tar_has_classes_from_its_folders(
    loader: str,
    files: dict[str, bytes],
    from_folder: Callable[[str], torch.Tensor],
    opened: Callable[..., Dataset],
    tmp_path: Path,
) -> None:
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in sorted(files.items()):
            add(archive, name, data)
    data = opened(path, loader=loader)
    assert data.class_names == ["a", "b"]
    assert torch.equal(data.take(range(FILES)), from_folder(loader))


def test_several_tars_have_classes_from_their_folders(
    files: dict[str, bytes], opened: Callable[..., Dataset], tmp_path: Path
) -> None:
    for k in range(2):
        with tarfile.open(tmp_path / f"s-{k}.tar", "w") as archive:
            for name, data in sorted(files.items())[k::2]:
                add(archive, name, data)
    found = opened(tmp_path)
    assert found.class_names == ["a", "b"]
    assert found.labels is not None
    assert sorted(found.labels) == [0] * 3 + [1] * 4
    with tarfile.open(tmp_path / "s-2.tar", "w") as archive:
        add(archive, "alone.jpg", files["a/0.jpg"])
    assert opened(tmp_path).labels is None


def test_the_end_of_a_long_file_is_its_own(files: dict[str, bytes], tmp_path: Path) -> None:
    """Not what comes behind it in the archive."""
    contents = [files["b/long.jpg"], files["a/0.jpg"]]
    assert len(contents[0]) > HEAD_BYTES
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive, tarfile.open(tmp_path / "set.tar", "w") as shard:
        for name, data in zip(("a.jpg", "b.jpg"), contents, strict=True):
            archive.writestr(name, data)
            add(shard, name, data)
    for source in (ZipSource(tmp_path / "set.zip"), TarSource(tmp_path / "set.tar", [tmp_path / "set.tar"])):
        for i, data in enumerate(contents):
            glimpse = source.glimpse(i)
            assert (glimpse.head, glimpse.tail) == (data[:HEAD_BYTES], data[-TAIL_BYTES:])
            assert (glimpse.size, glimpse.whole()) == (len(data), data)


def test_webdataset_shards_as_written_by_webdataset(
    files: dict[str, bytes],
    from_folder: Callable[[str], torch.Tensor],
    opened: Callable[..., Dataset],
    tmp_path: Path,
    loader: str,
) -> None:
    webdataset = pytest.importorskip("webdataset")
    folder = tmp_path / "shards"
    folder.mkdir()
    with webdataset.ShardWriter(f"{folder}/s-%03d.tar", maxcount=3, verbose=0) as writer:
        for k, (_, data) in enumerate(sorted(files.items())):
            writer.write({"__key__": f"{k:05}", "jpg": data, "cls": 10 - k})
    for source in (folder, f"{folder}/s-{{000..002}}.tar"):
        data = opened(source, loader=loader)
        assert data.count == FILES
        assert data.class_names == ["4", "5", "6", "7", "8", "9", "10"]
        assert data.labels == [6, 5, 4, 3, 2, 1, 0]
        assert torch.equal(data.take(range(FILES)), from_folder(loader))
    assert opened(f"{folder}/s-{{000..001}}.tar").count == 6


def test_few_of_many_shards_are_open_at_a_time(
    files: dict[str, bytes],
    from_folder: Callable[[str], torch.Tensor],
    opened: Callable[..., Dataset],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(archives, "OPEN_SHARDS", 2)
    for k, (name, data) in enumerate(sorted(files.items())):
        with tarfile.open(tmp_path / f"s-{k}.tar", "w") as archive:
            add(archive, name, data)
    data = opened(tmp_path)
    for _ in range(2):
        assert torch.equal(data.take(range(FILES)), from_folder("auto"))
    held = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if os.path.exists(link)]
    assert sum(str(tmp_path) in name for name in held) <= 2


def test_a_shard_cut_short_gives_what_is_whole(
    files: dict[str, bytes], opened: Callable[..., Dataset], tmp_path: Path
) -> None:
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            add(archive, name, data)
    path.write_bytes(path.read_bytes()[:-60_000])
    data = opened(path)
    assert data.count == FILES - 1
    assert any("the archive ends in the middle" in reason or "broken" in reason for _, reason in data.skipped)


def test_what_was_added_again_takes_the_place_of_what_was_there(
    files: dict[str, bytes], encoded: Callable[..., bytes], opened: Callable[..., Dataset], tmp_path: Path
) -> None:
    """As for `tar` and `unzip`; and shards that are named twice count once."""
    tar, zipped = tmp_path / "set.tar", tmp_path / "set.zip"
    with tarfile.open(tar, "w") as archive, zipfile.ZipFile(zipped, "w") as other, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of zipfile, that a name is there already
        for name, data in [*files.items(), ("a/0.jpg", encoded(77))]:
            add(archive, name, data)
            other.writestr(name, data)
    folder = tmp_path / "as-folder"
    folder.mkdir()
    (folder / "new.jpg").write_bytes(encoded(77))
    (new,) = opened(folder).take([0])
    for source in (tar, zipped, tmp_path / "{set,set}.tar"):
        data = opened(source)
        assert data.count == FILES
        assert sum(torch.equal(image, new) for image in data.take(range(FILES))) == 1


def test_sparse_members_are_left_out(files: dict[str, bytes], opened: Callable[..., Dataset], tmp_path: Path) -> None:
    """What lies in the archive is not what the file was."""
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            add(archive, name, data)
        member = tarfile.TarInfo("sparse.jpg")
        member.pax_headers = {"GNU.sparse.map": "0,10", "GNU.sparse.size": "4096"}
        member.size = 10
        archive.addfile(member, io.BytesIO(files["a/0.jpg"][:10]))
    data = opened(path)
    assert data.count == FILES and data.skipped == [("sparse.jpg", "stored as a sparse file (tar --sparse)")]


def test_names_that_begin_with_dots_for_folders_are_not_hidden(
    files: dict[str, bytes], opened: Callable[..., Dataset], tmp_path: Path
) -> None:
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            add(archive, f"../../{name}", data)
        add(archive, "../.hidden/x.jpg", files["a/0.jpg"])
    assert opened(path).count == FILES


def test_compressed_tars_are_refused_with_advice(tmp_path: Path, opened: Callable[..., Dataset]) -> None:
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w:gz") as archive:
        add(archive, "a.jpg", b"x")
    with pytest.raises(UserError, match=r"must be uncompressed \.tar files"):
        opened(path)


def test_lsun_lmdb(
    loader: str,
    files: dict[str, bytes],
    from_folder: Callable[[str], torch.Tensor],
    opened: Callable[..., Dataset],
    tmp_path: Path,
) -> None:
    lmdb = pytest.importorskip("lmdb")
    path = tmp_path / "church_lmdb"
    with lmdb.open(str(path), map_size=10 << 20) as env, env.begin(write=True) as transaction:
        for name, data in files.items():
            transaction.put(name.encode(), data)
    data = opened(path, loader=loader)
    assert (data.name, data.count, data.labels) == ("church_lmdb", FILES, None)
    assert torch.equal(data.take(range(FILES)), from_folder(loader))
    for other in (path, path / "data.mdb"):  # while the first is in use
        assert torch.equal(opened(other, loader=loader).take(range(FILES)), data.take(range(FILES)))
    (tmp_path / "church.mdb").write_bytes((path / "data.mdb").read_bytes())
    data = opened(tmp_path / "church.mdb", loader=loader)
    assert data.name == "church" and torch.equal(data.take(range(FILES)), from_folder(loader))


def test_an_lmdb_cut_short_is_refused(files: dict[str, bytes], tmp_path: Path) -> None:
    """Reading on would end the process: pages behind the end of a mapped file."""
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(tmp_path), map_size=10 << 20) as env, env.begin(write=True) as transaction:
        for name, data in files.items():
            transaction.put(name.encode(), data * 20)
    file = tmp_path / "data.mdb"
    assert len(LmdbSource(tmp_path)) == FILES
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match="cut short"):
        LmdbSource(tmp_path)


def test_lmdb_missing_package_says_what_to_install(
    tmp_path: Path, opened: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data.mdb").write_bytes(b"x")
    monkeypatch.setitem(__import__("sys").modules, "lmdb", None)
    with pytest.raises(UserError, match="pip install lmdb"):
        opened(tmp_path)


def test_braces() -> None:
    assert list(expand_braces("a-{08..10}.tar")) == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert list(expand_braces("{x,y}-{0..1}")) == ["x-0", "x-1", "y-0", "y-1"]
    assert list(expand_braces("plain.tar")) == ["plain.tar"]
    assert next(expand_braces("{0..99999999}{0..99999999}")) == "00"


@pytest.mark.parametrize("stated", [0, 100])
def test_a_zip_entry_that_states_too_small_a_size_is_not_unpacked_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stated: int
) -> None:
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(50 << 20))
    source = ZipSource(path)
    source._entries[0].file_size = stated
    tracemalloc.start()
    with pytest.raises(OSError, match="not of the size that it states"):
        source.read(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_names_in_a_zip_may_begin_with_a_dot_and_a_slash(
    files: dict[str, bytes], tmp_path: Path, opened: Callable[..., Dataset]
) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(f"./{name}", data)
    data = opened(tmp_path / "set.zip")
    assert (data.count, data.class_names) == (FILES, ["a", "b"])


@pytest.mark.parametrize("damage", ["a name that is no UTF-8", "a version of the far future"])
def test_a_zip_that_python_cannot_list_is_one_line(damage: str, tmp_path: Path, opened: Callable[..., Dataset]) -> None:
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("é.jpg", b"x")
    data = bytearray(path.read_bytes())
    if "name" in damage:
        data = data.replace("é".encode(), b"\xff\xff")
    else:
        at = data.index(b"PK\x01\x02")
        data[at + 6] = 99
    path.write_bytes(data)
    with pytest.raises(UserError, match="not a readable zip file"):
        opened(path)


def test_a_bit_that_fell_over_in_a_zip_costs_that_entry(
    files: dict[str, bytes], tmp_path: Path, opened: Callable[..., Dataset]
) -> None:
    """Where nothing but the checksum shows it: in the middle of the pixels."""
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    content = bytearray(path.read_bytes())
    content[content.index(files["a/2.jpg"]) + len(files["a/2.jpg"]) - 40] ^= 1
    path.write_bytes(content)
    data = opened(path)
    assert data.count == FILES - 1
    assert data.skipped == [("a/2.jpg", "broken in the zip: wrong checksum")]
    pack(str(path), image_size=(16, 16), out=tmp_path / "set.npy")  # which waits only for what may come back
    assert len(np.load(tmp_path / "set.npy")) == FILES - 1


def test_an_archive_that_was_written_anew_is_looked_at_anew(
    files: dict[str, bytes], tmp_path: Path, opened: Callable[..., Dataset], encoded: Callable[..., bytes]
) -> None:
    """Of the same name, with entries of the same names."""
    for kind in ("zip", "tar"):
        path = tmp_path / f"set.{kind}"
        for content in (b"", encoded(1)):
            if kind == "zip":
                with zipfile.ZipFile(path, "w") as archive:
                    for name in files:
                        archive.writestr(name, files[name] if name != "a/0.jpg" else content)
            else:
                with tarfile.open(path, "w") as shard:
                    for name in files:
                        add(shard, name, files[name] if name != "a/0.jpg" else content)
            assert opened(path).count == (FILES if content else FILES - 1)
