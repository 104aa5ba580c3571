"""What a run writes for people: lines that are whole, grids as torchvision lays them out."""

from __future__ import annotations

import json
import math
import resource
import signal
from pathlib import Path

import pytest
import torch
from torchvision.utils import make_grid

from fastdcgan.monitor import Monitor, grid, save_grid


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
