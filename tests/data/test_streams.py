"""Batches: the same order whatever the loader and the cache, exact continuation, disjoint shares for the ranks."""

from __future__ import annotations

import gc
import json
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from fastdcgan.data import Dataset, streams
from fastdcgan.data.array_dataset import ArrayDataset
from fastdcgan.data.loader import Request
from fastdcgan.data.order import Position, permutation, random_places
from fastdcgan.data.pillow_decode import decode
from fastdcgan.errors import UserError

Batches = Callable[..., list[torch.Tensor]]
CACHES = ["auto", "device", "host", "disk", "off"]
COUNT, BATCH = 23, 4  # batches straddle epochs


@pytest.fixture
def folder(make_folder: Callable[..., Path], encoded: Callable[..., bytes]) -> Path:
    """Small and large files, odd ones, and two that break while they are decoded."""
    extra = {
        "odd.png": encoded(30, "PNG", mode="LA"),
        "large.jpg": encoded(31, size=(300, 200)),
        "breaks.jpg": encoded(32).replace(b"\xff\xdb", b"\xff\xfe"),
        "large-breaks.jpg": encoded(33, size=(300, 200)).replace(b"\xff\xdb", b"\xff\xfe"),
        "empty.jpg": b"",
    }
    return make_folder(COUNT - 2, extra)


def test_one_order_for_every_loader_and_cache(folder: Path, opened: Callable[..., Dataset], batches: Batches) -> None:
    found = {}
    for loader in ("dali", "torch"):
        for cache in [*CACHES, "disk"]:  # the second "disk" reads what the first has left
            data = opened(folder, loader=loader, cache=cache, seed=5)
            stream = data.stream(BATCH)
            found[loader, cache] = torch.cat(batches(stream, 15))
            assert sorted(name for name, _ in data.skipped) == ["breaks.jpg", "empty.jpg", "large-breaks.jpg"]
            stream.close()
    first = found["dali", "auto"].int()
    for key, images in found.items():
        assert (images.int() - first).abs().max() <= 1, key
    other_seed = torch.cat(batches(opened(folder, seed=6).stream(BATCH), 15))
    assert not torch.equal(other_seed, found["dali", "auto"])


@pytest.mark.parametrize("cache", CACHES)
def test_continuing_gives_exactly_the_next_batch(
    cache: str, loader: str, folder: Path, opened: Callable[..., Dataset], batches: Batches
) -> None:
    for before in (1, 7, 12):  # in the first epoch, in the second, in the third
        stream = opened(folder, loader=loader, cache=cache).stream(BATCH)
        batches(stream, before)
        state = json.loads(json.dumps(stream.state()))
        assert stream.images == before * BATCH
        wanted = batches(stream, 9)
        stream.close()
        again = opened(folder, loader=loader, cache=cache).stream(BATCH, state)
        assert again.images == before * BATCH
        assert all(torch.equal(a, b) for a, b in zip(wanted, batches(again, 9), strict=True))
        again.close()


def test_a_run_continues_with_another_batch_size(
    folder: Path, opened: Callable[..., Dataset], batches: Batches
) -> None:
    stream = opened(folder).stream(BATCH)
    batches(stream, 3)
    rest = torch.cat(batches(opened(folder).stream(2 * BATCH, stream.state()), 4))
    assert torch.equal(rest, torch.cat(batches(stream, 8)))


def test_a_file_that_is_repaired_meanwhile_stays_left_out(
    loader: str, folder: Path, opened: Callable[..., Dataset], batches: Batches, encoded: Callable[..., bytes]
) -> None:
    stream = opened(folder, loader=loader).stream(BATCH)
    batches(stream, 8)
    state = stream.state()
    (folder / "breaks.jpg").write_bytes(encoded(32))
    data = opened(folder, loader=loader)
    again = batches(data.stream(BATCH, state), 8)
    assert all(torch.equal(a, b) for a, b in zip(batches(stream, 8), again, strict=True))
    assert ("breaks.jpg", "left out since the run began") in data.skipped
    assert "breaks.jpg" not in dict(opened(folder, loader=loader).skipped)  # a new run uses it


