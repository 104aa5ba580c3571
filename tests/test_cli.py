"""Mistakes at the command line: one line that says what is wrong and what to do, exit code 2, nothing left behind."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from fastdcgan import console, processor
from fastdcgan.cli import main, parse
from fastdcgan.commands import asked
from fastdcgan.config import TrainConfig
from fastdcgan.errors import UserError, check_utf8, first_line
from fastdcgan.processor import choose_device, choose_precision
from fastdcgan.trainer import train


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def mistake(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command line that is a mistake; the one line it answers with."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in argv])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert end.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("fastdcgan: ") and captured.out == "", captured.err
    return lines[0]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has"), "smaller --batch-size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "smaller --batch-size"),
        (MemoryError("Unable to allocate 20.0 GiB for an array"), "--count or --restarts, or free some"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "there is not enough memory"),
        (OSError("libcudart.so: failed to map segment from shared object"), "there is not enough memory"),
        (RuntimeError("Failed to find C compiler. Please specify via CC"), "install a C compiler"),
    ],
)
def test_what_a_machine_lacks_is_said_in_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception, says: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("fastdcgan.trainer.train", fail)
    assert says in mistake(capsys, "train", "digits")


def test_an_error_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr("fastdcgan.trainer.train", fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        main(["train", "digits"])


def test_what_keeps_the_compiler_from_working_is_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unlike a step that cannot be compiled at all, which is an error of the program."""
    from torch._dynamo.exc import Unsupported
    from torch._inductor.exc import InductorError

    error: Exception = InductorError(OSError(28, "No space left on device"), None)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("fastdcgan.trainer.train", fail)
    said = mistake(capsys, "train", "digits", "--compile")
    assert "cannot be compiled (OSError: [Errno 28] No space left on device)" in said
    assert "room for the compiler's files" in said and "leave --compile out" in said
    error = Unsupported("a graph break")
    with pytest.raises(Unsupported):
        main(["train", "digits", "--compile"])


