from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from fastdcgan import winograd
from fastdcgan.bench import contenders, end_to_end, overhead, roofline, throughput
from fastdcgan.bench.contenders import Entry, Shape, entries
from fastdcgan.bench.contestant import Contestant, Failed, in_one_line
from fastdcgan.bench.end_to_end import bench_data
from fastdcgan.bench.roofline import Rates, step_passes
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


@pytest.mark.parametrize("method", ["block", "count"])
def test_a_contender_that_fails_later_costs_its_row_only_too(method, capsys):
    class Fake:
        def __init__(self, rate, fails=""):
            self.answers, self.fails = {"prepare": ("", 1.0), "block": (rate, rate**2), "count": (7, 8)}, fails

        def ask(self, method, *_):
            if method == self.fails:
                self.fails = "any"
                raise Failed("its process ended")
            assert self.fails != "any", "it is not asked again"
            return self.answers[method]

    chosen = [(Entry(name, "fp32"), Fake(*given)) for name, *given in (
        ("example", 100.0, method), ("skilled", 50.0), ("fast-eager", 75.0)
    )]  # fmt: skip
    example, skilled, fast = throughput.bench_shape(Shape(4), chosen, {"fp32": Rates(1e11, 1e10)}, 3, CPU)
    assert (example.remark, example.rounds) == ("failed: its process ended", [])
    assert (fast.rounds, fast.kernels, fast.ratio, skilled.ratio) == ([75.0] * 3, 7, 1.5, 1)  # of the first that runs
    assert fast.cpu_ratio == 2.25
    assert capsys.readouterr().err.count("failed: its process ended") == 1


class Answers:
    """In the place of a contestant: 100 images a second, and its name in `order` for every block."""

    def __init__(self, name, order):
        self.name, self.order = name, order

    def ask(self, method, *_):
        if method == "block":
            self.order.append(self.name)
        return {"prepare": ("", 1.0), "block": (100.0, 50.0), "count": (7, 8)}[method]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_round_has_a_block_of_each(kind):
    """And a ratio of processor time is of a CPU alone: beside a GPU a processor mostly waits."""
    order = []
    chosen = [(Entry(name, "fp32"), Answers(name, order)) for name in ("example", "skilled", "fast-eager")]
    rows = throughput.bench_shape(Shape(4), chosen, {"fp32": Rates(1e11, 1e10)}, 2, torch.device(kind))
    assert order == ["example", "skilled", "fast-eager"] * 2
    assert [row.cpu_ratio for row in rows] == [1 if kind == "cpu" else None] * 3


def test_the_layers_of_each_precision_are_at_its_own_rates(monkeypatch, capsys):
    rates = {"fp32": Rates(1e11, 1e10), "bf16": Rates(4e11, 2e10)}
    monkeypatch.setattr("fastdcgan.bench.roofline.measure_rates", lambda device, precision: rates[precision])
    monkeypatch.setattr(throughput, "Contestant", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(throughput, "bench_shape", lambda *_: [])
    names = ("example", "fast-eager")
    bench(shape=SMALL, batch_sizes=(8,), device=CPU, names=names, precision="bf16", per_layer=True)
    said = capsys.readouterr().out
    for each, rate in rates.items():
        passes = throughput.least_passes(Shape(8, (16, 16), latent_dim=8, width=4), each, CPU)
        assert f"\n{each}, batch 8:\n{roofline.layer_table(passes, rate)}\n" in said


def test_what_was_measured_is_kept_when_a_later_batch_size_ends_it(monkeypatch, tmp_path):
    def bench_shape(shape, *_):
        if shape.batch_size == 8:
            raise KeyboardInterrupt
        return [Row("example", "fp32", shape.batch_size, rounds=[1.0])]

    monkeypatch.setattr(throughput, "Contestant", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(throughput, "bench_shape", bench_shape)
    with pytest.raises(KeyboardInterrupt):
        bench(shape=SMALL, batch_sizes=(4, 8), device=CPU, names=("example",), json=tmp_path / "out.json")
    assert [row["batch_size"] for row in json.loads((tmp_path / "out.json").read_text())["rows"]] == [4]


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

    def lose(self):
        open("nowhere.jpg")

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
        with pytest.raises(Failed, match=r"^FileNotFoundError: .*nowhere.jpg'$"):
            one.ask("lose")
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


def test_a_damaged_file_is_a_line_for_the_user(tmp_path, monkeypatch):
    """ImageFolder cannot do without it."""
    for i in range(8):
        Image.effect_noise((24, 24), 90).convert("RGB").save(tmp_path / f"{i}.jpg")
    (tmp_path / "3.jpg").write_bytes((tmp_path / "3.jpg").read_bytes()[:300])

    class Here:
        """A contestant in this process."""

        def __init__(self, kind, *arguments):
            self.made = kind(*arguments)

        def ask(self, method):
            try:
                return getattr(self.made, method)()
            except OSError as error:
                raise Failed(in_one_line(error)) from None

    monkeypatch.setattr(end_to_end, "Contestant", lambda *arguments: contextlib.nullcontext(Here(*arguments)))
    given = {"names": ("example",), "precision": "fp32", "epochs": 1}
    with pytest.raises(UserError, match=r"^example cannot be measured: OSError: .*; fastdcgan data check .* lists"):
        bench_data(data=tmp_path, shape=SMALL, batch_sizes=(4,), device=CPU, **given)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--only", "fastest"],
        ["--image-size", "65"],
        ["--batch-size", "1"],
        ["--batch-size"],
        ["--repetitions", "0"],
        ["--data", "nowhere"],
        ["--data", ".", "--follow"],
        ["--data", ".", "--per-layer"],
    ],
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


def test_a_block_ends_when_the_device_is_done(monkeypatch):
    order, runner = [], Runner.__new__(Runner)
    runner.device, runner.images, runner.steps, runner.run = CPU, 64, 2, lambda: order.append("step")
    monkeypatch.setattr(throughput, "synchronize", lambda device: order.append("wait"))
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: order.append("look") or float(len(order)))
    runner.block()
    assert order == ["wait", "look", "step", "step", "wait", "look"]


