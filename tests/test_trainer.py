"""Whole runs: what they write, and that a run stopped anywhere goes on to the same numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import gc
import importlib.metadata
import json
import logging
import os
import pty
import random
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.tensorboard import SummaryWriter

from fastdcgan import checkpoint, grid, saver, trainer
from fastdcgan.alarms import Alarm, Alarms
from fastdcgan.checkpoint import step_of
from fastdcgan.cli import main
from fastdcgan.config import TrainConfig
from fastdcgan.data.dataset import LEFT_OUT
from fastdcgan.data.streams import ResidentStream
from fastdcgan.distributed import ALONE, World
from fastdcgan.errors import UserError
from fastdcgan.heap import heap
from fastdcgan.models import build_discriminator, build_generator
from fastdcgan.runs import RunFolder, choose_folder, load_run, saved_config
from fastdcgan.saver import restore, write
from fastdcgan.step import TrainStep
from fastdcgan.trainer import Interrupted, train
from fastdcgan.watch import Watch

UMASK = os.umask(0)
os.umask(UMASK)
SMALL = TrainConfig(
    data="digits",
    image_size="16",
    gen_width=4,
    latent_dim=8,
    batch_size=16,
    steps=12,
    log_every=4,
    sample_every=6,
    checkpoint_every=3,
    device="cpu",
)


def small(run: Path, **changes: object) -> TrainConfig:
    return dataclasses.replace(SMALL, run_dir=run, **changes)  # type: ignore[arg-type]


def full(*_: object) -> None:
    """As a disk can be."""
    raise OSError(28, "No space left on device")


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step-{step:06d}"
    return {f"{f.stem}.{n}": t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}


def assert_equal_bits(run: Path, other: Path, step: int) -> None:
    a, b = tensors(run, step), tensors(other, step)
    assert a.keys() == b.keys() and len(a) > 40
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    progress = [json.loads((r / f"checkpoints/step-{step:06d}/state.json").read_text())["data"] for r in (run, other)]
    assert progress[0] == progress[1]


def metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "peak_memory_bytes")} for line in lines]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that never stopped."""
    return train(small(tmp_path_factory.mktemp("straight") / "run"))


def test_run_folder(straight: Path) -> None:
    assert not heap.keeps, "the process has its memory back as it was"
    names = {p.relative_to(straight).as_posix() for p in straight.rglob("*") if p.is_file()}
    assert {
        "config.json",
        "metrics.jsonl",
        "samples/real.png",
        "samples/step-000006.png",
        "samples/step-000012.png",
    } <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert [p.name for p in checkpoint.complete(straight)] == ["step-000006", "step-000009", "step-000012"]  # keep 3
    config = json.loads((straight / "config.json").read_text())
    assert config["config"]["image_size"] == "16" and "torch" in config["versions"] and config["device"]
    grid = Image.open(straight / "samples/step-000012.png")
    assert grid.size == (8 * 18 + 2,) * 2 and grid.mode == "L"
    assert [line["step"] for line in metrics(straight)] == [4, 8, 12]
    assert metrics(straight)[-1]["images"] == 12 * 16
    assert {"loss_d", "loss_g", "d_real", "d_fake", "epoch"} <= metrics(straight)[0].keys()


@pytest.mark.parametrize("stop", [3, 5])  # on a checkpoint, and between two
def test_resume_is_the_same_run(straight: Path, tmp_path: Path, stop: int) -> None:
    run = train(small(tmp_path / "run", steps=stop))
    if stop == 5:  # pretend it was killed after its last regular checkpoint
        checkpoint.complete(run)[-1].rename(run / "gone")
    train(small(run, resume=True, steps=12))
    assert_equal_bits(run, straight, 12)
    assert metrics(run)[-1] == metrics(straight)[-1]
    assert [line["step"] for line in metrics(run)][-2:] == [8, 12]
    if stop == 5:  # the checkpoint has the first three steps of the line that the fourth one ends
        assert metrics(run)[-3] == metrics(straight)[-3]


