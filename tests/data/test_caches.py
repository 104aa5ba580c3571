"""Decoded images kept on disk: used again, rebuilt when their sources change, never half right."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdcgan.data import Dataset, default_cache_dir, room, store
from fastdcgan.data.array_dataset import ArrayDataset
from fastdcgan.data.loader import Loader
from fastdcgan.data.order import Order
from fastdcgan.data.store import DiskStore, is_whole, reserve
from fastdcgan.errors import UserError

Batches = Callable[..., list[torch.Tensor]]
COUNT = 12


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the files that are read for decoding, from here on."""
    found: list[int] = []
    as_ever = Loader.read

    def read(self: Loader, i: int) -> bytes:
        found.append(i)
        return as_ever(self, i)

    monkeypatch.setattr(Loader, "read", read)
    return found


def kept_files() -> list[str]:
    return sorted(path.suffix for path in (default_cache_dir() / "images").glob("*") if path.suffix != ".lock")


@pytest.mark.parametrize("cache", ["host", "disk", "auto"])
def test_every_image_is_decoded_once(
    cache: str,
    loader: str,
    reads: list[int],
    make_folder: Callable[..., Path],
    opened: Callable[..., Dataset],
    batches: Batches,
) -> None:
    data = opened(make_folder(COUNT), loader=loader, cache=cache)
    stream = data.stream(5)
    batches(stream, 12)
    data.take(range(COUNT))
    batches(data.stream(3), 12)
    assert sorted(reads) == list(range(COUNT))


def test_the_next_run_decodes_nothing(
    loader: str, reads: list[int], make_folder: Callable[..., Path], opened: Callable[..., Dataset], batches: Batches
) -> None:
    folder = make_folder(COUNT)
    first = batches(opened(folder, loader=loader, cache="disk").stream(4), 6)
    assert kept_files() == [".json", ".npy"]
    assert sorted(reads) == list(range(COUNT))
    for cache in ("disk", "auto"):
        again = batches(opened(folder, loader=loader, cache=cache).stream(4), 6)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(reads) == COUNT


def test_a_changed_source_is_noticed(
    loader: str,
    make_folder: Callable[..., Path],
    opened: Callable[..., Dataset],
    encoded: Callable[..., bytes],
    batches: Batches,
) -> None:
    folder = make_folder(COUNT)
    batches(opened(folder, loader=loader, cache="disk").stream(4), 3)
    (folder / "good-0004.jpg").write_bytes(encoded(77))
    data = opened(folder, loader=loader, cache="disk")
    batches(data.stream(4), 3)
    fresh = opened(folder, loader=loader, cache="off").take(range(COUNT))
    assert torch.equal(data.take(range(COUNT)), fresh)
    assert kept_files() == [".json", ".npy"]  # in the place of the old one
    (folder / "more.jpg").write_bytes(encoded(78))
    more = opened(folder, loader=loader, cache="disk")
    batches(more.stream(4), 4)
    assert more.count == COUNT + 1
    assert torch.equal(more.take(range(COUNT)), fresh)


def test_other_sizes_channels_and_loaders_are_kept_apart(
    make_folder: Callable[..., Path], opened: Callable[..., Dataset], batches: Batches
) -> None:
    folder = make_folder(COUNT)
    ways = [{}, {"image_size": (8, 8)}, {"channels": 1}, {"loader": "torch"}]
    for number, way in enumerate(ways, start=1):
        batches(opened(folder, cache="disk", **way).stream(4), 3)
        assert kept_files().count(".npy") == number