def test_the_first_step_takes_its_building_too(monkeypatch):
    clock = [10.0]

    def built(*_):
        clock[0] += 5
        return lambda: None, ""

    monkeypatch.setattr(contenders, "on_random_images", built)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(Runner, "block", lambda self: (160.0, 0.0))
    assert Runner(Entry("fast-eager", "fp32"), CPU, block_seconds=1.0).prepare(Shape(64)) == ("", 5)


def test_a_row_is_the_median_of_its_rounds_beside_floor_and_baseline():
    shape, rates = Shape(64), Rates(matrix=1e12, copy=1e11)
    baseline, row = (Row("", "fp32", 64, rounds=rounds) for rounds in ([100.0, 200.0, 400.0], [300.0, 200.0, 1000.0]))
    throughput.summarize(row, baseline, shape, rates, CPU)
    work, direct = throughput.least_passes(shape, "fp32", CPU), step_passes(64, (64, 64), 3, 100, 64, "fp32")
    assert (row.images_per_second, row.ratio) == (300, 2.5)
    assert row.useful_flops == sum(each.flops for each in direct) / 64 * 300
    assert row.floor == 64 / sum(max(each.flops / 1e12, each.bytes / 1e11) for each in work)


def test_the_table_for_a_terminal():
    row = Row(
        "fast-eager", "bf16", 64, images_per_second=150.0, spread=1.5, ratio=2.5, useful_flops=3.4e11, floor=200.0,
        peak_memory_bytes=300 * 2**20, kernels=77, first_step_seconds=12.3, cpu_ratio=2.25, rounds=[150.0],
    )  # fmt: skip
    failed = Row("skilled", "bf16", 64, remark="failed: no")
    head, first, second = throughput.table([row, failed], "cpu").splitlines()
    words = ["fast-eager", "bf16", "64", "150.0", "1.5", "2.50", "2.25", "0.340", "75.0%", "300", "77", "12.3"]
    assert (first.split(), second.split()) == (words, ["skilled", "bf16", "64", "failed:", "no"])
    assert "calls" in head and "kernels" in throughput.table([row], "cuda").splitlines()[0]


def test_calls_are_those_of_the_step_and_not_of_one_another():
    weight, x = torch.ones(8, 3, 3, 3), torch.ones(2, 3, 8, 8)
    calls, _ = throughput.cpu_calls_and_memory(lambda: torch.relu(torch.conv2d(x, weight).view(2, -1)))
    assert calls == 2


def test_memory_is_the_most_at_a_time():
    def run():
        for _ in range(3):
            torch.empty(2**20, dtype=torch.uint8)

    assert throughput.cpu_calls_and_memory(run)[1] == 2**20


def test_who_failed_is_not_followed(monkeypatch):
    monkeypatch.setattr(throughput, "Contestant", lambda *_: contextlib.nullcontext())
    rows = [Row("example", "fp32", 4, 90.0, ratio=1.0, floor=1.0, rounds=[90.0]), Row("fast-eager", "fp32", 4)]
    monkeypatch.setattr(throughput, "bench_shape", lambda *_: rows)
    monkeypatch.setattr(overhead, "overhead", lambda *_: pytest.fail("it does not run"))
    assert bench(shape=SMALL, batch_sizes=(4,), device=CPU, names=("example", "fast-eager"), follow=True) == rows


