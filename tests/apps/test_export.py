"""`export`: every format computes what the run does, and the folder is whole or not there."""

from __future__ import annotations

import copy
import errno
import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import fastdcgan
from fastdcgan import checkpoint
from fastdcgan.apps import export as export_module
from fastdcgan.apps.export import export
from fastdcgan.apps.latent import generate, latents
from fastdcgan.apps.sample import sample
from fastdcgan.apps.trained import fingerprint, open_run
from fastdcgan.errors import UserError
from fastdcgan.models import Generator, TutorialGenerator


@pytest.fixture
def expected(networks):
    return generate(networks[0], latents(range(7), 100))


def test_from_pretrained_reads_every_export(run, tmp_path, expected, monkeypatch):
    export(run, format="safetensors", out=tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "README.md",
        "config.json",
        "generator.safetensors",
        "samples.png",
    ]
    generator = fastdcgan.from_pretrained(tmp_path / "model")
    assert not generator.training
    assert (generate(generator, latents(range(7), 100)) - expected).abs().max() < 1e-5
    assert fastdcgan.load_run(tmp_path / "model").discriminator is None  # no run, but it can be used as one
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fastdcgan.from_pretrained("~/model").latent_dim == 100
    export(tmp_path / "model", format="pth", out=tmp_path / "again")  # and an exported folder can be exported


class ExampleGenerator(nn.Module):
    """The generator of PyTorch's DCGAN example, for pictures of 16 pixels."""

    def __init__(self, nz=100, ngf=16, nc=1):
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(nz, ngf * 2, 4, 1, 0, bias=False),
            nn.BatchNorm2d(ngf * 2),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 2, ngf, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf, nc, 4, 2, 1, bias=False),
            nn.Tanh(),
        )

    def forward(self, latent):
        return self.main(latent)


def test_pth_loads_in_the_pytorch_example(run, tmp_path, expected):
    export(run, format="pth", out=tmp_path / "model")
    example = ExampleGenerator()
    example.load_state_dict(torch.load(tmp_path / "model" / "netG.pth"))
    with torch.no_grad():
        images = example.eval()(latents(range(7), 100).view(7, 100, 1, 1))
    assert (images - expected).abs().max() < 1e-5