def test_random_numbers_of_another_kind_of_device_are_drawn_anew(
    straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A GPU's generator has another state than a CPU's."""
    saved = checkpoint.load(straight / "checkpoints" / "step-000012")
    saved.tensors["state"]["rng"] = torch.zeros(1, 16, dtype=torch.uint8)
    step = small_step()
    assert restore(step, saved, ALONE) == 12
    assert "another kind of device" in capsys.readouterr().err
    assert torch.equal(step.weights()["generator"]["main.0.weight"], saved.tensors["generator"]["main.0.weight"])
    step.update()
    drawn = step.noise.clone()
    saved.progress["step"] = 9
    restore(step, saved, ALONE)
    step.update()
    assert not torch.equal(step.noise, drawn), "not the same from wherever a run goes on"


@pytest.mark.parametrize("kind", checkpoint.TENSOR_FILES)
def test_a_checkpoint_that_is_not_finite_is_not_written(
    kind: str, straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor one whose weights are and whose moments are not: none of its weights would ever move again."""
    taken = checkpoint.load(straight / "checkpoints" / "step-000012")
    values = next(value for value in taken.tensors[kind].values() if value.is_floating_point() and value.dim())
    values.view(-1)[-1] = torch.inf
    run = SimpleNamespace(path=tmp_path / "run", config=SMALL)
    run.path.mkdir()
    (run.path / "config.json").write_text("{}")
    assert write(run, taken, None, set()) is None  # type: ignore[arg-type]
    assert "no checkpoint at step 12" in capsys.readouterr().err and not checkpoint.complete(run.path)


@contextlib.contextmanager
def float64_as_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def small_step() -> TrainStep:
    generator, discriminator = build_generator("dcgan", (16, 16), 1, 8, 4), build_discriminator("dcgan", (16, 16), 1, 4)
    return TrainStep(generator, discriminator, torch.zeros(16, 16, 16, 1, dtype=torch.uint8), torch.arange(16))


def test_each_of_more_processes_than_before_draws_noise_of_its_own(straight: Path) -> None:
    saved = checkpoint.load(straight / "checkpoints" / "step-000012")
    steps = [small_step(), small_step()]
    for rank, step in enumerate(steps):
        restore(step, saved, World(rank, 2))
        step.draw()
    assert not torch.equal(steps[0].noise, steps[1].noise)


def test_each_process_goes_on_with_its_own_sums(straight: Path) -> None:
    """Of figures since the last log point; more processes than before with what those had on average."""
    saved = checkpoint.load(straight / "checkpoints" / "step-000012")
    assert saved.tensors["state"]["sums"].shape == (1, 5)
    sums, random = torch.arange(10.0).view(2, 5), saved.tensors["state"]["rng"].repeat(2, 1)
    state = saved.tensors["state"] | {"sums": sums, "rng": random}
    saved = dataclasses.replace(saved, tensors=saved.tensors | {"state": state})
    found = []
    for rank, size in ((0, 2), (1, 2), (2, 3)):
        step = small_step()
        restore(step, saved, World(rank, size))
        found.append(step.sums)
    assert torch.equal(torch.stack(found), torch.cat((sums, sums.mean(0, keepdim=True))))


def test_another_seed_is_another_run(straight: Path, tmp_path: Path) -> None:
    run = train(small(tmp_path / "run", seed=1))
    assert not torch.equal(
        tensors(run, 12)["generator.main.0.weight"], tensors(straight, 12)["generator.main.0.weight"]
    )


def test_a_damaged_newest_checkpoint_costs_only_itself(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(small(tmp_path / "run", steps=9))
    for damage in ("truncate", "flip", "missing"):
        newest = checkpoint.complete(run)[-1] / "state.safetensors"
        if damage == "truncate":
            newest.write_bytes(newest.read_bytes()[:-5])
        elif damage == "flip":
            newest.write_bytes(newest.read_bytes()[:-1] + b"\x01")
        else:
            newest.unlink()
        with pytest.raises(UserError, match="cannot be read"):
            checkpoint.load(newest.parent)
        train(small(run, resume=True, steps=12))
        assert "trying the one before" in capsys.readouterr().err
        assert_equal_bits(run, straight, 12)
        for folder in checkpoint.complete(run)[-1:]:
            folder.rename(run / f"{damage}-{folder.name}")


def test_a_run_whose_last_checkpoint_was_not_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(UserError, match=r"step 12 could not be saved .*last saved step is none"):
        train(small(run))


def test_damaged_later_checkpoints_do_not_cost_the_sound_one(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    (run / "checkpoints" / "step-000012" / "state.safetensors").write_bytes(b"")
    (run / "checkpoints" / "step-000009" / "state.safetensors").write_bytes(b"")
    train(small(run, resume=True, steps=8, keep=1))
    assert checkpoint.load(run / "checkpoints" / "step-000008").progress["step"] == 8
    assert (run / "checkpoints" / "step-000008" / "generator.safetensors").stat().st_mode & 0o777 == 0o666 & ~UMASK


def test_damaged_checkpoints_do_not_count_towards_those_that_are_kept(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    shutil.rmtree(run / "checkpoints" / "step-000006")
    (run / "checkpoints" / "step-000012" / "state.safetensors").write_bytes(b"")
    train(small(run, resume=True, steps=13, keep=2, checkpoint_every=13))
    assert [folder.name for folder in checkpoint.complete(run)] == ["step-000009", "step-000013"]
    (run / "checkpoints" / "step-000013" / "state.safetensors").write_bytes(b"")
    train(small(run, resume=True, steps=16, keep=2, checkpoint_every=13))  # which writes the damaged one anew
    assert [folder.name for folder in checkpoint.complete(run)] == ["step-000013", "step-000016"]


def test_who_looks_while_a_checkpoint_is_deleted_does_not_find_half_of_it(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    saved = checkpoint.load(run / "checkpoints" / "step-000012")
    rmtree, seen = shutil.rmtree, list[list[str]]()

    def look(folder: Path, **how: Any) -> None:
        seen.append([each.name for each in checkpoint.complete(run)])
        rmtree(folder, **how)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", look)
    checkpoint.save(run, 12, saved, keep=2)
    assert seen[-1] == ["step-000009", "step-000012"] == [each.name for each in checkpoint.complete(run)]
    assert not list((run / "checkpoints").glob(".*"))


def test_a_checkpoint_under_another_steps_name_is_damaged(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    (run / "checkpoints" / "step-000009").rename(run / "checkpoints" / "step-000099")
    found = checkpoint.load_newest(run)
    assert found is not None and found.progress["step"] == 12
    assert "step-000099 cannot be read: it is of step 9" in capsys.readouterr().err


def test_a_copy_with_a_name_of_ones_own_is_no_checkpoint_of_the_run(straight: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    mine = Path(shutil.copytree(run / "checkpoints" / "step-000009", run / "checkpoints" / "step-000009-mine"))
    assert [step_of(folder) for folder in checkpoint.complete(run)] == [6, 9, 12]
    assert (load_run(run).step, load_run(mine).step) == (12, 9)


@pytest.mark.parametrize("what", ["a disk that is away", "no permission"])
def test_a_run_whose_checkpoints_cannot_be_seen_does_not_begin_anew(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    if what == "a disk that is away":
        (run / "checkpoints").rename(tmp_path / "elsewhere")
        (run / "checkpoints").symlink_to(tmp_path / "not mounted")
    else:  # not chmod: tests may run as root
        listdir = os.listdir

        def refuse(path: Path) -> list[str]:
            if path == run / "checkpoints":
                raise PermissionError(13, "Permission denied", str(path))
            return listdir(path)

        monkeypatch.setattr(os, "listdir", refuse)
    figures = (run / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="cannot be listed"):
        train(small(run, resume=True, steps=14))
    assert (run / "metrics.jsonl").read_text() == figures


def test_the_best_checkpoint_stays_where_it_cannot_be_read_just_now(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    state = run / "checkpoints" / "best" / "state.json"
    content, read = state.read_text(), Path.read_text

    def fail(path: Path, *rest: Any) -> str:
        if path == state:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read(path, *rest)

    monkeypatch.setattr(Path, "read_text", fail)
    with pytest.raises(OSError, match="Input/output error"):
        checkpoint.keep_best(run, run / "checkpoints" / "step-000012", -1.0)
    monkeypatch.undo()
    assert state.read_text() == content
    state.write_text("{")
    assert checkpoint.keep_best(run, run / "checkpoints" / "step-000012", -1.0), "a damaged one is replaced"


def test_a_checkpoint_as_near_as_the_best_does_not_take_its_place(straight: Path, tmp_path: Path) -> None:
    """Nor does the best one itself, again at every resume."""
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    best = run / "checkpoints" / "best"
    before = best.stat().st_ino
    distance = checkpoint.load(best).progress["distance_to_data"]
    assert not checkpoint.keep_best(run, run / "checkpoints" / "step-000012", distance)
    assert best.stat().st_ino == before


@pytest.mark.parametrize("renamings", [1, 2])
def test_a_kill_while_a_checkpoint_is_replaced_leaves_one_of_the_two(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renamings: int
) -> None:
    """As when a stop falls on a step that was saved anyway, and --keep 1."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    older = checkpoint.load(checkpoint.complete(straight)[-1])
    newer = dataclasses.replace(older, progress=older.progress | {"images": 7})
    folder = checkpoint.save(run, 12, older, keep=1)
    rename, done = Path.rename, 0

    def killed(self: Path, target: Path) -> Path:
        nonlocal done
        if done == renamings:
            raise KeyboardInterrupt
        done += 1
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        if renamings == 1:
            with pytest.raises(KeyboardInterrupt):
                checkpoint.save(run, 12, newer, keep=1)
        else:
            patch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)
            checkpoint.save(run, 12, newer, keep=1)
    found = checkpoint.load_newest(run)
    assert found is not None and found.progress["images"] == (older if renamings == 1 else newer).progress["images"]
    checkpoint.remove_unfinished(run)
    assert [p.name for p in (run / "checkpoints").iterdir()] == [folder.name]


def test_who_reads_while_a_checkpoint_is_replaced_does_not_keep_it_out(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader may find neither of the two, and take the run for one that was killed there."""
    run, rename, looks = tmp_path / "run", Path.rename, 2
    (run / "checkpoints").mkdir(parents=True)
    older = checkpoint.load(checkpoint.complete(straight)[-1])
    newer = dataclasses.replace(older, progress=older.progress | {"images": 7})
    folder = checkpoint.save(run, 12, older, keep=1)

    def read_before(self: Path, target: Path) -> Path:
        nonlocal looks
        if looks and target == folder and self.name.endswith(checkpoint.UNFINISHED):
            looks -= 1
            found = checkpoint.load_newest(run)
            assert found is not None and found.progress["images"] == older.progress["images"]
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", read_before)
    checkpoint.save(run, 12, newer, keep=1)
    assert looks == 0 and checkpoint.load(folder).progress["images"] == 7
    assert [path.name for path in (run / "checkpoints").iterdir()] == [folder.name]


@pytest.mark.parametrize(
    ("full", "left"),
    [
        (9, ["step-000006", "step-000009", "step-000012"]),  # while checkpoints/best is copied from the first
        (16, ["step-000003", "step-000009", "step-000012"]),  # in the middle of the second
    ],
)
def test_a_full_disk_leaves_the_older_checkpoint_and_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], full: int, left: list[str]
) -> None:
    real_sync, calls = checkpoint._sync, 0

    def failing_sync(path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == full:
            raise OSError(28, "No space left on device")
        real_sync(path)

    monkeypatch.setattr(checkpoint, "_sync", failing_sync)
    run = train(small(tmp_path / "run"))
    said = capsys.readouterr().err
    assert "could not be copied to checkpoints/best" in said if full == 9 else "could not be written" in said
    assert [p.name for p in checkpoint.complete(run)] == left
    assert checkpoint.load(run / "checkpoints" / "best").progress["step"] in (3, 6, 9, 12)
    assert not list((run / "checkpoints").glob(".*"))


def test_a_checkpoint_that_cannot_be_copied_to_best_is_not_lost(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = checkpoint.load(straight / "checkpoints" / "step-000012")
    taken = dataclasses.replace(saved, progress=saved.progress | {"distance_to_data": 0.5})
    monkeypatch.setattr(checkpoint.shutil, "copyfile", full)
    run = SimpleNamespace(path=tmp_path / "run", config=SMALL)
    run.path.mkdir()
    (run.path / "config.json").write_text("{}")
    assert write(run, taken, None, set()) is None  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert "step 12 could not be copied to checkpoints/best" in said and "training goes on without" not in said
    assert checkpoint.load(run.path / "checkpoints" / "step-000012").progress["step"] == 12


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_does_not_sync_folders_takes_checkpoints(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fsync, refused = os.fsync, stat.S_ISDIR

    def refuse(descriptor: int) -> None:
        if refused(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    saved = checkpoint.load(checkpoint.complete(straight)[-1])
    monkeypatch.setattr(os, "fsync", refuse)
    folder = checkpoint.save(tmp_path, 12, saved, keep=1)
    assert checkpoint.keep_best(tmp_path, folder, 0.5)
    assert [checkpoint.load(each).progress["step"] for each in (folder, folder.with_name("best"))] == [12, 12]
    refused = stat.S_ISREG  # a file that is not on the disk is another matter
    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        checkpoint.save(tmp_path, 13, saved, keep=1)


def test_a_file_system_without_permissions_takes_checkpoints(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))

    saved = checkpoint.load(checkpoint.complete(straight)[-1])
    monkeypatch.setattr(os, "chmod", refuse)
    folder = checkpoint.save(tmp_path, 12, saved, keep=1)
    assert checkpoint.keep_best(tmp_path, folder, 0.5)
    assert [checkpoint.load(each).progress["step"] for each in (folder, folder.with_name("best"))] == [12, 12]


def test_a_checkpoint_of_a_containers_image_is_replaced(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot be moved there, only deleted; a kill at any moment leaves one of the two, whole."""
    older = checkpoint.load(checkpoint.complete(straight)[-1])
    newer = dataclasses.replace(older, progress=older.progress | {"images": 7})
    rename, unlink, left, found = Path.rename, Path.unlink, 0, list[int]()

    def moment() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt

    def move(path: Path, to: Path) -> Path:
        if path.stat().st_ino == image:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        moment()
        return rename(path, to)

    def delete(path: Path, **_: object) -> None:
        for file in path.glob("*"):
            file.unlink()
        with contextlib.suppress(FileNotFoundError):
            path.rmdir()

    for killed in range(20):
        run, left = tmp_path / str(killed), killed
        folder = checkpoint.save(run, 12, older, keep=1)
        image = folder.stat().st_ino
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(Path, "rename", move)
            patch.setattr(Path, "unlink", lambda path, **how: (moment(), unlink(path, **how)))
            patch.setattr(checkpoint.shutil, "rmtree", delete)
            checkpoint.save(run, 12, newer, keep=1)
        checkpoint.load_newest(run)  # somebody looks at it
        checkpoint.remove_unfinished(run)  # and it is gone on with
        assert [path.name for path in (run / "checkpoints").iterdir()] == [folder.name]
        found.append(checkpoint.load(folder).progress["images"])
    old = found.count(older.progress["images"])
    assert 1 < old < 20 and found == [older.progress["images"]] * old + [7] * (20 - old)


def test_the_callers_types_are_not_the_runs(straight: Path, tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            run = train(small(tmp_path / "run"))
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert_equal_bits(run, straight, 12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")])
def test_the_callers_modes_are_not_the_runs(straight: Path, tmp_path: Path, mode: Callable[[], Any]) -> None:
    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_device()
        run = train(small(tmp_path / "run"))
        assert before == (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_device())
    assert_equal_bits(run, straight, 12)


def test_a_run_whose_folder_is_taken_away_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Watch.log

    def log_and_move(self: Watch, figures: dict[str, float]) -> list[Alarm]:
        if figures["step"] == 8:
            (tmp_path / "run").rename(tmp_path / "elsewhere")
        return log(self, figures)

    monkeypatch.setattr(Watch, "log", log_and_move)
    with pytest.raises(UserError, match=r"step 12 could not be saved"):
        train(small(tmp_path / "run"))
    assert "the run folder is no longer there" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()
    (tmp_path / "elsewhere").rename(tmp_path / "run")
    monkeypatch.undo()
    assert_equal_bits(train(small(tmp_path / "run", resume=True)), train(small(tmp_path / "whole")), 12)


def test_a_stop_keeps_what_the_run_may_have_to_go_back_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Alarms, "no_sign_before", lambda self: 4)
    log = Watch.log

    def log_and_stop(self: Watch, figures: dict[str, float]) -> list[Alarm]:
        if figures["step"] == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return log(self, figures)

    monkeypatch.setattr(Watch, "log", log_and_stop)
    with pytest.raises(Interrupted):
        train(small(tmp_path / "run", keep=1, on_divergence="rollback"))
    assert [step_of(each) for each in checkpoint.complete(tmp_path / "run")] == [3, 8]


def test_lines_that_somebody_has_changed_do_not_stop_a_run(tmp_path: Path) -> None:
    run = train(small(tmp_path / "run", steps=6))
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": NaN}\n{"step": -1e400}\n{"step": 3, "loss_d": "x", "loss_g": 1}\n{"step": "3"}\n')
    train(small(run, resume=True))
    assert [line["step"] for line in metrics(run)] == [4, 6, 3, 8, 12]


def test_a_run_that_has_drawn_is_not_taken_for_one_that_never_began(tmp_path: Path) -> None:
    run = train(small(tmp_path / "run"))
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").unlink()
    for left in (run / "quality.jsonl", run / "samples"):  # either alone says so
        away = left.rename(tmp_path / "away")
        with pytest.raises(UserError, match="already holds a run"):
            train(small(run))
        away.rename(left)


def test_a_folder_that_a_kill_left_before_anything_was_written_is_none_of_another(tmp_path: Path) -> None:
    (tmp_path / "run" / "samples").mkdir(parents=True)
    for name in (".lock", ".config.json.unfinished"):
        (tmp_path / "run" / name).touch()
    assert saved_config(small(tmp_path / "run")) is None


def test_the_real_images_are_shown_once(tmp_path: Path) -> None:
    train(small(tmp_path / "run", steps=6))
    shown = (tmp_path / "run" / "samples" / "real.png").stat().st_mtime_ns
    train(small(tmp_path / "run", resume=True))
    assert (tmp_path / "run" / "samples" / "real.png").stat().st_mtime_ns == shown


def test_who_looks_while_checkpoints_are_replaced_finds_the_newest(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run that keeps one: where the one that was found is gone by now, there is another."""
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    folders = run / "checkpoints"
    shutil.copytree(folders / "step-000012", folders / "later")
    for step in (3, 6, 9):
        shutil.rmtree(folders / f"step-{step:06d}", ignore_errors=True)
    load = checkpoint.load

    def replaced_meanwhile(folder: Path) -> checkpoint.Checkpoint:
        if (folders / "later").exists():
            shutil.rmtree(folders / "step-000012")
            (folders / "later").rename(folders / "step-000012")
        return load(folder)

    monkeypatch.setattr(checkpoint, "load", replaced_meanwhile)
    found = checkpoint.load_newest(run)
    assert found is not None and found.progress["step"] == 12 and capsys.readouterr().err == ""


def test_a_resumed_run_says_what_changes_and_no_more(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    train(small(run, resume=True, flip=False, lr=1e-3))  # digits are not mirrored anyway
    said = capsys.readouterr().err
    assert "lr changes from 0.0002 to 0.001" in said and "flip" not in said
    train(small(run, resume=True, steps=13))
    assert "steps" not in capsys.readouterr().err.replace("13 steps of 16", "")
    train(small(run, resume=True, steps=14, lr_decay="linear", loader="torch"))  # a schedule runs to the last step
    said = capsys.readouterr().err
    assert "steps changes from 13 to 14" in said and "loader changes from auto to torch" in said
    with pytest.raises(UserError, match=r"the run has 0\.1247 epochs behind it: --epochs 0\.05 would end it before"):
        train(small(run, resume=True, steps=None, epochs=0.05))


def test_epochs_that_are_over_stay_so_with_a_smaller_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A job that is started again by the same command may get fewer processes; its last step went beyond the end."""
    np.save(tmp_path / "set.npy", np.full((10, 16, 16, 3), 99, np.uint8))
    run = train(small(tmp_path / "run", data=str(tmp_path / "set.npy"), steps=None, epochs=1.0, batch_size=8))
    train(small(run, data=str(tmp_path / "set.npy"), steps=None, epochs=1.0, batch_size=2, resume=True))
    assert checkpoint.complete(run)[-1].name == "step-000002"


def test_a_configuration_that_was_altered_is_noticed(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By one bit: the checkpoint knows what it was trained with. Where nothing is left to do, that is said too."""
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text.replace('"beta1": 0.5', '"beta1": 0.7'))
    shutil.rmtree(run / "samples")
    train(small(run, resume=True), asked=frozenset())
    said = capsys.readouterr().err
    assert "note: beta1 changes from 0.5 to 0.7" in said and f"done: {run} was at step 12 already" in said


def test_what_the_data_ends_a_run_for_costs_no_step(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under --strict one file that breaks while it is decoded does."""
    advance = ResidentStream.advance

    def broken(stream: ResidentStream) -> None:
        if stream.images == 5 * SMALL.batch_size:
            raise UserError("a.jpg: broken (--strict stops at the first unusable file)")
        advance(stream)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(ResidentStream, "advance", broken)
        with pytest.raises(
            UserError, match=r"a\.jpg.*; the last saved step is 5: put that right, then fastdcgan train"
        ):
            train(small(run))
        with pytest.raises(UserError, match=r"unusable file\)$"):  # nothing is new since then
            train(small(run, resume=True))
    train(small(run, resume=True))
    assert_equal_bits(run, straight, 12)


def test_training_does_not_wait_for_the_disk(straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps go on while a slow disk takes a checkpoint, which holds the numbers of its own step."""
    whole_save, whole_update = checkpoint.save, TrainStep.update
    moments: list[str] = []

    def slow_save(run: Path, step: int, *rest: object) -> Path:
        time.sleep(0.3)
        folder = whole_save(run, step, *rest)  # type: ignore[arg-type]
        moments.append(f"saved {step}")
        return folder

    def update(step: TrainStep) -> None:
        whole_update(step)
        moments.append("step")

    monkeypatch.setattr(checkpoint, "save", slow_save)
    monkeypatch.setattr(TrainStep, "update", update)
    run = train(small(tmp_path / "run"))
    assert moments.index("saved 3") >= 6  # not until the next checkpoint is due
    assert moments[-1] == "saved 12"
    for step in (6, 9, 12):
        assert_equal_bits(run, straight, step)


def start(run: Path, *more: str, steps: int = 12, hears: int = subprocess.PIPE) -> subprocess.Popen[str]:
    flags = (
        f"--image-size 16 --gen-width 4 --latent-dim 8 --batch-size 16 --steps {steps} --log-every 4 --sample-every 6"
    )
    command = [sys.executable, "-m", "fastdcgan", "train", "digits", *flags.split(), "--checkpoint-every", "3"]
    return subprocess.Popen(
        [*command, "--device", "cpu", "--run-dir", str(run), *more],
        stderr=hears,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as in this process: the bits depend on it
    )


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_random_moments(tmp_path: Path, kills: int) -> None:
    """SIGKILL, each time after new checkpoints appeared; then the same bits as a run that never stopped."""
    steps = 30 * kills
    straight, run = train(small(tmp_path / "straight", steps=steps)), tmp_path / "run"
    for _ in range(kills):
        before, process = checkpoint.complete(run)[-1:], start(run, "--resume", steps=steps)
        while checkpoint.complete(run)[-1:] == before and process.poll() is None:
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.3))
        process.kill()
        process.communicate()
    process = start(run, "--resume", steps=steps)
    assert process.wait(120) == 0, process.communicate()[1]
    assert_equal_bits(run, straight, steps)
    assert [line["step"] for line in metrics(run)] == list(range(4, steps + 1, 4))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGHUP, 129)])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path: Path, number: signal.Signals, code: int) -> None:
    run = tmp_path / "a run"
    process = start(run, steps=100_000)
    while not (run / "checkpoints" / "step-000003").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == code, said
    assert f"fastdcgan train --run-dir '{run}' --resume" in said and "Traceback" not in said
    step = json.loads((checkpoint.complete(run)[-1] / "state.json").read_text())["step"]
    assert f"stopped after step {step:,}" in said


@pytest.mark.parametrize("where", ["/dev/full", "a closed pipe"])
def test_a_run_goes_on_where_nobody_hears_of_it(tmp_path: Path, where: str) -> None:
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "w") as full, open(write, "w") as closed:
        process = start(tmp_path / "run", hears=(full if where == "/dev/full" else closed).fileno())
    assert process.wait(120) == 0
    assert checkpoint.complete(tmp_path / "run")[-1].name == "step-000012"


@pytest.mark.parametrize("term", ["dumb", "xterm"])  # plain lines, and a bar that moves
def test_a_terminal_that_closes_leaves_a_checkpoint(tmp_path: Path, term: str) -> None:
    run = tmp_path / "run"
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"TERM": term, "OMP_NUM_THREADS": "1"}
        flags = "--image-size 16 --gen-width 4 --latent-dim 8 --batch-size 16 --steps 100000 --log-every 4"
        command = [sys.executable, "-m", "fastdcgan", "train", "digits", *flags.split(), "--run-dir", str(run)]
        os.execv(sys.executable, [*command, "--checkpoint-every", "90000"])
    while not (run / "metrics.jsonl").exists():
        assert os.read(terminal, 65536)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 129
    assert checkpoint.step_of(checkpoint.complete(run)[-1]) < 90_000


def test_more_images_make_longer_epochs(tmp_path: Path) -> None:
    photos, run = tmp_path / "photos", tmp_path / "run"
    photos.mkdir()

    def add(count: int) -> None:
        for i in range(count):
            Image.effect_noise((16, 16), 90).save(photos / f"{i:02}.png")

    add(16)
    config = small(run, data=str(photos), steps=None, epochs=4.0, batch_size=8, cache_dir=tmp_path / "cache")
    train(config)
    shutil.rmtree(run / "checkpoints" / "step-000008")
    add(32)
    train(dataclasses.replace(config, resume=True))  # 6 steps of 8 are done, and 4 epochs are 128 images
    assert checkpoint.complete(run)[-1].name == "step-000016"


def test_a_run_that_is_finished_while_another_looks_at_its_images_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = trainer.open_dataset

    def slowly(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(trainer, "open_dataset", looked)
        train(small(tmp_path / "run", steps=1, seed=1))
        return looked(*args, **options)

    monkeypatch.setattr(trainer, "open_dataset", slowly)
    with pytest.raises(UserError, match="another process has trained there meanwhile"):
        train(small(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["seed"] == 1


def test_a_run_that_failed_lets_go_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a notebook, which keeps the failure with all that belongs to it."""
    closed: list[ResidentStream] = []
    with monkeypatch.context() as patched, pytest.raises(RuntimeError) as kept:
        patched.setattr(TrainStep, "read_metrics", lambda _: (_ for _ in ()).throw(RuntimeError("planted")))
        patched.setattr(ResidentStream, "close", lambda stream: closed.append(stream))
        train(small(tmp_path / "run"))
    assert len(closed) == 1, "its threads would go on"
    assert [each.name for each in checkpoint.complete(tmp_path / "run")] == ["step-000003"]
    train(small(tmp_path / "run", steps=6, resume=True))
    assert kept.value.args == ("planted",)


def test_a_disk_that_fills_up_costs_figures_and_pictures_not_the_run(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastdcgan.grid.replace_file", full)
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    run = train(small(tmp_path / "run"))
    said = capsys.readouterr().err
    assert said.count("figures and pictures cannot be written") == 1
    assert f"done: {run}  (" in said, "nor was it at the last step already"
    assert_equal_bits(run, straight, 12)
    assert not list((run / "samples").iterdir())


def test_pictures_come_again_once_a_full_disk_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the one of the averages is written and cannot be shown; and when it is full again, that is said."""
    sample, add_image, replace_file = Watch.sample, SummaryWriter.add_image, grid.replace_file
    done = 0

    def sample_at(watch: Watch, at: int, *rest: Any, **how: Any) -> list[Alarm]:
        nonlocal done
        done = at
        return sample(watch, at, *rest, **how)

    def add(board: SummaryWriter, name: str, *rest: Any) -> None:
        full() if (done, name) == (4, "step") else add_image(board, name, *rest)

    monkeypatch.setattr(Watch, "sample", sample_at)
    monkeypatch.setattr(SummaryWriter, "add_image", add)
    monkeypatch.setattr(grid, "replace_file", lambda *given: full() if done in (2, 6) else replace_file(*given))
    run = train(small(tmp_path / "run", steps=8, sample_every=2))
    assert {path.name for path in (run / "samples").iterdir()} == {
        "real.png", *(f"{kind}-00000{step}.png" for kind in ("step", "raw-step") for step in (4, 8))
    }  # fmt: skip
    assert capsys.readouterr().err.count("figures and pictures cannot be written") == 2


@pytest.mark.parametrize("batch_size", [8, 32])
def test_epochs_are_whole_also_with_other_batches(tmp_path: Path, batch_size: int) -> None:
    run, images = tmp_path / "run", 1797
    train(small(run, steps=None, epochs=0.1))
    train(small(run, steps=None, epochs=0.3, batch_size=batch_size, resume=True))
    seen = json.loads((checkpoint.complete(run)[-1] / "state.json").read_text())["images"]
    assert 0.3 * images <= seen < 0.3 * images + batch_size


def test_a_run_that_was_copied_goes_on_where_it_is(straight: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(straight, copied)
    before = checkpoint.complete(straight)
    assert train(small(copied, steps=15, resume=True), {"steps"}) == copied
    assert checkpoint.complete(straight) == before
    assert checkpoint.complete(copied)[-1].name == "step-000015"


def test_a_sign_that_lasts_is_known_after_a_stop(tmp_path: Path) -> None:
    """Also how far back it is to a sound step."""
    config, real = small(tmp_path, on_divergence="rollback"), torch.zeros(4, 16, 16, 1, dtype=torch.uint8)
    (tmp_path / "samples").mkdir()
    healthy = {"loss_d": 1.3, "loss_g": 0.8, "d_real": 0.5, "d_fake": 0.5, "grad_norm_d": 1.0, "grad_norm_g": 1.0}
    figures = healthy | {"images_per_second": 1.0}
    watch = Watch(tmp_path, config, real, torch.device("cpu"), 0)
    assert watch.log(figures | {"step": 4}) == watch.log(figures | {"step": 8, "loss_d": 900.0}) == []
    assert watch.log(figures | {"step": 12, "loss_d": 900.0}) == []
    watch.close()
    watch = Watch(tmp_path, config, real, torch.device("cpu"), 12)
    (alarm,) = watch.log(figures | {"step": 16, "loss_d": 900.0})
    watch.close()
    assert (alarm.kind, alarm.sound) == ("large losses", 4)
    for on_divergence, raised in (("warn", 0), ("rollback", 1)):  # a warning was given; the run still has to go back
        watch = Watch(tmp_path, dataclasses.replace(config, on_divergence=on_divergence), real, torch.device("cpu"), 16)
        assert len(watch.log(figures | {"step": 20, "loss_d": 900.0})) == raised
        watch.close()


def test_a_kill_before_the_best_checkpoint_is_copied_costs_nothing(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    newest = checkpoint.complete(run)[-1]
    saved = checkpoint.load(newest)
    better = dataclasses.replace(saved, progress=saved.progress | {"distance_to_data": 1e-9})
    checkpoint.save(run, saved.progress["step"], better, keep=9)
    train(small(run, steps=13, resume=True, checkpoint_every=100))
    assert checkpoint.load(run / "checkpoints" / "best").progress["step"] == saved.progress["step"]


@pytest.mark.parametrize("without_digest", [False, True])
def test_an_altered_position_is_noticed(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], without_digest: bool
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    state = checkpoint.complete(run)[-1] / "state.json"
    content = json.loads(state.read_text()) | {"step": 11}
    if without_digest:
        del content["sha256"]["state.json"]
    state.write_text(json.dumps(content))
    found = checkpoint.load_newest(run)
    assert found is not None and found.progress["step"] < 11
    complaint = "'state.json' is missing" if without_digest else "state.json is not what was written"
    assert complaint in capsys.readouterr().err


def test_a_full_disk_when_the_intervals_settle(straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunFolder, "keep_intervals", full)
    monkeypatch.setattr(trainer, "report_skipped", full)
    assert_equal_bits(train(small(tmp_path / "run")), straight, 12)


def test_a_start_on_a_full_disk_lets_go_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched, pytest.raises(UserError, match="cannot be written: No space") as kept:
        patched.setattr("fastdcgan.runs.replace_file", full)
        train(small(tmp_path / "run", steps=1))
    train(small(tmp_path / "run", steps=1))
    assert kept.value.args


def test_a_reason_to_skip_an_image_outlasts_a_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer.report_skipped([("a.png", "broken"), ("b.png", "truncated")], tmp_path)
    trainer.report_skipped([("a.png", LEFT_OUT), ("b.png", LEFT_OUT), ("b.png", "truncated")], tmp_path)
    assert (tmp_path / "skipped.txt").read_text() == "a.png\tbroken\nb.png\ttruncated\n"
    assert capsys.readouterr().err.count("2 images cannot be used") == 1


def test_what_other_processes_could_not_use_is_listed_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a run that goes on, and is killed at once."""
    gather, theirs = World.gather, [("b.png", "broken")]
    monkeypatch.setattr(World, "gather", lambda world, v: [v, theirs] if isinstance(v, list) else gather(world, v))
    monkeypatch.setattr(TrainStep, "update", full)
    with pytest.raises(OSError):
        train(small(tmp_path / "run"))
    assert (tmp_path / "run" / "skipped.txt").read_text() == "b.png\tbroken\n"


@pytest.mark.parametrize("difference", ["number", "names", "channels"])
def test_processes_that_see_different_images_do_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, difference: str
) -> None:
    """They would wait for each other at the end, or see images twice and others never."""
    seen: list[tuple[int, str, int]] = []

    def gather(world: World, value: Any) -> list[Any]:
        if isinstance(value, dict):
            return [value, value]  # the flags
        seen.append(value)
        number, names, channels = value
        other = {"number": (number + 1, names), "names": (number, names + "x")}.get(difference, (number, names))
        return [value, (*other, 3 if difference == "channels" else channels)]

    monkeypatch.setattr(World, "gather", gather)
    with pytest.raises(UserError, match="the processes see different images"):
        train(small(tmp_path / "run"))
    assert [value[0] for value in seen] == [1797] and not (tmp_path / "run").exists()


def test_the_callers_random_numbers_are_his(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(small(tmp_path / "run", steps=1))
    assert torch.equal(torch.rand(3), expected)


def test_fewer_steps_than_there_are_is_a_mistake(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    with pytest.raises(UserError, match="at step 12 already"):
        train(small(tmp_path / "run", steps=5, resume=True))


def test_how_to_go_on_is_said_of_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of one whose name could be a flag's: what is said, given as it is, goes on."""
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(UserError) as error:
        patch.setattr(checkpoint, "save", full)
        train(small(Path("-run")))
    _, _, command = str(error.value).partition("then fastdcgan ")
    main(shlex.split(command))
    assert load_run("-run").step == 12


def test_another_folder_goes_on_with_the_same_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("photos", "one", "other"):
        (tmp_path / name).mkdir()
    for i in range(16):
        Image.effect_noise((16, 16), 90).save(tmp_path / f"photos/{i:02}.png")
    monkeypatch.chdir(tmp_path / "one")
    changes = {"data": str(tmp_path / "photos"), "cache": "disk", "cache_dir": Path("cache")}
    train(small(tmp_path / "run", steps=1, **changes))
    monkeypatch.chdir(tmp_path / "other")
    train(small(tmp_path / "run", steps=2, resume=True), {"steps"})
    assert (tmp_path / "one" / "cache").exists() and not list((tmp_path / "other").iterdir())


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run, steps=100_000)
    try:
        while not (run / "checkpoints" / "step-000003").exists() and process.poll() is None:
            time.sleep(0.02)
        with pytest.raises(UserError, match="another process"):
            train(small(run, resume=True, steps=1_000_000))
    finally:
        process.kill()
        process.communicate()


def test_load_run(straight: Path, tmp_path: Path) -> None:
    run = load_run(straight)
    assert run.step == 12 and run.config is not None and run.discriminator is not None
    assert not run.generator.training and not run.discriminator.training and run.generator.image_size == (16, 16)
    noise = torch.randn(4, 8)
    assert torch.equal(run.generator(noise), load_run(straight / "checkpoints/step-000012").generator(noise))
    raw = load_run(straight, ema=False).generator
    assert not torch.equal(raw(noise), run.generator(noise))
    torch.save(raw.state_dict(), tmp_path / "netG.pth")
    assert torch.equal(load_run(tmp_path / "netG.pth").generator(noise), raw(noise))
    file = straight / "checkpoints/step-000012/generator.safetensors"
    assert torch.equal(load_run(file).generator(noise), raw(noise))


def test_load_run_takes_weights_as_wrappers_name_them(straight: Path, tmp_path: Path) -> None:
    """torch.compile and DataParallel, one in the other, and PyTorch's own moving average, which counts besides."""
    raw, noise = load_run(straight, ema=False).generator, torch.randn(4, 8)
    wrapped = {f"module._orig_mod.{name}": value for name, value in raw.state_dict().items()}
    for weights in (wrapped, torch.optim.swa_utils.AveragedModel(raw).state_dict()):
        torch.save(weights, tmp_path / "wrapped.pth")
        assert torch.equal(load_run(tmp_path / "wrapped.pth").generator(noise), raw(noise))


def test_load_run_finds_the_layers_of_deep_networks(tmp_path: Path) -> None:
    """At 64 pixels and above a file lists main.10 and main.12 before main.3."""
    run = train(small(tmp_path / "run", image_size="64x96", gen_width=2, disc_width=3, steps=1, batch_size=2))
    loaded = load_run(run)
    assert loaded.discriminator is not None and loaded.discriminator.width == 3
    assert loaded.generator(torch.randn(2, 8)).shape == (2, 1, 64, 96)


def test_load_run_refuses(straight: Path, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"main.0.weight": Hostile()}, tmp_path / "hostile.pth")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "torn.safetensors").write_bytes(
        (straight / "checkpoints/step-000012/generator.safetensors").read_bytes()[:99]
    )
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    weights = load_run(straight).generator.state_dict()
    torch.save({**weights, "main.0.weight": weights["main.0.weight"] * float("nan")}, tmp_path / "nan.pth")
    deep = {f"layer.{i}.weight": torch.zeros(8, 8, 4, 4) for i in range(20)}  # as a DCGAN it would take terabytes
    torch.save(deep, tmp_path / "deep.pth")
    (tmp_path / "empty").mkdir()
    files = ("hostile.pth", "text.pth", "torn.safetensors", "other.pth", "list.pth", "nan.pth", "deep.pth")
    for name in (*files, "empty", "nowhere"):
        with pytest.raises(UserError) as error:
            load_run(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "5", '{"step": "3"}', '{"step": 3}', '{"step": 3, "sha256": 5}', '{"step": 3, "sha256": {}}'],
)
def test_a_damaged_state_json_is_a_damaged_checkpoint(tmp_path: Path, straight: Path, text: str) -> None:
    folder = tmp_path / "run" / "checkpoints" / "step-000012"
    shutil.copytree(checkpoint.complete(straight)[-1], folder)
    (folder / "state.json").write_text(text)
    with pytest.raises(UserError, match="cannot be read") as error:
        checkpoint.load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"a_flag_of_next_year": 1}, "update fastdcgan"),
        ({"lr": "fast"}, "config.json: --lr 'fast'"),
        ({"batch_size": None}, "--batch-size None"),
        ({"loss": "other"}, "--loss 'other'"),
        ({"r1": [1]}, r"--r1 \[1\]"),
    ],
)
def test_a_config_from_elsewhere_is_refused(tmp_path: Path, change: dict[str, object], complaint: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"config": {**SMALL.as_json(), **change}}))
    with pytest.raises(UserError, match=complaint):
        train(TrainConfig(run_dir=run, resume=True))


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_it_trains_on_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert load_run(train(small(tmp_path / "run", steps=3))).step == 3


