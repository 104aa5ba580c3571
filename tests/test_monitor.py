"""What a run writes for people: lines that are whole, grids as torchvision lays them out."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.utils import make_grid

from fastdcgan.grid import grid, save_grid
from fastdcgan.monitor import Monitor


def test_a_line_that_does_not_fit_on_the_disk_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = Monitor(tmp_path, 0, "")
    monitor.board.close()  # its thread, at any moment, would meet the limit too
    monkeypatch.setattr(monitor.board, "add_scalar", lambda *_: None)
    monitor.log({"step": 1, "loss": 2.0})
    size, limits = (tmp_path / "metrics.jsonl").stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 9, limits[1]))
    try:
        with pytest.raises(OSError, match="no room for a whole line"):
            monitor.log({"step": 2, "loss": 3.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    monitor.log({"step": 3, "loss": 4.0})
    monitor.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 3]


def test_figures_that_are_not_finite_are_json(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, 0, "")
    monitor.log({"step": 1, "loss": math.nan, "norm": math.inf})
    monitor.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "norm": null}\n'
    again = Monitor(tmp_path, 1, "")
    again.close()
    assert math.isnan(again.before["metrics"][0]["loss"])


def test_a_grid_is_about_as_wide_as_high(tmp_path: Path) -> None:
    for height, width in ((8, 32), (32, 8)):
        grid = save_grid(torch.zeros(64, 3, height, width), tmp_path / "grid.png")
        assert 0.5 < grid.shape[2] / grid.shape[1] < 2


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (2, 1, 8, 8), (64, 3, 32, 32), (5, 4, 40, 8), (7, 3, 8, 64)], ids=str)
def test_a_grid_is_torchvisions(shape: tuple[int, ...]) -> None:
    images = torch.rand(shape) * 2 - 1
    columns = max(1, round((shape[0] * shape[2] / shape[3]) ** 0.5))
    expected = make_grid(images, nrow=columns, padding=2, pad_value=1.0)
    assert torch.equal(grid(images).expand_as(expected), expected)  # make_grid triples a single channel


def test_a_resumed_monitor_keeps_what_was_logged_at_its_step(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, 0, "")
    for step in (1, 2, 3):
        monitor.log({"step": step, "loss": 2.0})
    monitor.close()
    again = Monitor(tmp_path, 2, "")
    again.close()
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in kept] == [line["step"] for line in again.before["metrics"]] == [1, 2]


def test_tensorboard_shows_each_point_once_at_its_step(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    for resumed, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        if resumed:
            time.sleep(1.1)  # a file of events is named after its second
        monitor = Monitor(tmp_path, resumed, "")
        for step in steps:
            monitor.log({"step": step, "loss": step / 2 + resumed})
            monitor.picture(f"raw-step-{step:06d}", torch.zeros(4, 3, 8, 8), step)
        monitor.close()
    board = EventAccumulator(str(tmp_path)).Reload()
    assert board.Tags()["images"] == ["raw"]
    assert [(point.step, point.value) for point in board.Scalars("loss")] == [(1, 0.5), (2, 1.0), (3, 3.5), (4, 4.0)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the one that it has here
def test_tensorboard_goes_on_once_a_full_disk_has_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "samples").mkdir()
    monitor = Monitor(tmp_path, 0, "")
    monitor.log({"step": 1, "loss": 1.0})
    monitor.board.flush()
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
        monitor.log({"step": 2, "loss": 2.0})
        monitor.board.flush()  # by then its thread has ended
    with pytest.raises(OSError):
        monitor.log({"step": 3, "loss": 3.0})
    monitor.log({"step": 4, "loss": 4.0})
    monitor.picture("raw-step-000004", torch.zeros(4, 3, 8, 8), 4)
    monitor.close()
    board = EventAccumulator(str(tmp_path)).Reload()
    assert [point.step for point in board.Scalars("loss")] == [1, 4] and board.Tags()["images"] == ["raw"]


def test_a_grid_has_the_colours_of_its_pictures(tmp_path: Path) -> None:
    red = torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1, 1).expand(4, 3, 8, 8)
    save_grid(red, tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").getpixel((5, 5)) == (255, 0, 128)
