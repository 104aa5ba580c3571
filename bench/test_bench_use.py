"""What surrounds the step: drawing samples, and saving and loading a checkpoint."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from fastdcgan import checkpoint
from fastdcgan.apps.sample import sample
from fastdcgan.bench.contenders import Shape, fast_step
from fastdcgan.checkpoint import Checkpoint
from fastdcgan.models import Generator

SIZE = 64


@pytest.mark.parametrize("batch", [1, 64])
def test_sampling(benchmark, images_per_second, device, batch):
    benchmark.group = f"sample {SIZE}x{SIZE}"
    generator = Generator(SIZE).to(device).eval()
    latents = torch.randn(batch, generator.latent_dim, device=device)

    @torch.no_grad()
    def sample():
        return generator(latents)

    images_per_second(sample, batch)


def test_sample_command(benchmark, tmp_path):
    """`fastdcgan sample RUN --count 256 --out DIR`, from the weights' file to the PNGs."""
    benchmark.group = f"sample {SIZE}x{SIZE}"
    weights = {name: weight.contiguous() for name, weight in Generator(SIZE).state_dict().items()}
    save_file(weights, tmp_path / "generator.safetensors")
    benchmark.pedantic(
        lambda: sample(tmp_path / "generator.safetensors", out=tmp_path / "pictures", count=256),
        warmup_rounds=1,
        rounds=3,
    )
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 256
    benchmark.extra_info["images_per_second"] = round(256 / benchmark.stats.stats.median)


@pytest.fixture(scope="module")
def saved():
    """A 64x64 model's checkpoint: both networks, the moving average, both optimizers."""
    source = torch.zeros((4, SIZE, SIZE, 3), dtype=torch.uint8)
    step, _ = fast_step(Shape(2), source, torch.arange(2), "fp32", "fast-eager")
    return Checkpoint(step.weights() | {"state": step.state()}, {"images": 2})


def in_megabytes(benchmark, saved):
    tensors = [tensor for kind in saved.tensors.values() for tensor in kind.values()]
    megabytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6
    benchmark.extra_info["megabytes"] = round(megabytes, 1)
    benchmark.extra_info["megabytes_per_second"] = round(megabytes / benchmark.stats.stats.median, 1)


def test_checkpoint_save(benchmark, saved, tmp_path):
    benchmark.group = "checkpoint"
    benchmark.pedantic(lambda: checkpoint.save(tmp_path, 1, saved, keep=1), warmup_rounds=1, rounds=5)
    in_megabytes(benchmark, saved)


def test_checkpoint_load(benchmark, saved, tmp_path):
    benchmark.group = "checkpoint"
    folder = checkpoint.save(tmp_path, 1, saved, keep=1)
    benchmark.pedantic(lambda: checkpoint.load(folder), warmup_rounds=1, rounds=5)
    in_megabytes(benchmark, saved)
