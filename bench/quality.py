"""Time to a given sample quality: the plain reference against the fast step, on the same images with the same seeds.

    python -m fastdcgan.bench.quality OUT.json [DATA [IMAGE_SIZE [WIDTH [STEPS [SEEDS]]]]]

Both train in turns, a stretch of steps each. After every stretch the sliced Wasserstein distance between samples of the
generator (its latest weights, evaluation mode) and real images is taken, lower is better; only training is timed, and
compilation is not in it. The same distance between two halves of the real images is the least to hope for.

At the end `parity` says whether both got equally far.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from scipy.stats import t as student
from torch import Tensor, nn

from fastdcgan.apps.distances import sliced_wasserstein
from fastdcgan.bench import contenders
from fastdcgan.bench.contenders import Example, Shape, fast_step
from fastdcgan.bench.environment import describe, write_json
from fastdcgan.bench.roofline import synchronize
from fastdcgan.console import say
from fastdcgan.data import open_dataset

STRETCHES = 10
LAST = 3  # stretches whose distances count as the end
MARGIN = 0.2  # share of the distance that makes no visible difference; seeds of one trainer lie further apart
SAMPLES = 1024


def quality(
    *, data: str, shape: Shape, device: torch.device, steps: int, seeds: int, json: Path, command: str
) -> dict[str, Any]:
    """Train `steps` steps of both with each seed and write a curve for each to `json`."""
    contenders.quiet()
    executor, precision = ("fast-captured", "bf16") if device.type == "cuda" else ("fast-eager", "fp32")
    curves = []
    for seed in range(seeds):
        dataset = open_dataset(data, image_size=shape.image_size, device=device, seed=seed)
        real = dataset.take(range(min(2 * SAMPLES, dataset.count))).permute(0, 3, 1, 2)
        half = len(real) // 2
        least = distance(real[:half], real[half:])
        defaults = contenders.read_flags()
        seeded = dataclasses.replace(shape, seed=seed)
        trainers = [reference_trainer(seeded, dataset, device), fast_trainer(seeded, dataset, executor, precision)]
        contenders.set_flags(defaults)
        found: list[dict[str, Any]] = [
            {"contender": name, "seed": seed, "steps": [0], "seconds": [0.0], "distances": [], "least": least}
            for name in ("example", executor)
        ]
        for stretch in range(STRETCHES + 1):
            for curve, (generator, step, flags) in zip(found, trainers, strict=True):
                with contenders.flags(flags):
                    if stretch > 0:
                        synchronize(device)
                        start = time.perf_counter()
                        for _ in range(steps // STRETCHES):
                            step()
                        synchronize(device)
                        curve["seconds"].append(curve["seconds"][-1] + time.perf_counter() - start)
                        curve["steps"].append(curve["steps"][-1] + steps // STRETCHES)
                    curve["distances"].append(distance(real[:half], samples(generator, half, shape, device)))
                say(
                    f"seed {seed}, {curve['contender']}: step {curve['steps'][-1]}, {curve['seconds'][-1]:.1f} s,"
                    f" distance {curve['distances'][-1]:.4f} (real to real {least:.4f})"
                )
        curves += found
    content = describe(device, command) | {
        "measured": "quality",
        "data": Path(data).name,
        "network": {"image_size": shape.image_size, "width": shape.width, "batch_size": shape.batch_size},
        "precision": {"example": "tf32" if device.type == "cuda" else "fp32", executor: precision},
        "curves": curves,
        "parity": parity(curves),
    }
    write_json(json, content)
    return content


def parity(curves: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether the fast step's samples end as near to the data as the reference's.

    The criterion: with the seed as the unit, the 95% interval (Student's t) of the paired difference between the two
    final distances, each the mean over the last LAST stretches, lies within MARGIN of the reference's mean distance.

    Returns:
        difference, interval and margin as shares of the reference's mean distance; seeds; holds.
    """
    final: dict[bool, list[float]] = {
        fast: [mean(c["distances"][-LAST:]) for c in curves if (c["contender"] != "example") == fast]
        for fast in (False, True)
    }
    usual, count = mean(final[False]), len(final[False])
    differences = [(fast - slow) / usual for slow, fast in zip(final[False], final[True], strict=True)]
    difference = mean(differences)
    half = float(student.ppf(0.975, count - 1)) * stdev(differences) / count**0.5 if count > 1 else math.inf
    interval = difference - half, difference + half
    return {
        "difference": difference,
        "interval": interval,
        "margin": MARGIN,
        "seeds": count,
        "holds": max(-interval[0], interval[1]) <= MARGIN,
    }


Trainer = tuple[nn.Module, Callable[[], None], tuple[bool, ...]]  # generator, one step, the process's switches


def reference_trainer(shape: Shape, dataset: Any, device: torch.device) -> Trainer:
    example = Example(shape, device, "tf32" if device.type == "cuda" else "fp32")
    stream = dataset.stream(shape.batch_size)

    def step() -> None:
        stream.advance()
        real = stream.source[stream.index].permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1
        example.step(real.contiguous())

    return example.generator, step, contenders.read_flags()


def fast_trainer(shape: Shape, dataset: Any, executor: str, precision: str) -> Trainer:
    stream = dataset.stream(shape.batch_size)
    train_step, run = fast_step(shape, stream.source, stream.index, precision, executor)
    train_step.rng.manual_seed(shape.seed)

    def step() -> None:
        stream.advance()
        run()

    return train_step.generator, step, contenders.read_flags()


@torch.no_grad()
def samples(generator: nn.Module, count: int, shape: Shape, device: torch.device) -> Tensor:
    """float32 (count, C, H, W) on the CPU"""
    latents = torch.randn(count, shape.latent_dim, generator=torch.Generator().manual_seed(1)).to(device)
    generator.eval()
    images = generator(latents.to(next(generator.parameters()).dtype)).float().cpu()
    generator.train()
    return images


def distance(a: Tensor, b: Tensor) -> float:
    """Sliced Wasserstein, the mean over the levels of the pyramid."""
    levels = sliced_wasserstein(a, b)
    return sum(levels.values()) / len(levels)


def main() -> None:
    names = ("OUT.json", "DATA", "IMAGE_SIZE", "WIDTH", "STEPS", "SEEDS")
    given = dict(zip(names, sys.argv[1:], strict=False))
    if "OUT.json" not in given:
        sys.exit(f"usage: python -m fastdcgan.bench.quality {' '.join(names)}")
    side, data = int(given.get("IMAGE_SIZE", 32)), given.get("DATA", "digits")
    channels = open_dataset(data, image_size=(side, side), device=torch.device("cpu")).channels
    quality(
        data=data,
        shape=Shape(64, (side, side), channels, width=int(given.get("WIDTH", 32))),
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        steps=int(given.get("STEPS", 500)),
        seeds=int(given.get("SEEDS", 3)),
        json=Path(given["OUT.json"]),
        command=shlex.join(["python", "-m", "fastdcgan.bench.quality", *sys.argv[1:]]),
    )


if __name__ == "__main__":
    main()