def test_source_and_index_never_move(loader: str, folder: Path, opened: Callable[..., Dataset]) -> None:
    for cache in CACHES:
        stream = opened(folder, loader=loader, cache=cache).stream(BATCH)
        places = (stream.source.data_ptr(), stream.index.data_ptr())
        for _ in range(15):
            stream.advance()
            assert (stream.source.data_ptr(), stream.index.data_ptr()) == places
            assert stream.source.dtype == torch.uint8
            assert stream.index.dtype == torch.int64
            assert stream.index.shape == (BATCH,)
        stream.close()
        stream.close()


KINDS = ["array", "packed", "host", "disk", "off"]


@pytest.fixture
def share_of(
    make_folder: Callable[..., Path], opened: Callable[..., Dataset], tmp_path: Path
) -> Callable[..., Dataset]:
    """share_of("disk", 24, rank=1, world_size=2): that many images of one kind of set, for one rank of several."""

    def open_it(kind: str, count: int, **options: Any) -> Dataset:
        folder = tmp_path / "pictures"
        if not folder.exists():
            make_folder(count)
        if kind in ("array", "packed"):
            array = opened(folder, cache="off").take(range(count)).numpy()
            if kind == "array":
                return ArrayDataset("mine", array, "mine", device=torch.device("cpu"), seed=0, flip=False, **options)
            np.save(tmp_path / "packed.npy", array)
            return opened(tmp_path / "packed.npy", **options)
        return opened(folder, cache=kind, **options)

    return open_it


def numbers_in(data: Dataset) -> Callable[[torch.Tensor], list[int]]:
    """From a batch to the numbers of its images."""
    number = {image.numpy().tobytes(): i for i, image in enumerate(data.take(range(data.count)))}
    assert len(number) == data.count
    return lambda found: [number[image.numpy().tobytes()] for image in found]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_see_disjoint_shares_that_cover_the_set(
    world_size: int, kind: str, share_of: Callable[..., Dataset], batches: Batches
) -> None:
    count, batch = 24, 4
    alone = share_of(kind, count)
    numbers = numbers_in(alone)
    shares = []
    for rank in range(world_size):
        stream = share_of(kind, count, rank=rank, world_size=world_size).stream(batch)
        shares.append([numbers(found) for found in batches(stream, 4 * 6)])
        assert stream.images == 4 * 6 * batch * world_size
        stream.close()
    per_epoch = count // (batch * world_size)
    for epoch in range(2):
        seen = [i for share in shares for found in share[epoch * per_epoch : (epoch + 1) * per_epoch] for i in found]
        assert sorted(seen) == list(range(count))
    together = alone.stream(batch * world_size)
    for k, found in enumerate(batches(together, 6)):
        assert sorted(numbers(found)) == sorted(i for share in shares for i in share[k])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("saved_by", [0, 1])
def test_another_number_of_ranks_goes_on_at_the_same_place(
    saved_by: int, kind: str, share_of: Callable[..., Dataset], batches: Batches
) -> None:
    count, batch = 25, 5  # ten images by two ranks, then fifteen by three: one epoch
    numbers, seen, states = numbers_in(share_of(kind, count)), [], []
    for rank in range(2):
        stream = share_of(kind, count, rank=rank, world_size=2).stream(batch)
        seen += numbers(batches(stream, 1)[0])
        states.append(json.loads(json.dumps(stream.state())))
        stream.close()
    for rank in range(3):
        stream = share_of(kind, count, rank=rank, world_size=3).stream(batch, states[saved_by])
        seen += numbers(batches(stream, 1)[0])
        assert stream.images == count
        stream.close()
    assert sorted(seen) == list(range(count))


@pytest.mark.parametrize("cache", ["disk", "off"])
def test_each_rank_continues_with_exactly_its_next_batch(
    cache: str, folder: Path, opened: Callable[..., Dataset], batches: Batches
) -> None:
    """Also where the broken files that it met have put it apart from the others."""
    taken = set()
    for rank in range(3):
        options = {"cache": cache, "rank": rank, "world_size": 3}
        stream = opened(folder, **options).stream(BATCH)
        batches(stream, 7)
        state = json.loads(json.dumps(stream.state()))
        taken.add(state["taken"])
        again = opened(folder, **options).stream(BATCH, state)
        assert all(torch.equal(a, b) for a, b in zip(batches(stream, 5), batches(again, 5), strict=True))
        stream.close()
        again.close()
    assert len(taken) > 1