def test_verdicts_are_remembered(
    make_folder: Callable[..., Path],
    opened: Callable[..., Dataset],
    encoded: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fastdcgan.data import census

    breaks = encoded(1).replace(b"\xff\xdb", b"\xff\xfe")
    folder = make_folder(3, {"bad.jpg": b"", "breaks.jpg": breaks})
    first = opened(folder)
    first.take(range(4))
    monkeypatch.setattr(census, "look_at", lambda source, i: pytest.fail("looked at again"))
    again = opened(folder)
    assert sorted(again.skipped) == sorted(first.skipped)
    assert again.count == 3
    memory = next((default_cache_dir() / "verdicts").glob("*.npz"))
    monkeypatch.undo()
    whole = memory.read_bytes()
    flags = whole.rindex(b"PK\x01\x02") + 8  # of the last member, of which this bit says that it is encrypted
    encrypted = whole[:flags] + bytes([whole[flags] | 1]) + whole[flags + 1 :]
    for damaged in (whole[:100], encrypted):
        memory.write_bytes(damaged)
        assert opened(folder).count >= 3  # a damaged memory is as good as none
    monkeypatch.setattr(census, "FORMAT", census.FORMAT + "1")  # files are judged in another way now
    looks: list[int] = []
    as_ever = census.look_at
    monkeypatch.setattr(census, "look_at", lambda source, i: (looks.append(i), as_ever(source, i))[1])
    opened(folder)
    assert sorted(looks) == list(range(5))


def test_a_file_that_breaks_is_not_taken_for_a_black_picture_next_time(
    make_folder: Callable[..., Path], opened: Callable[..., Dataset], encoded: Callable[..., bytes], batches: Batches
) -> None:
    folder = make_folder(COUNT, {"breaks.jpg": encoded(1).replace(b"\xff\xdb", b"\xff\xfe")})
    batches(opened(folder, cache="disk").stream(4), 6)
    for memory in (default_cache_dir() / "verdicts").glob("*"):
        memory.unlink()
    data = opened(folder, cache="disk")
    assert all((image > 0).any() for found in batches(data.stream(4), 6) for image in found)
    assert [name for name, _ in data.skipped] == ["breaks.jpg"]


def test_a_file_that_breaks_does_not_keep_the_others_from_being_complete(
    loader: str,
    make_folder: Callable[..., Path],
    opened: Callable[..., Dataset],
    encoded: Callable[..., bytes],
    batches: Batches,
) -> None:
    broken = {"empty.jpg": b"", "good-0003-breaks.jpg": encoded(1).replace(b"\xff\xdb", b"\xff\xfe")}
    stream = opened(make_folder(COUNT, broken), loader=loader, cache="disk").stream(4)
    batches(stream, 6)
    assert kept_files() == [".json", ".npy"]
    (note,) = (default_cache_dir() / "images").glob("*.json")
    assert json.loads(note.read_text())["absent"] == [0, 4]


SLOW_RUN = """
import sys, time, torch
from pathlib import Path
from fastdcgan.data import open_dataset
from fastdcgan.data.loader import Loader
as_ever = Loader.read
Loader.read = lambda self, i: (time.sleep(0.02), as_ever(self, i))[1]
stream = open_dataset(sys.argv[1], image_size=(16, 16), device=torch.device("cpu"), cache="disk").stream(4)
while True:
    stream.advance()
    print(stream.images, flush=True)
"""


def test_a_killed_run_leaves_what_it_decoded_to_the_next(
    reads: list[int], make_folder: Callable[..., Path], opened: Callable[..., Dataset], batches: Batches
) -> None:
    count = 300
    folder = make_folder(count)
    run = subprocess.Popen([sys.executable, "-c", SLOW_RUN, str(folder)], stdout=subprocess.PIPE, env=environment())
    assert run.stdout is not None
    while int(run.stdout.readline()) < 80:
        pass
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert kept_files() == [".json", ".npy", ".rows"]
    data = opened(folder, cache="disk")
    found = torch.cat(batches(data.stream(4), count // 4))
    assert len(set(reads)) == len(reads) <= count - 80
    number = {image.numpy().tobytes(): i for i, image in enumerate(opened(folder, cache="off").take(range(count)))}
    assert sorted(number[image.numpy().tobytes()] for image in found) == list(range(count))
    assert kept_files() == [".json", ".npy"]


def test_what_another_boot_left_unfinished_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdcgan.data import store

    shape, path = (5, 4, 4, 1), tmp_path / "set.npy"
    half = DiskStore(path, shape, "print")
    half.write(np.array([1, 2]), torch.ones((2, 4, 4, 1), dtype=torch.uint8))
    assert DiskStore(path, shape, "print").present.tolist() == [False, True, True, False, False]
    monkeypatch.setattr(store, "_boot_id", lambda: "after the power came back")
    assert not DiskStore(path, shape, "print").present.any()


def test_images_are_on_the_disk_before_they_are_called_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, path, done = (2, 4, 4, 1), tmp_path / "set.npy", list[str]()
    kept = DiskStore(path, shape, "print")
    kept.write(np.arange(2), torch.ones(shape, dtype=torch.uint8))
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append("sync"), sync(file))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(Path(b).name), replace(a, b))[1])
    kept.finish()
    assert done == ["sync", "set.json"]


