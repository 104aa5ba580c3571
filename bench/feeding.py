"""How long the training step waits for its images, once they are decoded.

    python -m fastdcgan.bench.feeding --data DIR [--batch-size 128] --json OUT

For every place where images can be kept, from the second epoch on: steps that take the next batch each against the
same steps on one batch again and again, in turn, several rounds. The share of waiting is the median of what the
rounds say. On a GPU with images in host memory, a trace of a few steps also says how much of the copies' time kernels
run beside them; it is kept beside OUT, for https://ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fastdcgan.bench.contenders import Shape, fast_step, quiet_compiler
from fastdcgan.bench.environment import command_line, describe, write_result
from fastdcgan.bench.profiling import NO_KERNELS, WARM_UP, device_spans
from fastdcgan.bench.roofline import synchronize
from fastdcgan.console import say
from fastdcgan.data import Stream, open_dataset
from fastdcgan.processor import choose_device, choose_precision

Span = tuple[float, float]  # begin and end
PROFILED = 20  # steps


def waiting(stream: Stream, run: Callable[[], None], device: torch.device, rounds: int, seconds: float) -> list[float]:
    """The share of a step's time that taking the next batch adds to it, of each round: blocks of so many seconds."""

    def block(steps: int, advance: bool) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(steps):
            if advance:
                stream.advance()
            run()
        synchronize(device)
        return time.perf_counter() - start

    steps = math.ceil(seconds / block(1, True))
    shares = []
    for number in range(rounds):
        first = number % 2 == 0  # in turn, or a machine that slows down would seem to wait
        seconds_of = {fed: block(steps, fed) for fed in (first, not first)}
        shares.append(1 - seconds_of[False] / seconds_of[True])
    return shares


def copies_and_kernels(step: Callable[[], None], trace: Path) -> tuple[list[Span], list[Span]]:
    """When copies from the host, and when kernels, ran on the GPU in PROFILED steps, in microseconds."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            step()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(trace))
    spans = device_spans(profiler)
    copies = [(begin, end) for begin, end, name in spans if name.startswith("Memcpy HtoD")]
    return copies, [(begin, end) for begin, end, name in spans if not name.startswith(NO_KERNELS)]


def share_beside(copies: list[Span], kernels: list[Span]) -> float:
    """The share of the copies' time in which some kernel runs too; kernels may overlap one another."""
    beside, merged = 0.0, list[Span]()
    for begin, end in sorted(kernels):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    for begin, end in copies:
        beside += sum(max(0.0, min(end, until) - max(begin, since)) for since, until in merged)
    return beside / sum(end - begin for begin, end in copies)


def fed_from(kept: str, options: argparse.Namespace, device: torch.device, cache_dir: Path) -> dict[str, Any]:
    """One row: images kept in "device", "host" or "disk"."""
    size = (options.image_size, options.image_size)
    dataset = open_dataset(
        str(options.data), image_size=size, channels=3, device=device, cache=kept, cache_dir=cache_dir
    )
    stream = dataset.stream(options.batch_size)
    precision = choose_precision("auto", device)
    executor = "fast-captured" if device.type == "cuda" else "fast-eager"
    shape = Shape(options.batch_size, size)
    _, run = fast_step(shape, stream.source, stream.index, precision, executor, flip=True)

    def step() -> None:
        stream.advance()
        run()

    say(f"kept in {kept}: the first epoch")
    for _ in range(dataset.count // options.batch_size + 1):  # it decodes; the second one has begun
        stream.advance()
    for _ in range(WARM_UP):
        step()
    say(f"kept in {kept}: {options.rounds} rounds")
    shares = waiting(stream, run, device, options.rounds, options.block_seconds)
    row = {
        "kept": kept,
        "executor": executor,
        "precision": precision,
        "images": dataset.count,
        "share": median(shares),
        "shares": shares,
    }
    if device.type == "cuda" and kept == "host":
        copies, kernels = copies_and_kernels(step, options.json.with_suffix(".trace.json"))
        row |= {"copies": len(copies), "copies_beside_kernels": share_beside(copies, kernels)}
    stream.close()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--block-seconds", type=float, default=1.0)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    quiet_compiler()
    device = choose_device("auto")
    rows = []
    for kept in ("host", "device", "disk") if device.type == "cuda" else ("host", "disk"):
        with TemporaryDirectory() as cache_dir:
            rows.append(fed_from(kept, options, device, Path(cache_dir)))
        row = rows[-1]
        beside = row.get("copies_beside_kernels")
        print(
            f"kept in {kept:6}  waits {row['share']:6.2%} of the step"
            + ("" if beside is None else f"; {beside:.0%} of the copies' time beside kernels")
        )
        write_result(
            options.json,
            describe(device, command_line("feeding"))
            | {
                "measured": "feeding",
                "data": options.data.name,
                "image_size": options.image_size,
                "batch_size": options.batch_size,
                "rows": rows,
            },
        )


if __name__ == "__main__":
    main()