TINY = ("--steps", "2", "--image-size", "8", "--gen-width", "4", "--batch-size", "4")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("train digts", "digits"),
        ("train nowhere/at/all", "nowhere/at/all"),
        ("train --image-size 50", "48 and 56"),
        ("train --batch-size 1", "BatchNorm"),
        ("train --steps -5", "--steps -5"),
        ("train --steps abc", "--steps"),
        ("train --stepz 5", "--stepz"),
        ("train --stepz 5", "see fastdcgan train --help"),
        ("data check --stepz 5", "see fastdcgan data check --help"),
        ("train --flip True nowhere/at/all", "nowhere/at/all"),
        ("train --loader magic", "--loader"),
        ("train --batch-size 100000", "1797"),
        ("train --resume", "--run-dir"),
        ("trian", "did you mean train"),
        ("sample nowhere", "nowhere"),
        ("train --cuda-graph on --device cpu", "--cuda-graph"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], tmp_path: Path, argv: str, says: str) -> None:
    assert says.replace(",", "") in mistake(capsys, *argv.split()).replace(",", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("sample run --count many", "Error parsing --count: invalid literal for int() with base 10: 'many'"),
        ("train --stepz 5", "Unrecognized options: --stepz, 5"),
        ("export", "Missing from fastdcgan export: RUN "),
    ],
)
def test_arguments_that_do_not_fit_are_a_line_on_any_terminal(
    monkeypatch: pytest.MonkeyPatch, encoding: str, argv: str, says: str
) -> None:
    """What tyro draws around its words depends on the letters that standard output knows."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    with pytest.raises(UserError) as error:
        parse(argv.split())
    assert str(error.value).startswith(says) and "---" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_where_there_is_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "--device cpu" in mistake(capsys, "train", "--device", "cuda")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("", ""),
        ("photos", "data"),
        ("--resume --run-dir digits", "run_dir"),
        ("--run-dir=digits --lr 2e-4 photos", "run_dir lr data"),
        ("--no-compile --flip --image_size 64 --no-flip", "compile flip image_size"),
        ("--resume digits", "data"),
        ("--flip True photos", "flip data"),
        ("--flip photos", "flip data"),
        ("--flip None --lr 2", "flip lr"),
        ("--resume --lr 2 -- digits", "lr data"),
        ("--resume --", ""),
    ],
)
def test_which_flags_of_train_are_given(line: str, names: str) -> None:
    assert asked(line.split()) == set(names.split())


def test_a_resumed_run_takes_flags_as_they_are_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "--run-dir", "run", *TINY, "--lr", "1e-3"])
    Path("elsewhere").mkdir()
    again = ["train", "--run-dir", "run", "--resume", "--steps", "4"]
    capsys.readouterr()
    main([*again, "--lr", "2e-4", "digits"])
    assert "lr changes from 0.001 to 0.0002" in capsys.readouterr().err
    assert json.loads(Path("run/config.json").read_text())["config"]["lr"] == 2e-4
    assert "DATA fake cannot change" in mistake(capsys, *again, "fake")


def test_a_run_goes_on_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("photos").mkdir()
    for i in range(20):
        Image.effect_noise((20, 20), 90).convert("RGB").save(f"photos/{i}.png")
    main(["train", "photos", "--run-dir", "run", "--cache", "off", *TINY])
    monkeypatch.chdir("photos")
    main(["train", "../photos/", "--run-dir", "../run", "--resume", "--steps", "4", "--image-size", "8x8"])
    assert Path("../run/samples/step-000004.png").exists()
    monkeypatch.chdir("..")
    Path("photos").rename("pictures")
    again = ["train", "--run-dir", "run", "--resume", "--steps", "6"]
    capsys.readouterr()
    assert "photos any more: name the data's new place" in mistake(capsys, *again)
    main([*again, "pictures"])
    said = capsys.readouterr().err
    assert "data changes from" in said and "going on from step 4" in said


def test_folders_that_cannot_be_trained_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("hello")
    (tmp_path / "few").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "few" / "one.png")
    before = sorted(tmp_path.rglob("*"))
    for folder in ("empty", "texts", "few"):
        assert folder in mistake(capsys, "train", folder, "--steps", "2")
    assert sorted(tmp_path.rglob("*")) == before


def test_run_folders_that_are_not(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    (tmp_path / "file").write_text("x")
    assert "not a run" in mistake(capsys, "train", "--run-dir", "mine", *TINY)
    assert "is a file" in mistake(capsys, "train", "--run-dir", "file", *TINY)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    for theirs in ("samples/real.png", "checkpoints/best/model.pt"):
        file = tmp_path / theirs.partition("/")[0] / "project" / theirs
        file.parent.mkdir(parents=True)
        file.write_text("precious")
        assert "not a run" in mistake(capsys, "train", "--run-dir", str(file.parents[theirs.count("/")]), *TINY)
        assert file.read_text() == "precious"
    main(["train", "--run-dir", "run", *TINY])
    capsys.readouterr()
    assert "--resume" in mistake(capsys, "train", "--run-dir", "run", *TINY)
    (tmp_path / "run" / "config.json").write_text("{")
    assert "config.json" in mistake(capsys, "train", "--run-dir", "run", "--resume", "--steps", "3")


def test_a_folder_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot be written" in mistake(capsys, "train", "--run-dir", "/proc/here", *TINY)


def test_a_packed_set_says_its_size(capsys: pytest.CaptureFixture[str]) -> None:
    np.save("set.npy", np.random.default_rng(0).integers(0, 256, (20, 8, 12, 3), dtype=np.uint8))
    main(["train", "set.npy", "--run-dir", "run", "--steps", "2", "--gen-width", "4", "--batch-size", "4"])
    assert "20 images, 8x12x3" in capsys.readouterr().err
    main(["train", "--run-dir", "run", "--resume", "--steps", "3"])
    np.save("odd.npy", np.zeros((20, 9, 9, 3), np.uint8))
    capsys.readouterr()
    assert "image size 9 is not possible" in mistake(capsys, "train", "odd.npy")


def test_tf32_is_not_of_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (("train", "fake", "--device", "cpu", *TINY), ("bench", "--image-size", "16")):
        assert "--precision tf32" in mistake(capsys, *command, "--precision", "tf32")
    assert not Path("runs").exists()


def test_what_is_no_run_names_one_nearby(capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "fake", "--run-dir", "runs/a", *TINY])
    capsys.readouterr()
    assert "give a run, such as runs/a" in mistake(capsys, "sample", "runs")
    assert "give a run, such as runs/a" in mistake(capsys, "sample", "runs/a/checkpoints")
    Path("text.jpg").write_text("hello")
    assert "not a .safetensors file, nor a .pth" in mistake(capsys, "sample", "text.jpg")


def test_the_newest_of_several_runs_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for time, name in enumerate(("b", "c", "a")):
        (Path("runs") / name).mkdir(parents=True)
        (Path("runs") / name / "config.json").touch()
        for path in (Path("runs") / name / "config.json", Path("runs") / name):
            os.utime(path, (time, time))
    assert "the newest is runs/a" in mistake(capsys, "train", "--resume")
    assert "give a run, such as runs/a" in mistake(capsys, "sample", "runs")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"fastdcgan {importlib.metadata.version('fastdcgan')}\n"


def test_a_run_without_a_checkpoint_yet(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    assert "writes its first after --checkpoint-every steps" in mistake(capsys, "sample", "run")


@pytest.mark.parametrize("command", ["bench --json x/y.json", "profile --steps 1 --out x"])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "Permission denied" in mistake(capsys, *command.split())


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_narrow_terminal_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(console, "moves", lambda: True)
    monkeypatch.setattr(console, "on_stderr", lambda: Console(file=screen, width=width, force_terminal=True))
    with console.training_progress(0, 20_000) as show:
        show(2_438, "551 images/s  loss D 0.85 G 1.90  D(x) 0.71  D(G(z)) 0.29")
    lines = [line for line in screen.getvalue().splitlines() if "551" in line]
    assert "2438/20000" in lines[-1] and ("━" in lines[-1]) == (width == 120)


def test_ctrl_c_leaves_no_half_files(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "fake", "--run-dir", "run", *TINY])
    capsys.readouterr()

    def interrupt(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(SystemExit) as end:
        main(["sample", "run", "--count", "2", "--out", "singles"])
    assert (end.value.code, capsys.readouterr().err) == (130, "interrupted\n")
    assert not list(Path("singles").iterdir())


def test_train_then_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "fake", "--run-dir", "run", "--no-flip", *TINY, "--image-size", "8x12"])
    main(["sample", "run", "--count", "6", "--out", "grid.png"])
    main(["sample", "run", "--count", "3", "--out", "singles", "--seed", "2"])
    assert Image.open("grid.png").mode == "RGB"
    assert sorted(p.name for p in Path("singles").iterdir()) == [f"seed-00000{i}.png" for i in (2, 3, 4)]
    assert Image.open("singles/seed-000002.png").size == (12, 8)
    # A sample depends on its own seed alone: drawn with other neighbours it is the same picture.
    main(["sample", "run", "--count", "1", "--out", "alone", "--seed", "4"])
    assert Image.open("alone/seed-000004.png").tobytes() == Image.open("singles/seed-000004.png").tobytes()
    capsys.readouterr()
    assert "--count" in mistake(capsys, "sample", "run", "--count", "0")


def test_closed_streams_do_not_matter(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastdcgan", "train", "--run-dir", str(tmp_path / "run"), *TINY]
    closed = subprocess.run(["sh", "-c", '"$@" >&- 2>&-', "sh", *map(str, command)], timeout=120, check=False)
    assert closed.returncode == 0
    assert (tmp_path / "run" / "samples" / "step-000002.png").exists()


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    """Where what is written to standard error would end; nor does a program that is started find one closed."""
    program = """if True:
        import subprocess
        from unittest import mock
        from fastdcgan.cli import main

        def sample(run, *, out, **_):
            with open(out, "w") as file:
                file.write(f"{file.fileno()} {subprocess.call(['sh', '-c', 'echo >&2'])}")

        with mock.patch("fastdcgan.apps.sample.sample", sample):
            main(["sample", "run", "--out", "numbers"])
    """
    subprocess.run(["sh", "-c", '"$@" <&- >&- 2>&-', "sh", sys.executable, "-c", program], timeout=120, check=True)
    number, code = Path("numbers").read_text().split()
    assert int(number) > 2 and code == "0"


R, A, B, OUT = Path("R"), Path("a.png"), Path("b.png"), Path("out")
SEARCH = "--restarts 3 --steps 9 --seed 5 --fit --out out"
SEARCHED = {"restarts": 3, "steps": 9, "seed": 5, "fit": True, "out": OUT}


FLAGS: list[tuple[str, str, tuple[Any, ...], dict[str, Any]]] = [
    (
        "sample R --out out --count 3 --seed 5 --truncation 0.5 --no-ema",
        "apps.sample.sample",
        (R,),
        {"out": OUT, "count": 3, "seed": 5, "truncation": 0.5, "ema": False},
    ),
    (
        "interpolate R --seeds '3, a.png,,8 ' --steps 9 --truncation 0.5 --fit --out out",
        "apps.interpolate.interpolate",
        (R, ["3", "a.png", "8"]),
        {"out": OUT, "steps": 9, "truncation": 0.5, "fit": True},
    ),
    (
        "arithmetic R --plus 1,2 --minus 3 --plus '4, 5' --truncation 0.5 --fit --out out",
        "apps.arithmetic.arithmetic",
        (R, [["1", "2"], ["4", "5"]], [["3"]]),
        {"out": OUT, "truncation": 0.5, "fit": True},
    ),
    (
        f"invert R a.png b.png {SEARCH} --feature-weight 0.5",
        "apps.invert.invert_images",
        (R, (A, B)),
        {**SEARCHED, "feature_weight": 0.5},
    ),
    (
        f"inpaint R a.png b.png {SEARCH} --mask m.png --box 1,2,3,4 --random-fraction 0.5 --no-blend",
        "apps.inpaint.inpaint_images",
        (R, (A, B)),
        {**SEARCHED, "mask": Path("m.png"), "box": (1, 2, 3, 4), "random_fraction": 0.5, "blend": False},
    ),
    (
        f"denoise R a.png b.png {SEARCH} --sigma 0.3 --add-noise --clean b.png a.png",
        "apps.denoise.denoise_images",
        (R, (A, B)),
        {**SEARCHED, "sigma": 0.3, "add_noise": True, "clean": (B, A)},
    ),
    (
        "stylize R a.png --strength 0.3 --tiles 5 --seed 5 --out out",
        "apps.stylize.stylize",
        (R, A),
        {"out": OUT, "strength": 0.3, "tiles": 5, "seed": 5},
    ),
    (
        "probe R --data train --test-data test --images 50 --seed 5 --out out",
        "apps.probe.probe",
        (R,),
        {"data": "train", "test_data": "test", "images": 50, "seed": 5, "out": OUT},
    ),
    (
        "evaluate R --data d --images 50 --features F --fid --inception-weights w.pth --seed 5 --no-ema --out out",
        "apps.evaluate.evaluate",
        (R,),
        {
            "data": "d",
            "images": 50,
            "features": Path("F"),
            "fid": True,
            "inception_weights": Path("w.pth"),
            "seed": 5,
            "ema": False,
            "out": OUT,
        },
    ),
    (
        "export R --format pth --evaluation e.json --no-ema --out out",
        "apps.export.export",
        (R,),
        {"format": "pth", "evaluation": Path("e.json"), "ema": False, "out": OUT},
    ),
    ("report R --out out", "report.report", (R, OUT), {}),
    ("compare R a.png --out out", "report.compare", ([R, A], OUT), {}),
    ("data check R --strict", "data.check.check", ("R",), {"strict": True}),
    (
        "data pack R --out out --image-size 32x48 --channels 1 --loader torch --strict",
        "data.pack.pack",
        ("R",),
        {"image_size": (32, 48), "out": OUT, "channels": 1, "loader": "torch", "strict": True},
    ),
    (
        "profile R --image-size 32x48 --batch-size 8 --width 4 --precision bf16 --device cpu --compile --steps 3"
        " --out out --nsight",
        "bench.profiling.profile_training",
        (),
        {
            "data": "R",
            "image_size": (32, 48),
            "batch_size": 8,
            "width": 4,
            "precision": "bf16",
            "device": torch.device("cpu"),
            "executor": "fast-compiled",
            "steps": 3,
            "out": OUT,
            "nsight": True,
        },
    ),
]


@pytest.mark.parametrize(("line", "function", "given", "named"), FLAGS, ids=[line.split(" R")[0] for line, *_ in FLAGS])
def test_every_flag_reaches_what_it_is_for(
    line: str, function: str, given: tuple[Any, ...], named: dict[str, Any]
) -> None:
    with mock.patch(f"fastdcgan.{function}") as called:
        main(shlex.split(line))
    called.assert_called_once_with(*given, **named)


@pytest.mark.parametrize(
    ("line", "function", "named"),
    [
        (
            "--repetitions 5 --block-seconds 0.3 --per-layer --follow",
            "throughput.bench",
            {"repetitions": 5, "block_seconds": 0.3, "per_layer": True, "follow": True},
        ),
        ("--data photos --repetitions 5", "end_to_end.bench_data", {"data": Path("photos"), "epochs": 5}),
    ],
)
def test_every_flag_of_bench_reaches_what_it_is_for(line: str, function: str, named: dict[str, Any]) -> None:
    from fastdcgan.bench.contenders import Shape

    Path("photos").mkdir()
    words = f"bench {line} --image-size 32x48 --batch-size 8 16 --width 4 --precision bf16 --device cpu".split()
    words += ["--only", "example", "fast-eager", "--json", "out"]
    with mock.patch(f"fastdcgan.bench.{function}") as called:
        main(words)
    called.assert_called_once_with(
        shape=Shape(image_size=(32, 48), width=4), batch_sizes=(8, 16), device=torch.device("cpu"),
        names=("example", "fast-eager"), precision="bf16", json=OUT, command=shlex.join(["fastdcgan", *words]),
        **named,
    )  # fmt: skip


def test_the_help_explains_each_flag_in_one_paragraph(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line of the source that does not begin with a letter is one of its own there."""
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
    options = [line for line in said[said.index(str(TrainConfig.__doc__)) + 1 :] if line.strip("─╰╯")]
    assert len([line for line in options if "(default: " in line]) == len(dataclasses.fields(TrainConfig)) - 1  # DATA
    assert any(line.startswith("[DATA]") and line.endswith("(default: digits)") for line in said)
    for line in options:
        assert line.startswith("--") or "(default: " in line, line


