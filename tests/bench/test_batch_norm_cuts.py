"""Which cuts are tried, and what is said of them; the kernels themselves need a GPU."""

from __future__ import annotations

import sys

import pytest
import torch

from fastdcgan.bench import batch_norm_cuts
from fastdcgan.kernels.batch_norm_act_triton import plan

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("rows", "channels", "groups"), [(2048, 256, 1), (262144, 256, 1), (131072, 64, 2), (32, 1024, 1), (7, 5, 1)]
)
def test_every_cut_takes_each_row_once_and_leaves_no_split_without(rows: int, channels: int, groups: int) -> None:
    cuts = batch_norm_cuts.candidates(rows, channels, groups)
    assert cuts[0] == plan(rows, channels, groups) and len(set(cuts)) == len(cuts) > 3
    for cut in cuts:
        of_a_split = cut.turns * cut.block_rows
        assert (cut.splits - 1) * of_a_split < rows <= cut.splits * of_a_split, cut
        assert cut.block_rows & (cut.block_rows - 1) == cut.block_cols & (cut.block_cols - 1) == 0, cut


def test_cuts_are_compared_with_the_shipped_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = {"forward": iter([10.0, 5.0, *[20.0] * 20]), "both": iter([30.0, 20.0, *[60.0] * 20])}
    monkeypatch.setattr(batch_norm_cuts, "runs", lambda *_: lambda cut: {which: which for which in times})
    monkeypatch.setattr(batch_norm_cuts, "microseconds", lambda which: next(times[which]))
    rows = batch_norm_cuts.measure("8x32x4x4", 2, CPU)
    assert rows[0]["microseconds"] == {"forward": 10.0, "both": 30.0}
    assert {name: rows[0][name] for name in plan(64, 32, 2)._fields} == plan(64, 32, 2)._asdict()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(rows) and "x2.00" in said[1] and "x1.50" in said[1] and said[2].count("x0.50") == 2


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["batch_norm_cuts"])
    with pytest.raises(SystemExit) as end:
        batch_norm_cuts.main()
    assert end.value.code == 2 and "there is none here" in capsys.readouterr().err


@pytest.mark.gpu
def test_cuts_are_measured_on_a_gpu() -> None:
    rows = batch_norm_cuts.measure("64x32x4x4", 1, torch.device("cuda"))
    assert len(rows) > 3 and all(min(row["microseconds"].values()) > 0 for row in rows)
