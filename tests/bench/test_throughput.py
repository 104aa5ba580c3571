from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from fastdcgan.bench import contenders
from fastdcgan.bench.contenders import Entry, Shape, entries
from fastdcgan.bench.end_to_end import bench_data
from fastdcgan.bench.roofline import Rates
from fastdcgan.bench.throughput import bench
from fastdcgan.errors import UserError

CPU = torch.device("cpu")
SMALL = Shape(image_size=(16, 16), latent_dim=8, width=4)


@pytest.fixture(autouse=True)
def _no_long_measurement(monkeypatch):
    monkeypatch.setattr("fastdcgan.bench.roofline.measure_rates", lambda device, precision: Rates(1e11, 1e10))


def test_contenders_take_turns_and_everything_is_reported(tmp_path, capsys):
    out = tmp_path / "results" / "step.json"
    rows = bench(
        shape=SMALL,
        batch_sizes=(4, 8),
        device=CPU,
        names=("example", "fast-eager"),
        precision="fp32",
        repetitions=3,
        block_seconds=0.01,
        json=out,
        command="fastdcgan bench",
    )
    assert [(row.contender, row.batch_size) for row in rows] == [
        ("example", 4), ("fast-eager", 4), ("example", 8), ("fast-eager", 8)
    ]  # fmt: skip
    for row in rows:
        assert len(row.rounds) == 3
        assert min(row.rounds) <= row.images_per_second <= max(row.rounds)
        assert row.peak_memory_bytes > 0 and row.kernels > 0 and row.floor > 0 and row.useful_flops > 0
    assert rows[0].ratio == 1
    written = json.loads(out.read_text())
    assert {"device", "versions", "date", "commit", "command", "rates", "rows", "network"} <= written.keys()
    assert len(written["rows"]) == 4
    assert capsys.readouterr().out.count("fast-eager") == 2


def test_a_contender_that_fails_costs_its_row_only(monkeypatch, capsys):
    built = contenders.on_random_images

    def fail(entry, shape, device):
        if entry.name == "fast-eager":
            raise RuntimeError("no such kernel\nand more")
        return built(entry, shape, device)

    monkeypatch.setattr(contenders, "on_random_images", fail)
    names = ("example", "fast-eager")
    rows = bench(
        shape=SMALL, batch_sizes=(4,), device=CPU, names=names, precision="fp32", repetitions=1, block_seconds=0.01
    )
    assert rows[0].rounds and not rows[1].rounds
    assert rows[1].remark == "failed: RuntimeError: no such kernel"
    assert "no such kernel" in capsys.readouterr().out


def test_bf16_runs_on_a_cpu_only_where_it_is_native(monkeypatch):
    monkeypatch.setattr(contenders, "native_bf16", lambda: False)
    assert entries(("fast-eager",), "auto", CPU) == [Entry("fast-eager", "fp32")]
    monkeypatch.setattr(contenders, "native_bf16", lambda: True)
    assert entries(("fast-eager",), "auto", CPU) == [Entry("fast-eager", "fp32"), Entry("fast-eager", "bf16")]
    assert entries(("example", "example-fp32", "fast-captured"), "auto", CPU) == [Entry("example", "fp32")]


def test_a_contenders_switches_do_not_leak():
    before = contenders.read_flags()
    others = tuple(not value for value in before)
    with contenders.flags(others):
        assert contenders.read_flags() == others
    assert contenders.read_flags() == before


def test_end_to_end_from_files(tmp_path, capsys):
    pixels = torch.randint(0, 256, (24, 24, 24, 3), dtype=torch.uint8).numpy()
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / f"{i}.jpg")
    rows = bench_data(
        data=tmp_path,
        shape=SMALL,
        batch_sizes=(8,),
        device=CPU,
        names=("example", "fast-eager"),
        precision="fp32",
        epochs=2,
        json=tmp_path / "out.json",
    )
    assert [row.images for row in rows] == [24, 24]
    assert all(len(row.epochs) == 2 and row.first_epoch > 0 and row.later_epochs > 0 for row in rows)
    assert json.loads((tmp_path / "out.json").read_text())["measured"] == "end to end"


@pytest.mark.parametrize(
    "arguments",
    [["--only", "fastest"], ["--image-size", "65"], ["--batch-size", "1"], ["--batch-size"], ["--repetitions", "0"]],
)
def test_mistakes_on_the_command_line(arguments):
    from fastdcgan.cli import parse

    with pytest.raises(UserError):
        parse(["bench", *arguments])()