def test_who_began_before_the_sources_changed_does_not_finish_the_new_file(tmp_path: Path) -> None:
    shape, path = (2, 4, 4, 1), tmp_path / "set.npy"
    ones = torch.ones(shape, dtype=torch.uint8)
    before = DiskStore(path, shape, "before")
    after = DiskStore(path, shape, "after")
    before.write(np.arange(2), ones)
    before.finish()
    assert not DiskStore(path, shape, "after").present.any()
    after.write(np.arange(2), 2 * ones)
    after.finish()
    kept = DiskStore(path, shape, "after")
    assert kept.present.all() and torch.equal(kept.array, 2 * ones)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    "damage", ["cut short", "empty", "another shape", "no file", "no note", "note without its list"]
)
def test_a_damaged_file_is_made_anew(damage: str, finished: bool, tmp_path: Path) -> None:
    shape, path = (2, 4, 4, 1), tmp_path / "set.npy"
    store = DiskStore(path, shape, "print")
    store.write(np.arange(2), torch.ones(shape, dtype=torch.uint8))
    if finished:
        store.finish()
    note = path.with_suffix(".json")
    if damage == "another shape":
        np.save(path, np.ones((3, 4, 4, 1), np.uint8))
    elif damage == "no file":
        path.unlink()
    elif damage == "no note":
        note.write_text("")
    elif damage == "note without its list":
        note.write_text('{"fingerprint": "print"}')
    else:
        os.truncate(path, 130 if damage == "cut short" else 0)
    assert not DiskStore(path, shape, "print").present.any()
    assert not DiskStore(path, shape, "print").array.any()


@pytest.mark.parametrize("absent", [[99], ["a"], "a", {"a": 1}, [0.5]])
def test_a_file_whose_note_says_nonsense_is_made_anew(absent: object, tmp_path: Path) -> None:
    shape, path = (2, 4, 4, 1), tmp_path / "set.npy"
    store = DiskStore(path, shape, "print")
    store.write(np.arange(2), torch.ones(shape, dtype=torch.uint8))
    store.finish()
    note = path.with_suffix(".json")
    note.write_text(json.dumps(json.loads(note.read_text()) | {"absent": absent}))
    assert not DiskStore(path, shape, "print").present.any()
    assert not is_whole(path, "print")


def test_without_its_rows_an_unfinished_file_is_made_anew(tmp_path: Path) -> None:
    shape, path = (2, 4, 4, 1), tmp_path / "set.npy"
    DiskStore(path, shape, "print").write(np.arange(2), torch.ones(shape, dtype=torch.uint8))
    path.with_suffix(".rows").unlink()
    store = DiskStore(path, shape, "print")
    assert not store.present.any() and not store.array.any()


def test_a_damaged_header_is_noticed_in_each_of_its_bytes(tmp_path: Path) -> None:
    shape, path = (2, 4, 4, 1), tmp_path / "set.npy"
    for byte in range(128):
        store = DiskStore(path, shape, "print")
        store.write(np.arange(2), torch.ones(shape, dtype=torch.uint8))
        content = bytearray(path.read_bytes())
        content[byte] ^= 0x15
        path.write_bytes(content)
        assert not DiskStore(path, shape, "print").present.any(), byte


def test_what_was_absent_stays_so_for_who_finds_it_later(tmp_path: Path) -> None:
    """A finished file is not written any more: what its reader decodes beside it, it alone has."""
    shape, path = (4, 2, 2, 1), tmp_path / "set.npy"
    first = DiskStore(path, shape, "print")
    first.write(np.arange(3), torch.ones((3, 2, 2, 1), dtype=torch.uint8))
    first.finish()
    second = DiskStore(path, shape, "print")
    second.write(np.array([3]), torch.ones((1, 2, 2, 1), dtype=torch.uint8))
    second.finish()
    assert DiskStore(path, shape, "print").present.tolist() == [True, True, True, False]


