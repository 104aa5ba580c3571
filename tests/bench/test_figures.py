"""The arithmetic between what is timed and what is published."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from fastdcgan import patches, winograd
from fastdcgan.bench import (
    ablations,
    contenders,
    data_path,
    end_to_end,
    environment,
    kernels_table,
    overhead,
    scaling,
)
from fastdcgan.bench.contenders import Entry, Example, Shape, Skilled

CPU = torch.device("cpu")


def test_scaling_is_a_process_beside_one_alone(monkeypatch):
    rates = {
        ("weak", 1): [90, 100, 300],
        ("weak", 2): [150, 160, 170],
        ("strong", 1): [100] * 3,
        ("strong", 2): [50] * 3,
    }
    monkeypatch.setattr(scaling, "measure", lambda row, *_: rates[row.scaling, row.processes].pop())
    rows = scaling.scaling(64, 64, 2, CPU)
    assert [(row.scaling, row.processes, row.batch_size, row.efficiency) for row in rows] == [
        ("weak", 1, 64, 1), ("weak", 2, 64, 0.8), ("strong", 1, 64, 1), ("strong", 2, 32, 0.25),
    ]  # fmt: skip


def test_end_to_end_is_the_first_epoch_and_the_median_of_the_others(monkeypatch):
    seconds = {"example": iter([10.0, 5.0, 4.0]), "fast-eager": iter([4.0, 2.0, 1.0])}

    class Fake:
        def __init__(self, runner, entry, *_):
            self.seconds = seconds[entry.name]

        def ask(self, what):
            return (100, next(self.seconds)) if what == "epoch" else None

    monkeypatch.setattr(end_to_end, "Contestant", lambda *arguments: contextlib.nullcontext(Fake(*arguments)))
    example, fast = end_to_end.bench_batch_size(Path(), Shape(), CPU, ("example", "fast-eager"), "fp32", 3, "")
    assert (example.first_epoch, example.later_epochs) == (10, 22.5)
    assert (fast.first_epoch, fast.later_epochs, fast.images) == (25, 75, 100)
    assert (fast.first_ratio, fast.later_ratio) == (2.5, 75 / 22.5)


@pytest.mark.parametrize(("which", "passes"), [("forward", 3), ("both", 8)])
def test_a_kernels_bandwidth_beside_a_copys(monkeypatch, which, passes):
    """A copy reads and writes once; forward reads twice and writes once, backward reads four times and writes once."""
    once = 8 * 16 * 4 * 4 * 2
    monkeypatch.setattr(
        kernels_table, "milliseconds", lambda run, _: {"cpu": 2.0 if hasattr(run.func, "__self__") else 4.0}
    )
    (rows,) = kernels_table.measure([(8, 16, 4, 4)], "bf16", "cpu", 1)
    found = next(row for row in rows if row["variant"] == "eager" and row["pass"] == which)
    assert found["gb_per_s"] == pytest.approx(passes * once / 4e-3 / 1e9)
    assert found["copy_gb_per_s"] == pytest.approx(2 * once / 2e-3 / 1e9)
    assert found["fraction_of_copy"] == pytest.approx(found["gb_per_s"] / found["copy_gb_per_s"])


def test_following_a_run_costs_what_it_takes_at_its_interval(monkeypatch):
    """20 steps take 2 s; a log point 1 ms, a grid 4 ms, a checkpoint 1 s, which at 0.5% stretches its interval."""
    took = iter([2.0, 0.001, 0.004, 1.0])
    monkeypatch.setattr(overhead, "seconds", lambda *_, **__: next(took))
    found = overhead.overhead(Shape(4, (16, 16), latent_dim=8, width=4), CPU, "fp32", "fast-eager")
    assert found["step_seconds"] == 0.1
    assert [found[name]["every"] for name in ("log", "sample", "checkpoint")] == [20, 100, 2000]
    assert found["share"] == pytest.approx(0.001 / 2 + 0.004 / 10 + 1 / 200)


class Clock:
    """Two clocks that only go on when told: `now`, and processor time `cpu`."""

    def __init__(self, monkeypatch, module):
        self.now, self.cpu = 100.0, 50.0
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(module.time, "process_time", lambda: self.cpu)

    def pass_by(self, seconds, cpu_seconds=0.0):
        self.now += seconds
        self.cpu += cpu_seconds


def test_an_ablation_is_beside_direct_convolutions_of_the_same_executor(monkeypatch):
    """Eager takes 4 s, compiled 2, and twice that of processor time; with matrix products 1 s more, with Winograd's
    half as long."""

    def settings():
        return patches.WIDEST_GRID, patches.FAST_SGEMM, winograd.PAYS_HERE

    clock, usual = Clock(monkeypatch, ablations), settings()

    def fast_step(shape, source, index, precision, executor):
        prepared = settings()

        def run():
            assert settings() == prepared
            seconds = {"fast-eager": 4.0, "fast-compiled": 2.0}[executor] + 1.0 * (patches.WIDEST_GRID > 0)
            assert patches.FAST_SGEMM is (patches.WIDEST_GRID > 0)
            clock.pass_by(*(seconds / (1 + winograd.PAYS_HERE) * times for times in (1, 2)))

        return None, run

    monkeypatch.setattr(ablations, "fast_step", fast_step)
    rows = ablations.ablate(Shape(4, (16, 16)), repetitions=2)
    assert [row.variant for row in rows[:3]] == [
        "eager, direct convolutions",
        "eager, matrix products on small grids",
        "eager, Winograd's",
    ]
    assert [row.time_to_direct for row in rows] == [1, 5 / 4, 1 / 2, 1, 3 / 2, 1 / 2]
    assert all(row.cpu_time_to_direct == row.time_to_direct for row in rows)
    assert [row.cpu_seconds for row in rows[:2]] == [[8.0, 8.0], [10.0, 10.0]]
    assert usual == settings()


def test_a_scaling_worker_counts_the_images_of_all(monkeypatch, tmp_path):
    clock = Clock(monkeypatch, scaling)
    ended: list[str] = []
    world = SimpleNamespace(
        rank=0, size=3, broadcast_object=lambda value: value, leave=lambda: ended.append("processes")
    )
    monkeypatch.setattr(scaling, "join", lambda device: world)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    step = SimpleNamespace(synchronise=lambda: None)
    monkeypatch.setattr(scaling, "TrainStep", lambda *_, **given: step if given["world"] is world else None)
    executor = SimpleNamespace(run=lambda: clock.pass_by(0.5), close=lambda: ended.append("graphs"))
    monkeypatch.setattr(scaling, "make_executor", lambda step, **_: executor)
    scaling.worker(8, 16, tmp_path / "rate.json")
    assert json.loads((tmp_path / "rate.json").read_text()) == 8 * 3 / 0.5
    assert ended == ["graphs", "processes"], "NCCL waits for the graphs"


def test_processes_that_scale_have_a_core_each(monkeypatch):
    def run(command, check, env):
        assert (env["OMP_NUM_THREADS"], "--nproc-per-node=2" in command) == ("1", True)
        Path(command[-1]).write_text("12.5")

    monkeypatch.setattr(scaling.subprocess, "run", run)
    assert scaling.measure(scaling.Row("weak", 2, 8), 16, CPU) == 12.5


def test_images_from_the_cache_are_counted_one_by_one(monkeypatch):
    clock, source = Clock(monkeypatch, data_path), torch.zeros(10, 2, 2, 3, dtype=torch.uint8)
    stream = SimpleNamespace(source=source, index=torch.arange(7), advance=lambda: clock.pass_by(0.25))
    assert data_path.from_cache(stream) == 7 / 0.25


@pytest.mark.parametrize("at_hand", [False, True])
def test_getting_memory_at_hand_is_not_counted(monkeypatch, at_hand):
    """100 s; opening the data takes 3 and each of two batches 1."""
    clock = Clock(monkeypatch, data_path)

    class Memory:
        def __setitem__(self, *_):
            clock.pass_by(100)

    stream = SimpleNamespace(
        advance=lambda: clock.pass_by(1), source=torch.zeros(8, 1), index=torch.arange(4), close=lambda: None
    )
    dataset = SimpleNamespace(count=8, stream=lambda batch: stream)
    monkeypatch.setattr(data_path, "np", SimpleNamespace(empty=lambda *_, **__: Memory(), uint8=None))
    monkeypatch.setattr(data_path, "opened", lambda *_: (clock.pass_by(3), dataset)[1])
    assert data_path.first_epoch(Path(), 8, 4, 8, CPU, "torch", "host", memory_at_hand=at_hand) == 8 / 5


def test_opening_the_data_belongs_to_the_first_epoch(monkeypatch):
    clock = Clock(monkeypatch, end_to_end)
    runner = end_to_end.Runner(Entry("example", "fp32"), Path(), Shape(), CPU, Path())
    runner.opened, runner.train = 3.0, lambda: (clock.pass_by(2.0), 64)[1]
    assert [runner.epoch(), runner.epoch()] == [(64, 5.0), (64, 2.0)]


def test_an_epoch_of_ours_has_the_images_it_trained_on(monkeypatch, tmp_path):
    for i in range(10):
        Image.new("RGB", (16, 16), (25 * i, 0, 0)).save(tmp_path / f"{i}.png")
    steps = []
    monkeypatch.setattr(end_to_end.contenders, "fast_step", lambda *_, **__: (None, lambda: steps.append(1)))
    shape = Shape(4, (16, 16), width=4)
    _, epoch = end_to_end.prepare_fast(Entry("fast-eager", "fp32"), tmp_path, shape, CPU, tmp_path / "cache")
    steps.clear()
    assert (epoch(), len(steps)) == (8, 2)


def test_what_following_costs_in_words():
    costs = {"log": (0.0015, 20, 0.001), "sample": (0.25, 1_000, 0.002), "checkpoint": (1.5, 2_000, 0.0043)}
    found = {name: dict(zip(("seconds", "every", "share"), cost, strict=True)) for name, cost in costs.items()}
    assert overhead.sentence({"share": 0.0073, **found}) == (
        "following a run costs 0.73% of its steps' time: log 1.5 ms every 20 steps (0.10%), sample 250.0 ms every 1,000"
        " steps (0.20%), checkpoint 1,500.0 ms every 2,000 steps (0.43%)"
    )


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_measurement_names_its_commit_and_whether_files_were_changed_since(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "REPOSITORY", tmp_path)
    monkeypatch.setenv("COMMIT", "given")
    assert environment.commit() == "given"  # a copy without git

    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    (tmp_path / "bench").mkdir()
    for name in ("bench/step.py", "README.md"):
        (tmp_path / name).write_text("first")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    (tmp_path / "README.md").write_text("what was measured")
    clean = environment.commit()
    (tmp_path / "bench" / "step.py").write_text("second")
    assert len(clean) == 10 and environment.commit() == clean + "+"


def test_the_tuned_example_takes_the_steps_of_the_plain_one(monkeypatch):
    """What it computes is compared uncompiled."""
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)
    switches = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    shape, real = Shape(4, (16, 16), latent_dim=8, width=4), torch.rand(4, 3, 16, 16) * 2 - 1
    tuned, plain = Skilled(shape, CPU, "fp32"), Example(shape, CPU, "tf32")
    assert torch.backends.cudnn.allow_tf32  # as PyTorch has it on a GPU
    for contender in (tuned, plain):
        torch.manual_seed(3)
        for _ in range(2):
            contender.step(real)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = switches
    for name in ("generator", "discriminator"):
        states = (getattr(contender, name).state_dict().values() for contender in (tuned, plain))
        for a, b in zip(*states, strict=True):
            assert torch.allclose(a, b, atol=1e-6), name


def test_contenders_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    gpu = torch.device("cuda")
    assert [(entry.name, entry.precision) for entry in contenders.entries(contenders.NAMES, "bf16", gpu)] == [
        ("example", "tf32"), ("example-fp32", "fp32"), ("skilled", "bf16"), ("skilled", "fp16"),
        ("fast-eager", "bf16"), ("fast-compiled", "bf16"), ("fast-captured", "bf16"),
    ]  # fmt: skip


def test_a_measurement_names_the_threads_it_used():
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 3)
    try:
        assert environment.device_facts(CPU)["threads"] == threads + 3
    finally:
        torch.set_num_threads(threads)
