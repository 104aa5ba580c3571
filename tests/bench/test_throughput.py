from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastdcgan.bench import contenders, throughput
from fastdcgan.bench.contenders import Entry, Shape, entries
from fastdcgan.bench.contestant import Contestant, Failed
from fastdcgan.bench.end_to_end import bench_data
from fastdcgan.bench.roofline import Rates
from fastdcgan.bench.throughput import Row, Runner, bench
from fastdcgan.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
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
    chosen = [Entry("example", "fp32"), Entry("fast-captured", "fp32")]  # captured, on a CPU
    monkeypatch.setattr(contenders, "entries", lambda names, precision, device: chosen)
    rows = bench(shape=SMALL, batch_sizes=(4,), device=CPU, repetitions=1, block_seconds=0.01)
    assert rows[0].rounds and not rows[1].rounds
    assert rows[1].remark.startswith("failed: UserError: --cuda-graph on needs a GPU")
    assert "--cuda-graph on needs a GPU" in capsys.readouterr().out


def test_ratios_are_to_the_example_whatever_runs_first():
    names = ("fast-eager", "example")
    ours, plain = bench(
        shape=SMALL, batch_sizes=(4,), device=CPU, names=names, precision="fp32", repetitions=1, block_seconds=0.01
    )
    assert ours.ratio == ours.rounds[0] / plain.rounds[0] and plain.ratio == plain.cpu_ratio == 1


def test_bf16_runs_on_a_cpu_only_where_it_is_native(monkeypatch):
    monkeypatch.setattr(contenders, "native_bf16", lambda: False)
    assert entries(("fast-eager",), "auto", CPU) == [Entry("fast-eager", "fp32")]
    monkeypatch.setattr(contenders, "native_bf16", lambda: True)
    assert entries(("fast-eager",), "auto", CPU) == [Entry("fast-eager", "fp32"), Entry("fast-eager", "bf16")]
    assert entries(("skilled",), "auto", CPU) == [Entry("skilled", "fp32"), Entry("skilled", "bf16")]
    assert entries(("example", "example-fp32", "fast-captured"), "auto", CPU) == [Entry("example", "fp32")]


SWITCH = """
import multiprocessing
import os
import torch
from fastdcgan.errors import UserError

class Switch:
    def __init__(self, value):
        torch.backends.cudnn.benchmark = value

    def read(self):
        return torch.backends.cudnn.benchmark, os.getpid()

    def start_method(self):
        return multiprocessing.get_start_method()

    def mistake(self):
        raise UserError("this will not do:\\nand more")

    def die(self):
        os._exit(1)

    def work(self):
        os.write(1, f"{os.getpid()}\\n".encode())
        while True:
            pass
"""


def test_contestants_share_no_switches(monkeypatch, tmp_path):
    (tmp_path / "a_switch.py").write_text(SWITCH)
    monkeypatch.syspath_prepend(tmp_path)
    Switch = importlib.import_module("a_switch").Switch
    before = torch.backends.cudnn.benchmark
    with Contestant(Switch, True) as one, Contestant(Switch, False) as other:
        (a, a_process), (b, b_process) = one.ask("read"), other.ask("read")
        assert (a, b) == (True, False)
        assert len({a_process, b_process, os.getpid()}) == 3
        with pytest.raises(Failed, match=r"^UserError: this will not do:$"):
            one.ask("mistake")
        assert one.ask("read") == (True, a_process)
        assert other.ask("start_method") == multiprocessing.get_all_start_methods()[0]  # the default's place
        with pytest.raises(Failed, match="its process ended"):
            other.ask("die")
    assert torch.backends.cudnn.benchmark == before


def test_contestants_end_with_a_killed_asker(tmp_path):
    (tmp_path / "a_switch.py").write_text(SWITCH)
    asker = (
        "from a_switch import Switch; from fastdcgan.bench.contestant import Contestant\n"
        "if __name__ == '__main__': Contestant(Switch, True).ask('work')\n"
    )
    (tmp_path / "asker.py").write_text(asker)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "asker.py"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert int(process.stdout.readline()) != process.pid
    process.kill()
    assert process.communicate(timeout=60) == ("", None)  # the pipe closes when its last writer is gone


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


def test_a_block_counts_the_images_of_its_steps(monkeypatch):
    clock, runner = iter([10.0, 12.0]), Runner.__new__(Runner)
    processor = iter([1.0, 5.0])
    runner.device, runner.images, runner.steps, calls = torch.device("cpu"), 64, 5, []
    runner.run = lambda: calls.append(1)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(throughput.time, "process_time", lambda: next(processor))
    assert runner.block() == (64 * 5 / 2, 64 * 5 / 4)
    assert len(calls) == 5


def test_a_row_is_the_median_of_its_rounds_beside_floor_and_baseline():
    shape, rates = Shape(64), Rates(matrix=1e12, copy=1e11)
    baseline, row = (Row("", "fp32", 64, rounds=rounds) for rounds in ([100.0, 200.0, 400.0], [300.0, 200.0, 1000.0]))
    throughput.summarize(row, baseline, shape, rates)
    work = throughput.passes(shape, "fp32")
    assert (row.images_per_second, row.ratio) == (300, 2.5)
    assert row.useful_flops == sum(each.flops for each in work) / 64 * 300
    assert row.floor == 64 / sum(max(each.flops / 1e12, each.bytes / 1e11) for each in work)
