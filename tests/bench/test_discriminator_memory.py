from __future__ import annotations

import json
import sys

import pytest
import torch

from fastdcgan.bench import discriminator_memory
from fastdcgan.bench.contenders import Shape

CPU = torch.device("cpu")


def test_a_pass_holds_at_least_its_activations():
    shape = Shape(4, (32, 32), width=16)
    layers = 4 * (16 * 16 * 16 + 32 * 8 * 8 + 64 * 4 * 4)  # values that the convolutions write
    for kind in discriminator_memory.KINDS:
        network = discriminator_memory.discriminator(kind, shape, "fp32", CPU)
        weights = sum(parameter.numel() for parameter in network.parameters())  # their gradients
        held = discriminator_memory.peak_bytes(network, shape, CPU)
        assert 4 * (layers + weights) < held < 16 * (layers + weights), kind


def test_the_command_writes_a_row_for_each_precision_and_batch(tmp_path, monkeypatch, capsys):
    out = tmp_path / "memory.json"
    options = ["--image-size", "32", "--batches", "2", "4", "--precisions", "bf16", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["discriminator_memory", *options])
    discriminator_memory.main()
    content = json.loads(out.read_text())
    assert [(row["precision"], row["batch_size"]) for row in content["rows"]] == [("bf16", 2), ("bf16", 4)]
    assert all(0 < row["fused_bytes"] < row["plain_bytes"] for row in content["rows"])
    assert content["command"].endswith(" ".join(options))
    row = content["rows"][1]
    said = capsys.readouterr().out.splitlines()[1]
    assert said.startswith(f"bf16, batch 4: {row['plain_bytes'] / 2**20:,.1f} MiB plain, ")
    assert said.endswith(f"{(row['plain_bytes'] - row['fused_bytes']) / row['plain_bytes']:.0%} less")


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [128, 1024])
def test_on_a_gpu_its_peak_in_bf16_is_30_percent_below_the_plain_modules(batch):
    shape, device = Shape(batch), torch.device("cuda")
    plain, fused = (
        discriminator_memory.peak_bytes(discriminator_memory.discriminator(kind, shape, "bf16", device), shape, device)
        for kind in discriminator_memory.KINDS
    )
    assert fused <= 0.7 * plain
