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

from fastdcgan import heic
from fastdcgan.apps.evaluate import evaluate
from fastdcgan.apps.export import export
from fastdcgan.apps.pictures import (
    HEADING,
    fitted,
    names,
    open_picture,
    read_pictures,
    save,
    sheet,
    to_picture,
    to_tensor,
)
from fastdcgan.apps.sample import sample
from fastdcgan.apps.stylize import stylize
from fastdcgan.apps.trained import open_both, open_run
from fastdcgan.cli import main
from fastdcgan.errors import UserError
from fastdcgan.files import check_out
from fastdcgan.models import Generator

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


@pytest.mark.parametrize("line", ["sample --out grid.png", "export --out new"])
@pytest.mark.parametrize("given", ["model", "model/generator.safetensors"])
def test_what_is_exported_has_no_latest_weights_to_ask_for(run, tmp_path, monkeypatch, capsys, line, given):
    monkeypatch.chdir(tmp_path)
    export(run, format="safetensors", out=Path("model"))
    capsys.readouterr()
    command, *rest = line.split()
    with pytest.raises(SystemExit) as end:
        main([command, given, "--no-ema", *rest])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "holds one network's weights alone: leave --no-ema out" in line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_torchscript_is_refused_in_a_line(tmp_path, recwarn):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)  # that it is deprecated
        torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "generator.pt")
    recwarn.clear()
    with pytest.raises(UserError, match=r"generator\.pt is not a \.safetensors file, nor a \.pth file of weights"):
        open_run(tmp_path / "generator.pt")
    assert not recwarn.list


def test_channels_that_no_picture_has_are_explained(tmp_path):
    torch.save(Generator(8, channels=2, latent_dim=5, width=4).state_dict(), tmp_path / "netG.pth")
    with pytest.raises(UserError, match="makes pictures of 2 channels, which no picture file has"):
        open_run(tmp_path / "netG.pth")


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
    with pytest.raises(UserError, match="would replace pictures that are read"):
        names([tmp_path / "a.png"], tmp_path)


def test_the_results_of_pictures_with_long_names_have_shorter_ones(tmp_path):
    long, also = "x" * 251, "x" * 250 + "y"
    found = names([Path(f"{long}.png"), Path(f"{also}.png"), Path("a.png")], tmp_path)
    assert found == ["x" * 100 + "-0", "x" * 100 + "-1", "a"]
    assert names([Path("x" * 230 + ".png")], tmp_path) == ["x" * 230]


def test_a_picture_is_saved_to_where_a_link_points(tmp_path):
    (tmp_path / "link.png").symlink_to("picture.png")
    save(Image.new("L", (4, 4)), tmp_path / "link.png")
    assert (tmp_path / "link.png").is_symlink() and Image.open(tmp_path / "picture.png").size == (4, 4)


