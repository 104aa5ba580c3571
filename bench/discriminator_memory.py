"""Peak memory of the discriminator's forward and backward pass, the plain modules' and the fused operators'.

    python -m fastdcgan.bench.discriminator_memory --json bench/results/discriminator-memory.json

Bytes allocated at a time beyond what there was before the pass, gradients of the weights among them. Neither is
compiled: what differs is what the operators save for the backward pass, and what they need on the way, on a GPU with
the workspaces of the algorithms that cuDNN finds fastest.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdcgan.bench.contenders import Shape
from fastdcgan.bench.environment import command_line, describe, write_result
from fastdcgan.bench.profiling import live_bytes
from fastdcgan.models import build_discriminator
from fastdcgan.step import set_precision

KINDS = ("plain", "fused")


def discriminator(kind: str, shape: Shape, precision: str, device: torch.device) -> nn.Module:
    """The plain one is the reference's, in channels-last and in the same precision."""
    if kind == "plain":
        _, network = shape.reference_networks()
    else:
        network = build_discriminator("dcgan", shape.image_size, shape.channels, shape.width)
    network.to(device).to(memory_format=torch.channels_last)
    set_precision(network, precision)
    return network


def peak_bytes(network: nn.Module, shape: Shape, device: torch.device) -> int:
    """The most bytes that one forward and backward pass has at a time beyond those before it."""
    images = torch.rand(shape.batch_size, shape.channels, *shape.image_size, device=device) * 2 - 1
    images = images.to(next(network.parameters()).dtype, memory_format=torch.channels_last)

    def run() -> None:
        network(images).sum().backward()
        network.zero_grad()

    run()  # compiles kernels, tries algorithms
    if device.type == "cpu":
        return max(live for _, live in live_bytes(run))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows and the machine here")
    parser.add_argument("--image-size", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp32"])
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, Any]] = []
    for precision in arguments.precisions:
        for batch in arguments.batches:
            shape = Shape(batch, (arguments.image_size, arguments.image_size))
            plain, fused = (peak_bytes(discriminator(kind, shape, precision, device), shape, device) for kind in KINDS)
            rows.append({"precision": precision, "batch_size": batch, "plain_bytes": plain, "fused_bytes": fused})
            print(
                f"{precision}, batch {batch}: {plain / 2**20:,.1f} MiB plain, {fused / 2**20:,.1f} fused, "
                f"{1 - fused / plain:.0%} less",
                flush=True,
            )
            if arguments.json:
                about = describe(device, command_line("discriminator_memory")) | {"measured": "discriminator memory"}
                write_result(arguments.json, about | {"rows": rows})


if __name__ == "__main__":
    main()
