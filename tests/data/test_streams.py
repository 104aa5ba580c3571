"""Batches: the same order whatever the loader and the cache, exact continuation, disjoint shares for the ranks."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdcgan.data import Dataset

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


@pytest.mark.parametrize("cache", ["host", "disk", "off"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_see_disjoint_shares_that_cover_the_set(
    world_size: int, cache: str, make_folder: Callable[..., Path], opened: Callable[..., Dataset], batches: Batches
) -> None:
    count, batch = 24, 4
    folder = make_folder(count)
    alone = opened(folder, cache=cache)
    whole = alone.take(range(count))
    number = {image.numpy().tobytes(): i for i, image in enumerate(whole)}
    shares = []
    for rank in range(world_size):
        stream = opened(folder, cache=cache, rank=rank, world_size=world_size).stream(batch)
        shares.append([[number[image.numpy().tobytes()] for image in found] for found in batches(stream, 4 * 6)])
        assert stream.images == 4 * 6 * batch * world_size
        stream.close()
    per_epoch = count // (batch * world_size)
    for epoch in range(2):
        seen = [i for share in shares for found in share[epoch * per_epoch : (epoch + 1) * per_epoch] for i in found]
        assert sorted(seen) == list(range(count))
    together = alone.stream(batch * world_size)
    for k, found in enumerate(batches(together, 6)):
        of_all = [number[image.numpy().tobytes()] for image in found]
        assert sorted(of_all) == sorted(i for share in shares for i in share[k])


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


def test_random_crops_have_one_place_an_image(
    loader: str, make_folder: Callable[..., Path], opened: Callable[..., Dataset], encoded: Callable[..., bytes]
) -> None:
    sizes = [(90, 16), (90, 20), (16, 50), (400, 100), (300, 300)]
    folder = make_folder(0, {f"{k}.jpg": encoded(k, size=size) for k, size in enumerate(sizes)})
    options: dict[str, Any] = {"loader": loader, "crop": "random"}
    first, again = (opened(folder, **options).take(range(5)) for _ in range(2))
    assert torch.equal(first, again)
    centre, other = opened(folder, loader=loader).take(range(5)), opened(folder, seed=1, **options).take(range(5))
    differs = [not torch.equal(first[k], centre[k]) and not torch.equal(first[k], other[k]) for k in range(5)]
    assert differs == [True, True, True, True, False]  # a square has only one place


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


def test_ending_a_stream_waits_for_no_thread(
    loader: str, folder: Path, opened: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An abandoned stream ends wherever Python collects garbage; joining a thread there can wait forever."""
    waited = []
    shutdown = ThreadPoolExecutor.shutdown

    def watched(pool: ThreadPoolExecutor, wait: bool = True, **options: Any) -> None:
        waited.append(wait)
        shutdown(pool, wait, **options)

    stream = opened(folder, loader=loader, cache="off").stream(BATCH)
    stream.advance()
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", watched)
    del stream
    gc.collect()
    assert waited == [False]
