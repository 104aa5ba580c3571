"""Names of files, and writing files."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from fastdcgan.errors import UserError

LONGEST = 255  # bytes of a file's name


def short(name: str) -> str:
    """A name that leaves room for more in the name of a file, which has 255 bytes."""
    return name.encode(errors="ignore")[:100].decode(errors="ignore")


def printable(name: str | Path) -> str:
    """A file name that any terminal and any line of text can show: undecodable bytes become \\xNN, a line's end \\n."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def expand_braces(pattern: str) -> Iterator[str]:
    """'a-{08..10}.tar' -> 'a-08.tar', 'a-09.tar', 'a-10.tar'; '{x,y}.tar' -> 'x.tar', 'y.tar'."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    choices: Iterable[str]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if numbers:
        first, last = numbers[1], numbers[2]
        choices = (f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1))
    else:
        choices = match[1].split(",")
    for choice in choices:
        yield from expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])


def make_writable(folder: Path, asked: str) -> None:
    """Make a folder where there is none yet; `asked` is what the user asked to be written there.

    Raises:
        UserError: it cannot be made, or no file in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"{asked} cannot be written: {error.strerror or error}") from None


def check_out(
    out: Path, suffixes: tuple[str, ...] = (), reads: Sequence[Path] = (), beside: Sequence[Path] = ()
) -> None:
    """See before the work begins that it can be saved: `out` is a folder, or a file with one of the suffixes.

    Args:
        reads: pictures that are read, and not to be replaced.
        beside: files that are written too.

    Raises:
        UserError: a wrong suffix, or something in the way.
    """
    check_name(out, suffixes, reads, beside)
    make_writable(target(out).parent if suffixes else out, f"--out {out}")


def check_name(
    out: Path, suffixes: tuple[str, ...] = (), reads: Sequence[Path] = (), beside: Sequence[Path] = ()
) -> None:
    """As `check_out`, as far as can be seen without making a folder.

    Raises:
        UserError: a wrong suffix, or something in the way.
    """
    if suffixes and out.suffix.lower() not in suffixes:
        raise UserError(f"--out {out} is not possible: end it in {' or '.join(suffixes)}")
    kept = {os.path.realpath(path) for path in reads}
    for path in (out, *beside):
        which = f"--out {out}" if path == out else f"{path}, which goes with --out {out},"
        if path.exists() and not (path.is_file() if suffixes else path.is_dir()):
            what = "folder" if path.is_dir() else "file" if path.is_file() else "device or a pipe"
            raise UserError(f"{which} is a {what} already: choose another name")
        if os.path.realpath(path) in kept:
            raise UserError(f"{which} would replace a picture that is read: choose another name")


def lock(file: IO[Any], *, wait: bool) -> None:
    """Keep other processes from locking the file until it is closed.

    Does nothing where there are no such locks: on Windows, and on file systems such as Lustre as it is often mounted.

    Raises:
        BlockingIOError: another process has locked it, and this one does not wait.
    """
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise


def target(path: Path) -> Path:
    """Where a link points; any other path as it is."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def unfinished_name(path: Path) -> Path:
    """Where what is to appear at `path` whole is written first, by a name that is possible wherever that one's is."""
    name = path.name
    if len(os.fsencode(name)) > LONGEST - len("..unfinished"):
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return path.with_name(f".{name}.unfinished")


def replace_file(path: Path, content: bytes) -> None:
    """Write a small file whole or not at all.

    Raises:
        OSError: it could not be written, or is something else than a file; what was there before still is.
    """
    if path.name in ("", "..") or path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "it is a device or a pipe, not a file", str(path))
    unfinished = unfinished_name(path)
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    except BaseException:  # Ctrl-C too
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise
