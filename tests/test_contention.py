"""Whether a run notices that other programs use its cores."""

from __future__ import annotations

import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastdcgan import contention, watch
from fastdcgan.config import TrainConfig
from fastdcgan.contention import Contention, Reading, is_shared
from fastdcgan.trainer import train

START = Reading(100.0, 50.0, 1_000)


def later(seconds: float, processor: float, switches: int, since: Reading = START) -> Reading:
    return Reading(since.wall + seconds, since.processor + processor, since.switches + switches)


@pytest.mark.parametrize(
    ("processor", "switches", "shared"),
    [  # in 10 seconds on two cores, as measured
        pytest.param(19.9, 380, False, id="alone"),
        pytest.param(12.7, 1_900, True, id="beside a busy core"),
        pytest.param(9.9, 2_560, True, id="beside another run"),
        pytest.param(9.9, 90, False, id="waiting for a disk, or compiling"),
        pytest.param(19.5, 3_000, False, id="its own decoding threads"),
    ],
)
def test_what_is_taken_for_shared(processor: float, switches: int, shared: bool) -> None:
    assert is_shared(2, START, later(10, processor, switches)) is shared


def test_switches_are_counted_by_processor_time() -> None:
    """Sixteen threads have eight times those of two, also where they wait for a disk now and then."""
    assert not is_shared(16, START, later(10, 100, 19 * 100))
    assert is_shared(16, START, later(10, 100, 150 * 100))
    assert is_shared(2, START, later(10, 2.5, 150 * 2.5)), "beside seven others"


def test_what_is_read_is_of_all_threads_and_of_switches_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    used = SimpleNamespace(ru_utime=3.0, ru_stime=0.5, ru_nvcsw=1_000, ru_nivcsw=70)
    monkeypatch.setattr(resource, "getrusage", {resource.RUSAGE_SELF: used}.get)
    monkeypatch.setattr(contention.sys, "platform", "linux")
    found = contention.read()
    assert found is not None and (found.processor, found.switches) == (3.5, 70)
    monkeypatch.setattr(contention.sys, "platform", "darwin")
    assert contention.read() is None


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[Reading | None]:
    """What `read` gives, one thing; two threads, none told to sleep."""
    given: list[Reading | None] = [START]
    monkeypatch.setattr(contention, "read", lambda: given[0])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    return given


def after(tested: Contention, readings: list[Reading | None], *uses: tuple[float, float, int]) -> list[bool]:
    """What `tested` finds where the process uses this much from one look to the next."""
    found, last = [], START
    for use in uses:
        last = later(*use, since=last)
        readings[:] = [last]
        found.append(tested.found())
    return found


ALONE, SHARED = (5.0, 9.9, 190), (5.0, 5.0, 1_280)


def test_two_looks_in_a_row_tell_once(readings: list[Reading | None]) -> None:
    tested = Contention()
    assert after(tested, readings, SHARED, ALONE, SHARED, SHARED, SHARED, SHARED) == [False] * 3 + [True, False, False]


def test_looks_that_follow_closely_count_as_one(readings: list[Reading | None]) -> None:
    tested = Contention()
    short = (0.5, 0.5, 128)
    assert after(tested, readings, *[short] * 8) == [False] * 7 + [True]


def test_nothing_is_said_where_it_would_not_help(
    readings: list[Reading | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert not any(after(Contention(), readings, SHARED, SHARED, SHARED))
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert not any(after(Contention(), readings, SHARED, SHARED, SHARED))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    readings[:] = [None]  # a system that does not say
    assert not Contention().found()


def test_a_run_says_it_once(
    tmp_path: Path, readings: list[Reading | None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [START]

    def read() -> Reading:
        now[0] = later(*SHARED, since=now[0])
        return now[0]

    monkeypatch.setattr(contention, "read", read)
    train(TrainConfig(image_size="16", gen_width=4, batch_size=4, steps=8, log_every=1, run_dir=tmp_path / "run"))
    assert capsys.readouterr().err.count("OMP_WAIT_POLICY=passive") == 1


def test_who_computes_on_a_gpu_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "Quality", lambda *_: SimpleNamespace(varied=True))
    (tmp_path / "samples").mkdir()
    real = torch.zeros(64, 16, 16, 1, dtype=torch.uint8)
    looks = [watch.Watch(tmp_path, TrainConfig(), real, torch.device(kind), 0) for kind in ("cpu", "meta")]
    assert [each.contention is None for each in looks] == [False, True]
    for each in looks:
        each.close()