def test_every_image_comes_once_an_epoch(
    loader: str, make_folder: Callable[..., Path], opened: Callable[..., Dataset], batches: Batches
) -> None:
    for cache in ("host", "off"):
        data = opened(make_folder(COUNT, name=cache), loader=loader, cache=cache)
        number = {image.numpy().tobytes(): i for i, image in enumerate(data.take(range(COUNT)))}
        stream = data.stream(BATCH)
        seen = [number[image.numpy().tobytes()] for image in torch.cat(batches(stream, 3 * COUNT))]
        stream.close()
        epochs = [seen[k : k + COUNT] for k in range(0, len(seen), COUNT)]
        assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_taking_an_image_that_breaks_gives_one_of_its_class(
    loader: str, make_folder: Callable[..., Path], opened: Callable[..., Dataset], encoded: Callable[..., bytes]
) -> None:
    broken = encoded(9).replace(b"\xff\xdb", b"\xff\xfe")
    files = {f"{name}/{k}.jpg": encoded(10 * (name == "b") + k) for name in "ab" for k in range(3)}
    data = opened(make_folder(0, files | {"a/2.jpg": broken}), loader=loader)
    taken = data.take([2, 0, 5])
    assert torch.equal(taken[0], taken[1])
    assert not torch.equal(taken[0], taken[2])
    assert data.skipped[0][0] == "a/2.jpg"
    assert len(data.skipped) == 1


OBLONG = {"0.jpg": (90, 16), "1.jpg": (16, 50), "2.png": (90, 20), "3.jpg": (400, 100), "4.jpg": (300, 300)}


@pytest.fixture
def oblong(make_folder: Callable[..., Path], encoded: Callable[..., bytes]) -> Path:
    """For the fast decoder, for Pillow, for scaled decoding; a square, which has only one place; and a broken file."""
    files = {}
    for number, (name, size) in enumerate(OBLONG.items()):
        odd = name.endswith(".png")
        files[name] = encoded(number, "PNG" if odd else "JPEG", size=size, mode="LA" if odd else "RGB")
    return make_folder(0, files | {"breaks.jpg": encoded(9).replace(b"\xff\xdb", b"\xff\xfe")})


def test_random_crops_are_new_every_epoch(
    loader: str, oblong: Path, opened: Callable[..., Dataset], batches: Batches
) -> None:
    epochs, names = 4, sorted(os.listdir(oblong))
    data = opened(oblong, loader=loader, crop="random", channels=3, seed=3)
    in_order = iter(torch.cat(batches(data.stream(5), epochs)))
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in OBLONG}
    for epoch in range(epochs):
        places = random_places(len(names), 3, epoch)
        for i in permutation(len(names), 3, epoch).tolist():
            if names[i] != "breaks.jpg":
                picture = next(in_order)
                seen[names[i]].append(picture)
                expected = decode((oblong / names[i]).read_bytes(), (16, 16), 3, tuple(places[i].tolist()))
                assert abs(picture.numpy().astype(int) - expected).max() <= 2, (names[i], epoch)
    distinct = {name: len({picture.numpy().tobytes() for picture in pictures}) for name, pictures in seen.items()}
    assert distinct == {name: 1 if name == "4.jpg" else epochs for name in OBLONG}
    first = data.take([names.index(name) for name in OBLONG])
    assert torch.equal(first, torch.stack([pictures[0] for pictures in seen.values()]))
    other_seed = opened(oblong, loader=loader, crop="random", channels=3, seed=4).take([names.index("0.jpg")])
    assert not torch.equal(other_seed[0], first[0])