@pytest.mark.parametrize("flag", ["--version", "--help"])
def test_nobody_reads_the_answer(flag: str) -> None:
    """Text that waits in a buffer until the end meets the closed pipe there."""
    reader, writer = os.pipe()
    os.close(reader)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "fastdcgan", flag]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=buffered, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("flag", ["--version", "--help"])
def test_a_full_standard_output_is_a_line(flag: str) -> None:
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "fastdcgan", flag]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=buffered, check=False)
    says = "fastdcgan: standard output cannot be written (No space left on device): send it elsewhere\n"
    assert (done.returncode, done.stderr) == (2, says)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(28, "No space left on device", "out/x.png"), "the disk is full (out/x.png): make room"),
        (OSError(5, "Input/output error", "out/x.png"), "a file cannot be used (out/x.png): Input/output error"),
        (UserError("odd.png cannot be read:\n it is\n\n odd"), "odd.png cannot be read: it is odd"),
    ],
)
def test_what_fails_is_a_line(capsys: pytest.CaptureFixture[str], error: Exception, says: str) -> None:
    with mock.patch("fastdcgan.apps.sample.sample", side_effect=error):
        assert says in mistake(capsys, "sample", "run")


def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the console reads the time from; set `now`."""
    watch = SimpleNamespace(now=1000.0)
    watch.monotonic = lambda: watch.now
    monkeypatch.setattr(console, "time", watch)
    return watch


def test_the_time_left_is_that_of_the_steps_to_come(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = clock(monkeypatch)
    with console.training_progress(100, 1100) as show:
        watch.now += 500  # compiles
        show(120, "")
        watch.now += 80
        show(140, "loss D 1")
    assert capsys.readouterr().err == "step 140 of 1,100  loss D 1  1:04:00 left\n"  # 960 steps of 4 s


def test_progress_without_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    watch = clock(monkeypatch)
    with console.progress("reading", 2000) as advance:
        watch.now += 1
        advance(500)  # a line every ten seconds is enough
        watch.now += 9
        advance(500)
        watch.now += 2
        advance(1000)
    written = capsys.readouterr()
    assert written.err.splitlines() == [
        "reading: 1,000 of 2,000 images (100 images/s)",
        "reading: 2,000 of 2,000 images (167 images/s)",
    ]
    assert written.out == ""


def test_one_process_of_a_run_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in ("0", "1", "2", "first"):  # the last two are mistakes, which have to be told
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        console.say(f"from {rank}")
        with console.spinner(f"work of {rank}"):
            pass
    expected = [f"{what} {rank}" for rank in ("0", "2", "first") for what in ("from", "work of")]
    assert capsys.readouterr().err.splitlines() == expected


def test_the_first_process_does_what_is_not_done_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of those that torchrun starts: all would write the same file. A rank that somebody has left set is no reason."""
    command = ["data", "pack", "fake", "--image-size", "8", "--out", str(tmp_path / "set.npy")]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for torchrun, done in (("x", False), (None, True)):
        if torchrun:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", torchrun)
        else:
            monkeypatch.delenv("TORCHELASTIC_RUN_ID")
        main(command)
        assert (tmp_path / "set.npy").exists() == done
    (tmp_path / "set.npy").unlink()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    main(command)
    assert (tmp_path / "set.npy").exists()


