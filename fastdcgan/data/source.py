"""Encoded images, wherever they lie, as a numbered list of byte strings. Folders here, archives in archives.py."""

from __future__ import annotations

import hashlib
import os
import stat
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from fastdcgan.data.header import IMAGE_SUFFIXES, Glimpse, has_image_magic
from fastdcgan.data.pillow_decode import NO_MEMORY
from fastdcgan.errors import UserError
from fastdcgan.files import printable

HEAD_BYTES = 65536  # most files are read whole by this; a frame header behind longer metadata costs a second read
TAIL_BYTES = 64
MAGIC_BYTES = 16  # from which `has_image_magic` tells
KEPT_BYTES = 256 << 20  # of small files, held in memory from the first look at them until they are decoded
MOST_ENCODED_BYTES = 1 << 30
TOO_LARGE = "larger than 1 GiB"
READ_BYTES = os.O_RDONLY | getattr(os, "O_BINARY", 0)  # Windows would translate line ends


class EncodedSource(ABC):
    """Files that claim to be images, in one fixed order. Methods may be called from several threads."""

    path: Path
    names: list[str]  # relative, with forward slashes; one a file
    unusable: list[tuple[str, str]]  # (what, reason): found broken while listing, not among `names`

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def read(self, i: int) -> bytes:
        """The whole file number i. Raises OSError where it cannot be read."""

    @abstractmethod
    def glimpse(self, i: int) -> Glimpse:
        """Its beginning, its end and its size. Raises OSError."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when a file is added, removed, renamed or written to."""

    def classes(self) -> tuple[list[int], list[str]] | None:
        """(label of each file, class names), from the folders the files lie in; None where there is only one.

        The class is the innermost folder's name, so `train/cat` and `test/cat` are one class.
        """
        folders = [name.rpartition("/")[0] for name in self.names]
        class_of = {folder: unicodedata.normalize("NFC", PurePosixPath(folder).name) for folder in set(folders)}
        class_names = sorted(set(class_of.values()))
        if len(class_names) < 2:
            return None
        number = {name: label for label, name in enumerate(class_names)}
        label_of = {folder: number[name] for folder, name in class_of.items()}
        return [label_of[folder] for folder in folders], class_names


def why_unreadable(error: OSError) -> str:
    """A few words on a file that cannot be read."""
    if isinstance(error, FileNotFoundError):
        return "vanished after it was listed"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if error.errno is None:  # not the system's: an archive is broken there
        return str(error)
    return f"cannot be read ({error.strerror or error})"


# How the reasons begin that may be gone the next time, without the file having changed.
PASSING = ("vanished", "no permission", "cannot be read", NO_MEMORY)


def is_hidden(name: str) -> bool:
    """Whether a relative path is hidden, or is what macOS adds to archives."""
    parts = name.split("/")
    return "__MACOSX" in parts or any(part[:1] == "." and part not in (".", "..") for part in parts)


class FolderSource(EncodedSource):
    """A folder of images, flat or nested. Links are followed, each folder is visited once.

    Hidden files and folders of runs stay out.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.unusable, self._root = path, [], str(path)
        self.names, self._sizes, other_suffixes, facts = [], list[int](), set(), []
        for name, size, modified in sorted(self._walk()):
            suffix = os.path.splitext(name)[1]
            if suffix.lower() in IMAGE_SUFFIXES or self._starts_like_an_image(name):
                self.names.append(name)
                self._sizes.append(size)
                facts.append(f"{size} {modified} {name}\n")
            else:
                other_suffixes.add(suffix or "no extension")
        self._fingerprint = hashlib.sha256(os.fsencode("".join(facts))).hexdigest()
        self._kept: dict[int, bytes] = {}
        self._room = KEPT_BYTES
        if not self.names:
            unreadable = f" ({self.unusable[0][0]}: {self.unusable[0][1]})" if self.unusable else ""
            found = f"it holds only {', '.join(sorted(other_suffixes)[:4])} files" if other_suffixes else "it is empty"
            raise UserError(f"no images in the folder {path}: {found}{unreadable}; give a folder of .jpg or .png files")

    def _walk(self) -> Iterator[tuple[str, int, int]]:
        """(name, size, time of last change) of every file."""
        waiting, visited = [""], set()  # folders still to look into; those looked into, which breaks loops of links
        while waiting:
            relative = waiting.pop()
            folder = self.path / relative
            try:
                status = folder.stat()
                if (status.st_dev, status.st_ino) in visited:
                    continue
                visited.add((status.st_dev, status.st_ino))
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError as error:
                reason = f"folder cannot be read ({error.strerror})"
                self.unusable.append((printable(relative or str(self.path)), reason))
                continue
            if relative and {".lock", "config.json", "samples"} <= {entry.name for entry in entries}:
                continue  # a run, whose pictures are not to be trained on
            folders = []
            for entry in entries:
                name = f"{relative}/{entry.name}" if relative else entry.name
                if is_hidden(entry.name):
                    continue
                try:
                    status = entry.stat()
                    if stat.S_ISDIR(status.st_mode):
                        folders.append(name)
                    elif stat.S_ISREG(status.st_mode):
                        yield name, status.st_size, status.st_mtime_ns
                except OSError as error:
                    reason = "broken link" if entry.is_symlink() else f"cannot be read ({error.strerror})"
                    if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES or not entry.is_symlink():
                        self.unusable.append((printable(name), reason))
            waiting += reversed(folders)  # in the order of their names, each with all that is in it

    def _starts_like_an_image(self, name: str) -> bool:
        try:
            with open(self.path / name, "rb", buffering=0) as file:
                return has_image_magic(name, file.read(MAGIC_BYTES))
        except OSError:
            return False

    def read(self, i: int) -> bytes:
        kept = self._kept.pop(i, None)
        if kept is not None:
            self._room += len(kept)
            return kept
        if self._sizes[i] > MOST_ENCODED_BYTES:
            raise OSError(TOO_LARGE)
        # Plain system calls: for small files a Python file object costs as much as decoding the header.
        handle = os.open(f"{self._root}/{self.names[i]}", READ_BYTES)
        try:
            data = os.read(handle, self._sizes[i] + 1)
            if len(data) == self._sizes[i]:
                return data
            with open(handle, "rb", closefd=False) as file:  # grown, or a read cut short
                data += file.read(MOST_ENCODED_BYTES + 1 - len(data))
            if len(data) > MOST_ENCODED_BYTES:
                raise OSError(TOO_LARGE)
            return data
        finally:
            os.close(handle)

    def glimpse(self, i: int) -> Glimpse:
        if self._sizes[i] < HEAD_BYTES:
            data = self.read(i)
            if len(data) <= self._room:
                self._room -= len(data)
                self._kept[i] = data
            return Glimpse(data, data[-TAIL_BYTES:], len(data), lambda: data)
        with open(f"{self._root}/{self.names[i]}", "rb", buffering=0) as file:
            head = file.read(HEAD_BYTES)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - TAIL_BYTES, 0))
            return Glimpse(head, file.readall(), size, lambda: self.read(i))

    def fingerprint(self) -> str:
        return self._fingerprint
