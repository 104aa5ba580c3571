"""The floor: the least time one exact training step can take on a device, from its measured rates.

Every layer and pass of the step is one kernel that takes max(FLOPs / matrix rate, bytes / copy bandwidth), reading each
input and writing each output once; their sum is the floor. What counts as the exact step:
- real and fake images go through the discriminator together; its update computes no gradient for images, the
  generator's update none for the discriminator's weights;
- a convolution multiplies every weight with every pixel of the smaller grid, padding among them, as torch's FLOP
  counter has it and matrix products compute it (at 64x64 a tenth or more of all multiplications are with padding);
- where `fastdcgan/winograd.py` takes it, only the 25 of 64 multiplications that are left count, and no transforms;
- BatchNorm with its activation is one kernel each way that reads its input twice, once for the statistics: forward
  reads x, x, writes y; backward reads x, dy, x, dy, writes dx;
- the activations that follow a convolution directly, and the losses, cost nothing beyond that convolution;
- Adam reads the gradient, reads and writes weights and both moments in float32, and writes a 16-bit copy where there is
  one; the generator's moving average is not counted.
So it is a floor for this set of kernels. Statistics computed inside the convolution before would go below it.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdcgan import reference, winograd

BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2}  # of an activation or a weight as the step computes with it
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Pass:
    """One layer in one direction, over one step of the whole batch."""

    phase: str  # "D update" or "G update"
    layer: str  # "D 2 Conv2d": the network, the place in its list of layers, the kind
    direction: str  # "forward", "input gradient", "weight gradient", "backward", "update"
    flops: int  # a multiplication and an addition are two
    bytes: int  # at least read and written


@dataclass(frozen=True)
class Rates:
    """What a device reaches on the simplest work there is: FLOP/s of a matrix product, bytes/s of a copy."""

    matrix: float
    copy: float

    def seconds(self, work: Pass) -> float:
        return max(work.flops / self.matrix, work.bytes / self.copy)


def step_passes(
    batch_size: int,
    image_size: tuple[int, int],
    channels: int,
    latent_dim: int,
    width: int,
    precision: str,
    by_winograd: bool = False,
) -> list[Pass]:
    """All passes of one exact step of both networks; `by_winograd`: every convolution that fits it."""
    with torch.device("meta"):
        generator = reference.Generator(image_size, channels, latent_dim, width)
        discriminator = reference.Discriminator(image_size, channels, width)
        noise = torch.empty(batch_size, latent_dim, 1, 1)
        images = torch.empty(batch_size, channels, *image_size)
    size, pixels = BYTES[precision], images.numel()
    both = torch.cat((images, images))
    rows = [Pass("D update", "real images", "forward", 0, pixels * (1 + size))]  # uint8 in, floating point out
    forward = functools.partial(_forward, size=size, by_winograd=by_winograd)
    backward = functools.partial(_backward, size=size, by_winograd=by_winograd)
    rows += forward("G", "D update", generator.main, noise)
    rows += forward("D", "D update", discriminator.main, both)
    rows += backward("D", "D update", discriminator.main, both, weights=True)
    rows += _adam("D", "D update", discriminator, size)
    rows += forward("D", "G update", discriminator.main, images)
    rows += backward("D", "G update", discriminator.main, images, weights=False, images=True)
    rows += backward("G", "G update", generator.main, noise, weights=True)
    rows += _adam("G", "G update", generator, size)
    return rows


def _forward(network: str, phase: str, layers: nn.Sequential, x: Tensor, *, size: int, by_winograd: bool) -> list[Pass]:
    rows = []
    for i, layer in enumerate(layers.children()):
        y: Tensor = layer(x)
        name = f"{network} {i} {type(layer).__name__}"
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            moved = x.numel() + layer.weight.numel() + y.numel()
            rows.append(Pass(phase, name, "forward", _flops(layer, x, y, by_winograd), moved * size))
        elif isinstance(layer, nn.BatchNorm2d):
            rows.append(Pass(phase, name, "forward", 0, 3 * x.numel() * size))
        x = y
    return rows


def _backward(
    network: str,
    phase: str,
    layers: nn.Sequential,
    x: Tensor,
    *,
    weights: bool,
    images: bool = False,
    size: int,
    by_winograd: bool,
) -> list[Pass]:
    """Last layer first. The first layer's input gradient only with `images`."""
    rows: list[Pass] = []
    for i, layer in enumerate(layers.children()):
        y: Tensor = layer(x)
        name = f"{network} {i} {type(layer).__name__}"
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            flops = _flops(layer, x, y, by_winograd)
            moved = (x.numel() + layer.weight.numel() + y.numel()) * size
            if weights:
                rows.append(Pass(phase, name, "weight gradient", flops, moved))
            if i > 0 or images:
                rows.append(Pass(phase, name, "input gradient", flops, moved))
        elif isinstance(layer, nn.BatchNorm2d):
            rows.append(Pass(phase, name, "backward", 0, 5 * x.numel() * size))
        x = y
    return rows[::-1]


