"""What all commands say about a run that cannot be used: one line, exit code 2, and nothing is left behind."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastdcgan.apps.pictures import HEADING, check_out, fitted, names, open_picture, sheet, to_picture, to_tensor
from fastdcgan.apps.sample import sample
from fastdcgan.apps.stylize import stylize
from fastdcgan.apps.trained import open_both, open_run
from fastdcgan.cli import main
from fastdcgan.errors import UserError

COMMANDS = {
    "sample": [],
    "interpolate": [],
    "arithmetic": ["--plus", "1,2"],
    "invert": ["photo.png"],
    "inpaint": ["photo.png", "--box", "1,1,2,2"],
    "denoise": ["photo.png"],
    "stylize": ["photo.png"],
    "probe": ["--data", "digits"],
    "evaluate": ["--data", "digits"],
    "export": [],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_without_a_checkpoint(command, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main([command, "empty", *COMMANDS[command]])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "no checkpoint" in line
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_run_without_images_to_work_on(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in ("invert", "denoise"):
        with pytest.raises(SystemExit) as end:
            main([command, str(run)])
        assert end.value.code == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_weights_that_are_not_finite(run, tmp_path):
    from fastdcgan.apps.sample import sample

    weights = load_file(next(run.glob("checkpoints/*/average.safetensors")))
    weights["main.0.weight"][0, 0, 0, 0] = float("nan")
    save_file(weights, tmp_path / "broken.safetensors")
    with pytest.raises(UserError, match="not finite"):
        sample(tmp_path / "broken.safetensors", out=tmp_path / "grid.png")
    assert not (tmp_path / "grid.png").exists()


def test_a_generator_alone_is_enough_to_sample_and_not_to_invert(run, tmp_path):
    shutil.copy(next(run.glob("checkpoints/*/average.safetensors")), tmp_path / "g.safetensors")
    assert open_run(tmp_path / "g.safetensors").generator.image_size == (16, 16)
    with pytest.raises(UserError, match="discriminator"):
        open_both(tmp_path / "g.safetensors")


def test_networks_are_frozen(networks):
    assert not any(value.requires_grad for network in networks for value in network.parameters())
    z = torch.zeros(1, 100, requires_grad=True)
    networks[1](networks[0](z)).sum().backward()
    assert z.grad is not None


def test_the_help_needs_no_torch():
    code = """
import sys
from fastdcgan.cli import main
try:
    main(["--help"])
except SystemExit:
    print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False")


def test_results_take_nobodys_place(tmp_path):
    assert names([Path("x/a.png"), Path("y/a.png"), Path("a-0.png"), Path("sheet.png")], tmp_path) == [
        "a-0", "a-1", "a-0-2", "sheet-3",
    ]  # fmt: skip
    with pytest.raises(UserError, match="would replace the pictures themselves"):
        names([tmp_path / "a.png"], tmp_path)


def test_a_picture_of_16_bits_keeps_its_upper_8(tmp_path):
    ramp = np.arange(256, dtype=np.uint8)[None].repeat(4, 0)
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(open_picture(tmp_path / "deep.png")), ramp)


@pytest.mark.parametrize(("mode", "why"), [("F", "floating-point pixels"), ("I", "32-bit pixels")])
def test_a_picture_whose_range_nobody_knows(tmp_path, mode, why):
    Image.new(mode, (8, 8), 200).save(tmp_path / "x.tiff")
    with pytest.raises(UserError, match=f"x.tiff has .*{why}: convert"):
        open_picture(tmp_path / "x.tiff")


def test_a_strip_is_too_narrow_to_stylize(run, tmp_path):
    Image.new("RGB", (3_000, 3)).save(tmp_path / "strip.png")
    with pytest.raises(UserError, match="too narrow for --tiles 8"):
        stylize(run, tmp_path / "strip.png", out=tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("name", ["grid.tiff", "g.jpg"])
def test_a_grid_is_a_png(run, tmp_path, name):
    with pytest.raises(UserError, match="end it in"):
        sample(run, out=tmp_path / name, count=1)
    assert not (tmp_path / name).exists()


def test_a_picture_is_turned_as_its_camera_says(tmp_path):
    picture = Image.new("RGB", (8, 4), "red")
    picture.paste("blue", (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: the left side is up
    picture.save(tmp_path / "photo.png", exif=exif)
    turned = open_picture(tmp_path / "photo.png")
    assert turned.size == (4, 8)
    assert (turned.getpixel((2, 1)), turned.getpixel((2, 6))) == ((0, 0, 255), (255, 0, 0))


def test_colours_keep_their_places():
    orange = Image.new("RGB", (3, 2), (255, 128, 0))
    assert to_tensor(orange)[:, 1, 2].tolist() == pytest.approx([1, 1 / 255, -1], abs=1e-6)
    assert to_picture(to_tensor(orange)).tobytes() == orange.tobytes()


def test_fitting_crops_the_centre_and_puts_transparency_on_white():
    wide = Image.new("RGB", (40, 10), "red")
    wide.paste("blue", (15, 0, 25, 10))
    assert np.allclose(np.asarray(fitted(wide, (5, 5), 3)), (0, 0, 255), atol=20)
    clear = Image.new("RGBA", (6, 4), (255, 0, 0, 0))
    assert fitted(clear, (6, 4), 3).getpixel((0, 0)) == (255, 255, 255)
    assert fitted(clear, (6, 4), 1).getpixel((0, 0)) == 255
    assert fitted(clear, (6, 4), 4).tobytes() == clear.tobytes()


def test_headings_stand_over_their_columns():
    black = torch.full((1, 16, 16), -1.0)
    for column in range(3):
        page = np.asarray(sheet([[black, None, black]], [*[""] * column, "heading"]))
        (found,) = np.nonzero((page[:HEADING] < 128).any(0))
        assert column * 98 <= found.min() < column * 98 + 10


def test_what_is_in_the_way_of_a_result_is_named(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("mine")
    for place, suffixes, what in (("folder.png", (".png",), "folder"), ("file", (), "file")):
        with pytest.raises(UserError, match=f"{place} is a {what} already: choose another name"):
            check_out(tmp_path / place, suffixes)
    assert (tmp_path / "file").read_text() == "mine"
