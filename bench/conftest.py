"""Benchmarks run with `pytest --benchmark-only` or when they are named; plain `pytest` leaves this folder alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    from_testpaths = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    return True if from_testpaths and not config.getoption("benchmark_only", default=False) else None


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def images_per_second(benchmark, device):
    """images_per_second(run, images): time run() to the end of its work on the device; the rate goes to extra_info."""

    def measure(run, images, rounds=None):
        def to_the_end():
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()

        rounds = rounds or (50 if device.type == "cuda" else 5)
        benchmark.pedantic(to_the_end, warmup_rounds=5 if device.type == "cuda" else 1, rounds=rounds)
        benchmark.extra_info["images_per_second"] = round(images / benchmark.stats.stats.median, 1)
        return benchmark.extra_info["images_per_second"]

    return measure
