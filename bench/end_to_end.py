"""Images a second from image files to trained weights: `fastdcgan bench --data DIR`.

Each contender brings the loader it would use: `example` ImageFolder and a DataLoader with two workers, `skilled` the
same with a worker a core, pinned memory and persistent workers, `fast` this project's data path with its own choice of
loader and cache, into an empty cache folder. Each has a process of its own (`contestant`), and they take turns, an
epoch each; the first epoch, in which ours decodes and keeps, is reported apart from the later ones. Compilation is not
in these times; opening the data is in the first epoch.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shlex
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.data import DataLoader

from fastdcgan.bench import contenders
from fastdcgan.bench.contenders import Entry, Example, Shape, Skilled
from fastdcgan.bench.contestant import Contestant, Failed
from fastdcgan.bench.environment import describe, write_result
from fastdcgan.bench.roofline import synchronize
from fastdcgan.console import say
from fastdcgan.errors import UserError


@dataclass
class Row:
    """What was measured of one contender at one batch size."""

    contender: str
    precision: str
    batch_size: int
    images: int = 0  # in an epoch
    first_epoch: float = 0.0  # images/s
    later_epochs: float = 0.0  # images/s, median
    first_ratio: float | None = None  # to `example`, or the first contender if that did not run
    later_ratio: float | None = None
    epochs: list[float] = field(default_factory=list)  # images/s


def bench_data(
    *,
    data: Path,
    shape: Shape,
    batch_sizes: tuple[int, ...],
    device: torch.device,
    names: tuple[str, ...],
    precision: str = "auto",
    epochs: int = 3,
    json: Path | None = None,
    command: str = "",
) -> list[Row]:
    """Measure, print the table and return its rows; with `json` write them there too, after every batch size."""
    rows: list[Row] = []
    for batch_size in batch_sizes:
        with TemporaryDirectory() as cache_dir:
            rows += bench_batch_size(
                data, dataclasses.replace(shape, batch_size=batch_size), device, names, precision, epochs, cache_dir
            )
        if json:
            content = describe(device, command) | {
                "measured": "end to end",
                "data": data.name,
                "network": {name: value for name, value in dataclasses.asdict(shape).items() if name != "batch_size"},
                "rows": [dataclasses.asdict(row) for row in rows],
            }
            write_result(json, content)
    print(table(rows))
    return rows


def bench_batch_size(
    data: Path,
    shape: Shape,
    device: torch.device,
    names: tuple[str, ...],
    precision: str,
    epochs: int,
    cache_dir: str,
) -> list[Row]:
    rows: list[Row] = []
    with ExitStack() as processes:
        contestants = []
        for entry in contenders.entries(names, precision, device):
            rows.append(Row(entry.name, entry.precision, shape.batch_size))
            folder = Path(cache_dir) / f"{entry.name}-{entry.precision}"
            contestants.append(processes.enter_context(Contestant(Runner, entry, data, shape, device, folder)))
        for row, contestant in zip(rows, contestants, strict=True):
            say(f"batch {shape.batch_size}: preparing {row.contender} {row.precision}")
            ask(row, contestant, "prepare", data)
        for number in range(epochs):
            say(f"batch {shape.batch_size}: epoch {number + 1} of {epochs}")
            for row, contestant in zip(rows, contestants, strict=True):
                row.images, seconds = ask(row, contestant, "epoch", data)
                row.epochs.append(row.images / seconds)
    for row in rows:
        row.first_epoch, row.later_epochs = row.epochs[0], median(row.epochs[1:] or row.epochs)
    plain = next((row for row in rows if row.contender == "example"), rows[0])
    for row in rows:
        row.first_ratio, row.later_ratio = row.first_epoch / plain.first_epoch, row.later_epochs / plain.later_epochs
    return rows


def ask(row: Row, contestant: Contestant, method: str, data: Path) -> Any:
    """What the row's contender answers.

    Raises:
        UserError: it failed. The usual loader takes no damaged file.
    """
    try:
        return contestant.ask(method)
    except Failed as failure:
        check = shlex.join(["fastdcgan", "data", "check", str(data)])
        hint = f"; {check} lists damaged files" if row.contender in ("example", "skilled") else ""
        raise UserError(f"{row.contender} cannot be measured: {failure}{hint}") from None


class Runner:
    """One contender, in the process that is its own."""

    def __init__(self, entry: Entry, data: Path, shape: Shape, device: torch.device, cache_dir: Path) -> None:
        self.arguments = entry, data, shape, device, cache_dir

    def prepare(self) -> None:
        """Open the data, build the contender and warm it up."""
        entry, *_ = self.arguments
        self.opened, self.train = (prepare_fast if entry.name.startswith("fast") else prepare_usual)(*self.arguments)

    def epoch(self) -> tuple[int, float]:
        """Train one; its images and its seconds, to the first of which opening the data is added."""
        _, _, _, device, _ = self.arguments
        synchronize(device)
        start = time.perf_counter()
        images = self.train()
        synchronize(device)
        opened, self.opened = self.opened, 0.0
        return images, time.perf_counter() - start + opened


def prepare_usual(
    entry: Entry, data: Path, shape: Shape, device: torch.device, cache_dir: Path
) -> tuple[float, Callable[[], int]]:
    """`example` and `skilled`: seconds of opening the data, and what trains an epoch. They keep no images."""
    from fastdcgan.bench.data_path import usual_images

    start = time.perf_counter()
    dataset = usual_images(data, shape.image_size)
    opened = time.perf_counter() - start
    zeros = torch.zeros(shape.batch_size, shape.channels, *shape.image_size, device=device)
    loaded = functools.partial(DataLoader, dataset, shape.batch_size, shuffle=True, drop_last=True)
    if entry.name == "skilled":
        trainer: Example | Skilled = contenders.compiled_skilled(shape, device, entry.precision, zeros)[0]
        workers, pin_memory = os.cpu_count() or 1, device.type == "cuda"
        loader: DataLoader[Any] = loaded(num_workers=workers, pin_memory=pin_memory, persistent_workers=True)
    else:
        trainer = Example(shape, device, entry.precision)
        trainer.step(zeros)
        loader = loaded(num_workers=2)

    def epoch() -> int:
        images = 0
        for real, _ in loader:
            trainer.step(real.to(device, non_blocking=True))
            images += len(real)
        return images

    return opened, epoch


def prepare_fast(
    entry: Entry, data: Path, shape: Shape, device: torch.device, cache_dir: Path
) -> tuple[float, Callable[[], int]]:
    """`fast`: the same. On a GPU that does not keep the images a thread decodes from when the loader is opened, so the
    first batches while the step is compiled; elsewhere nothing is decoded before the epoch starts."""
    from fastdcgan.data import open_dataset

    start = time.perf_counter()
    dataset = open_dataset(
        str(data), image_size=shape.image_size, channels=shape.channels, device=device, cache_dir=cache_dir
    )
    stream = dataset.stream(shape.batch_size)
    opened = time.perf_counter() - start
    _, run = contenders.fast_step(shape, stream.source, stream.index, entry.precision, entry.name, flip=True)
    for _ in range(5):  # compiles, and captures
        run()

    def epoch() -> int:
        steps = dataset.count // shape.batch_size
        for _ in range(steps):
            stream.advance()
            run()
        return steps * shape.batch_size

    return opened, epoch


def table(rows: list[Row]) -> str:
    """The rows for a terminal."""
    lines = [
        f"{'contender':14} {'precision':9} {'batch':>5} {'images':>8} {'first epoch':>12} {'ratio':>6}"
        f" {'later epochs':>13} {'ratio':>6}   (images/s)"
    ]
    lines += [
        f"{row.contender:14} {row.precision:9} {row.batch_size:5} {row.images:8,} {row.first_epoch:12,.1f}"
        f" {row.first_ratio:6.2f} {row.later_epochs:13,.1f} {row.later_ratio:6.2f}"
        for row in rows
    ]
    return "\n".join(lines)