def test_random_crops_continue_exactly(
    loader: str, oblong: Path, opened: Callable[..., Dataset], batches: Batches
) -> None:
    stream = opened(oblong, loader=loader, crop="random").stream(2)
    for _ in range(4):  # in the first epoch, in the second, between them, and once more after going on
        batches(stream, 1)
        again = opened(oblong, loader=loader, crop="random").stream(2, json.loads(json.dumps(stream.state())))
        wanted = batches(stream, 7)
        assert all(torch.equal(a, b) for a, b in zip(wanted, batches(again, 7), strict=True))
        stream.close()
        again.close()
        stream = opened(oblong, loader=loader, crop="random").stream(2, again.state())
    stream.close()


def test_random_crops_are_the_same_for_any_number_of_ranks(
    make_folder: Callable[..., Path], encoded: Callable[..., bytes], opened: Callable[..., Dataset], batches: Batches
) -> None:
    folder = make_folder(0, {f"{k}.jpg": encoded(k, size=(90, 16)) for k in range(8)})
    alone = torch.cat(batches(opened(folder, crop="random").stream(4), 6))
    shares = [
        torch.cat(batches(opened(folder, crop="random", rank=rank, world_size=2).stream(4), 3)) for rank in range(2)
    ]
    assert torch.equal(torch.stack(shares, dim=1).flatten(0, 1), alone)


def test_random_crops_are_never_kept(oblong: Path, opened: Callable[..., Dataset], tmp_path: Path) -> None:
    stream = opened(oblong, crop="random").stream(2)  # --cache auto
    assert len(stream.source) == 2
    stream.close()
    for cache in ("device", "host", "disk"):
        with pytest.raises(UserError, match=f"--cache {cache} cannot keep"):
            opened(oblong, crop="random", cache=cache)
    np.save(tmp_path / "packed.npy", np.zeros((5, 16, 16, 3), np.uint8))
    with pytest.raises(UserError, match="cropped already: leave --crop random out"):
        opened(tmp_path / "packed.npy", crop="random")


def test_sizes_that_are_not_square(
    loader: str, make_folder: Callable[..., Path], opened: Callable[..., Dataset]
) -> None:
    data = opened(make_folder(3), loader=loader, image_size=(16, 24))
    assert data.take(range(3)).shape == (3, 16, 24, 3)
    assert data.image_size == (16, 24)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("cache", CACHES)
def test_the_gpu_gets_the_pictures_of_the_cpu(
    cache: str, loader: str, folder: Path, opened: Callable[..., Dataset], batches: Batches
) -> None:
    on_cpu = opened(folder, loader=loader).stream(BATCH)
    on_gpu = opened(folder, loader=loader, cache=cache, device=torch.device("cuda")).stream(BATCH)
    places = (on_gpu.source.data_ptr(), on_gpu.index.data_ptr())
    for expected, found in zip(batches(on_cpu, 20), batches(on_gpu, 20), strict=True):
        assert found.is_cuda
        assert torch.equal(expected, found.cpu())
    assert (on_gpu.source.data_ptr(), on_gpu.index.data_ptr()) == places
    assert on_gpu.state() == on_cpu.state()
    on_gpu.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("cache", ["device", "off"])
def test_large_files_are_decoded_by_the_gpu(
    cache: str,
    make_folder: Callable[..., Path],
    opened: Callable[..., Dataset],
    encoded: Callable[..., bytes],
    batches: Batches,
) -> None:
    pytest.importorskip("nvidia.dali")
    files = {f"{k}.jpg": encoded(k, size=(800, 600), quality=100, subsampling=0) for k in range(12)}
    folder = make_folder(1, files | {"breaks.jpg": files["3.jpg"].replace(b"\xff\xdb", b"\xff\xfe")})
    on_gpu = opened(folder, loader="dali", cache=cache, device=torch.device("cuda"))
    assert on_gpu.loader().device.type == "cuda"  # type: ignore[attr-defined]
    stream = on_gpu.stream(BATCH)
    found = batches(stream, 7)
    stream.close()
    assert [name for name, _ in on_gpu.skipped] == ["breaks.jpg"]
    for expected, images in zip(batches(opened(folder).stream(BATCH), 7), found, strict=True):
        assert (expected.int() - images.cpu().int()).abs().float().mean() < 6  # full against scaled decoding


