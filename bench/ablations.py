"""What each technique of the CPU step brings: the step with one of them changed, in turns with the whole.

python -m fastdcgan.bench.ablations OUT.json [BATCH_SIZE [REPETITIONS]]
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from fastdcgan import patches
from fastdcgan.bench.contenders import Shape, fast_step, quiet
from fastdcgan.bench.environment import command_line, describe, write_json
from fastdcgan.console import say
from fastdcgan.step import TrainStep

Change = Callable[[TrainStep], None]


def direct_convolutions(step: TrainStep) -> None:
    patches.WIDEST_GRID = 0


def matrix_products(step: TrainStep) -> None:
    patches.FAST_SGEMM = True


def merged_halves(step: TrainStep) -> None:
    step.merge_halves = True


VARIANTS: dict[str, tuple[str, Change]] = {
    "eager": ("fast-eager", lambda step: None),
    "eager, direct convolutions on every grid": ("fast-eager", direct_convolutions),
    "eager, matrix products on small grids": ("fast-eager", matrix_products),
    "eager, real and fake as one batch": ("fast-eager", merged_halves),
    "compiled": ("fast-compiled", lambda step: None),
    "compiled, direct convolutions on every grid": ("fast-compiled", direct_convolutions),
    "compiled, matrix products on small grids": ("fast-compiled", matrix_products),
}


@dataclasses.dataclass
class Row:
    variant: str
    seconds: list[float] = dataclasses.field(default_factory=list)  # a step
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)  # a step, of processor time over all threads
    time_to_whole: float = 0.0  # against the same executor with nothing changed; median over rounds
    cpu_time_to_whole: float = 0.0


def ablate(shape: Shape, repetitions: int) -> list[Row]:
    """Rounds in which every variant runs one step."""
    quiet()
    source = shape.random_images(1024, torch.device("cpu"))
    usual = patches.WIDEST_GRID, patches.FAST_SGEMM
    rows, runs = [], []
    for variant, (executor, change) in VARIANTS.items():
        say(f"preparing: {variant}")
        step, run = fast_step(shape, source, torch.arange(shape.batch_size), "fp32", executor)
        change(step)
        run()
        rows.append(Row(variant))
        runs.append((run, (patches.WIDEST_GRID, patches.FAST_SGEMM)))
        patches.WIDEST_GRID, patches.FAST_SGEMM = usual
    for number in range(repetitions):
        say(f"round {number + 1} of {repetitions}")
        for row, (run, settings) in zip(rows, runs, strict=True):
            patches.WIDEST_GRID, patches.FAST_SGEMM = settings
            start, cpu_start = time.perf_counter(), time.process_time()
            run()
            row.cpu_seconds.append(time.process_time() - cpu_start)
            row.seconds.append(time.perf_counter() - start)
    patches.WIDEST_GRID, patches.FAST_SGEMM = usual
    for row in rows:
        whole = next(each for each in rows if each.variant == row.variant.split(",")[0])
        row.time_to_whole = median(a / b for a, b in zip(row.seconds, whole.seconds, strict=True))
        row.cpu_time_to_whole = median(a / b for a, b in zip(row.cpu_seconds, whole.cpu_seconds, strict=True))
        print(
            f"{row.variant:46} {median(row.seconds) * 1e3:8.0f} ms  {median(row.cpu_seconds) * 1e3:8.0f} ms processor"
            f"  x{row.time_to_whole:.2f}  x{row.cpu_time_to_whole:.2f}"
        )
    return rows


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: python -m fastdcgan.bench.ablations OUT.json [BATCH_SIZE [REPETITIONS]]")
    shape = Shape(int(sys.argv[2]) if len(sys.argv) > 2 else 64)
    rows = ablate(shape, int(sys.argv[3]) if len(sys.argv) > 3 else 9)
    command = command_line("ablations")
    content = describe(torch.device("cpu"), command) | {
        "measured": "ablations",
        "network": dataclasses.asdict(shape),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    write_json(Path(sys.argv[1]), content)


if __name__ == "__main__":
    main()
