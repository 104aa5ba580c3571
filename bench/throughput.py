"""Images a second of one training step, contenders side by side: `fastdcgan bench`.

Each contender has a process of its own (`contestant`). At a batch size all are built and warmed up first; then they
take turns, a block of steps each, round after round, while the others wait. So a machine that gets slower slows them
all, and ratios are taken within a round. Medians and half the distance between the quartiles are reported. On a CPU
that others use too, the ratio of images a second of processor time (`cpu ratio`) is the steadier one:
OMP_WAIT_POLICY=PASSIVE keeps waiting threads out of it.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fastdcgan import winograd
from fastdcgan.bench import contenders, roofline
from fastdcgan.bench.contenders import Entry, Shape
from fastdcgan.bench.contestant import Contestant, Failed
from fastdcgan.bench.environment import describe, write_result
from fastdcgan.bench.profiling import NO_KERNELS, device_spans, live_bytes
from fastdcgan.bench.roofline import Rates, median_and_spread, synchronize
from fastdcgan.console import say

# Operators that only make views, or reserve memory.
WORKLESS = {
    f"aten::{name}"
    for name in [
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
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "resize_",
        "set_",
        "lift_fresh",
        "detach",
        "detach_",
        "alias",
        "result_type",
        "promote_types",
        "resolve_conj",
    ]
}


@dataclass
class Row:
    """What was measured of one contender at one batch size."""

    contender: str
    precision: str
    batch_size: int
    images_per_second: float = 0.0  # median over the rounds
    spread: float = 0.0  # half the distance between the quartiles
    ratio: float | None = None  # to `example`, or the first if that did not run; median over rounds of that in each
    useful_flops: float = 0.0  # FLOP/s: of the exact step, convolved directly, whatever the contender computes
    floor: float = 0.0  # images/s at the floor, in this row's precision
    peak_memory_bytes: int = 0  # GPU: taken from the device. CPU: allocated inside one step beyond what it began with
    kernels: int = 0  # GPU: kernels a step. CPU: operator calls that do work; a compiled kernel counts as one
    first_step_seconds: float = 0.0  # building, compiling, autotuning, and the first step
    cpu_ratio: float | None = None  # CPU only: as `ratio`, of images a second of processor time
    rounds: list[float] = field(default_factory=list)  # images/s
    cpu_rounds: list[float] = field(default_factory=list)  # images a second of processor time, over all threads
    remark: str = ""


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
    chosen = contenders.entries(names, precision, device)
    rates = {each: roofline.measure_rates(device, each) for each in {entry.precision for entry in chosen}}
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the contenders, in processes of their own, may need it
    for each, rate in sorted(rates.items()):
        say(f"{each}: matrix product {rate.matrix / 1e12:,.3f} TFLOP/s, copy {rate.copy / 1e9:,.1f} GB/s")
    rows: list[Row] = []
    with ExitStack() as processes:
        contestants = [processes.enter_context(Contestant(Runner, entry, device, block_seconds)) for entry in chosen]
        for shape in [dataclasses.replace(shape, batch_size=each) for each in batch_sizes]:
            if per_layer:
                for each in sorted(rates):
                    layers = roofline.layer_table(least_passes(shape, each, device), rates[each])
                    print(f"\n{each}, batch {shape.batch_size}:\n{layers}")
            rows += bench_shape(shape, list(zip(chosen, contestants, strict=True)), rates, repetitions, device)
            content = describe(device, command) | {
                "measured": "throughput",
                "rates": {each: dataclasses.asdict(rate) for each, rate in rates.items()},
                "network": {name: value for name, value in dataclasses.asdict(shape).items() if name != "batch_size"},
                "rows": [dataclasses.asdict(row) for row in rows],
            }
            if json:
                write_result(json, content)
    print(table(rows, device.type))
    ours = [row for row in rows if row.contender.startswith("fast") and row.rounds]
    if follow and ours:
        best = max(ours, key=lambda row: row.images_per_second)
        from fastdcgan.bench import overhead  # here: it needs the whole trainer, the rest torch and triton alone

        say(f"following a run of {best.contender} {best.precision}, batch {best.batch_size}")
        one_shape = dataclasses.replace(shape, batch_size=best.batch_size)
        content["overhead"] = overhead.overhead(one_shape, device, best.precision, best.contender)
        print(overhead.sentence(content["overhead"]))
        if json:
            write_result(json, content)
    return rows


def bench_shape(
    shape: Shape,
    chosen: list[tuple[Entry, Contestant]],
    rates: dict[str, Rates],
    repetitions: int,
    device: torch.device,
) -> list[Row]:
    """All contenders at one batch size, interleaved."""
    rows = [Row(entry.name, entry.precision, shape.batch_size) for entry, _ in chosen]
    running = [(row, contestant) for row, (_, contestant) in zip(rows, chosen, strict=True)]

    def answers(method: str, *arguments: Any) -> Iterator[tuple[Row, Any]]:
        """What each contestant still running answers, in turn; one failure costs one row."""
        for each in list(running):
            row, contestant = each
            if method == "prepare":
                say(f"batch {shape.batch_size}: preparing {row.contender} {row.precision}")
            try:
                answer = contestant.ask(method, *arguments)
            except Failed as failure:
                row.remark, row.rounds, row.cpu_rounds = f"failed: {failure}", [], []
                say(f"{row.contender} {row.precision} {row.remark}")
                running.remove(each)
            else:
                yield row, answer

    for row, (remark, seconds) in answers("prepare", shape):
        row.remark, row.first_step_seconds = remark, seconds
    for round_number in range(repetitions):
        say(f"batch {shape.batch_size}: round {round_number + 1} of {repetitions}")
        for row, (rate, cpu_rate) in answers("block"):
            row.rounds.append(rate)
            row.cpu_rounds.append(cpu_rate)
    for row, (kernels, peak_memory_bytes) in answers("count"):
        row.kernels, row.peak_memory_bytes = kernels, peak_memory_bytes
    baseline = next((row for row, _ in running if row.contender == "example"), running[0][0] if running else None)
    for row, _ in running:
        assert baseline is not None
        summarize(row, baseline, shape, rates[row.precision], device)
        if device.type == "cpu":  # elsewhere waiting for the device is work too
            row.cpu_ratio = median_ratio(row.cpu_rounds, baseline.cpu_rounds)
    return rows


class Runner:
    """One contender, in the process that is its own."""

    def __init__(self, entry: Entry, device: torch.device, block_seconds: float) -> None:
        self.entry, self.device, self.block_seconds = entry, device, block_seconds
        self.run: Callable[[], None] | None = None
        self.images = 0  # in a step
        self.steps = 1  # in a block
        self.reserved = 0  # bytes of GPU memory before it was built

    def prepare(self, shape: Shape) -> tuple[str, float]:
        """Build and warm it up; a remark, and the seconds until its first step was done."""
        self.run = None
        gc.collect()
        torch._dynamo.reset()  # or another batch size would be taken for a dynamic shape
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.empty_cache()
            self.reserved = torch.cuda.memory_reserved(self.device)
        start = time.perf_counter()
        run, remark = contenders.on_random_images(self.entry, shape, self.device)
        synchronize(self.device)
        first_step_seconds = time.perf_counter() - start
        run()
        if on_gpu:
            run()  # what only the first steps need (autotuning, compilation) is over
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            for _ in range(3):  # a graph is captured here, its memory with it
                run()
        self.run, self.images, self.steps = run, shape.batch_size, 1
        self.steps = max(1, math.ceil(self.block_seconds * self.block()[0] / self.images))
        return remark, first_step_seconds

    def count(self) -> tuple[int, int]:
        """`kernels` and `peak_memory_bytes` of `Row`. After the blocks: on a CPU the profiler leaves free memory in the
        heap, which spares the contenders measured after it their page faults."""
        assert self.run is not None
        if self.device.type == "cuda":
            return gpu_kernels(self.run), torch.cuda.max_memory_reserved(self.device) - self.reserved
        return cpu_calls_and_memory(self.run)

    def block(self) -> tuple[float, float]:
        """Images a second, and a second of processor time, over `steps` steps."""
        assert self.run is not None
        synchronize(self.device)
        start, cpu_start = time.perf_counter(), time.process_time()
        for _ in range(self.steps):
            self.run()
        synchronize(self.device)
        images = self.images * self.steps
        return images / (time.perf_counter() - start), images / (time.process_time() - cpu_start)


def gpu_kernels(run: Callable[[], None]) -> int:
    """Kernels in one step, copies and fills not counted."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return sum(not name.startswith(NO_KERNELS) for _, _, name in device_spans(profiler))


