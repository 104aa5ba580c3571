"""Encoded images inside archives, read in place: .zip, WebDataset .tar shards, LSUN's LMDB."""

from __future__ import annotations

import functools
import hashlib
import os
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any
from weakref import WeakValueDictionary

from fastdcgan.data.header import IMAGE_SUFFIXES, Glimpse, has_image_magic
from fastdcgan.data.source import (
    HEAD_BYTES,
    MAGIC_BYTES,
    MOST_ENCODED_BYTES,
    TAIL_BYTES,
    TOO_LARGE,
    EncodedSource,
    is_hidden,
)
from fastdcgan.errors import UserError
from fastdcgan.files import printable

HEADER_OF_DEFLATE = 1024  # bytes of a compressed file that are sure to unpack to its first few
OPEN_SHARDS = 256  # at a time: a process may have some 1,000 files open


class ArchiveFile:
    """An open file read at given places, from any thread; closed when nobody holds it any more."""

    def __init__(self, path: Path, stamp: str | None = None) -> None:
        """Open it; `stamp` is what `stamp_of` said when its content was listed.

        Raises:
            OSError: it cannot be opened, or is another file by now.
        """
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115
        self._lock, self.stamp = threading.Lock(), stamp_of(self.file.fileno())
        if stamp not in (None, self.stamp):
            raise OSError("the archive was replaced after it was listed")

    def __del__(self) -> None:
        if hasattr(self, "file"):
            self.file.close()

    def read_at(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset` on; OSError where the file ends before."""
        if hasattr(os, "pread"):
            data = os.pread(self.file.fileno(), size, offset) if offset < 1 << 62 else b""
        else:
            with self._lock:
                self.file.seek(offset)
                data = self.file.read(size) or b""
        if len(data) != size:
            raise OSError("the archive ends in the middle of this file")
        return data


class ZipSource(EncodedSource):
    """A .zip of images; stored entries are read straight from the file, compressed ones unpacked in memory."""

    def __init__(self, path: Path) -> None:
        self.path, self.names, self.unusable = path, [], []
        try:
            self._archive = ArchiveFile(path)
            archive = zipfile.ZipFile(self._archive.file)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise UserError(
                f"{path} is not a readable zip file ({error}): unpack it yourself, or fetch it again"
            ) from None
        self._entries = []
        with archive:
            # Where a name was added again the newest counts. Some programs on Windows write backslashes in names.
            newest = {entry.filename.replace("\\", "/"): entry for entry in archive.infolist()}
            for name, entry in sorted(newest.items()):
                hidden = is_hidden(name.removeprefix("./"))
                if name.endswith("/") or hidden:
                    continue
                named, why = PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES, _why_not_in_place(entry)
                if not named and (why or not self._starts_like_an_image(name, entry)):
                    continue
                if why:
                    self.unusable.append((printable(name), why))
                elif max(entry.file_size, entry.compress_size) > MOST_ENCODED_BYTES:
                    self.unusable.append((printable(name), TOO_LARGE))
                else:
                    self.names.append(name)
                    self._entries.append(entry)
        _require_images(self)

    def read(self, i: int) -> bytes:
        entry = self._entries[i]
        data = self._archive.read_at(self._start(entry), entry.compress_size)
        if entry.compress_type == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompressobj(-15).decompress(data, entry.file_size + 1)  # 0 would be no limit
            except zlib.error as error:
                raise OSError(f"broken in the zip: {error}") from None
        if len(data) != entry.file_size:
            raise OSError("broken in the zip: not of the size that it states")
        if zlib.crc32(data) != entry.CRC:
            raise OSError("broken in the zip: wrong checksum")
        return data

    def glimpse(self, i: int) -> Glimpse:
        entry = self._entries[i]
        if entry.compress_type == zipfile.ZIP_DEFLATED or entry.file_size <= HEAD_BYTES:
            data = self.read(i)
            return Glimpse(data, data[-TAIL_BYTES:], len(data), lambda: data)
        start = self._start(entry)
        tail = self._archive.read_at(start + entry.file_size - TAIL_BYTES, TAIL_BYTES)
        return Glimpse(self._archive.read_at(start, HEAD_BYTES), tail, entry.file_size, lambda: self.read(i))

    def _starts_like_an_image(self, name: str, entry: zipfile.ZipInfo) -> bool:
        try:
            head = self._archive.read_at(self._start(entry), min(entry.compress_size, HEADER_OF_DEFLATE))
            if entry.compress_type == zipfile.ZIP_DEFLATED:
                head = zlib.decompressobj(-15).decompress(head, MAGIC_BYTES)
        except (OSError, zlib.error):
            return False
        return has_image_magic(name, head)

    def _start(self, entry: zipfile.ZipInfo) -> int:
        """Where the entry's data begin: behind its local header, whose length only it knows."""
        header = self._archive.read_at(entry.header_offset, 30)
        if header[:4] != b"PK\x03\x04":
            raise OSError("broken in the zip: no header where one should be")
        name_length, extra_length = struct.unpack_from("<HH", header, 26)
        return int(entry.header_offset + 30 + name_length + extra_length)

    def fingerprint(self) -> str:
        return _fingerprint_of_files({self.path: self._archive.stamp})


class TarSource(EncodedSource):
    """WebDataset shards: uncompressed .tar files; a `.cls` file beside an image is its label."""

    def __init__(self, path: Path, shards: Sequence[Path]) -> None:
        self.path, self.names, self.unusable = path, [], []
        self._shards = list(dict.fromkeys(shards))
        self._stamps: dict[Path, str] = {}
        self._shard = functools.lru_cache(OPEN_SHARDS)(self._open)
        self._places: list[tuple[int, int, int]] = []  # (shard, offset, size)
        self._labels: list[str | None] = []
        prefixes = [f"{shard.name}/" for shard in self._shards] if len(self._shards) > 1 else [""]
        if len(set(prefixes)) < len(prefixes):  # shards of one name, in several folders
            prefixes = [f"{shard}/" for shard in self._shards]
        for number, prefix in enumerate(prefixes):
            self._index(number, prefix)
        _require_images(self)

    def _open(self, number: int) -> ArchiveFile:
        shard = self._shards[number]
        return ArchiveFile(shard, self._stamps[shard])

    def _index(self, number: int, prefix: str) -> None:
        shard = self._shards[number]
        found: dict[str, tarfile.TarInfo] = {}  # by name: one that was added again takes the place of the one before
        label_of: dict[str, tarfile.TarInfo] = {}
        try:
            with open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
                self._stamps[shard] = stamp_of(file.fileno())
                for member in archive:
                    if member.size < 0:  # of which tarfile goes backwards, for ever
                        raise tarfile.ReadError("a negative size")
                    suffix = PurePosixPath(member.name).suffix.lower()
                    if is_hidden(member.name.removeprefix("./")):
                        continue
                    if (member.issym() or member.islnk()) and suffix in IMAGE_SUFFIXES:
                        self.unusable.append((printable(prefix + member.name), "a link inside the archive"))
                    if not member.isfile():
                        continue
                    if suffix == ".cls":
                        label_of[member.name[:-4]] = member
                    elif suffix in IMAGE_SUFFIXES or _starts_like_an_image(file, member):
                        found[member.name] = member
                file.seek(archive.offset)
                if why := _why_no_end(file):
                    raise tarfile.ReadError(why)
        except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
            if not found:
                what = f"{shard} is not a readable tar file ({error})"
                raise UserError(f"{what}: shards must be uncompressed .tar files; unpack it into a folder") from None
            last = printable(list(found)[-1])
            self.unusable.append((printable(shard.name), f"the shard is broken behind {last} ({error})"))
        for member in found.values():
            if member.issparse():
                self.unusable.append((printable(prefix + member.name), "stored as a sparse file (tar --sparse)"))
                continue
            if member.size > MOST_ENCODED_BYTES:
                self.unusable.append((printable(prefix + member.name), TOO_LARGE))
                continue
            self.names.append(prefix + member.name)
            self._places.append((number, member.offset_data, member.size))
            stem, base = os.path.splitext(member.name)[0], member.name.rpartition("/")[2]
            key = member.name.removesuffix(base) + base.split(".")[0]  # WebDataset's: what is before the first dot
            label = label_of.get(stem) or label_of.get(key)
            text = None
            if label and label.size < 1024:
                with suppress(OSError):  # the shard is cut short in the middle of it
                    text = self._shard(number).read_at(label.offset_data, label.size)
            self._labels.append(None if text is None else text.decode("utf-8", "backslashreplace").strip())

    def classes(self) -> tuple[list[int], list[str]] | None:
        found = [label for label in self._labels if label is not None]
        if len(found) < len(self.names):
            folders = super().classes()
            shard_names = {shard.name for shard in self._shards}  # where an image lies in no folder of its shard
            return None if folders is None or shard_names.intersection(folders[1]) else folders
        numeric = all(label.isdecimal() for label in found)
        class_names = sorted(set(found), key=int if numeric else str)
        number = {name: label for label, name in enumerate(class_names)}
        return [number[label] for label in found], class_names

    def read(self, i: int) -> bytes:
        shard, offset, size = self._places[i]
        return self._shard(shard).read_at(offset, size)

    def glimpse(self, i: int) -> Glimpse:
        shard, offset, size = self._places[i]
        tail, file = min(size, TAIL_BYTES), self._shard(shard)
        head = file.read_at(offset, min(size, HEAD_BYTES))
        return Glimpse(head, file.read_at(offset + size - tail, tail), size, lambda: self.read(i))

    def fingerprint(self) -> str:
        return _fingerprint_of_files(self._stamps)


# By the file's resolved path: LMDB refuses to open a database twice in one process, and several data sets may read one.
_environments: WeakValueDictionary[Path, Any] = WeakValueDictionary()


class LmdbSource(EncodedSource):
    """An LSUN database: every value is an encoded image."""

    def __init__(self, path: Path) -> None:
        self.path, self.unusable = path, []
        self._data = path / "data.mdb" if path.is_dir() else path
        try:
            import lmdb
        except ImportError:
            raise UserError(f"{path} is an LMDB, which needs one more package: pip install lmdb") from None
        try:
            self._damaged: type[Exception] = lmdb.Error
            self._env: Any = _environments.get(self._data.resolve())
            self._stamp = stamp_of(self._data)
            if self._env is None:
                self._env = lmdb.open(os.fsencode(self._data), subdir=False, readonly=True, lock=False, readahead=False)
                _environments[self._data.resolve()] = self._env
            # LMDB maps the file as long as it says it is: reading behind its end would kill the process (SIGBUS).
            if self._data.stat().st_size < (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]:
                raise UserError(f"{path} is cut short: fetch it again")
            with self._env.begin() as transaction:
                self._keys = [bytes(key) for key in transaction.cursor().iternext(values=False)]
        except lmdb.Error as error:
            raise UserError(f"{path} is not a readable LMDB ({error}): fetch it again") from None
        self.names = [key.decode("utf-8", "backslashreplace") for key in self._keys]
        _require_images(self)

    def read(self, i: int) -> bytes:
        try:
            with self._env.begin() as transaction:
                value = transaction.get(self._keys[i])
        except self._damaged as error:
            raise OSError(f"broken in the database: {error}") from None
        if value is None:
            raise OSError("vanished from the database")
        return bytes(value)

    def glimpse(self, i: int) -> Glimpse:
        data = self.read(i)
        return Glimpse(data, data[-TAIL_BYTES:], len(data), lambda: data)

    def classes(self) -> None:
        return None

    def fingerprint(self) -> str:
        return _fingerprint_of_files({self._data: self._stamp})


def _require_images(source: EncodedSource) -> None:
    if not source.names:
        found = "{} is {}; ".format(*source.unusable[0]) if source.unusable else ""
        raise UserError(f"no images in {source.path}: {found}give an archive with .jpg or .png files in it")


def _why_not_in_place(entry: zipfile.ZipInfo) -> str:
    """Why an entry of a zip is not read where it lies; '' for most."""
    if entry.flag_bits & 1:
        return "encrypted"
    if entry.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return ""
    method = {zipfile.ZIP_BZIP2: "bzip2", zipfile.ZIP_LZMA: "LZMA"}.get(entry.compress_type, "unknown")
    return f"compressed ({method}) in a way that is not read in place"


def _starts_like_an_image(file: IO[bytes], member: tarfile.TarInfo) -> bool:
    file.seek(member.offset_data)
    return has_image_magic(member.name, file.read(min(member.size, MAGIC_BYTES)))


def _why_no_end(file: IO[bytes]) -> str:
    """Why a tar file is not whole, of which tarfile says nothing, from what follows its last member; '' where it is."""
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        return "it ends without an end mark"
    if any(block):
        return "a damaged header"
    for piece in iter(functools.partial(file.read, 1 << 20), b""):
        if any(piece):
            return "more follows its end mark, as of another archive appended"
    return ""


def stamp_of(file: Path | int) -> str:
    """What tells whether a file, by path or open descriptor, has since been written to or replaced: size and time."""
    status = os.stat(file)
    return f"{status.st_size} {status.st_mtime_ns}"


def _fingerprint_of_files(stamps: Mapping[Path, str]) -> str:
    """A digest of files' names and of what `stamp_of` said when they were listed, not of what lies there by now."""
    digest = hashlib.sha256()
    for path, stamp in stamps.items():
        digest.update(f"{stamp} ".encode() + os.fsencode(path.name) + b"\n")
    return digest.hexdigest()
