"""The arithmetic between what is timed and what is published."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from fastdcgan.bench import end_to_end, kernels_table, overhead, scaling
from fastdcgan.bench.contenders import Shape

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