def cpu_calls_and_memory(run: Callable[[], None]) -> tuple[int, int]:
    """Operators called in one step (not by one another, and only those that do work; kernels inside compiled code are
    not seen), and the most bytes allocated at a time beyond what there was."""
    peak = max(live for _, live in live_bytes(run))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    operators = [e for e in profiler.events() if e.name.startswith("aten::") and e.name not in WORKLESS]
    return sum(not (e.cpu_parent and e.cpu_parent.name.startswith("aten::")) for e in operators), peak


def summarize(row: Row, baseline: Row, shape: Shape, rates: Rates, device: torch.device) -> None:
    """Medians of the row's rounds, and how far they are from the baseline and from the floor."""
    row.images_per_second, row.spread = median_and_spread(row.rounds)
    row.ratio = median_ratio(row.rounds, baseline.rounds)
    work = sum(each.flops for each in passes(shape, row.precision))
    row.useful_flops = work / shape.batch_size * row.images_per_second
    row.floor = shape.batch_size / roofline.floor_seconds(least_passes(shape, row.precision, device), rates)


def median_ratio(mine: list[float], theirs: list[float]) -> float:
    return median([a / b for a, b in zip(mine, theirs, strict=True)])


def passes(shape: Shape, precision: str, by_winograd: bool = False) -> list[roofline.Pass]:
    return roofline.step_passes(
        shape.batch_size, shape.image_size, shape.channels, shape.latent_dim, shape.width, precision, by_winograd
    )


def least_passes(shape: Shape, precision: str, device: torch.device) -> list[roofline.Pass]:
    """What the floor is made of on this device."""
    return passes(shape, precision, winograd.pays(device, roofline.DTYPES[precision]))


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
            line += f" {row.images_per_second:10,.1f} {row.spread:8,.1f} {row.ratio:6.2f}"
            line += f" {row.cpu_ratio:9.2f}" if row.cpu_ratio is not None else " " * 10
            line += f" {row.useful_flops / 1e12:8.3f} {row.images_per_second / row.floor:8.1%}"
            line += f" {row.peak_memory_bytes / 2**20:8,.0f} {row.kernels:7} {row.first_step_seconds:7.1f}"
        lines.append(f"{line} {row.remark}".rstrip())
    return "\n".join(lines)