def test_results_take_nobodys_place_by_another_path(tmp_path, monkeypatch):
    """The same folder under another name, and a link to it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    for given, out in ((Path("a.png"), tmp_path), (tmp_path / "a.png", Path(".")), (Path("a.png"), Path("link"))):
        with pytest.raises(UserError, match="would replace pictures that are read"):
            names([given], out)


@pytest.mark.parametrize(
    "line",
    [
        "invert noisy/digit0.png --out noisy",
        "denoise noisy/digit0.png --clean clean/digit0.png --out clean",
        "inpaint noisy/digit0.png --mask masks/digit0.png --out masks",
        "inpaint noisy/digit0.png --mask masks/sheet.png --out masks",
        "stylize noisy/digit0.png --out noisy/digit0.png",
        "stylize noisy/digit0.png --out link.png",
        "interpolate --seeds noisy/digit0.png,1 --out noisy/digit0.png",
        "interpolate --seeds 1,noisy/digit0.png --out noisy/../noisy/digit0.png",
        "arithmetic --plus 1 --minus noisy/digit0.png --out noisy/digit0.png",
        "evaluate --data noisy --out noisy/digit0.json",
        "probe --data clean --test-data noisy --out noisy/digit0.json",
    ],
)
def test_no_command_replaces_a_picture_that_it_reads(run, digits, tmp_path, monkeypatch, capsys, line):
    monkeypatch.chdir(tmp_path)
    for folder in ("noisy", "clean"):
        (tmp_path / folder).mkdir()
        save(to_picture(digits[0]), tmp_path / folder / "digit0.png")
    (tmp_path / "masks").mkdir()
    for name in ("digit0.png", "sheet.png"):
        Image.fromarray(np.eye(16, dtype=np.uint8) * 255).save(tmp_path / "masks" / name)
    (tmp_path / "link.png").symlink_to("noisy/digit0.png")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    command, *rest = line.split()
    with pytest.raises(SystemExit) as end:
        main([command, str(run), *rest])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "would replace" in line and "read: " in line
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.png")}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("sample --count 9", "--count 9 is too large: from --seed 4294967290 on there are 6 seeds"),
        ("invert photo.png --restarts 9", "--restarts 9 is too large"),
        ("inpaint photo.png --box 1,1,2,2", "--restarts 8 is too large"),
        ("denoise photo.png", "--restarts 8 is too large"),
        ("stylize photo.png", "--seed 4294967290 is not possible: from 0 to 4294967104"),
        ("evaluate --data digits --images 40", "--images 40 is too large"),
    ],
)
def test_seeds_that_run_out_are_said_before_the_work(run, tmp_path, monkeypatch, capsys, line, says):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (16, 16)).save("photo.png")
    command, *rest = line.split()
    with pytest.raises(SystemExit) as end:
        main([command, str(run), *rest, "--seed", "4294967290", "--out", "new/result.json"])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert says in line
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


@pytest.mark.parametrize("name", ["e.png", "e-nearest.png"])
def test_what_is_in_the_way_of_a_picture_that_goes_with_a_file_is_named_before_the_work(run, tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=rf"{name}, which goes with --out .*e\.json, is a folder already"):
        evaluate(run, data="nowhere", out=tmp_path / "e.json")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_picture_of_16_bits_keeps_its_upper_8(tmp_path):
    ramp = np.arange(256, dtype=np.uint8)[None].repeat(4, 0)
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(open_picture(tmp_path / "deep.png")), ramp)


def test_a_result_is_a_line_whatever_its_picture_is_called(run, digits, tmp_path, capsys):
    picture = tmp_path / "two\nlines.png"
    save(to_picture(digits[0]), picture)
    main(["invert", str(run), str(picture), "--out", str(tmp_path / "a\nb"), "--steps", "4"])
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 1 and said.out.startswith("two\\nlines: root-mean-square error")
    assert said.err.splitlines()[-1].endswith("a\\nb/sheet.png")


def test_black_and_white_is_grey(tmp_path):
    Image.new("1", (16, 16), 1).save(tmp_path / "line.png")
    (found,) = read_pictures([tmp_path / "line.png"], Generator(16, 1, 5, 4), fit=False)
    assert found.shape == (1, 16, 16) and (found == 1).all()


@pytest.mark.parametrize(("mode", "why"), [("F", "floating-point pixels"), ("I", "32-bit pixels")])
def test_a_picture_whose_range_nobody_knows(tmp_path, mode, why):
    Image.new(mode, (8, 8), 200).save(tmp_path / "x.tiff")
    with pytest.raises(UserError, match=f"x.tiff has .*{why}: convert"):
        open_picture(tmp_path / "x.tiff")


def test_a_picture_too_large_to_open_is_a_line(tmp_path, monkeypatch):
    Image.new("L", (64, 64)).save(tmp_path / "vast.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match=r"vast\.png is not a picture that can be read: .*bomb"):
        open_picture(tmp_path / "vast.png")


def test_a_photograph_of_an_iphone(tmp_path, monkeypatch):
    Image.new("RGB", (64, 48), "red").save(tmp_path / "IMG.HEIC", "HEIF")
    assert open_picture(tmp_path / "IMG.HEIC").size == (64, 48)
    monkeypatch.setattr(heic, "VERSION", "")
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
    with pytest.raises(UserError, match="that can be read: HEIC, which needs one more package: pip install"):
        open_picture(tmp_path / "IMG.HEIC")


def test_a_strip_is_too_narrow_to_stylize(run, tmp_path):
    for size in ((3_000, 3), (9_000, 1)):  # the longer one is made smaller, of which no line would be left
        Image.new("RGB", size).save(tmp_path / "strip.png")
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


def test_what_is_transparent_is_so_in_every_kind_of_file(tmp_path):
    """Also where a palette or one grey says so, without a channel of its own."""
    clear = Image.new("RGBA", (6, 4), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 3, 4))
    clear.quantize(16).save(tmp_path / "palette.png")
    clear.convert("LA").save(tmp_path / "grey.png")
    for name in ("palette", "grey"):
        picture = open_picture(tmp_path / f"{name}.png")
        assert picture.mode == "RGBA"
        assert (picture.getpixel((1, 1))[3], picture.getpixel((5, 1))[3]) == (255, 0), name


def test_a_picture_is_turned_where_the_rest_of_its_exif_is_damaged(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "hello"
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=exif)
    data = bytearray((tmp_path / "a.jpg").read_bytes())
    data[data.index(b"\x01\x0e\x00\x02") + 1] = 0  # its description becomes a width, in words
    (tmp_path / "a.jpg").write_bytes(data)
    assert open_picture(tmp_path / "a.jpg").size == (4, 8)


def test_whatever_pillow_raises_for_a_damaged_picture_is_one_line(tmp_path, monkeypatch):
    def damaged(*given, **options):
        raise RuntimeError("what a plugin in C says\nin two lines")

    Image.new("RGB", (8, 4)).save(tmp_path / "a.png")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", damaged)
    with pytest.raises(UserError, match=r"a\.png is not a picture that can be read: what a plugin in C says$"):
        open_picture(tmp_path / "a.png")


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


def test_pictures_are_read_at_the_size_of_an_oblong_generator(tmp_path):
    Image.fromarray(np.arange(16 * 24, dtype=np.uint8).reshape(16, 24)).save(tmp_path / "wide.png")
    generator = Generator((16, 24), 1, 5, 4)
    for fit in (False, True):
        assert read_pictures([tmp_path / "wide.png"], generator, fit).shape == (1, 1, 16, 24)
    Image.new("L", (16, 24)).save(tmp_path / "high.png")
    with pytest.raises(UserError, match=r"high\.png is 16x24, and this run draws 24x16"):
        read_pictures([tmp_path / "high.png"], generator, fit=False)


def test_headings_stand_over_their_columns():
    black = torch.full((1, 16, 16), -1.0)
    for column in range(3):
        page = np.asarray(sheet([[black, None, black]], [*[""] * column, "heading"]))
        (found,) = np.nonzero((page[:HEADING] < 128).any(0))
        assert column * 98 <= found.min() < column * 98 + 10


def test_a_sheet_of_oblong_pictures_keeps_their_proportions():
    left, right = torch.full((1, 16, 24), -1.0), torch.full((1, 16, 24), -1.0)
    left[:, :, 0], right[:, 15] = 1, 1  # one has a white first column, the other a white last line
    page = sheet([[left, right], [right, left]], ["a", "b"])
    width, height = 24 * 6, 16 * 6
    assert page.size == (2 * width + 2, HEADING + 2 * height + 2)
    for x, y, image in ((0, 0, left), (1, 0, right), (0, 1, right), (1, 1, left)):
        corner = x * (width + 2), HEADING + y * (height + 2)
        part = page.crop((*corner, corner[0] + width, corner[1] + height))
        assert torch.equal(to_tensor(part.resize((24, 16), Image.Resampling.NEAREST)), image)


def test_what_is_in_the_way_of_a_result_is_named(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("mine")
    for place, suffixes, what in (("folder.png", (".png",), "folder"), ("file", (), "file")):
        with pytest.raises(UserError, match=f"{place} is a {what} already: choose another name"):
            check_out(tmp_path / place, suffixes)
    assert (tmp_path / "file").read_text() == "mine"


def test_the_case_of_a_suffix_does_not_matter(tmp_path):
    check_out(tmp_path / "A.PNG", (".png",))
    for name, format in (("A.PNG", "PNG"), ("B.JPG", "JPEG")):
        save(Image.new("RGB", (4, 4)), tmp_path / name)
        assert Image.open(tmp_path / name).format == format


def test_a_sheet_is_large_enough_to_be_seen():
    """By whole multiples, the least that has CELL pixels a side."""
    sizes = [sheet([[torch.zeros(1, side, side)]]).width for side in (16, 32, 48, 64, 95, 96, 97)]
    assert sizes == [96, 96, 96, 128, 190, 96, 97]
