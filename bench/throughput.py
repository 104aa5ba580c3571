"""Images a second of one training step, contenders side by side: `fastdcgan bench`.

All contenders of a batch size are built and warmed up first; then they take turns, a block of steps each, round after
round in one process. So a machine that gets slower slows them all, and ratios are taken within a round. Medians and
half the distance between the quartiles are reported. On a CPU that others use too, the ratio of images a second of
processor time (`cpu ratio`) is the steadier one: OMP_WAIT_POLICY=PASSIVE keeps waiting threads out of it.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from fastdcgan.bench import contenders, roofline
from fastdcgan.bench.contenders import Entry, Shape
from fastdcgan.bench.environment import describe, write_json
from fastdcgan.bench.profiling import live_bytes
from fastdcgan.bench.roofline import Rates, median_and_spread, synchronize
from fastdcgan.console import say
from fastdcgan.errors import UserError

# Operators that only look at memory otherwise, or reserve it.
WORKLESS = {
    f"aten::{name}"
    for name in (
        *(
            "view",
            "_unsafe_view",
            "view_as",
            "reshape",
            "flatten",
            "unflatten",
            "permute",
            "transpose",
            "t",
            "as_strided",
        ),
        *(
            "slice",
            "select",
            "narrow",
            "split",
            "chunk",
            "unbind",
            "unfold",
            "squeeze",
            "unsqueeze",
            "expand",
            "expand_as",
        ),
        *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_", "lift_fresh"),
        *("detach", "detach_", "alias", "result_type", "promote_types", "resolve_conj"),
    )
}


@dataclass
class Row:
    """What was measured of one contender at one batch size."""

    contender: str
    precision: str
    batch_size: int
    images_per_second: float = 0.0  # median over the rounds
    spread: float = 0.0  # half the distance between the quartiles
    ratio: float | None = None  # to the first contender, median over rounds of the ratio within a round
    useful_flops: float = 0.0  # FLOP/s: those of the exact step, whatever else the contender computes
    floor: float = 0.0  # images/s at the floor, in this row's precision
    peak_memory_bytes: int = 0  # GPU: taken from the device. CPU: allocated inside one step beyond what it began with
    kernels: int = 0  # GPU: kernels a step. CPU: operator calls that do work; a compiled kernel counts as one
    first_step_seconds: float = 0.0  # building, compiling, autotuning, and the first step
    cpu_ratio: float | None = None  # CPU only: as `ratio`, of images a second of processor time
    rounds: list[float] = field(default_factory=list)  # images/s
    cpu_rounds: list[float] = field(default_factory=list)  # images a second of processor time, over all threads
    remark: str = ""


@dataclass
class Runner:
    """A contender that is ready to run."""

    row: Row
    run: Callable[[], None]
    flags: tuple[bool, ...]
    steps: int = 1  # in a block

    def block(self, device: torch.device) -> tuple[float, float]:
        """Seconds and processor seconds of `steps` steps."""
        with contenders.flags(self.flags):
            synchronize(device)
            start, cpu_start = time.perf_counter(), time.process_time()
            for _ in range(self.steps):
                self.run()
            synchronize(device)
            return time.perf_counter() - start, time.process_time() - cpu_start


def bench(
    *,
    shape: Shape,
    batch_sizes: tuple[int, ...],
    device: torch.device,
    names: tuple[str, ...] = contenders.NAMES,
    precision: str = "auto",
    repetitions: int = 7,
    block_seconds: float = 1.0,
    per_layer: bool = False,
    follow: bool = False,
    json: Path | None = None,
    command: str = "",
) -> list[Row]:
    """Measure, print the table and return its rows; with `json` write them there too, after every batch size.

    With `follow`, also what logs, samples and checkpoints cost beside the fastest of our steps (`overhead`).
    """
    contenders.quiet()
    chosen = contenders.entries(names, precision, device)
    rates = {each: roofline.measure_rates(device, each) for each in {entry.precision for entry in chosen}}
    for each, rate in sorted(rates.items()):
        say(f"{each}: matrix product {rate.matrix / 1e12:,.3f} TFLOP/s, copy {rate.copy / 1e9:,.1f} GB/s")
    rows: list[Row] = []
    for shape in [dataclasses.replace(shape, batch_size=each) for each in batch_sizes]:
        if per_layer:
            for each in sorted(rates):
                print(f"\n{each}, batch {shape.batch_size}:\n{roofline.layer_table(passes(shape, each), rates[each])}")
        rows += bench_shape(shape, chosen, device, rates, repetitions, block_seconds)
        content = describe(device, command) | {
            "measured": "throughput",
            "rates": {each: dataclasses.asdict(rate) for each, rate in rates.items()},
            "network": {name: value for name, value in dataclasses.asdict(shape).items() if name != "batch_size"},
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        if json:
            write_json(json, content)
    print(table(rows, device.type))
    ours = [row for row in rows if row.contender.startswith("fast") and row.rounds]
    if follow and ours:
        best = max(ours, key=lambda row: row.images_per_second)
        from fastdcgan.bench import (
            overhead,
        )  # here, for it needs the whole trainer, and the rest torch and triton alone

        say(f"following a run of {best.contender} {best.precision}, batch {best.batch_size}")
        one_shape = dataclasses.replace(shape, batch_size=best.batch_size)
        content["overhead"] = overhead.overhead(one_shape, device, best.precision, best.contender)
        print(overhead.sentence(content["overhead"]))
        if json:
            write_json(json, content)
    return rows


def bench_shape(
    shape: Shape,
    chosen: list[Entry],
    device: torch.device,
    rates: dict[str, Rates],
    repetitions: int,
    block_seconds: float,
) -> list[Row]:
    """All contenders at one batch size, interleaved."""
    torch._dynamo.reset()  # or another batch size would be taken for a dynamic shape
    defaults = contenders.read_flags()
    rows, runners = [], []
    for entry in chosen:
        row = Row(entry.name, entry.precision, shape.batch_size)
        rows.append(row)
        say(f"batch {shape.batch_size}: preparing {entry.name} {entry.precision}")
        try:
            runners.append(prepare(row, entry, shape, device, block_seconds))
        except (RuntimeError, UserError, torch._dynamo.exc.TorchDynamoException) as error:  # one failure costs one row
            row.remark = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
            say(f"{entry.name} {entry.precision} {row.remark}")
        contenders.set_flags(defaults)
        gc.collect()
    for round_number in range(repetitions):
        say(f"batch {shape.batch_size}: round {round_number + 1} of {repetitions}")
        for runner in runners:
            seconds, cpu_seconds = runner.block(device)
            runner.row.rounds.append(shape.batch_size * runner.steps / seconds)
            runner.row.cpu_rounds.append(shape.batch_size * runner.steps / cpu_seconds)
    for runner in runners:
        summarize(runner.row, runners[0].row, shape, rates[runner.row.precision])
    return rows


def prepare(row: Row, entry: Entry, shape: Shape, device: torch.device, block_seconds: float) -> Runner:
    """Build and warm up one contender, and take everything about it that is not time."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        reserved = torch.cuda.memory_reserved(device)
    start = time.perf_counter()
    run, row.remark = contenders.on_random_images(entry, shape, device)
    synchronize(device)
    row.first_step_seconds = time.perf_counter() - start
    flags = contenders.read_flags()
    if on_gpu:
        run()
        run()  # what only the first steps need (autotuning, compilation) is over
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(3):  # a graph is captured here, its memory with it
            run()
        row.peak_memory_bytes = torch.cuda.max_memory_reserved(device) - reserved
        row.kernels = gpu_kernels(run)
    else:
        run()
        row.kernels, row.peak_memory_bytes = cpu_calls_and_memory(run)
    runner = Runner(row, run, flags)
    runner.steps = max(1, math.ceil(block_seconds / runner.block(device)[0]))
    return runner


