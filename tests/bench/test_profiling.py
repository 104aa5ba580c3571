from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from fastdcgan.bench import profiling
from fastdcgan.bench.profiling import in_order, live_bytes, profile_training
from fastdcgan.cli import main
from fastdcgan.errors import UserError
from fastdcgan.spans import span

SMALL = {"data": "fake", "image_size": (16, 16), "batch_size": 4, "width": 4, "precision": "fp32", "steps": 2}


def test_table_trace_and_memory(tmp_path, capsys):
    profile_training(**SMALL, device=torch.device("cpu"), executor="fast-eager", out=tmp_path, nsight=False)
    assert "aten::" in (tmp_path / "table.txt").read_text()
    names = [event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]]
    assert {"data path", "data", "generator", "discriminator", "backward", "optimizer"} <= set(names)
    assert names.count("data path") == SMALL["steps"]
    rows = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert max(live for _, live in rows) > 10_000
    assert "optimizer" in capsys.readouterr().out


def test_kernels_in_order():
    """Two steps of two kernels, given out of order: the last step's lines with their gaps, and sums over a step."""
    spans = [(20.0, 24.0, "a"), (0.0, 4.0, "a"), (5.0, 7.0, "b"), (26.5, 28.0, "b")]
    lines, summary = in_order(spans, steps=2)
    assert [line.split() for line in lines] == [
        ["4.00", "us", "after", "0.00", "a"],
        ["1.50", "us", "after", "2.50", "b"],
    ]
    assert summary == "a step: 2.0 kernels, busy 6 us of 14"


def test_what_ran_on_a_gpu_is_kernels_and_copies_and_not_the_spans_around_them():
    """Kineto lays a span of `record_function` on the GPU's time line too, over the kernels inside it."""

    def event(name, start, end, device, annotation=False):
        return FunctionEvent(
            id=0, name=name, thread=0, start_us=start, end_us=end, device_type=device, is_user_annotation=annotation
        )

    events = [
        event("aten::mm", 0, 3, DeviceType.CPU),
        event("generator", 4, 9, DeviceType.CUDA, annotation=True),
        event("gemm", 4, 6, DeviceType.CUDA),
        event("Memcpy HtoD", 7, 9, DeviceType.CUDA),
    ]
    spans = profiling.device_spans(SimpleNamespace(events=lambda: events))
    assert spans == [(4, 6, "gemm"), (7, 9, "Memcpy HtoD")]


def test_nsight_needs_a_gpu(tmp_path):
    with pytest.raises(UserError, match="--nsight"):
        profile_training(**SMALL, device=torch.device("cpu"), executor="fast-eager", out=tmp_path, nsight=True)


@pytest.mark.parametrize("wrong", [["--width", "0"], ["--batch-size", "1"], ["--steps", "0"]])
def test_impossible_numbers_are_named(wrong, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["profile", *wrong])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"fastdcgan: {' '.join(wrong)} is too small")


def test_spans_are_nothing_while_nobody_listens():
    assert span("step") is span("another")


def test_memory_that_is_freed_is_not_live():
    def step():
        for _ in range(3):
            torch.ones(250_000)  # a million bytes, gone before the next

    assert max(live for _, live in live_bytes(step)) == 1_000_000


def test_the_course_of_memory_is_in_microseconds(monkeypatch):
    def record(name, nanoseconds, change):
        return SimpleNamespace(name=lambda: name, start_ns=lambda: nanoseconds, nbytes=lambda: change)

    records = [record("[memory]", 9_000, -40), record("aten::add", 1_000, 0), record("[memory]", 2_000, 100)]
    profiler = SimpleNamespace(profiler=SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: records)))
    monkeypatch.setattr(profiling, "profile", lambda **_: contextlib.nullcontext(profiler))
    assert live_bytes(lambda: None) == [(0, 100), (7, 60)]