def test_a_full_disk_at_the_end_costs_the_kept_images_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, path = (2, 4, 4, 1), tmp_path / "set.npy"
    kept = DiskStore(path, shape, "print")
    kept.write(np.arange(2), torch.ones(shape, dtype=torch.uint8))

    def full(self: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        kept.finish()
    assert not is_whole(path, "print") and kept.present.all()
    kept.finish()
    assert is_whole(path, "print")


def test_auto_waits_for_no_file_that_another_run_is_filling(
    make_folder: Callable[..., Path], opened: Callable[..., Dataset], batches: Batches
) -> None:
    folder = make_folder(COUNT)
    other = opened(folder, cache="disk").stream(4)
    assert ".rows" in kept_files()
    data = opened(folder)
    batches(data.stream(4), 1)
    assert not isinstance(data._store, DiskStore)  # type: ignore[attr-defined]
    batches(other, COUNT // 4 + 1)
    assert ".rows" not in kept_files()
    data = opened(folder)
    batches(data.stream(4), 1)
    assert isinstance(data._store, DiskStore)  # type: ignore[attr-defined]


LIMITED = """
import resource, sys, torch
from pathlib import Path
from fastdcgan.data import open_dataset
from fastdcgan.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
data = open_dataset(sys.argv[1], image_size=(64, 64), device=torch.device("cpu"), cache="disk")
try:
    data.stream(4)
except UserError as error:
    print(error)
"""


def test_no_room_on_the_disk_is_said_before_anything_is_written(make_folder: Callable[..., Path]) -> None:
    pytest.importorskip("resource")
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, str(make_folder(COUNT))],
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
    )
    assert "cannot keep 0 MB of decoded images" in run.stdout
    assert "choose another --cache-dir, or --cache off" in run.stdout
    assert kept_files() == [".json"]


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="space is claimed by writing there")
def test_space_on_the_disk_is_claimed(tmp_path: Path) -> None:
    """A file that is only said to be so long would end the process, not with an error, where the disk is full."""
    with open(tmp_path / "file", "wb") as file:
        reserve(file, 1 << 20)
    status = (tmp_path / "file").stat()
    assert status.st_size == 1 << 20 and status.st_blocks * 512 >= 1 << 20


