"""How often a run logs, samples and saves."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdcgan import pace
from fastdcgan.config import TrainConfig
from fastdcgan.distributed import ALONE, World
from fastdcgan.pace import SHARE, TRIALS, Pace, stretched
from fastdcgan.trainer import train

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("every", "seconds", "step_seconds", "expected"),
    [(100, 0.02, 0.1, 100), (100, 0.05, 0.1, 100), (100, 0.051, 0.1, 200), (20, 0.002, 0.00065, 620)],
)
def test_the_least_multiple_that_costs_little(every: int, seconds: float, step_seconds: float, expected: int) -> None:
    found = stretched(every, seconds, step_seconds)
    assert found == expected
    assert seconds <= SHARE * found * step_seconds * (1 + 1e-9)
    assert found == every or seconds > SHARE * (found - every) * step_seconds


def test_what_was_asked_for_stays_and_the_rest_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])
    tested = Pace({"log": 5, "sample": None, "checkpoint": None}, ALONE, CPU)
    assert tested.every == {"log": 5, "sample": 100, "checkpoint": 500}
    tested.start(0)
    now[0] = 1.0
    tested.tick(1000)  # a millisecond a step
    for cost in (9.0, 0.05, 7.0):  # warming up, the shorter one, one that was held up
        for name in ("log", "sample"):
            with tested.measured(name):
                now[0] += cost
    assert tested.every == {"log": 5, "sample": 10_000, "checkpoint": 500}
    assert not tested.settled
    assert tested.due("sample", 20_000) and not tested.due("sample", 20_100) and tested.due("log", 15)


def test_work_that_is_always_slow_is_still_done_every_ten_minutes() -> None:
    """A run of which nothing is saved any more would lose everything to a kill."""
    for seconds in (20.0, 3600.0):
        assert stretched(500, seconds, 0.01) == 60_000
    assert stretched(500, 20.0, 10.0) == 500


@pytest.mark.parametrize(("step_seconds", "expected"), [(0.001, 5000), (0.5, 10), (4.0, 1), (60.0, 1)])
def test_processes_hear_of_a_signal_within_seconds(
    monkeypatch: pytest.MonkeyPatch, step_seconds: float, expected: int
) -> None:
    now = [0.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])
    tested = Pace({"log": None, "sample": None, "checkpoint": None}, ALONE, CPU)
    assert all(tested.listens(done) for done in range(20)), "no step has been timed"
    now[0] = 20 * step_seconds
    tested.tick(20)
    assert [done for done in range(1, 2 * expected + 1) if tested.listens(done)] == [expected, 2 * expected]


def test_a_run_remembers_its_intervals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "USUAL", {"log": 2, "sample": 3, "checkpoint": 4})
    monkeypatch.setattr(pace, "SHARE", 1e-9)  # anything costs too much
    small = TrainConfig(
        data="digits", image_size="16", gen_width=4, latent_dim=8, batch_size=16, device="cpu", log_every=2, steps=13
    )
    run = train(TrainConfig(**{**small.__dict__, "run_dir": tmp_path / "run"}))
    config = json.loads((run / "config.json").read_text())["config"]
    assert config["log_every"] == 2
    assert config["sample_every"] > 13 and config["sample_every"] % 3 == 0
    assert config["checkpoint_every"] > 13 and config["checkpoint_every"] % 4 == 0
    drawn = sorted(path.stem for path in (run / "samples").glob("step-*"))
    assert drawn == [f"step-{step:06d}" for step in (3, 6, 9, 13)], "three times as usual, and at the end"


def test_the_time_of_a_step_is_that_of_the_latest_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])
    tested = Pace({"log": None, "sample": None, "checkpoint": None}, ALONE, CPU)
    for done, at, expected in ((20, 20.0, 1.0), (40, 22.0, 0.1)):
        now[0] = at
        tested.tick(done)
        assert tested.step_seconds == pytest.approx(expected)


def test_what_comes_before_the_start_is_no_steps_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step compiles, for a minute."""
    now = [0.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])
    tested = Pace({"log": None, "sample": None, "checkpoint": None}, ALONE, CPU)
    now[0] = 60.0
    tested.start(1)
    now[0] = 62.0
    tested.tick(21)
    assert tested.step_seconds == pytest.approx(0.1)


def test_a_log_point_without_a_step_before_it_times_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])
    tested = Pace({"log": None, "sample": None, "checkpoint": None}, ALONE, CPU)
    tested.start(5)
    tested.tick(5)
    assert tested.step_seconds == float("inf")


@dataclasses.dataclass(frozen=True)
class Second(World):
    """Another process than the first, which has found `said`."""

    said: int = 0

    def broadcast_object(self, value: Any) -> Any:
        return self.said


def test_all_processes_keep_the_intervals_of_the_first() -> None:
    """Or one of them would wait for the others at a step at which they do not come."""
    tested = Pace({"log": None, "sample": None, "checkpoint": None}, Second(1, 2, said=700), CPU)
    tested.start(0)
    tested.tick(20)
    assert tested.listening == 700
    for _ in range(TRIALS):
        with tested.measured("sample"):
            pass
    assert tested.every == {"log": 20, "sample": 700, "checkpoint": 500}


def test_a_measurement_begins_and_ends_when_the_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    tested = Pace({"log": None, "sample": None, "checkpoint": None}, ALONE, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append(f"wait for the {device}"))
    monkeypatch.setattr(pace.time, "perf_counter", lambda: order.append("look") or float(len(order)))
    with tested.measured("log"):
        order.append("work")
    assert order == ["wait for the cuda", "look", "work", "wait for the cuda", "look"]
