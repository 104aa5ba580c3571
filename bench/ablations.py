"""What each way to convolve brings the CPU step: all its convolutions that way, in turns with direct ones.

python -m fastdcgan.bench.ablations OUT.json [BATCH_SIZE [REPETITIONS]]
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from statistics import median

import torch

from fastdcgan import patches, winograd
from fastdcgan.bench.contenders import Shape, fast_step, quiet_compiler
from fastdcgan.bench.environment import command_line, describe, write_result
from fastdcgan.console import say

DIRECT = "direct convolutions"
# WIDEST_GRID and FAST_SGEMM of patches, PAYS_HERE of winograd: one algorithm wherever it fits, on any processor.
CONVOLUTIONS = {
    DIRECT: (0, False, False),
    "matrix products on small grids": (patches.WIDEST_GRID, True, False),
    "Winograd's": (0, False, True),
}
EXECUTORS = {"eager": "fast-eager", "compiled": "fast-compiled"}


@dataclasses.dataclass
class Row:
    variant: str
    seconds: list[float] = dataclasses.field(default_factory=list)  # a step
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)  # a step, of processor time over all threads
    time_to_direct: float = 0.0  # against the same executor with direct convolutions; median over rounds
    cpu_time_to_direct: float = 0.0


def ablate(shape: Shape, repetitions: int) -> list[Row]:
    """Rounds in which every variant runs one step."""
    quiet_compiler()
    source = shape.random_images(1024, torch.device("cpu"))
    rows, runs = [], []
    usual = patches.WIDEST_GRID, patches.FAST_SGEMM, winograd.PAYS_HERE
    for name, executor in EXECUTORS.items():
        for way, settings in CONVOLUTIONS.items():
            say(f"preparing: {name}, {way}")
            patches.WIDEST_GRID, patches.FAST_SGEMM, winograd.PAYS_HERE = settings
            _, run = fast_step(shape, source, torch.arange(shape.batch_size), "fp32", executor)
            run()
            rows.append(Row(f"{name}, {way}"))
            runs.append((run, settings))
    for number in range(repetitions):
        say(f"round {number + 1} of {repetitions}")
        for row, (run, settings) in zip(rows, runs, strict=True):
            patches.WIDEST_GRID, patches.FAST_SGEMM, winograd.PAYS_HERE = settings
            start, cpu_start = time.perf_counter(), time.process_time()
            run()
            row.cpu_seconds.append(time.process_time() - cpu_start)
            row.seconds.append(time.perf_counter() - start)
    patches.WIDEST_GRID, patches.FAST_SGEMM, winograd.PAYS_HERE = usual
    for row in rows:
        executor, _ = row.variant.split(", ")
        direct = next(each for each in rows if each.variant == f"{executor}, {DIRECT}")
        row.time_to_direct = median(a / b for a, b in zip(row.seconds, direct.seconds, strict=True))
        row.cpu_time_to_direct = median(a / b for a, b in zip(row.cpu_seconds, direct.cpu_seconds, strict=True))
        print(
            f"{row.variant:42} {median(row.seconds) * 1e3:8.0f} ms  {median(row.cpu_seconds) * 1e3:8.0f} ms processor"
            f"  x{row.time_to_direct:.2f}  x{row.cpu_time_to_direct:.2f}"
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
    write_result(Path(sys.argv[1]), content)


if __name__ == "__main__":
    main()
