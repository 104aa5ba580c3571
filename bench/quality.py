"""Time to a given sample quality: the plain reference against the fast step, on the same images with the same seeds.

    python -m fastdcgan.bench.quality OUT.json [DATA [IMAGE_SIZE [WIDTH [STEPS [SEEDS]]]]]

Each has a process of its own, and they train in turns, a stretch of steps each. After every stretch the sliced
Wasserstein distance between samples of the generator (its latest weights, evaluation mode) and real images is taken,
lower is better; only training is timed, and not its first steps, which compile: the others stand for them. The same
distance between two halves of the real images is the least to hope for.

At the end `parity` says whether both got equally far.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from scipy.stats import t as student
from torch import Tensor, nn

from fastdcgan.bench.contenders import Entry, Example, Shape, fast_step
from fastdcgan.bench.contestant import Contestant
from fastdcgan.bench.environment import command_line, describe, write_result
from fastdcgan.bench.roofline import synchronize
from fastdcgan.console import say
from fastdcgan.data import open_dataset
from fastdcgan.distances import mean_sliced_wasserstein

STRETCHES = 10
LAST = 3  # stretches whose distances count as the end
MARGIN = 0.2  # share of the distance that makes no visible difference; seeds of one trainer lie further apart
SAMPLES = 1024


def quality(
    *, data: str, shape: Shape, device: torch.device, steps: int, seeds: int, json: Path, command: str
) -> dict[str, Any]:
    """Train `steps` steps of both with each seed and write a curve for each to `json`."""
    executor, precision = ("fast-captured", "bf16") if device.type == "cuda" else ("fast-eager", "fp32")
    entries = [Entry("example", "tf32" if device.type == "cuda" else "fp32"), Entry(executor, precision)]
    curves = []
    for seed in range(seeds):
        seeded = dataclasses.replace(shape, seed=seed)
        found: list[dict[str, Any]] = [
            {"contender": entry.name, "seed": seed, "steps": [0], "seconds": [0.0], "distances": []}
            for entry in entries
        ]
        with ExitStack() as processes:
            contestants = [
                processes.enter_context(Contestant(Trainer, entry, data, seeded, device)) for entry in entries
            ]
            for stretch in range(STRETCHES + 1):
                for curve, contestant in zip(found, contestants, strict=True):
                    if stretch > 0:
                        curve["seconds"].append(curve["seconds"][-1] + contestant.ask("train", steps // STRETCHES))
                        curve["steps"].append(curve["steps"][-1] + steps // STRETCHES)
                    of_samples, curve["least"] = contestant.ask("distances")
                    curve["distances"].append(of_samples)
                    say(
                        f"seed {seed}, {curve['contender']}: step {curve['steps'][-1]}, {curve['seconds'][-1]:.1f} s,"
                        f" distance {of_samples:.4f} (real to real {curve['least']:.4f})"
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
        write_result(json, content)  # after every seed: whoever has not the time for all keeps those
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


class Trainer:
    """One of the two, in the process that is its own."""

    def __init__(self, entry: Entry, data: str, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        dataset = open_dataset(data, image_size=shape.image_size, device=device, seed=shape.seed)
        real = dataset.take(range(min(2 * SAMPLES, dataset.count))).permute(0, 3, 1, 2).to(device)
        self.real, others = real.split(math.ceil(len(real) / 2))
        self.least = mean_sliced_wasserstein(self.real, others)
        stream = dataset.stream(shape.batch_size)
        if entry.name == "example":
            example = Example(shape, device, entry.precision)
            self.generator: nn.Module = example.generator

            def step() -> None:
                stream.advance()
                real = stream.source[stream.index].permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1
                example.step(real.contiguous())
        else:
            fast, run = fast_step(shape, stream.source, stream.index, entry.precision, entry.name)
            fast.rng.manual_seed(shape.seed)
            self.generator = fast.generator

            def step() -> None:
                stream.advance()
                run()

        self.step, self.begun = step, False

    def train(self, steps: int) -> float:
        """Seconds of that many steps; of the first call's, the latter half, twice."""
        timed = steps if self.begun else -(-steps // 2)
        self.begun = True
        for _ in range(steps - timed):
            self.step()
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(timed):
            self.step()
        synchronize(self.device)
        return (time.perf_counter() - start) * steps / timed

    def distances(self) -> tuple[float, float]:
        """The distance of samples to real images, and of these to other real ones."""
        drawn = samples(self.generator, len(self.real), self.shape, self.device)
        return mean_sliced_wasserstein(self.real, drawn), self.least


@torch.no_grad()
def samples(generator: nn.Module, count: int, shape: Shape, device: torch.device) -> Tensor:
    """float32 (count, C, H, W) in -1..1, on the device."""
    latents = torch.randn(count, shape.latent_dim, generator=torch.Generator().manual_seed(1)).to(device)
    generator.eval()
    images = generator(latents.to(next(generator.parameters()).dtype)).float()
    generator.train()
    return images


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
        command=command_line("quality"),
    )


if __name__ == "__main__":
    main()