def test_a_block_has_the_steps_that_fill_its_seconds(monkeypatch):
    steps = []
    monkeypatch.setattr(contenders, "on_random_images", lambda *_: (lambda: steps.append(1), "a remark"))
    monkeypatch.setattr(Runner, "block", lambda self: (160.0, 0.0))  # images/s
    runner = Runner(Entry("fast-eager", "fp32"), CPU, block_seconds=3.0)
    assert runner.prepare(Shape(64))[0] == "a remark" and runner.steps == 8  # 7.5 of 64 images


def test_the_fastest_of_ours_is_followed_and_every_precision_has_its_rates(monkeypatch, tmp_path, capsys):
    rates = {"fp32": Rates(1e11, 1e10), "bf16": Rates(4e11, 2e10)}
    monkeypatch.setattr("fastdcgan.bench.roofline.measure_rates", lambda device, precision: rates[precision])
    monkeypatch.setattr(throughput, "Contestant", lambda *_: contextlib.nullcontext())
    followed = []

    def bench_shape(shape, chosen, rates, repetitions, device):
        speed = {"example": 90.0, "fast-eager": 40.0, "fast-compiled": 60.0}
        return [
            Row(
                e.name,
                e.precision,
                shape.batch_size,
                speed[e.name] + shape.batch_size,
                ratio=1.0,
                floor=1.0,
                rounds=[1],
            )
            for e, _ in chosen
        ]

    def follow(shape, device, precision, executor):
        followed.append((shape.batch_size, precision, executor))
        cost = {"seconds": 1.0, "every": 20, "share": 0.001}
        return {"share": 0.0123, "log": cost, "sample": cost, "checkpoint": cost}

    monkeypatch.setattr(throughput, "bench_shape", bench_shape)
    monkeypatch.setattr(overhead, "overhead", follow)
    names, out = ("example", "fast-eager", "fast-compiled"), tmp_path / "out.json"
    bench(shape=SMALL, batch_sizes=(4, 8), device=CPU, names=names, precision="bf16", follow=True, json=out)
    assert followed == [(8, "bf16", "fast-compiled")]
    content = json.loads(out.read_text())
    assert content["rates"] == {
        "fp32": {"matrix": 1e11, "copy": 1e10}, "bf16": {"matrix": 4e11, "copy": 2e10},
    }  # fmt: skip
    assert content["overhead"]["share"] == 0.0123 and "costs 1.23%" in capsys.readouterr().out


def test_the_floor_is_of_the_shape_that_is_trained():
    assert throughput.passes(Shape(8, (32, 48), 1, 20, 16), "bf16") == step_passes(8, (32, 48), 1, 20, 16, "bf16")


@pytest.mark.parametrize("pays", [False, True])
def test_the_floor_is_of_the_convolutions_that_are_computed(pays, monkeypatch):
    monkeypatch.setattr(winograd, "PAYS_HERE", pays)
    shape = (32, (64, 64), 3, 100, 64)
    for precision, device, fewer in (("fp32", "cpu", pays), ("bf16", "cpu", False), ("fp32", "cuda", False)):
        found = throughput.least_passes(Shape(*shape), precision, torch.device(device))
        assert found == step_passes(*shape, precision, by_winograd=fewer), (precision, device)


def test_our_executors_are_what_their_names_say(monkeypatch):
    made = []

    def make_executor(step, compile, cuda_graph):
        made.append((compile, cuda_graph))
        step.compiled = compile
        return SimpleNamespace(run=lambda: None)

    monkeypatch.setattr(contenders, "make_executor", make_executor)
    for executor in ("fast-eager", "fast-compiled", "fast-captured"):
        contenders.fast_step(SMALL, SMALL.random_images(64, CPU), torch.arange(64), "fp32", executor)
    assert made == [(False, "off"), (True, "off"), (True, "on")]


def test_each_row_is_beside_the_floor_of_its_own_precision():
    rates = {"fp32": Rates(1e11, 1e10), "bf16": Rates(4e11, 2e10)}
    chosen = [(Entry("example", each), Answers("example", [])) for each in rates]
    rows = throughput.bench_shape(Shape(4), chosen, rates, 1, CPU)
    for row in rows:
        passes = throughput.least_passes(Shape(4), row.precision, CPU)
        assert row.floor == 4 / roofline.floor_seconds(passes, rates[row.precision])


def test_the_first_step_is_over_when_the_device_is_done(monkeypatch):
    clock = [10.0]

    def wait(device):
        clock[0] += 3

    monkeypatch.setattr(contenders, "on_random_images", lambda *_: (lambda: None, ""))
    monkeypatch.setattr(throughput, "synchronize", wait)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(Runner, "block", lambda self: (160.0, 0.0))
    assert Runner(Entry("fast-eager", "fp32"), CPU, block_seconds=1.0).prepare(Shape(64)) == ("", 3)