def test_what_stands_for_standard_error_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook's stream raises errors of its own once the cell is over: the line is lost, the run and what comes
    later are not."""

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise RuntimeError("Socket operation on non-socket")

    stream = Closed()
    monkeypatch.setattr(sys, "stderr", stream)
    console.say("step 20")
    assert sys.stderr is stream


def test_devices_and_precisions_are_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with a GPU, first one that only emulates bfloat16."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    native = False
    monkeypatch.setattr(processor, "why_no_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert (choose_device("cpu"), choose_device("auto"), choose_device("cuda")) == (cpu, gpu, gpu)
    assert [choose_precision(*each) for each in (("auto", cpu), ("bf16", cpu), ("tf32", gpu))] == [
        "fp32", "bf16", "tf32"
    ]  # fmt: skip
    assert choose_precision("auto", gpu) == "fp32"
    with pytest.raises(UserError, match="--precision bf16 is of GPUs from Ampere on"):
        choose_precision("bf16", gpu)
    native = True
    assert (choose_precision("auto", gpu), choose_precision("bf16", gpu)) == ("bf16", "bf16")


@pytest.fixture
def two_gpus_found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """PyTorch finds two GPUs, and nobody has tried them yet."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    processor.why_no_gpu.cache_clear()
    yield
    processor.why_no_gpu.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a GPU that cannot be used")