@pytest.mark.skipif(torch.cuda.is_available(), reason="DALI finds the GPU")
def test_where_dali_cannot_use_the_gpu_the_cpu_decodes(
    make_folder: Callable[..., Path],
    opened: Callable[..., Dataset],
    encoded: Callable[..., bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As with a DALI for a newer CUDA than the driver's: torch has the GPU, DALI does not."""
    dali_loader = pytest.importorskip("fastdcgan.data.dali_loader")
    files = {f"{k}.jpg": encoded(k, size=(800, 600), quality=100, subsampling=0) for k in range(3)}
    folder = make_folder(0, files)
    data = opened(folder, loader="dali")
    expected = data.take(range(3))
    dali_loader.decodes_on.cache_clear()
    loaders = [
        dali_loader.DaliLoader(
            data._source,  # type: ignore[attr-defined]
            data._census,  # type: ignore[attr-defined]
            device=torch.device("cuda", 0),
            image_size=(16, 16),
            channels=3,
            threads=1,
        )
        for _ in range(2)
    ]
    assert capsys.readouterr().err.count("DALI cannot decode on the GPU, so the CPU does: ") == 1
    (decoded,) = loaders[0].decode([Request(np.arange(3))])
    assert decoded.images.device.type == "cpu" and not decoded.broken
    assert torch.equal(decoded.images, expected)


def test_ending_a_stream_waits_for_no_thread(
    loader: str, folder: Path, opened: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An abandoned stream ends wherever Python collects garbage; joining a thread there can wait forever."""
    waited = []
    shutdown = ThreadPoolExecutor.shutdown

    def watched(pool: ThreadPoolExecutor, wait: bool = True, **options: Any) -> None:
        waited.append(wait)
        shutdown(pool, wait, **options)

    gc.collect()  # streams that other tests have abandoned
    stream = opened(folder, loader=loader, cache="off").stream(BATCH)
    stream.advance()
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", watched)
    del stream
    gc.collect()
    assert waited == [False]


@pytest.fixture
def staged_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for what a StagedStream asks of CUDA."""
    empty = torch.empty
    monkeypatch.setattr(streams.torch, "cuda", MagicMock())
    monkeypatch.setattr(streams.torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))


@pytest.mark.usefixtures("staged_without_a_gpu")
def test_what_keeps_the_next_batch_from_coming_is_raised_in_its_turn() -> None:
    """Of batches that are staged on a GPU one is ahead: the last good one is trained on, and counted, first."""
    feed, device = MagicMock(device=torch.device("cpu"), order=MagicMock(world_size=1)), torch.device("cpu")
    feed.fill.side_effect = [1, 2, UserError("a.jpg is broken")]
    position = Position()
    staged = streams.StagedStream(feed, (2, 4, 4, 3), device, position)
    staged.advance()
    staged.advance()
    for _ in range(2):
        with pytest.raises(UserError, match="is broken"):
            staged.advance()
    assert (position.taken, position.images, staged.images) == (2, 4, 4)
    staged.close()
    for first in (UserError("all are broken"), KeyboardInterrupt()):
        feed.reset_mock()
        feed.fill.side_effect = [first]
        with pytest.raises(type(first)):  # before anything is written
            streams.StagedStream(feed, (2, 4, 4, 3), device, position)
        feed.close.assert_called_once()


@pytest.mark.usefixtures("staged_without_a_gpu")
def test_an_interrupt_before_the_first_batch_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens the stream waits for that batch, and has nothing yet that could be closed."""
    get = queue.Queue.get

    def interrupted(of: queue.Queue[object], *arguments: object) -> object:
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        return get(of, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(queue.Queue, "get", interrupted)
    feed, device = MagicMock(device=torch.device("cpu"), order=MagicMock(world_size=1)), torch.device("cpu")
    feed.fill.return_value = 1
    with pytest.raises(KeyboardInterrupt):
        streams.StagedStream(feed, (2, 4, 4, 3), device, Position())
    assert not [thread for thread in threading.enumerate() if thread.name == "fill slots"]
    feed.close.assert_called_once()
