"""How the step scales over the processes of one machine: a GPU each, or on a CPU one core each.

    python -m fastdcgan.bench.scaling OUT.json [BATCH_SIZE [IMAGE_SIZE [MOST_PROCESSES]]]

Weak scaling: BATCH_SIZE images in each process, so the ideal is as many times the images a second as there are
processes. Strong scaling: BATCH_SIZE images shared out, the same ideal. Every number of processes is started anew in
each of several rounds that take turns; medians are compared.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from fastdcgan.bench.contenders import Shape, quiet_compiler
from fastdcgan.bench.environment import command_line, describe, write_result
from fastdcgan.bench.roofline import synchronize
from fastdcgan.console import say
from fastdcgan.distributed import join
from fastdcgan.executors import make_executor
from fastdcgan.models import build_discriminator, build_generator
from fastdcgan.step import TrainStep

ROUNDS = 3
WARM_UP, STEPS = 5, 10  # on a GPU the graph is captured in the fourth


@dataclass
class Row:
    scaling: str  # "weak" or "strong"
    processes: int
    batch_size: int  # of a process
    images_per_second: float = 0.0  # of all processes, median over rounds
    efficiency: float = 0.0  # images/s over those of one process times the number of processes
    rounds: list[float] = field(default_factory=list)


def scaling(batch_size: int, image_size: int, most: int, device: torch.device) -> list[Row]:
    counts = [count for count in (1, 2, 4, 8) if count <= most and batch_size // count >= 2]
    rows = [Row("weak", count, batch_size) for count in counts]
    rows += [Row("strong", count, batch_size // count) for count in counts]
    for number in range(ROUNDS):
        for row in rows:
            say(f"round {number + 1} of {ROUNDS}: {row.scaling}, {row.processes} processes of {row.batch_size}")
            row.rounds.append(measure(row, image_size, device))
    for row in rows:
        row.images_per_second = median(row.rounds)
    for row in rows:
        alone = next(each for each in rows if each.scaling == row.scaling)
        row.efficiency = row.images_per_second / alone.images_per_second / row.processes
    return rows


def measure(row: Row, image_size: int, device: torch.device) -> float:
    """images/s of all processes together, in processes started for it."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "rate.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={row.processes}"]
        command += ["-m", "fastdcgan.bench.scaling", "worker", str(row.batch_size), str(image_size), str(out)]
        threads = {} if device.type == "cuda" else {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=os.environ | threads)
        return float(json.loads(out.read_text()))


def worker(batch_size: int, image_size: int, out: Path) -> None:
    """One of the processes: a few steps on random images; the first one writes the rate."""
    quiet_compiler()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = join(device)
    shape = Shape(batch_size, (image_size, image_size))
    generator = build_generator("dcgan", shape.image_size, shape.channels, shape.latent_dim, shape.width).to(device)
    discriminator = build_discriminator("dcgan", shape.image_size, shape.channels, shape.width).to(device)
    precision = "bf16" if device.type == "cuda" else "fp32"
    source = shape.random_images(max(1024, batch_size), device)
    index = torch.randint(0, len(source), (batch_size,), device=device)
    step = TrainStep(generator, discriminator, source, index, precision=precision, world=world)
    step.synchronise()
    on_gpu = device.type == "cuda"
    executor = make_executor(step, compile=on_gpu, cuda_graph="on" if on_gpu else "off")
    for _ in range(WARM_UP if on_gpu else 1):
        executor.run()
    world.broadcast_object(None)  # so that all begin together
    synchronize(device)
    start = time.perf_counter()
    for _ in range(STEPS if on_gpu else 3):
        executor.run()
    synchronize(device)
    world.broadcast_object(None)
    if world.rank == 0:
        images = (STEPS if on_gpu else 3) * batch_size * world.size
        out.write_text(json.dumps(images / (time.perf_counter() - start)))
    executor.close()  # NCCL would wait for the graph that has it
    world.leave()


def main() -> None:
    if sys.argv[1:2] == ["worker"]:
        worker(int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
        return
    if not 2 <= len(sys.argv) <= 5:
        sys.exit("usage: python -m fastdcgan.bench.scaling OUT.json [BATCH_SIZE [IMAGE_SIZE [MOST_PROCESSES]]]")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch_size, image_size, most = (
        int(sys.argv[i]) if len(sys.argv) > i else default
        for i, default in ((2, 64), (3, 64), (4, torch.cuda.device_count() or len(os.sched_getaffinity(0))))
    )
    rows = scaling(batch_size, image_size, most, device)
    command = command_line("scaling")
    content = describe(device, command) | {"measured": "scaling", "rows": [dataclasses.asdict(row) for row in rows]}
    write_result(Path(sys.argv[1]), content)
    for row in rows:
        print(
            f"{row.scaling:6} {row.processes} processes of {row.batch_size:4} images"
            f" {row.images_per_second:10,.1f} images/s  efficiency {row.efficiency:.0%}"
        )


if __name__ == "__main__":
    main()