def gpu_kernels(run: Callable[[], None]) -> int:
    """Kernels in one step, copies and fills not counted."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    on_device = [e for e in profiler.events() if e.device_type.name == "CUDA"]
    return sum(not e.name.startswith(("Memcpy", "Memset")) for e in on_device)


def cpu_calls_and_memory(run: Callable[[], None]) -> tuple[int, int]:
    """Operators called in one step (not by one another, and only those that do work; kernels inside compiled code are
    not seen), and the most bytes allocated at a time beyond what there was."""
    peak = max(live for _, live in live_bytes(run))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    operators = [e for e in profiler.events() if e.name.startswith("aten::") and e.name not in WORKLESS]
    return sum(not (e.cpu_parent and e.cpu_parent.name.startswith("aten::")) for e in operators), peak


def summarize(row: Row, baseline: Row, shape: Shape, rates: Rates) -> None:
    """Medians of the row's rounds, and how far they are from the first contender and from the floor."""
    row.images_per_second, row.spread = median_and_spread(row.rounds)
    row.ratio = median_ratio(row.rounds, baseline.rounds)
    row.cpu_ratio = median_ratio(row.cpu_rounds, baseline.cpu_rounds)
    work = passes(shape, row.precision)
    row.useful_flops = sum(each.flops for each in work) / shape.batch_size * row.images_per_second
    row.floor = shape.batch_size / roofline.floor_seconds(work, rates)


def median_ratio(mine: list[float], theirs: list[float]) -> float:
    return median([a / b for a, b in zip(mine, theirs, strict=True)])


def passes(shape: Shape, precision: str) -> list[roofline.Pass]:
    return roofline.step_passes(
        shape.batch_size, shape.image_size, shape.channels, shape.latent_dim, shape.width, precision
    )


def table(rows: list[Row], kind: str) -> str:
    """The rows for a terminal; `kind` of device: "cuda" or "cpu"."""
    calls = "kernels" if kind == "cuda" else "calls"
    lines = [
        f"{'contender':14} {'precision':9} {'batch':>5} {'images/s':>10} {'spread':>8} {'ratio':>6}"
        f" {'cpu ratio':>9} {'TFLOP/s':>8}"
        f" {'of floor':>8} {'peak MiB':>8} {calls:>7} {'first s':>7}"
    ]
    for row in rows:
        line = f"{row.contender:14} {row.precision:9} {row.batch_size:5}"
        if row.rounds:
            line += f" {row.images_per_second:10,.1f} {row.spread:8,.1f} {row.ratio:6.2f} {row.cpu_ratio:9.2f}"
            line += f" {row.useful_flops / 1e12:8.3f} {row.images_per_second / row.floor:8.1%}"
            line += f" {row.peak_memory_bytes / 2**20:8,.0f} {row.kernels:7} {row.first_step_seconds:7.1f}"
        lines.append(f"{line} {row.remark}".rstrip())
    return "\n".join(lines)