def _adam(network: str, phase: str, module: nn.Module, size: int) -> list[Pass]:
    count = sum(p.numel() for p in module.parameters())
    low_precision_copy = size if size < 4 else 0
    return [Pass(phase, f"{network} Adam", "update", 0, count * (6 * 4 + size + low_precision_copy))]


def _flops(layer: nn.Conv2d | nn.ConvTranspose2d, x: Tensor, y: Tensor, by_winograd: bool) -> int:
    """Of a convolution, the same in all three directions: every weight meets every pixel of the smaller grid
    (at the border partly as padding, which is counted too)."""
    small, large = sorted((x, y), key=lambda images: images.shape[2] * images.shape[3])
    grid = small.shape[2], small.shape[3]
    flops = 2 * len(x) * grid[0] * grid[1] * layer.weight.numel()
    if by_winograd and layer.stride == (2, 2) and winograd.fits(len(x), grid, large.shape[1]):
        flops = flops * 25 // 64
    return flops


def floor_seconds(passes: list[Pass], rates: Rates) -> float:
    return sum(rates.seconds(row) for row in passes)


def measure_rates(device: torch.device, precision: str) -> Rates:
    """The best of several rounds: a floor is what the device can do, not what it mostly does."""
    dtype = DTYPES[precision]
    side, copied = (8192, 2**30) if device.type == "cuda" else (2048, 2**28)
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    c = torch.empty_like(a)
    matrix = 2 * side**3 / _best_seconds(lambda: torch.mm(a, b, out=c), device)
    # The library of convolutions is another one, on some processors a faster one: the floor takes the better of both.
    x = torch.randn(32, 256, 32, 32, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    w = torch.randn(256, 256, 3, 3, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    flops = 2 * 32 * 30 * 30 * w.numel()
    matrix = max(matrix, flops / _best_seconds(lambda: torch.conv2d(x, w), device))
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    copy = 2 * copied / _best_seconds(lambda: target.copy_(source), device)
    return Rates(matrix, copy)


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    repeats = 10 if device.type == "cuda" else 1
    times = []
    for _ in range(7):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        synchronize(device)
        times.append((time.perf_counter() - start) / repeats)
    return min(times[1:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def layer_table(passes: list[Pass], rates: Rates) -> str:
    """One line a pass: GFLOP, MB, microseconds and which of the two decides; then the sums."""
    lines = [f"{'phase':9} {'layer':22} {'direction':16} {'GFLOP':>9} {'MB':>9} {'us':>9}  bound by"]
    for row in passes:
        bound = "matrix" if row.flops / rates.matrix > row.bytes / rates.copy else "memory"
        lines.append(
            f"{row.phase:9} {row.layer:22} {row.direction:16} {row.flops / 1e9:9.3f} {row.bytes / 1e6:9.2f}"
            f" {rates.seconds(row) * 1e6:9.1f}  {bound}"
        )
    flops, moved = sum(row.flops for row in passes), sum(row.bytes for row in passes)
    total = floor_seconds(passes, rates) * 1e6
    lines.append(f"{'sum':49} {flops / 1e9:9.3f} {moved / 1e6:9.2f} {total:9.1f}")
    return "\n".join(lines)


def median_and_spread(values: list[float]) -> tuple[float, float]:
    """Median, and half the distance between the quartiles (0 for a single value)."""
    if len(values) < 2:
        return values[0], 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, (high - low) / 2
