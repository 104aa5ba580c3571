# mypy: disable-error-code="no-untyped-def"
"""Three of the kernels against torch's own, on the GPU where there is one and at small sizes on the CPU.

    pytest --benchmark-only bench/test_bench_kernels.py

`kernels_table.py` prints the same comparison of batch_norm_act as a table, with finer timing.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdcgan.bench import kernels_table
from fastdcgan.kernels import adam_step, uint8_to_float

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FULL = [
    (n, c, side, side) for n in kernels_table.BATCHES for layers in kernels_table.LAYERS.values() for c, side in layers
]
SHAPES = FULL if DEVICE == "cuda" else [(8, 64, 8, 8), (16, 64, 32, 32)]
VARIANTS = ["fused", "eager", "compiled", "tuned"] if DEVICE == "cuda" else ["eager", "compiled"]
DTYPE = "bf16" if DEVICE == "cuda" else "fp32"


def timed(benchmark, run, bytes_moved):
    """Median seconds of run(), to the end of its work on the device, and the bandwidth that makes."""

    def to_the_end():
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(to_the_end, warmup_rounds=3, rounds=20 if DEVICE == "cuda" else 5)
    benchmark.extra_info["gb_per_s"] = bytes_moved / benchmark.stats.stats.median / 1e9


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("which", ["forward", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_norm_act(benchmark, shape, which, variant):
    torch._dynamo.reset()
    benchmark.group = f"batch_norm_act {which} {shape} {DTYPE}"
    passes, copy, copy_bytes = kernels_table.layer(shape, kernels_table.DTYPES[DTYPE], DEVICE, groups=1)
    run, bytes_moved = passes[which]
    copied = min(copy_bytes / ms / 1e6 for ms in kernels_table.milliseconds(copy, DEVICE).values())
    timed(benchmark, functools.partial(run, kernels_table.variants(DEVICE)[variant]), bytes_moved)
    benchmark.extra_info["copy_gb_per_s"] = copied
    benchmark.extra_info["fraction_of_copy"] = benchmark.extra_info["gb_per_s"] / copied


@pytest.mark.parametrize("backend", ["auto", "reference"] if DEVICE == "cuda" else ["reference"])
def test_uint8_to_float(benchmark, backend):
    benchmark.group = "uint8_to_float 128 of 64x64"
    images = torch.randint(0, 256, (1000, 64, 64, 3), dtype=torch.uint8, device=DEVICE)
    index = torch.randint(0, 1000, (128,), device=DEVICE)
    flip = torch.rand(128, device=DEVICE) < 0.5
    run = functools.partial(uint8_to_float, images, index, flip, dtype=torch.bfloat16, backend=backend)
    timed(benchmark, run, 128 * images[0].numel() * (1 + 2))


@pytest.mark.parametrize(
    "variant", ["auto", "reference", "torch.optim.Adam"] if DEVICE == "cuda" else ["reference", "torch.optim.Adam"]
)
def test_adam_step(benchmark, variant):
    """The 64-pixel generator: 3.6 million parameters; only torch.optim.Adam goes without copies and averages."""
    benchmark.group = "adam_step 64-pixel generator"
    convolutions = [(100, 512, 4, 4), (512, 256, 4, 4), (256, 128, 4, 4), (128, 64, 4, 4), (64, 3, 4, 4)]
    params = [torch.randn(s, device=DEVICE) for s in convolutions]
    grads, exp_avgs, exp_avg_sqs = ([torch.zeros_like(p) for p in params] for _ in range(3))
    elements = sum(p.numel() for p in params)
    if variant == "torch.optim.Adam":
        for p, grad in zip(params, grads, strict=True):
            p.requires_grad_().grad = grad
        timed(benchmark, torch.optim.Adam(params, fused=True, capturable=DEVICE == "cuda").step, elements * 28)
        return
    copies = [torch.empty_like(p, dtype=torch.bfloat16) for p in params]
    emas = [p.clone() for p in params]
    run = functools.partial(
        adam_step,
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        torch.zeros((), device=DEVICE),
        lr=torch.tensor(2e-4, device=DEVICE),
        copies=copies,
        emas=emas,
        ema_decay=0.999,
        backend=variant,
    )
    timed(benchmark, run, elements * (28 + 2 + 8))


def test_the_table_runs(benchmark, tmp_path):
    out = tmp_path / "kernels.json"
    command = [sys.executable, "-m", "fastdcgan.bench.kernels_table", "--json", str(out)]
    command += ["--batches", "8", "--image-sizes", "32"]
    run = functools.partial(subprocess.run, command, cwd=Path(__file__).parents[1], check=True)
    benchmark.pedantic(run, rounds=1)
    rows = json.loads(out.read_text())["rows"]
    assert {row["variant"] for row in rows} >= {"eager", "compiled"} and all(row["ms"] > 0 for row in rows)