def test_a_gpu_that_cannot_be_used_is_left_alone(
    two_gpus_found: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one that is too old for PyTorch's kernels, which finds it all the same."""
    processor.say_once.cache_clear()
    assert [choose_device("auto"), choose_device("auto"), choose_device("cpu")] == [torch.device("cpu")] * 3
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("the GPU cannot be used, so the CPU computes: ") and "driver" in said
    with pytest.raises(UserError, match=r"--device cuda: .*driver.*; use --device cpu"):
        choose_device("cuda")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--device auto: "):  # the others may have theirs
        choose_device("auto")
    assert choose_device("cpu") == torch.device("cpu")


def test_torch_keeps_to_the_cores_of_its_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the machine's eight it may use three; and where it has been told to use fewer, it does."""
    before = torch.get_num_threads()
    monkeypatch.setattr(processor, "allowed_cores", lambda: 3)
    try:
        for threads, kept in ((8, 3), (3, 3), (2, 2)):
            torch.set_num_threads(threads)
            choose_device("cpu")
            assert torch.get_num_threads() == kept
        torch.set_num_threads(8)
        train(TrainConfig("fake", image_size="8", gen_width=4, batch_size=4, steps=1, device="cpu", run_dir=tmp_path))
        assert torch.get_num_threads() == 8  # afterwards the process is as it was
    finally:
        torch.set_num_threads(before)


def test_a_gpu_whose_driver_and_pytorch_disagree_is_left_alone(
    two_gpus_found: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def zeros(size: int, device: str) -> torch.Tensor:
        raise torch.cuda.DeferredCudaCallError("CUDA call failed lazily at initialization")

    monkeypatch.setattr(torch, "zeros", zeros)
    assert choose_device("auto") == torch.device("cpu")


def test_a_backslash_is_text() -> None:
    check_utf8("--out", Path(r"runs\udcff"))
    with pytest.raises(UserError, match="--out"):
        check_utf8("--out", Path("runs\udcff"))


def test_each_process_tries_its_own_gpu(two_gpus_found: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def zeros(size: int, device: str) -> torch.Tensor:
        tried.append(device)
        return torch.ones(size)

    monkeypatch.setattr(torch, "zeros", zeros)
    for rank in ("0", "1", "2"):
        processor.why_no_gpu.cache_clear()
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert choose_device("auto") == torch.device("cuda")
    assert tried == ["cuda:0", "cuda:1", "cuda:1"]


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("\n what\nand more"), "what"), (MemoryError(), "MemoryError"), ("error: no\n", "error: no")],
    ids=str,
)
def test_what_an_error_says_in_one_line(error: Exception | str, line: str) -> None:
    assert first_line(error) == line


def test_a_folder_that_is_gone_is_said(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f"rmdir {gone}; exec {sys.executable} -m fastdcgan train"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, shell=True, cwd=gone, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("fastdcgan: the folder that this was")


def test_what_a_program_has_put_in_place_of_standard_error_need_not_know_of_terminals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (SimpleNamespace(write=lambda text: None, flush=lambda: None), closed, None):
        monkeypatch.setattr(sys, "stderr", stream)
        assert not console.moves()
        console.say("something")


def test_a_home_folder_that_is_not_there_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["sample", "~nobody-of-this-name/run"])
    assert ended.value.code == 2 and "~nobody-of-this-name/run does not exist" in capsys.readouterr().err
