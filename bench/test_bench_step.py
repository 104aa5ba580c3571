"""One training step, every contender: full shapes on a GPU, small ones on a CPU."""

from __future__ import annotations

import pytest
import torch

from fastdcgan.bench import contenders
from fastdcgan.bench.contenders import NAMES, Entry, Shape, entries, on_random_images
from fastdcgan.bench.roofline import floor_seconds, measure_rates
from fastdcgan.bench.throughput import least_passes
from fastdcgan.heap import heap

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SHAPES = (
    [Shape(batch, (side, side)) for side in (32, 64, 128) for batch in (64, 128, 512)]
    if GPU
    else [Shape(32, (32, 32), width=32)]
)
SLOW_TO_COMPILE = (
    [] if GPU else [Entry("skilled", "fp32"), Entry("fast-compiled", "bf16")]
)  # `fastdcgan bench` has them
ENTRIES = [entry for entry in entries(NAMES, "auto", DEVICE) if entry not in SLOW_TO_COMPILE]


@pytest.fixture(scope="module")
def rates():
    measured = {}

    def of(precision):
        if precision not in measured:
            measured[precision] = measure_rates(DEVICE, precision)
        return measured[precision]

    return of


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry.name}-{entry.precision}")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.image_size[0]}px-{shape.batch_size}")
def test_step(benchmark, images_per_second, rates, shape: Shape, entry: Entry):
    benchmark.group = f"step {shape.image_size[0]}x{shape.image_size[1]}, width {shape.width}, batch {shape.batch_size}"
    contenders.quiet_compiler()
    torch._dynamo.reset()
    heap.keeps = False  # left by another contender; the other switches of the process each sets for itself
    run, _ = on_random_images(entry, shape, DEVICE)
    rate = images_per_second(run, shape.batch_size)
    floor = shape.batch_size / floor_seconds(least_passes(shape, entry.precision, DEVICE), rates(entry.precision))
    benchmark.extra_info["of_floor"] = round(rate / floor, 3)
