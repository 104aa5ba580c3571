from __future__ import annotations

import json

import pytest
import torch

from fastdcgan.bench.profiling import profile_training
from fastdcgan.errors import UserError
from fastdcgan.spans import span

SMALL = {"data": "fake", "image_size": (16, 16), "batch_size": 4, "width": 4, "precision": "fp32", "steps": 2}


def test_table_trace_and_memory(tmp_path, capsys):
    profile_training(**SMALL, device=torch.device("cpu"), executor="fast-eager", out=tmp_path, nsight=False)
    assert "aten::" in (tmp_path / "table.txt").read_text()
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {"data path", "data", "generator", "discriminator", "backward", "optimizer"} <= names
    rows = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert max(live for _, live in rows) > 10_000
    assert "optimizer" in capsys.readouterr().out


def test_nsight_needs_a_gpu(tmp_path):
    with pytest.raises(UserError, match="--nsight"):
        profile_training(**SMALL, device=torch.device("cpu"), executor="fast-eager", out=tmp_path, nsight=True)


def test_spans_are_nothing_while_nobody_listens():
    assert span("step") is span("another")