@pytest.mark.parametrize(
    "change", [{"gen_width": 8}, {"image_size": "32"}, {"latent_dim": 1}, {"channels": 3}, {"spectral_norm": True}]
)
def test_a_config_of_other_networks_than_the_checkpoints_is_refused(
    tmp_path: Path, straight: Path, change: dict[str, object]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    (run / "config.json").write_text(json.dumps({"config": {**SMALL.as_json(), **change}}))
    with pytest.raises(UserError, match=r"step 12 is of other networks than config\.json"):
        train(TrainConfig(run_dir=run, resume=True, steps=14))


def test_a_checkpoint_that_links_out_of_its_run_is_refused(tmp_path: Path) -> None:
    run, other = (train(small(tmp_path / name, steps=3)) for name in ("run", "other"))
    file = checkpoint.complete(run)[0] / "generator.safetensors"
    file.unlink()
    file.symlink_to(checkpoint.complete(other)[0] / "generator.safetensors")
    with pytest.raises(UserError, match=r"generator\.safetensors is a link out of its folder"):
        checkpoint.load(file.parent)
    moved = checkpoint.complete(other)[0].rename(tmp_path / "step-000003")
    (other / "checkpoints" / "step-000003").symlink_to(moved)
    shutil.rmtree(other / "checkpoints" / "best", ignore_errors=True)
    with pytest.raises(UserError, match="not one checkpoint"):
        load_run(other)
    (tmp_path / "alias").symlink_to(run)  # the run folder itself may lie anywhere
    shutil.rmtree(file.parent)
    train(small(tmp_path / "alias", steps=3, resume=True))
    assert load_run(tmp_path / "alias").step == 3


def test_a_state_that_links_out_of_its_run_is_refused(straight: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    state = run / "checkpoints" / "step-000012" / "state.json"
    state.rename(tmp_path / "state.json")
    state.symlink_to(tmp_path / "state.json")
    with pytest.raises(UserError, match=r"state\.json is a link out of its folder"):
        checkpoint.load(state.parent)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tutorial_pair_trains(tmp_path: Path, precision: str) -> None:
    changes = {"arch": "tutorial", "image_size": None, "gen_width": None, "precision": precision}
    run = train(small(tmp_path / "run", steps=3, **changes))
    assert load_run(run).generator(torch.randn(2, 8)).shape == (2, 1, 28, 28)


def test_bf16_trains_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole = train(small(tmp_path / "whole", precision="bf16"))
    parts = train(small(tmp_path / "parts", precision="bf16", steps=6))
    train(small(parts, resume=True, steps=12))
    assert_equal_bits(parts, whole, 12)


@pytest.mark.parametrize(("native", "precision", "hinted"), [(True, "auto", 1), (False, "auto", 0), (True, "fp32", 0)])
def test_who_could_train_in_bf16_is_told(
    native: bool,
    precision: str,
    hinted: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("fastdcgan.trainer.native_bf16", lambda: native)
    train(small(tmp_path / "run", steps=1, precision=precision))
    assert capsys.readouterr().err.count("hint: this processor multiplies bfloat16 itself") == hinted


def test_flags_reach_the_data_and_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_data = {"seed": 3, "channels": 3, "loader": "torch", "cache": "off", "cache_dir": tmp_path, "crop": "random"}
    of_data["strict"] = True
    of_step = {"seed": 3, "ema_decay": 0.9, "loss": "lsgan", "label_smoothing": 0.1, "r1": 2.0, "r1_every": 5}
    of_step |= {"spectral_norm": True, "diffaugment": True, "instance_noise": 0.2}
    config = small(tmp_path / "run", beta1=0.4, beta2=0.99, **(of_data | of_step))

    def options_of(name: str, config: TrainConfig) -> dict[str, object]:
        """What the run gives this function of the trainer, where it ends."""
        options: dict[str, object] = {}

        def reached(*_: object, **given: object) -> None:
            options.update(given)
            raise InterruptedError

        with monkeypatch.context() as patched, pytest.raises(InterruptedError):
            patched.setattr(trainer, name, reached)
            train(config)
        return options

    assert of_data.items() <= options_of("open_dataset", config).items()
    for flip, flips in ((True, True), (None, False)):  # of digits, which read differently in a mirror
        options = options_of("TrainStep", dataclasses.replace(config, flip=flip, crop="centre"))
        assert (of_step | {"flip": flips, "betas": (0.4, 0.99)}).items() <= options.items()


def test_what_the_data_turned_out_to_be_is_in_the_configuration(straight: Path) -> None:
    config = load_run(straight).config
    assert config is not None and config.channels == 1 and SMALL.channels is None


@pytest.mark.parametrize(
    "given",
    [
        lambda: torch.device("meta"),
        torch.inference_mode,
        torch.no_grad,
        lambda: torch.autocast("cpu", torch.bfloat16),
        float64_as_default,
    ],
)
def test_a_run_is_loaded_the_same_whatever_the_caller_has_set(straight: Path, given: Callable[[], Any]) -> None:
    """And the caller's random numbers stay where they were."""
    latents = torch.randn(2, 8)
    expected, numbers = load_run(straight).generator(latents), torch.get_rng_state()
    with given():
        run = load_run(straight)
    images = run.generator(latents)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert torch.equal(images, expected) and images.requires_grad
    assert run.discriminator is not None and next(run.discriminator.parameters()).dtype == torch.float32


def test_weights_from_before_batches_were_counted(straight: Path, tmp_path: Path) -> None:
    """By PyTorch up to 0.4, or by programs that leave out what is no floating-point number."""
    generator = load_run(straight).generator
    plain = {name: value for name, value in generator.state_dict().items() if "num_batches" not in name}
    assert len(plain) < len(generator.state_dict())
    torch.save(plain, tmp_path / "g.pth")
    found = load_run(tmp_path / "g.pth").generator
    assert {int(value) for name, value in found.named_buffers() if "num_batches" in name} == {0}
    latents = torch.randn(2, 8)
    assert torch.equal(found(latents), generator(latents))


def test_an_interrupt_while_a_run_begins_leaves_its_folder_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while a notebook keeps the traceback; nor does TensorBoard's thread stay."""

    def interrupted(*given: object) -> None:
        raise KeyboardInterrupt

    threads = threading.active_count()
    for place in (RunFolder, "write_config"), (Watch, "_begin"):
        with monkeypatch.context() as patched:
            patched.setattr(*place, interrupted)
            with pytest.raises(KeyboardInterrupt) as kept:
                train(small(tmp_path / "run", steps=1))
        assert threading.active_count() == threads
        shutil.rmtree(tmp_path / "run" / "samples")
        train(small(tmp_path / "run", steps=1, resume=(tmp_path / "run" / "config.json").exists()))
        shutil.rmtree(tmp_path / "run")
        del kept


def test_a_compiled_run_leaves_no_step_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the next run would find the last one's images still in its memory, until Python looks for cycles."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr("fastdcgan.executors.why_not_compiled", lambda kind: None)
    steps: list[weakref.ref[TrainStep]] = []
    compile_ = TrainStep.compile

    def compile_and_note(step: TrainStep) -> None:
        steps.append(weakref.ref(step))
        compile_(step)

    monkeypatch.setattr(TrainStep, "compile", compile_and_note)
    gc.disable()
    try:
        train(small(tmp_path / "run", compile=True, steps=2))
        assert [step() for step in steps] == [None]
    finally:
        gc.enable()


def test_a_first_step_that_compiles_has_no_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainStep, "compile", lambda step: setattr(step, "compiled", True))
    run = train(small(tmp_path / "run", steps=2, log_every=1, compile=True))
    first, second = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert "images_per_second" not in first and second["images_per_second"] > 0


def test_warnings_are_the_first_processs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    read = TrainStep.read_metrics
    log = logging.getLogger("fastdcgan")
    monkeypatch.setattr(TrainStep, "read_metrics", lambda step: seen.append(log.getEffectiveLevel()) or read(step))
    for first in (True, False):
        monkeypatch.setattr(trainer, "speaks", lambda first=first: first)
        train(small(tmp_path / str(first), steps=1))
    assert seen[0] <= logging.WARNING < seen[-1] and log.level == logging.NOTSET


def test_figures_of_a_log_point(straight: Path) -> None:
    last = json.loads((straight / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["epoch"] == pytest.approx(12 * 16 / 1797)
    assert 50 << 20 < last["peak_memory_bytes"] < 1 << 40  # torch alone is more than 50 MiB


def test_samples_are_the_moving_averages(tmp_path: Path) -> None:
    """From the same noise in every grid, which comes from the seed."""
    run = train(small(tmp_path / "run", seed=1, lr=0.1))  # at which the average and the latest weights soon differ
    noise = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    for step in (6, 12):
        drawn = {}
        for name, ema in (("step", True), ("raw-step", False)):
            with torch.no_grad():
                picture = load_run(run / f"checkpoints/step-{step:06d}", ema=ema).generator(noise)[9, 0]
            grid = Image.open(run / f"samples/{name}-{step:06d}.png")
            drawn[name] = np.asarray(grid)[20:36, 20:36].astype(float)  # in the second row and column of the grid
            assert abs(drawn[name] - (picture.numpy() + 1) * 127.5).max() <= 0.51, f"{name} {step} is rounded"
        assert abs(drawn["step"] - drawn["raw-step"]).max() > 9


def test_new_runs_of_one_second_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "now")
    found = [choose_folder(TrainConfig(), name) for name in ("digits", "digits", "digits", "others")]
    assert len({*found}) == 4 and all(path.is_dir() for path in found), "made, so that nobody else takes it"
    assert choose_folder(TrainConfig(), "ü" * 300).is_dir()  # a name of 600 bytes, where 255 are the most
    shutil.rmtree("runs")
    Path("runs").symlink_to("on a disk that is not mounted")
    with pytest.raises(UserError, match=r"--run-dir runs/digits-.* cannot be written"):
        train(dataclasses.replace(SMALL, run_dir=None))


def test_what_was_mended_is_no_longer_listed(tmp_path: Path) -> None:
    trainer.report_skipped([("a.png", "broken")], tmp_path)
    trainer.report_skipped([], tmp_path)
    assert not (tmp_path / "skipped.txt").exists()


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = checkpoint.load(checkpoint.complete(straight)[-1])
    done: list[str] = []
    sync, rename = checkpoint._sync, Path.rename
    monkeypatch.setattr(checkpoint, "_sync", lambda path: (done.append(path.name), sync(path)))
    monkeypatch.setattr(Path, "rename", lambda path, to: (done.append(f"rename to {to.name}"), rename(path, to))[1])
    files = {f"{kind}.safetensors" for kind in checkpoint.TENSOR_FILES} | {"state.json"}
    folder = checkpoint.save(tmp_path, 12, saved, keep=1)
    assert {*done[:5]} == files
    assert done[5:] == [".step-000012.unfinished", "rename to step-000012", "checkpoints"]
    done.clear()
    checkpoint.keep_best(tmp_path, folder, 0.5)
    assert {*done[:5]} == files
    assert done[5:] == [".best.unfinished", "rename to best", "checkpoints"]


def test_one_checkpoint_is_written_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the copies that wait for a slow disk would fill the memory."""
    moments: list[str] = []
    submit, write = ThreadPoolExecutor.submit, saver.write

    def begin(pool: ThreadPoolExecutor, *work: Any) -> Any:
        moments.append("begun")
        return submit(pool, *work)

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.5)
        moments.append("written")
        return write(*arguments)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", begin)
    monkeypatch.setattr(saver, "write", slowly)
    train(small(tmp_path / "run", steps=2, checkpoint_every=1))
    assert moments == ["begun", "written"] * 2


@pytest.mark.parametrize("damaged", [False, True])
def test_back_to_a_sound_step(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damaged: bool
) -> None:
    """Its own checkpoint is the newest that is sound; those behind it go, a kill would have them taken for sound."""
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    if damaged:
        (run / "checkpoints" / "step-000009" / "state.safetensors").write_bytes(b"")
    found = checkpoint.load_sound(run, 9)
    assert found is not None and found.progress["step"] == (6 if damaged else 9)
    assert capsys.readouterr().err.count("cannot be read") == damaged
    assert [folder.name for folder in checkpoint.complete(run)] == ["step-000006", "step-000009"][: 2 - damaged]
    assert checkpoint.load_sound(run, 2) is None
    assert len(checkpoint.complete(run)) == 2 - damaged


def test_a_process_goes_on_in_the_data_where_it_was(straight: Path) -> None:
    """And among more or fewer of them where all have been, without the files that any of them found broken."""
    state = {"images": 40, "count": 9, "listing": "", "world_size": 2}
    each = [state | {"taken": 23, "unusable": [3]}, state | {"taken": 20, "unusable": [5, 3]}]
    saved = checkpoint.load(checkpoint.complete(straight)[-1])
    saved = dataclasses.replace(saved, progress=saved.progress | {"data": each})
    assert [saver.position(saved, World(rank, 2)) for rank in range(2)] == each
    # The second has seen every other element from 1 to 39.
    assert saver.position(saved, World(1, 3)) == state | {"taken": 41, "world_size": 1, "unusable": [3, 5]}


def test_epochs_end_where_they_were_to_end_though_files_broke(tmp_path: Path) -> None:
    """What a resumed run finds of the files is less than what the run began with."""
    photos, run = tmp_path / "photos", tmp_path / "run"
    photos.mkdir()
    for i in range(24):
        Image.effect_noise((16, 16), 90).save(photos / f"{i:02}.png")
    config = small(run, data=str(photos), steps=None, epochs=4.0, batch_size=8, cache_dir=tmp_path / "cache")
    train(config)
    shutil.rmtree(run / "checkpoints" / "step-000012")
    for i in range(8):
        (photos / f"{i:02}.png").write_bytes(b"")
    train(dataclasses.replace(config, resume=True))
    assert checkpoint.complete(run)[-1].name == "step-000012"


def test_in_a_notebook(straight: Path, tmp_path: Path) -> None:
    """What can be completed, what a mistake and a loaded run look like, and that no thread stays."""
    script = "import fastdcgan; print(*dir(fastdcgan)); print(fastdcgan.__version__)"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    names, version = told.stdout.splitlines()
    assert {"train", "TrainConfig", "load_run", "from_pretrained"} <= set(names.split())
    assert version == importlib.metadata.version("fastdcgan")
    assert len(repr(load_run(straight))) < 1800 and "ConvTranspose2d" not in repr(load_run(straight))
    for mistake in ("digits", {"data": "digits"}, TrainConfig):
        with pytest.raises(UserError, match=r"train takes a TrainConfig, not .*: train\(TrainConfig\(data=") as error:
            train(mistake)  # type: ignore[arg-type]
    assert error.value._render_traceback_() == [f"UserError: {error.value}"]
    assert Interrupted(2, straight)._render_traceback_() == [
        f"Interrupted: stopped by a signal; a checkpoint is saved in {straight}"
    ]
    train(small(tmp_path / "run"))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


def test_figures_are_of_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "means", lambda _, values: dict.fromkeys(values, 0.7))
    last = metrics(train(small(tmp_path / "run", steps=1)))[-1]
    assert {last[name] for name in ("loss_d", "loss_g", "d_real", "d_fake")} == {0.7}


def test_one_process_that_is_to_end_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that got no signal itself ends as the one that did: torchrun would start it anew otherwise."""
    gather = World.gather
    monkeypatch.setattr(World, "gather", lambda world, value: [value, 15] if value == 0 else gather(world, value))
    with pytest.raises(trainer.Interrupted) as ended:
        train(small(tmp_path / "run"))
    assert ended.value.signal_number == 15 and ended.value.folder == tmp_path / "run"
    assert not isinstance(ended.value, Exception), "a loop over runs that goes on after those that fail ends too"
    assert [each.name for each in checkpoint.complete(tmp_path / "run")] == ["step-000001"]


def test_what_the_bar_says_of_a_log_point(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    real = torch.zeros(4, 16, 16, 1, dtype=torch.uint8)
    watch = Watch(tmp_path, small(tmp_path), real, torch.device("cpu"), 0)
    figures = {"loss_d": 1.25, "loss_g": 0.75, "d_real": 0.6, "d_fake": 0.4, "grad_norm_d": 1.0, "grad_norm_g": 1.0}
    watch.log({"step": 4, "images_per_second": 1234.4, **figures})
    watch.close()
    assert watch.status == "1,234 images/s  loss D 1.25 G 0.75  D(x) 0.60  D(G(z)) 0.40"


def test_a_run_computes_in_the_precision_that_was_asked_for(tmp_path: Path) -> None:
    runs = [train(small(tmp_path / precision, steps=2, precision=precision)) for precision in ("fp32", "bf16")]
    weights = [tensors(run, 2)["generator.main.0.weight"] for run in runs]
    assert not torch.equal(*weights)


def test_the_rate_is_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.Pace, "tick", lambda pace, done: setattr(pace, "step_seconds", 0.5))
    last = json.loads((train(small(tmp_path / "run", steps=1)) / "metrics.jsonl").read_text())
    assert last["images_per_second"] == 16 / 0.5


def test_the_millionth_step_comes_after_the_one_before(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000, 999_000):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    assert [checkpoint.step_of(folder) for folder in checkpoint.complete(tmp_path)] == [999_000, 999_999, 1_000_000]


def test_a_resumed_run_knows_how_varied_its_pictures_were(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "quality.jsonl").write_text('{"step": 300, "diversity": 0.01, "nearest": 0.01}\n')
    real = torch.randint(0, 256, (4, 16, 16, 1), dtype=torch.uint8)
    watch = Watch(tmp_path, small(tmp_path), real, torch.device("cpu"), 300)
    watch.close()
    assert watch.alarms.best_diversity == 0.01


def test_epochs_are_whole_where_only_the_batches_change(tmp_path: Path) -> None:
    run, images = tmp_path / "run", 1797
    train(small(run, steps=None, epochs=0.3, checkpoint_every=9, keep=9))
    for folder in checkpoint.complete(run)[1:]:
        shutil.rmtree(folder)
    train(small(run, resume=True, steps=None, batch_size=8))
    seen = json.loads((checkpoint.complete(run)[-1] / "state.json").read_text())["images"]
    assert 0.3 * images <= seen < 0.3 * images + 8


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 8},
        {"seed": 1},
        {"crop": "random"},
        {"precision": "bf16"},
        {"loss": "hinge"},
        {"label_smoothing": 0.1},
        {"r1": 1.0},
        {"r1_every": 4},
        {"diffaugment": True},
        {"instance_noise": 0.1},
        {"lr_g": 1e-3},
        {"lr_d": 1e-3},
        {"beta2": 0.9},
        {"ema_decay": 0.9},
        {"compile": True},
        {"sync_batchnorm": True},
        {"lr_decay": "linear"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_change_that_makes_it_another_run_is_said(
    change: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    ((name, now),) = change.items()
    trainer.warn_of_changes(dataclasses.replace(SMALL, **change), SMALL, False)
    before = getattr(SMALL, name)
    assert capsys.readouterr().err.splitlines() == [
        f"note: {name} changes from {before} to {now}: the run is no longer the one that never stopped"
    ]


@pytest.mark.parametrize("schedule", [{"lr_decay": "linear"}, {"instance_noise": 0.1}])
def test_other_lengths_of_a_run_with_a_schedule_are_said(
    schedule: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Learning rates and noise fall to 0 at its last step."""
    config = dataclasses.replace(SMALL, **schedule)
    trainer.warn_of_changes(dataclasses.replace(config, steps=20), config, False)
    assert "note: steps changes from 12 to 20" in capsys.readouterr().err


def test_what_a_run_took_of_the_memory_is_in_mebibytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = SimpleNamespace(ru_maxrss=1536 * 1024, ru_utime=0.0, ru_stime=0.0, ru_nivcsw=0)  # KiB, as Linux counts
    monkeypatch.setattr("resource.getrusage", lambda _: usage)
    assert trainer.peak_memory(torch.device("cpu")) == 1536 << 20
    train(small(tmp_path / "run", steps=1))
    assert "(peak memory 1,536 MiB)" in capsys.readouterr().err


def test_a_checkpoint_has_what_each_process_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its random numbers, its sums and its place in the data."""
    monkeypatch.setattr(World, "gather", lambda _, own: [own, (own[0] ^ 1, own[1] + 1, {"taken": 7})])
    run, stream = SimpleNamespace(path=tmp_path, config=SMALL), SimpleNamespace(state=lambda: {"taken": 5}, images=9)
    (tmp_path / "config.json").write_text("{}")
    step = small_step()
    saving = saver.Saver(run, World(0, 2), 12)  # type: ignore[arg-type]
    saving.save(step, stream, 3)  # type: ignore[arg-type]
    saving.wait()
    saved = checkpoint.load(tmp_path / "checkpoints" / "step-000003")
    random, sums = saved.tensors["state"]["rng"], saved.tensors["state"]["sums"]
    assert torch.equal(sums, torch.stack((step.sums, step.sums + 1)))
    assert torch.equal(random[1], random[0] ^ 1) and saved.progress["data"] == [{"taken": 5}, {"taken": 7}]