def test_auto_takes_the_first_place_with_room(
    make_folder: Callable[..., Path],
    opened: Callable[..., Dataset],
    monkeypatch: pytest.MonkeyPatch,
    batches: Batches,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = make_folder(COUNT)
    size = COUNT * 16 * 16 * 3
    monkeypatch.setattr(room, "free_host_bytes", lambda: size)  # but only half of it may be used
    monkeypatch.setattr(room, "free_disk_bytes", lambda folder: size)
    stream = opened(folder).stream(4)
    assert len(stream.source) == 4  # decoded anew each time
    assert "decoding every epoch anew" in capsys.readouterr().err
    monkeypatch.setattr(room, "free_disk_bytes", lambda folder: 2 * size)
    batches(opened(folder).stream(4), 3)
    assert "too much for the memory" in capsys.readouterr().err
    assert kept_files() == [".json", ".npy"]
    monkeypatch.setattr(room, "free_host_bytes", lambda: size - 1)
    with pytest.raises(UserError, match="the decoded images need 0 MB, more than"):
        opened(folder, cache="host").stream(4)


@pytest.mark.parametrize(("first_in_colour", "channels", "asked"), [(True, None, 1), (False, None, 2), (False, 3, 1)])
def test_memory_is_asked_for_before_the_files_are_looked_at(
    first_in_colour: bool,
    channels: int | None,
    asked: int,
    make_folder: Callable[..., Path],
    opened: Callable[..., Dataset],
    encoded: Callable[..., bytes],
    batches: Batches,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fastdcgan.data import file_dataset

    order: list[str] = []

    def note(name: str) -> None:
        as_ever = getattr(file_dataset, name)

        def noted(*arguments: object) -> object:
            order.append(name)
            return as_ever(*arguments)

        monkeypatch.setattr(file_dataset, name, noted)

    note("prefaulted")
    note("take_census")
    first = encoded(1) if first_in_colour else encoded(1, mode="L")
    folder = make_folder(COUNT, {"a-first.jpg": first})
    data = opened(folder, channels=channels)
    found = batches(data.stream(4), 6)
    assert order == ["prefaulted", "take_census", "prefaulted"][: asked + 1]  # again where the first image misled
    assert data.channels == 3
    fresh = batches(opened(folder, channels=channels, cache="off").stream(4), 6)
    assert all(torch.equal(a, b) for a, b in zip(found, fresh, strict=True))


def test_auto_decodes_anew_where_the_disk_refuses(
    make_folder: Callable[..., Path], opened: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastdcgan.data import file_dataset

    def refuse(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room, "free_host_bytes", lambda: 0)
    monkeypatch.setattr(file_dataset, "DiskStore", refuse)
    assert len(opened(make_folder(COUNT)).stream(4).source) == 4


def test_auto_goes_on_without_kept_images_that_it_cannot_use(
    make_folder: Callable[..., Path], opened: Callable[..., Dataset], batches: Batches
) -> None:
    """As those of somebody else, in a folder that may only be read."""
    folder = make_folder(COUNT)
    first = batches(opened(folder, cache="disk").stream(4), 6)
    (kept,) = (default_cache_dir() / "images").glob("*.lock")
    kept.unlink()
    kept.mkdir()  # not chmod: tests may run as root
    again = batches(opened(folder).stream(4), 6)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_cache_folder_that_cannot_be_written_does_not_stop_a_run(
    make_folder: Callable[..., Path], opened: Callable[..., Dataset], tmp_path: Path, batches: Batches
) -> None:
    (tmp_path / "file").write_text("not a folder")
    data = opened(make_folder(COUNT), cache_dir=tmp_path / "file" / "cache")
    batches(data.stream(4), 3)
    with pytest.raises(UserError, match="choose another --cache-dir"):
        opened(tmp_path / "pictures", cache="disk", cache_dir=tmp_path / "file" / "cache").stream(4)


def test_free_memory_is_a_sensible_number() -> None:
    assert 1 << 20 < room.free_host_bytes() < 1 << 50
    assert 0 < room.free_disk_bytes(Path("/nowhere/at/all")) < 1 << 60
    assert 1 <= room.cores() <= (os.cpu_count() or 1)


def test_sizes_are_said_in_powers_of_ten() -> None:
    sizes = {0: "0 MB", 4_194_304: "4 MB", 52_428_800: "52 MB", 999_400_000: "999 MB", 10**9: "1.0 GB"}
    assert {size: room.in_words(size) for size in (*sizes, 2_560_000_000)} == sizes | {2_560_000_000: "2.6 GB"}


def test_who_has_no_home_has_a_cache_all_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a container that runs as a user of whom its system knows nothing."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_dir() == tmp_path / "home" / ".cache" / "fastdcgan"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert default_cache_dir() == tmp_path / "fastdcgan-12345"


GIB = 1 << 30


V1_LIMIT, V1_USED, V1_STAT = (f"memory/memory.{name}" for name in ("limit_in_bytes", "usage_in_bytes", "stat"))
NOTHING_CACHED = "anon 5\nfile 9\nactive_file 0\ninactive_file 0\ntotal_active_file 0\ntotal_inactive_file 0"
HALF_CACHED = f"anon 5\nfile 9\nactive_file {GIB}\ninactive_file {GIB}"
HALF_CACHED_V1 = f"active_file 0\ninactive_file 0\ntotal_active_file {GIB}\ntotal_inactive_file {GIB}"
LIMIT, USED, STAT = "memory.max", "memory.current", "memory.stat"


@pytest.mark.parametrize(
    ("container", "free"),
    [
        pytest.param({}, 8 * GIB, id="none"),
        pytest.param({LIMIT: "max"}, 8 * GIB, id="without a limit"),
        pytest.param({LIMIT: 5 * GIB, USED: GIB, STAT: NOTHING_CACHED}, 4 * GIB, id="with a limit"),
        # Half of what counts as used are files that were read, which give way.
        pytest.param({LIMIT: 5 * GIB, USED: 4 * GIB, STAT: HALF_CACHED}, 3 * GIB, id="full of cached files"),
        pytest.param({V1_LIMIT: 5 * GIB, V1_USED: 4 * GIB, V1_STAT: HALF_CACHED_V1}, 3 * GIB, id="version 1"),
        pytest.param(
            {V1_LIMIT: 2**63 - 4096, V1_USED: GIB, V1_STAT: NOTHING_CACHED}, 8 * GIB, id="version 1 without a limit"
        ),
        pytest.param({LIMIT: GIB, USED: 2 * GIB, STAT: NOTHING_CACHED}, 0, id="above the limit"),
        pytest.param({LIMIT: 5 * GIB, USED: GIB, STAT: "anon 5"}, 4 * GIB, id="with other entries"),
        pytest.param({LIMIT: 5 * GIB, USED: GIB}, 4 * GIB, id="with no entries"),
        pytest.param({LIMIT: "", USED: ""}, 8 * GIB, id="empty files"),
    ],
)
def test_memory_is_what_the_container_leaves_and_shared_by_the_ranks(
    container: dict[str, int | str], free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory").mkdir()
    for name, text in container.items():
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(room, "CGROUPS", tmp_path)
    meminfo, read_text = f"MemTotal: {16 << 20} kB\nMemAvailable: {8 << 20} kB\n", Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path: meminfo if str(path) == "/proc/meminfo" else read_text(path))
    assert room.free_host_bytes() == free
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert room.free_host_bytes() == free // 4


@pytest.mark.parametrize(
    ("says", "cores"),
    [
        ({}, 12),
        ({"cpu.max": "max 100000"}, 12),
        ({"cpu.max": "400000 100000"}, 4),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "5000 100000"}, 1),
        ({"cpu.max": "6400000 100000"}, 12),
        ({"cpu.max": "0 100000"}, 12),
        ({"cpu.max": "100000 0"}, 12),
        ({"cpu.max": ""}, 12),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 12),
        ({"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, 3),
    ],
)
def test_cores_are_those_of_the_container(
    says: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastdcgan.cores.CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    for name, text in says.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert room.cores() == cores


def test_cores_are_shared_by_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "allowed_cores", lambda: 12)
    shares = []
    for ranks in (1, 4, 20):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        shares.append(room.cores())
    assert shares == [12, 3, 1]


def environment() -> dict[str, str]:
    """For a Python process that imports the package from where this one does."""
    import fastdcgan

    assert fastdcgan.__file__ is not None
    return os.environ | {"PYTHONPATH": str(Path(fastdcgan.__file__).parent.parent)}


def test_what_one_rank_has_decoded_another_does_not(
    loader: str, reads: list[int], make_folder: Callable[..., Path], opened: Callable[..., Dataset], batches: Batches
) -> None:
    count = 3_200  # a rank's half is more than it decodes ahead
    folder = make_folder(count)
    first, second = (
        opened(folder, loader=loader, cache="disk", rank=rank, world_size=2).stream(50) for rank in range(2)
    )
    batches(second, 1)
    batches(first, count // 100)  # its half of the first epoch
    half = set(Order(count, 0, 0, 2).slice(0, count // 2).tolist())
    first.close()
    reads.clear()
    batches(second, count // 100 - 1)
    second.close()
    assert not set(reads) & half


RANK = """
import sys, torch
from pathlib import Path
from fastdcgan.data import open_dataset
folder, rank, batches = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
data = open_dataset(folder, image_size=(16, 16), device=torch.device("cpu"), cache="disk", rank=rank, world_size=2)
stream = data.stream(6)
for _ in range(batches):
    stream.advance()
    print(*stream.index.tolist())  # the whole set is the source, so these are the numbers of the files
"""


def test_two_processes_fill_one_file(make_folder: Callable[..., Path], opened: Callable[..., Dataset]) -> None:
    count = 300
    folder = make_folder(count)
    epoch = count // 12  # batches
    command = [sys.executable, "-c", RANK, str(folder)]
    runs = [
        subprocess.Popen([*command, str(rank), str(3 * epoch)], stdout=subprocess.PIPE, text=True, env=environment())
        for rank in range(2)
    ]
    lines = [run.communicate()[0].splitlines() for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    for start in range(0, 3 * epoch, epoch):
        seen = [int(word) for rank in lines for line in rank[start : start + epoch] for word in line.split()]
        assert sorted(seen) == list(range(count))
    assert kept_files() == [".json", ".npy"]
    kept = opened(folder, cache="disk").stream(6).source
    assert torch.equal(kept, opened(folder, cache="off").take(range(count)))


def test_two_streams_fill_one_file(make_folder: Callable[..., Path], opened: Callable[..., Dataset]) -> None:
    folder = make_folder(COUNT)
    shares = [opened(folder, cache="disk", rank=rank, world_size=2).stream(3) for rank in range(2)]
    deadline = time.monotonic() + 60
    while ".rows" in kept_files() and time.monotonic() < deadline:
        for stream in shares:
            stream.advance()
    whole = opened(folder, cache="off").take(range(COUNT))
    assert torch.equal(opened(folder, cache="disk").take(range(COUNT)), whole)
    for stream in shares:
        stream.advance()
        assert torch.equal(stream.source[stream.index], whole[stream.index])


def test_what_a_reader_of_a_finished_file_adds_does_not_change_the_file(tmp_path: Path) -> None:
    """Nor has it to be writable: it may be somebody else's."""
    shape, path = (2, 2, 2, 1), tmp_path / "set.npy"
    DiskStore(path, shape, "print").finish()
    before = path.read_bytes()
    reader = DiskStore(path, shape, "print")
    reader.write(np.array([1]), torch.ones((1, 2, 2, 1), dtype=torch.uint8))
    assert reader.read(np.array([1])).all() and path.read_bytes() == before


def test_a_note_that_is_no_object_is_none(tmp_path: Path) -> None:
    shape, path = (2, 4, 4, 1), tmp_path / "set.npy"
    for text in ("[]", "5", "null", '"print"'):
        path.with_suffix(".json").write_text(text)
        assert not is_whole(path, "print")
        assert not DiskStore(path, shape, "print").present.any()


def test_one_at_a_time_opens_and_finishes_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or one would take away what the other has just made."""
    fcntl = pytest.importorskip("fcntl")
    path, done = tmp_path / "set.npy", list[str]()
    kept = DiskStore(path, (2, 4, 4, 1), "print")
    for work in (lambda: DiskStore(path, (2, 4, 4, 1), "print"), kept.finish):
        with open(path.with_suffix(".lock"), "w") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            thread = threading.Thread(target=lambda work=work: (work(), done.append("done")))
            thread.start()
            thread.join(0.2)
            assert not done
        thread.join(10)
        assert done.pop() == "done"


def test_a_torn_note_is_none(tmp_path: Path) -> None:
    path = tmp_path / "set.npy"
    kept = DiskStore(path, (2, 4, 4, 1), "print")
    path.with_suffix(".json").write_bytes(b'{"finger\xff')
    assert not is_whole(path, "print")
    kept.finish()


def test_without_a_name_of_this_boot_a_process_trusts_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS."""

    def none(path: Path) -> str:
        raise FileNotFoundError(2, "No such file", str(path))

    monkeypatch.setattr(Path, "read_text", none)
    first = store._boot_id()
    monkeypatch.setattr(os, "getpid", lambda: 12345)
    assert store._boot_id() != first


def test_what_earlier_runs_have_left_to_pytorch_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch keeps the memory of tensors that are gone, which the driver counts as used."""
    free = [1 << 30]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.append(3 << 30))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[-1], 4 << 30))
    assert room.free_device_bytes(torch.device("cuda")) == 3 << 30


def test_a_packed_set_larger_than_the_gpu_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_device_bytes", lambda device: 8 * 4 * 4 * 3 - 1)
    data = ArrayDataset(
        "set", np.zeros((8, 4, 4, 3), np.uint8), "", device=torch.device("cuda"), seed=0, flip=False, cache="device"
    )
    with pytest.raises(UserError, match=r"the images need .* free on the GPU: use --cache auto or --cache host"):
        data.stream(2)
