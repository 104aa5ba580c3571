"""What must not creep into the step: graph breaks, kernels, passes over activations, waiting for the device.

No timing: the compiler's own report of the CPU step, and the operators that the step calls.
"""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdcgan import reference
from fastdcgan.models import build_discriminator, build_generator
from fastdcgan.step import TrainStep

SIZE, CHANNELS, LATENT, WIDTH, BATCH = (16, 16), 3, 16, 8, 64  # the smallest networks that have every kind of layer

# Of the compiled CPU step at these sizes, on one thread, with torch 2.15. Lower them when they fall.
KERNELS = 74
PASSES = 22.0
OTHER_TORCH = 1.0 if torch.__version__.startswith("2.15.") else 1.15  # another release may fuse a little otherwise

WAITING = {  # operators whose result the host needs before it can go on
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::item",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::repeat_interleave.Tensor",
}


def small_step(flip: bool = True) -> TrainStep:
    generator = build_generator("dcgan", SIZE, CHANNELS, LATENT, WIDTH)
    discriminator = build_discriminator("dcgan", SIZE, CHANNELS, WIDTH)
    source = torch.randint(0, 256, (2 * BATCH, *SIZE, CHANNELS), dtype=torch.uint8)
    return TrainStep(generator, discriminator, source, torch.arange(BATCH), flip=flip, seed=1)


@pytest.fixture(scope="module")
def compiler_report() -> dict[str, float]:
    """Compile the step, kernels only generated and not built (which is most of the time), and collect the counters."""
    from torch._dynamo.utils import counters
    from torch._inductor import compile_fx, config, metrics
    from torch._inductor.async_compile import AsyncCompile

    torch._dynamo.reset()
    metrics.reset()
    counters.clear()
    # A step from the cache reports nothing. (Not by monkeypatch, which would leave the setting deleted.)
    with pytest.MonkeyPatch.context() as patch, config.patch(force_disable_caches=True):
        patch.setattr(AsyncCompile, "cpp_pybinding", lambda self, types, source: lambda *arguments: None)
        level = compile_fx.inductor_metrics_log.level
        compile_fx.inductor_metrics_log.setLevel(logging.INFO)  # only then are bytes counted
        step = small_step()
        step.compile()
        step.update()
        compile_fx.inductor_metrics_log.setLevel(level)
    report = {
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "kernels": metrics.generated_kernel_count,
        "bytes": metrics.num_bytes_accessed,
    }
    torch._dynamo.reset()  # these graphs compute nothing: nobody else may meet them
    return report


def test_the_step_is_three_graphs_without_a_break(compiler_report):
    assert compiler_report["graph_breaks"] == 0
    assert compiler_report["graphs"] == 3, "generate, discriminator_loss, generator_loss"


def test_no_more_kernels_than_stated(compiler_report):
    assert 0 < compiler_report["kernels"] <= KERNELS * OTHER_TORCH


def test_no_more_passes_over_activations_than_stated(compiler_report):
    """Bytes that all kernels and convolutions of the step move, over those of one pass over every activation."""
    passes = compiler_report["bytes"] / one_pass()
    assert 0 < passes <= PASSES * OTHER_TORCH


def one_pass() -> int:
    """Bytes of every convolution's output, once: of one generator's and three discriminators' forward passes."""
    with torch.device("meta"):
        generator = reference.Generator(SIZE, CHANNELS, LATENT, WIDTH)
        discriminator = reference.Discriminator(SIZE, CHANNELS, WIDTH)
        noise, images = torch.empty(BATCH, LATENT, 1, 1), torch.empty(BATCH, CHANNELS, *SIZE)
    return 4 * (activations(generator.main, noise) + 3 * activations(discriminator.main, images))


def activations(layers: nn.Sequential, x: torch.Tensor) -> int:
    count = 0
    for layer in layers:
        x = layer(x)
        count += x.numel() if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) else 0
    return count


class Operators(TorchDispatchMode):
    """Collects the names of all operators called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names |= {function._schema.name, f"{function._schema.name}.{function._schema.overload_name}"}
        return function(*args, **(kwargs or {}))


def test_the_step_never_waits_for_the_device():
    step = small_step()
    with Operators() as called:
        step.update()
    assert called.names & WAITING == set()


def test_the_reference_step_waits_and_the_check_sees_it():
    generator, discriminator = reference.Generator(16, 3, 8, 4), reference.Discriminator(16, 3, 4)
    optimizers = reference.adam(generator), reference.adam(discriminator)
    with Operators() as called:
        reference.reference_step(generator, discriminator, *optimizers, torch.zeros(4, 3, 16, 16), torch.randn(4, 8))
    assert "aten::_local_scalar_dense" in called.names