def test_the_card_holds_any_name(run, tmp_path):
    """Of the folder that was trained on: bytes that are no text, and the sign between a table's cells."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = json.loads((copy / "config.json").read_text())
    config["config"]["data"] = "/home/bilder|\udcff/\u732b"
    (copy / "config.json").write_text(json.dumps(config))
    export(copy, format="safetensors", out=tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_bytes().decode("utf-8")
    assert "| trained on | bilder\\|\\xff/\u732b |" in card.splitlines()


@pytest.mark.parametrize("format", ["safetensors", "onnx", "torchscript", "pth"])
def test_a_name_that_is_no_text_is_refused(run, tmp_path, format):
    with pytest.raises(UserError, match=r"--out '.*model\\udcff' is not possible: it needs a name in UTF-8"):
        export(run, format=format, out=tmp_path / "model\udcff")
    assert list(tmp_path.iterdir()) == []


def test_torchscript_agrees(run, tmp_path, expected):
    export(run, format="torchscript", out=tmp_path / "model")
    script = torch.jit.load(tmp_path / "model" / "generator.pt")
    assert (script(latents(range(7), 100)) - expected).abs().max() < 1e-4


def test_onnx_agrees_at_any_batch_size(run, tmp_path, expected):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    export(run, format="onnx", out=tmp_path / "model")
    session = onnxruntime.InferenceSession(str(tmp_path / "model" / "generator.onnx"))
    for count in (1, 7):
        (images,) = session.run(["images"], {"latent": latents(range(count), 100).numpy()})
        assert (torch.from_numpy(images) - expected[:count]).abs().max() < 1e-4


def test_the_tutorial_network_is_exported_too(tmp_path):
    pytest.importorskip("onnxscript")
    generator = TutorialGenerator().eval()
    save_file(generator.state_dict(), tmp_path / "g.safetensors")
    export(tmp_path / "g.safetensors", format="onnx", out=tmp_path / "onnx")
    export(tmp_path / "g.safetensors", format="torchscript", out=tmp_path / "script")
    script = torch.jit.load(tmp_path / "script" / "generator.pt")
    assert (script(latents(range(3), 100)) - generate(generator, latents(range(3), 100))).abs().max() < 1e-4


def test_the_card_has_the_numbers(run, networks, tmp_path):
    results = {
        "generated": {"swd_16": 12.5, "swd": 12.5, "recall": 0.5},
        "other real images": {"swd_16": 3.25, "swd": 3.25, "recall": 0.75},
    }
    about = {"weights": fingerprint(networks[0]), "images": 2000, "results": results}
    (tmp_path / "evaluation.json").write_text(json.dumps(about))
    export(run, format="safetensors", out=tmp_path / "model", evaluation=tmp_path / "evaluation.json")
    card = (tmp_path / "model" / "README.md").read_text()
    parameters = sum(each.numel() for each in networks[0].parameters())
    for words in (
        "16 x 16 pixels, 1 channel, in",
        "| trained on | digits |",
        "| steps | 400, over 25,600 images |",
        f"| parameters | {parameters:,} |",
        "| | generated | other real images | |\n|---|---|---|---|\n",
        "| swd | 12.500 | 3.250 | lower is better |",
        "| recall | 0.500 | 0.750 | higher is better |",
        "Each of 2,000 images, against as many real ones.",
        "samples.png",
    ):
        assert words in card
    assert str(tmp_path) not in card and str(run) not in card


def test_numbers_of_other_weights_are_refused(run, networks, tmp_path):
    """Of another run that made as many steps at the same size; of the latest ones; of who knows which."""
    other, latest = copy.deepcopy(networks[0]), open_run(run, ema=False).generator
    other.main[0].weight[0, 0, 0, 0] += 1e-6
    file, about = tmp_path / "e.json", {"step": 400, "ema": True, "results": {"generated": {"swd_16": 1.0}}}
    for network in (other, latest):
        file.write_text(json.dumps(about | {"weights": fingerprint(network)}))
        with pytest.raises(UserError, match=r"of another run.*: evaluate what is exported"):
            export(run, format="safetensors", out=tmp_path / "new", evaluation=file)
    file.write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"does not say which weights it is of.*: evaluate again"):
        export(run, format="safetensors", out=tmp_path / "new", evaluation=file)
    assert [path.name for path in tmp_path.iterdir()] == ["e.json"]


def test_an_exported_folder_is_of_the_weights_that_were_measured(run, networks, tmp_path):
    about = {"weights": fingerprint(networks[0]), "results": {"generated": {"swd_16": 7.125}}}
    (tmp_path / "e.json").write_text(json.dumps(about))
    for format in ("safetensors", "pth"):
        export(run, format=format, out=tmp_path / format)
    for source in ("safetensors", "pth/netG.pth"):
        export(tmp_path / source, format="pth", out=tmp_path / "again", evaluation=tmp_path / "e.json")
        assert "| swd_16 | 7.125 |" in (tmp_path / "again" / "README.md").read_text()
        shutil.rmtree(tmp_path / "again")


@pytest.mark.parametrize(
    "content",
    [
        "[1]",
        '{"results": []}',
        '{"results": {"a": 1}}',
        '{"results": {"a": {"b": null}}}',
        '{"results": {}}',
        '{"results": {"a": {"b": 1}}, "images": "many"}',
        '{"results": {"a": {"b": 1' + 400 * "0" + "}}}",
        100_000 * "[",
    ],
    ids=["a list", "no sets", "no figures", "no number", "nothing", "no count", "a vast number", "deep"],
)
def test_what_is_no_evaluation_is_a_line(run, tmp_path, content):
    (tmp_path / "e.json").write_text(content)
    with pytest.raises(UserError, match="is not a file made by fastdcgan evaluate"):
        export(run, format="safetensors", out=tmp_path / "model", evaluation=tmp_path / "e.json")


def test_what_differs_from_the_run_is_not_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "AGREEMENT", -1.0)
    with pytest.raises(UserError, match="differs"):
        export(run, format="torchscript", out=tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_what_is_no_number_does_not_agree():
    network = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(UserError, match="the ONNX file differs from the run by nan"):
        export_module._agree("ONNX", lambda z: network(z) * float("nan"), network)


def test_what_differs_a_little_does_not_agree(networks):
    """By less than can be seen, and more than rounding."""
    plain = export_module.any_batch(export_module.plain_generator(networks[0]))
    with pytest.raises(UserError, match=r"the ONNX file differs from the run by 1\.0e-03"):
        export_module._agree("ONNX", lambda z: plain(z) + 1e-3, plain)


def test_a_full_disk_is_a_line(run, tmp_path, monkeypatch):
    """safetensors has an error of its own for it."""

    def full(*_):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        export(run, format="safetensors", out=tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["torchscript", "pth"])
def test_a_disk_that_fills_up_is_a_line_in_every_format(run, tmp_path, format):
    """Room for the first file, and for no larger one; what torch does then may end the process."""
    export(run, format="safetensors", out=tmp_path / "whole")
    most = (tmp_path / "whole" / "generator.safetensors").stat().st_size
    done = subprocess.run(
        [sys.executable, "-m", "fastdcgan", "export", run, "--format", format, "--out", tmp_path / "model"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)),
    )
    assert (
        done.returncode == 2
        and done.stderr == f"fastdcgan: --out {tmp_path / 'model'} cannot be written: File too large\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


@pytest.mark.parametrize("format", ["torchscript", "pth"])
def test_a_file_system_without_permissions_takes_an_export(run, tmp_path, monkeypatch, format):
    def refuse(path, *_, **__):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))

    monkeypatch.setattr(os, "chmod", refuse)
    export(run, format=format, out=tmp_path / "model")
    assert len(list((tmp_path / "model").iterdir())) == 5


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed(run, tmp_path, there):
    if there:
        (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    export(run, format="safetensors", out=tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "folder" / "generator.safetensors").exists()
    assert len(list(tmp_path.iterdir())) == 2


def test_where_a_disk_is_mounted_is_refused_before_the_work(run, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    monkeypatch.setattr(type(tmp_path), "is_mount", lambda path: path == tmp_path / "disk")
    monkeypatch.setattr(export_module, "open_run", lambda *_: pytest.fail("begun"))
    for name in ("disk", "link"):
        with pytest.raises(UserError, match=f"{name} is where a disk is mounted.*: name a new folder in it"):
            export(run, format="safetensors", out=tmp_path / name)


def test_the_folder_one_is_in_is_no_mount_point(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="has no name of its own"):
        export(run, format="safetensors", out=type(tmp_path)())


def test_mistakes_are_explained_and_nothing_is_written(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="exists already"):
        export(run, format="pth", out=tmp_path / "full")
    with pytest.raises(UserError, match="--evaluation"):
        export(run, format="pth", out=tmp_path / "new", evaluation=tmp_path / "full" / "mine.txt")
    with pytest.raises(UserError, match="made by fastdcgan export"):
        fastdcgan.from_pretrained(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine.txt"]


def test_a_file_in_the_way_is_kept(run, tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(UserError, match="model exists already"):
        export(run, format="safetensors", out=tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


def test_packages_that_are_missing_are_named(run, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnxscript" else find_spec(name, *rest)
    )
    with pytest.raises(UserError, match="--format onnx needs onnxscript: pip install"):
        export(run, format="onnx", out=tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_export_left_is_cleared_away(run, tmp_path):
    (tmp_path / ".model.unfinished").mkdir()
    (tmp_path / ".model.unfinished" / "generator.pt").write_text("half")
    export(run, format="safetensors", out=tmp_path / "model")
    assert not (tmp_path / "model" / "generator.pt").exists() and not (tmp_path / ".model.unfinished").exists()


def test_a_folder_can_have_the_longest_name(run, tmp_path):
    export(run, format="safetensors", out=tmp_path / ("x" * 255))
    assert [path.name for path in tmp_path.iterdir()] == ["x" * 255]


def test_the_latest_weights_can_be_exported_and_others_can_read_them(run, tmp_path):
    for name, ema in (("average", True), ("latest", False)):
        export(run, format="safetensors", out=tmp_path / name, ema=ema)
        files = {path.stat().st_mode & 0o777 for path in (tmp_path / name).iterdir()}
        assert len(files) == 1, "all files are for the same people"
    average, latest = (load_file(tmp_path / name / "generator.safetensors") for name in ("average", "latest"))
    trained = load_file(next(run.glob("checkpoints/*/average.safetensors")))
    assert all(torch.equal(value, trained[name]) for name, value in average.items())
    assert not torch.equal(latest["main.0.weight"], average["main.0.weight"])


def test_the_samples_are_those_of_the_first_seeds(run, tmp_path):
    export(run, format="safetensors", out=tmp_path / "model")
    sample(run, count=36, out=tmp_path / "samples.png")
    assert (tmp_path / "model" / "samples.png").read_bytes() == (tmp_path / "samples.png").read_bytes()


def test_a_generator_of_a_shape_of_its_own_is_described(tmp_path):
    generator = Generator((16, 28), 3, 20, 8)
    weights = {name: value.contiguous() for name, value in generator.state_dict().items()}
    save_file(weights, tmp_path / "g.safetensors")
    export(tmp_path / "g.safetensors", format="safetensors", out=tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| 16 x 28 pixels, 3 channels, in -1..1 |" in card
    assert "torch.randn(16, 20))  # (16, 3, 16, 28) in -1..1" in card
    about = json.loads((tmp_path / "model" / "config.json").read_text())
    assert [about[key] for key in ("image_size", "channels", "latent_dim", "width")] == [[16, 28], 3, 20, 8]
