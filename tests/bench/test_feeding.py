"""The share of waiting, and whether copies run beside kernels."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdcgan.bench import data_path, feeding

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(12):
        Image.fromarray(generator.integers(0, 256, (20, 24, 3), np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
    return tmp_path / "pictures"


def test_waiting_is_what_the_next_batch_adds_to_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, seen = [0.0], []

    class Slow:
        def advance(self) -> None:
            clock[0] += 1
            seen.append("next")

    def run() -> None:
        clock[0] += 3
        seen.append("run")

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert feeding.waiting(Slow(), run, CPU, rounds=3, seconds=10) == [0.25] * 3  # type: ignore[arg-type]
    fed, again = ["next", "run"] * 3, ["run"] * 3  # of 10 seconds, that is of three steps
    assert seen == ["next", "run", *fed, *again, *again, *fed, *fed, *again]


@pytest.mark.parametrize(
    ("copies", "kernels", "share"),
    [
        ([(0, 10)], [(20, 30)], 0.0),
        ([(0, 10)], [(5, 30)], 0.5),
        ([(0, 10), (20, 30)], [(0, 10)], 0.5),
        ([(0, 10)], [(0, 6), (4, 8)], 0.8),  # kernels beside one another count once
        ([(0, 10)], [(8, 9), (0, 4), (1, 2)], 0.5),
    ],
)
def test_the_share_of_copies_beside_kernels(
    copies: list[feeding.Span], kernels: list[feeding.Span], share: float
) -> None:
    assert feeding.share_beside(copies, kernels) == pytest.approx(share)


def test_the_command_measures_every_place_where_images_are_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "feeding.json"
    options = ["--image-size", "16", "--batch-size", "4", "--rounds", "2", "--block-seconds", "0.01"]
    monkeypatch.setattr(sys, "argv", ["feeding", "--data", str(folder), *options, "--json", str(out)])
    monkeypatch.setattr(feeding, "choose_device", lambda _: CPU)
    feeding.main()
    content = json.loads(out.read_text())
    assert content["measured"] == "feeding"
    assert [(row["kept"], row["images"]) for row in content["rows"]] == [("host", 12), ("disk", 12)]
    assert all(len(row["shares"]) == 2 and max(row["shares"]) < 1 for row in content["rows"])
    assert all(min(row["shares"]) <= row["share"] <= max(row["shares"]) for row in content["rows"])


def test_loading_is_measured_in_every_way_against_the_usual_loader(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "data.json"
    options = ["--image-size", "16", "--batch-size", "4", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["data_path", "--data", str(folder), *options, "--json", str(out)])
    monkeypatch.setattr(data_path, "CACHE_SECONDS", 0.01)
    threads = torch.get_num_threads()
    data_path.main()
    torch.set_num_threads(threads)
    content = json.loads(out.read_text())
    usual, *first, cache = (row["way"] for row in content["ways"])
    assert usual.startswith("ImageFolder") and cache == "cache"
    assert {f"--loader torch --cache {kept}, first epoch" for kept in ("host", "off")} < set(first)
    assert content["images"] == content["files"] == 12 and content["device"]["kind"] == "cpu"
    assert all(len(row["all"]) == 2 for row in content["ways"])


def test_ways_of_loading_are_compared_by_medians() -> None:
    rows = data_path.compared({"usual": [90.0, 100.0, 500.0], "ours": [100.0, 300.4, 250.0]})
    assert rows == [
        {"way": "usual", "images_per_second": 100, "ratio": 1.0, "all": [90, 100, 500]},
        {"way": "ours", "images_per_second": 250, "ratio": 2.5, "all": [100, 300, 250]},
    ]


@pytest.mark.gpu
def test_on_a_gpu_copies_run_beside_the_step(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "feeding.json"
    options = ["--image-size", "16", "--batch-size", "4", "--rounds", "1", "--block-seconds", "0.1"]
    monkeypatch.setattr(sys, "argv", ["feeding", "--data", str(folder), *options, "--json", str(out)])
    feeding.main()
    rows = {row["kept"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows.keys() == {"device", "host", "disk"} and rows["host"]["copies"] >= feeding.PROFILED
    assert 0 <= rows["host"]["copies_beside_kernels"] <= 1
    assert out.with_suffix(".trace.json").exists()
