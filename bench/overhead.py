"""What following a run costs: its log points, sample grids and checkpoints, against the time of its steps."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fastdcgan.bench.contenders import Shape, fast_step
from fastdcgan.bench.roofline import synchronize
from fastdcgan.config import TrainConfig
from fastdcgan.data import open_dataset
from fastdcgan.distributed import ALONE
from fastdcgan.pace import USUAL, stretched
from fastdcgan.runs import RunFolder
from fastdcgan.saver import Saver
from fastdcgan.watch import Watch

TIMES = 5  # each is done, after a first time that warms up


def overhead(shape: Shape, device: torch.device, precision: str, executor: str) -> dict[str, Any]:
    """Train a little on "fake", do what a run does beside its steps, and compare the times.

    Returns:
        step_seconds; for "log", "sample" and "checkpoint" the seconds that training waits (median), every how many
        steps `train` would do it, and the share of the steps' time; share, the sum of theirs. On a CPU a checkpoint
        counts whole: what a thread writes while training goes on takes time from the steps there.
    """
    data = open_dataset("fake", image_size=shape.image_size, channels=shape.channels, device=device)
    stream = data.stream(shape.batch_size)
    step, run = fast_step(shape, stream.source, stream.index, precision, executor)

    def steps() -> None:
        for _ in range(USUAL["log"]):
            stream.advance()
            run()

    with TemporaryDirectory() as folder:
        config = TrainConfig(run_dir=Path(folder), batch_size=shape.batch_size, latent_dim=shape.latent_dim)
        saver = Saver(RunFolder(Path(folder), config, {"device": str(device)}), ALONE, total=1)
        watch = Watch(Path(folder), config, data.take(range(256)), device, 0)

        def log() -> None:
            metrics = step.read_metrics() | step.gradient_norms()
            watch.log({"step": 1, "images": 1, "epoch": 1, "images_per_second": 1, **metrics})

        def checkpoint() -> None:
            saver.save(step, stream, 1, watch.quality.distance(step.average))
            if device.type == "cpu":
                saver.wait()

        steps()
        step_seconds = seconds(steps, device, times=3) / USUAL["log"]
        work: dict[str, Callable[[], object]] = {
            "log": log,
            "sample": functools.partial(watch.sample, 1, step),
            "checkpoint": checkpoint,
        }
        found: dict[str, Any] = {"precision": precision, "executor": executor, "step_seconds": step_seconds}
        for name, each in work.items():
            took = seconds(each, device, TIMES)
            every = stretched(USUAL[name], took, step_seconds)
            found[name] = {"seconds": took, "every": every, "share": took / (every * step_seconds)}
        saver.wait()
        watch.close()
    stream.close()
    return found | {"share": sum(found[name]["share"] for name in work)}


def seconds(work: Callable[[], object], device: torch.device, times: int) -> float:
    """Median seconds of work(), to the end of its work on the device, after a first time."""
    work()
    took = []
    for _ in range(times):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        took.append(time.perf_counter() - start)
    return median(took)


def sentence(found: dict[str, Any]) -> str:
    """The result in words."""
    parts = []
    for name in USUAL:
        cost = found[name]
        parts.append(f"{name} {cost['seconds'] * 1e3:,.1f} ms every {cost['every']:,} steps ({cost['share']:.2%})")
    return f"following a run costs {found['share']:.2%} of its steps' time: {', '.join(parts)}"
