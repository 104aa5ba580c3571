"""`data check`: decode every file of a set once and say what is in it and what cannot be used."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from fastdcgan.console import progress
from fastdcgan.data import NAMES, open_source, room
from fastdcgan.data.header import UNUSABLE, Glimpse, examine
from fastdcgan.data.pillow_decode import UnusableImage, traits
from fastdcgan.data.source import TAIL_BYTES, EncodedSource, why_unreadable
from fastdcgan.errors import UserError
from fastdcgan.files import printable

FILES_AT_ONCE = 32


@dataclass
class CheckReport:
    """What `check` found."""

    files: int = 0  # that claim to be images
    usable: int = 0
    unusable: list[tuple[str, str]] = field(default_factory=list)  # (file, reason), in the source's order
    traits: Counter[str] = field(default_factory=Counter)  # "JPEG", "grey", "rotated": usable files that are so


def check(data: str, *, strict: bool = False) -> CheckReport:
    """Decode every image of a folder or archive; print a table of what is there, then every unusable file and why.

    Args:
        data: path of a folder, .zip, .tar shards or LMDB.
        strict: stop with an error at the first unusable file.

    Raises:
        UserError: `data` has no files to check; or, when strict, something in it is unusable.
    """
    if data in NAMES:
        raise UserError(f"{data} is known to be sound: data check is for folders and archives of your own")
    if data.endswith(".npy"):
        raise UserError(f"{data} is packed, so every image in it could be decoded: check what it was packed from")
    source = open_source(data)
    report = CheckReport(files=len(source) + len(source.unusable), unusable=list(source.unusable))

    def look(start: int) -> list[tuple[str, list[str], str]]:
        numbers = range(start, min(start + FILES_AT_ONCE, len(source)))
        return [(printable(source.names[i]), *_decode(source, i)) for i in numbers]

    with ThreadPoolExecutor(room.cores()) as pool, progress("checking", len(source), "files") as advance:
        try:
            for found in pool.map(look, range(0, len(source), FILES_AT_ONCE)):
                for name, file_traits, reason in found:
                    if reason:
                        report.unusable.append((name, reason))
                    report.usable += not reason
                    report.traits.update(file_traits)
                advance(len(found))
                if strict and report.unusable:
                    raise UserError("{}: {} (--strict stops at the first unusable file)".format(*report.unusable[0]))
        finally:
            pool.shutdown(cancel_futures=True)
    print_report(report)
    return report


def print_report(report: CheckReport) -> None:
    """The table and the list, on standard output."""
    print(f"{report.files:>12,} files")
    print(f"{report.usable:>12,} usable")
    for trait, count in report.traits.most_common():
        print(f"{count:>16,} {trait}")
    print(f"{len(report.unusable):>12,} unusable")
    for name, reason in report.unusable:
        print(f"                 {name}: {reason}")


def _decode(source: EncodedSource, i: int) -> tuple[list[str], str]:
    """(traits, "") of a usable file, ([], reason) of another."""
    try:
        data = source.read(i)
        facts = examine(Glimpse(data, data[-TAIL_BYTES:], len(data), lambda: data))
        return (traits(source.names[i], data), "") if facts.kind != UNUSABLE else ([], facts.reason)
    except UnusableImage as fault:
        return [], str(fault)
    except OSError as error:
        return [], why_unreadable(error)
