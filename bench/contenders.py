"""The training steps that are compared, each as a person would run it.

`example`        the classic eager loop: float32, NCHW, real and fake passes, `.item()` each step; on a GPU with TF32
                 convolutions (PyTorch's default) and cudnn.benchmark, as the widely used example has it
`example-fp32`   the same with TF32 off; GPUs only, elsewhere it is the same thing
`skilled`        what a good engineer writes by hand: autocast, channels_last, max-autotune, fused Adam
`skilled-fp16`   the same in float16, whose BatchNorm runs on cuDNN where bfloat16's does not; GPUs only, beside bf16
`fast-eager`, `fast-compiled`, `fast-captured`   this project's step and its executors; captured needs a GPU
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdcgan import reference
from fastdcgan.bench.roofline import DTYPES
from fastdcgan.errors import UserError, first_line
from fastdcgan.executors import make_executor
from fastdcgan.models import build_discriminator, build_generator
from fastdcgan.processor import choose_precision, native_bf16
from fastdcgan.step import TrainStep

NAMES = ("example", "example-fp32", "skilled", "skilled-fp16", "fast-eager", "fast-compiled", "fast-captured")


@dataclass(frozen=True)
class Shape:
    """What is trained: the DCGAN of `reference.py` on batches of images."""

    batch_size: int = 64
    image_size: tuple[int, int] = (64, 64)
    channels: int = 3
    latent_dim: int = 100
    width: int = 64
    seed: int = 0  # of the first weights

    def reference_networks(self) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(self.seed)
        generator = reference.Generator(self.image_size, self.channels, self.latent_dim, self.width)
        return generator, reference.Discriminator(self.image_size, self.channels, self.width)

    def random_images(self, count: int, device: torch.device) -> Tensor:
        """uint8 (count, H, W, C)"""
        return torch.randint(0, 256, (count, *self.image_size, self.channels), dtype=torch.uint8, device=device)


@dataclass(frozen=True)
class Entry:
    """One contender in one precision, in the order they are run and printed."""

    name: str
    precision: str


def entries(names: tuple[str, ...], precision: str, device: torch.device) -> list[Entry]:
    """The contenders that make sense on the device. `precision` is of `skilled` and `fast`; auto: bf16 on a GPU that
    computes in it, else fp32, and on a CPU that multiplies bfloat16 bf16 too."""
    on_gpu = device.type == "cuda"
    further = ["bf16"] if precision == "auto" and not on_gpu and native_bf16() else []
    precision = choose_precision(precision, device)
    chosen = []
    for name in names:
        if name == "example":
            chosen.append(Entry(name, "tf32" if on_gpu else "fp32"))
        elif name == "example-fp32":
            chosen += [Entry(name, "fp32")] if on_gpu else []
        elif name == "skilled-fp16":
            chosen += [Entry("skilled", "fp16")] if on_gpu and precision == "bf16" else []
        elif name != "fast-captured" or on_gpu:
            chosen += [Entry(name, each) for each in [precision, *further]]
    return chosen


class Example:
    """The classic loop."""

    def __init__(self, shape: Shape, device: torch.device, precision: str) -> None:
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        self.generator, self.discriminator = (network.to(device) for network in shape.reference_networks())
        self.adam_g, self.adam_d = reference.adam(self.generator), reference.adam(self.discriminator)
        self.latent_dim = shape.latent_dim

    def step(self, real: Tensor) -> None:
        """real: (B, C, H, W) in -1..1, on the device."""
        noise = torch.randn(len(real), self.latent_dim, device=real.device)
        reference.reference_step(self.generator, self.discriminator, self.adam_g, self.adam_d, real, noise)


class Skilled:
    """Written by hand, with what PyTorch offers for speed."""

    def __init__(self, shape: Shape, device: torch.device, precision: str, mode: str = "max-autotune") -> None:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = True, 0  # all algorithms, as ours
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"
        generator, discriminator = (
            network.to(device).to(memory_format=torch.channels_last) for network in shape.reference_networks()
        )
        self.adam_g, self.adam_d = (
            torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.999), fused=True)
            for network in (generator, discriminator)
        )
        self.generator, self.discriminator = (torch.compile(n, mode=mode) for n in (generator, discriminator))
        low = precision in ("bf16", "fp16")
        self.autocast = functools.partial(torch.autocast, device.type, DTYPES[precision] if low else None, enabled=low)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.latent_dim = shape.latent_dim

    def step(self, real: Tensor) -> None:
        """real: (B, C, H, W) in -1..1, on the device."""
        torch.compiler.cudagraph_mark_step_begin()
        real = real.contiguous(memory_format=torch.channels_last)
        noise = torch.randn(len(real), self.latent_dim, device=real.device)
        ones, zeros = real.new_ones(len(real)), real.new_zeros(len(real))

        self.adam_d.zero_grad()
        with self.autocast():
            fake = self.generator(noise)
            loss_real = F.binary_cross_entropy_with_logits(self.discriminator(real), ones)
        self.scaler.scale(loss_real).backward()
        with self.autocast():
            loss_fake = F.binary_cross_entropy_with_logits(self.discriminator(fake.detach()), zeros)
        self.scaler.scale(loss_fake).backward()
        self.scaler.step(self.adam_d)

        self.adam_g.zero_grad()
        with self.autocast():
            loss_g = F.binary_cross_entropy_with_logits(self.discriminator(fake), ones)
        self.scaler.scale(loss_g).backward()
        self.scaler.step(self.adam_g)
        self.scaler.update()


def fast_step(
    shape: Shape, source: Tensor, index: Tensor, precision: str, executor: str, flip: bool = False
) -> tuple[TrainStep, Callable[[], None]]:
    """This project's step over `source[index]`, and what runs it once; executor as in NAMES.

    Raises:
        UserError: it is to be compiled and cannot be.
    """
    torch.manual_seed(shape.seed)
    generator = build_generator("dcgan", shape.image_size, shape.channels, shape.latent_dim, shape.width)
    discriminator = build_discriminator("dcgan", shape.image_size, shape.channels, shape.width)
    device = source.device
    step = TrainStep(generator.to(device), discriminator.to(device), source, index, flip=flip, precision=precision)
    graph = "on" if executor == "fast-captured" else "off"
    made = make_executor(step, compile=executor != "fast-eager", cuda_graph=graph)
    if executor != "fast-eager" and not step.compiled:
        raise UserError(f"{executor} cannot be compiled here: measure fast-eager")
    return step, made.run


def on_random_images(entry: Entry, shape: Shape, device: torch.device) -> tuple[Callable[[], None], str]:
    """What runs one step of a contender on images that lie on the device, already run once; and a remark."""
    images = shape.random_images(shape.batch_size, device)
    if entry.name.startswith("fast"):
        index = torch.randperm(len(images), device=device)  # no more images than the others have
        _, run = fast_step(shape, images, index, entry.precision, entry.name)
        run()
        return run, ""
    real = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1
    if entry.name.startswith("example"):
        example = Example(shape, device, entry.precision)
        example.step(real)
        return lambda: example.step(real), ""
    skilled, remark = compiled_skilled(shape, device, entry.precision, real)
    return lambda: skilled.step(real), remark


def compiled_skilled(shape: Shape, device: torch.device, precision: str, real: Tensor) -> tuple[Skilled, str]:
    """`Skilled`, warmed up; without CUDA graphs where its compiled networks cannot be used with them."""
    try:
        skilled = Skilled(shape, device, precision)
        for _ in range(3 if device.type == "cuda" else 1):  # CUDA graphs are recorded in the second
            skilled.step(real)
    except RuntimeError as error:
        if device.type != "cuda":
            raise
        skilled = Skilled(shape, device, precision, mode="max-autotune-no-cudagraphs")
        skilled.step(real)
        return skilled, f"max-autotune-no-cudagraphs, for with them: {first_line(error)[:100]}"
    return skilled, ""


def quiet_compiler() -> None:
    """Keep the compiler's remarks out of the table, and let it compile one contender after the other."""
    torch._dynamo.config.recompile_limit = 64  # they share the functions that are compiled
    warnings.filterwarnings("ignore", module="torch")
    for name in ("torch.utils.cpp_extension", "torch._inductor"):
        logging.getLogger(name).setLevel(logging.ERROR)
