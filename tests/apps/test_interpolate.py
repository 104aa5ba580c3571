"""`interpolate` and `arithmetic`: the pictures between, and the picture of a sum."""

from __future__ import annotations

import io
import shutil
import subprocess
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdcgan.apps import arithmetic as arithmetic_module
from fastdcgan.apps import endpoints
from fastdcgan.apps import interpolate as interpolate_module
from fastdcgan.apps.arithmetic import arithmetic, combine
from fastdcgan.apps.endpoints import open_points
from fastdcgan.apps.interpolate import gif, interpolate, mp4
from fastdcgan.apps.latent import generate, latents
from fastdcgan.apps.pictures import HEADING, open_picture, sheet, to_tensor
from fastdcgan.apps.sample import sample
from fastdcgan.errors import UserError
from fastdcgan.models import Generator

CELL = 96


def cell(path, x, y, top=0):
    """The picture in column x and row y of a sheet, as it was before it was enlarged: (1, 16, 16) in -1..1."""
    left, top = x * (CELL + 2), top + y * (CELL + 2)
    page = open_picture(path).crop((left, top, left + CELL, top + CELL))
    return to_tensor(page.resize((16, 16), Image.Resampling.NEAREST))


def test_a_strip_begins_and_ends_with_the_seeds_own_pictures(run, tmp_path):
    interpolate(run, ["3", "7", "9"], out=tmp_path / "walk.png", steps=5)
    sample(run, out=tmp_path / "own", count=7, seed=3)
    assert open_picture(tmp_path / "walk.png").size == (6 * 98 - 2, 2 * 98 - 2)
    for x, y, seed in ((0, 0, 3), (5, 0, 7), (0, 1, 7), (5, 1, 9)):
        own = to_tensor(open_picture(tmp_path / "own" / f"seed-{seed:06d}.png"))
        assert (cell(tmp_path / "walk.png", x, y) - own).abs().max() < 2 / 127.5


def test_an_animation_goes_round(run, tmp_path):
    interpolate(run, ["1", "2", "3"], out=tmp_path / "walk.gif", steps=4)
    with Image.open(tmp_path / "walk.gif") as animation:
        assert (animation.n_frames, animation.size, animation.info["loop"]) == (12, (128, 128), 0)
        durations = []
        for i in range(12):
            animation.seek(i)
            durations.append(animation.info["duration"])
    assert durations == [500, 50, 50, 50] * 3  # milliseconds: it rests at the points


def test_an_animation_has_the_pixels_of_the_strip(run, tmp_path):
    """Enlarged as in all sheets, not smoothed."""
    interpolate(run, ["1", "2"], out=tmp_path / "walk.png", steps=3)
    interpolate(run, ["1", "2"], out=tmp_path / "walk.gif", steps=3)
    frame = Image.open(tmp_path / "walk.gif").convert("L")
    small = frame.resize((16, 16), Image.Resampling.NEAREST)
    assert small.resize(frame.size, Image.Resampling.NEAREST).tobytes() == frame.tobytes()
    assert (to_tensor(small) - cell(tmp_path / "walk.png", 0, 0)).abs().max() < 2 / 127.5


def test_an_animation_needs_no_room_for_temporary_files(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "full"))
    interpolate(run, ["1", "2"], out=tmp_path / "walk.gif", steps=4)
    assert Image.open(tmp_path / "walk.gif").n_frames == 8


@pytest.mark.parametrize(("size", "film"), [((8, 12), (192, 128)), ((24, 28), (168, 144))])  # 16 and 6 times as large
def test_a_film_of_oblong_pictures_keeps_their_proportions(size, film, tmp_path):
    torch.save(Generator(size, channels=1, latent_dim=5, width=4).state_dict(), tmp_path / "netG.pth")
    interpolate(tmp_path / "netG.pth", ["1", "2"], out=tmp_path / "walk.gif", steps=2)
    assert Image.open(tmp_path / "walk.gif").size == film


def test_the_case_of_a_suffix_does_not_matter(run, tmp_path):
    interpolate(run, ["1", "2"], out=tmp_path / "walk.GIF", steps=2)
    assert (tmp_path / "walk.GIF").read_bytes()[:4] == b"GIF8"
    interpolate(run, ["1", "2"], out=tmp_path / "walk.PNG", steps=2)
    assert Image.open(tmp_path / "walk.PNG").format == "PNG"


def test_what_is_transparent_lies_on_white_in_a_film(tmp_path, monkeypatch):
    generator = Generator(8, channels=4, latent_dim=5, width=4)
    torch.save(generator.state_dict(), tmp_path / "netG.pth")
    clear = torch.full((1, 4, 8, 8), -1.0)  # black, and not to be seen
    monkeypatch.setattr(
        "fastdcgan.apps.interpolate.generate", lambda _, latents: clear.expand(len(latents), -1, -1, -1)
    )
    interpolate(tmp_path / "netG.pth", ["1", "2"], out=tmp_path / "walk.gif", steps=2)
    assert open_picture(tmp_path / "walk.gif").convert("RGB").getextrema() == ((255, 255),) * 3


def test_an_image_can_be_a_point(run, digit_files, digits, tmp_path):
    interpolate(run, [str(digit_files[0]), "2"], out=tmp_path / "walk.png", steps=2)
    error = (cell(tmp_path / "walk.png", 0, 0) - digits[0]).square().mean()
    others = (generate_seeds(run, 32) - digits[0]).square().flatten(1).mean(1)
    assert error < others.min()


def generate_seeds(run, count):
    from fastdcgan.apps.trained import open_run

    return generate(open_run(run).generator, latents(range(count), 100))


def test_film_where_there_is_ffmpeg(run, tmp_path):
    if shutil.which("ffmpeg") is None:
        with pytest.raises(UserError, match="ffmpeg"):
            interpolate(run, ["1", "2"], out=tmp_path / "walk.mp4")
        assert not list(tmp_path.iterdir())
    else:
        interpolate(run, ["1", "2"], out=tmp_path / "walk.mp4", steps=4)
        assert (tmp_path / "walk.mp4").read_bytes()[4:8] == b"ftyp"


def test_a_group_less_itself_leaves_the_other(run, tmp_path):
    arithmetic(run, [["1", "2"], ["5"]], [["1", "2"]], out=tmp_path / "sum.png")
    assert open_picture(tmp_path / "sum.png").size == (7 * 98 - 2, HEADING + 4 * 98 - 2)
    result, five = (cell(tmp_path / "sum.png", *place, top=HEADING) for place in ((5, 1), (1, 0)))
    assert (result - five).abs().max() < 2 / 127.5
    assert combine(torch.tensor([[1.0], [2.0], [10.0]]), 2).item() == -7


def test_the_means_are_named_and_the_result_is_framed(run, tmp_path):
    arithmetic(run, [["1", "2"], ["5"]], [["3", "4"]], out=tmp_path / "sum.png")
    step, top = CELL + 2, HEADING + CELL + 2  # the frame fills the lines around the result, and covers none of it
    page = torch.from_numpy(np.array(Image.open(tmp_path / "sum.png")))
    framed = page[top - 2 : top + step, 5 * step - 2 : 6 * step] == 0
    framed[2:-2, 2:-2] = True
    assert framed.all()
    beside = page[HEADING + 3 * step :, 3 * step : 4 * step]
    assert (beside == 0).any(), "a word beside the row of means"
    assert (page[HEADING : HEADING + 3 * step, 3 * step : 4 * step] == 255).all()


def test_all_groups_count_the_same():
    means = torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0], [1000.0, 2000.0]])
    assert combine(means, 2).tolist() == [-1089, -2178]
    assert combine(means, 4).tolist() == [1111, 2222]


@pytest.mark.parametrize(
    ("points", "out", "complaint"),
    [
        (["1"], "walk.gif", "at least two"),
        (["1", "x.png"], "walk.gif", "x.png is neither"),
        (["1", "-2"], "walk.gif", "-2 is neither"),
        (["1", str(2**32)], "walk.gif", f"{2**32} is not possible as a seed: from 0 to {2**32 - 1}"),
        (["1", "9" * 5000], "walk.gif", r"^9{20}\.\.\. is not possible as a seed"),
        (["1", "2"], "walk.avi", "end it in"),
    ],
)
def test_impossible_walks_are_explained(run, tmp_path, points, out, complaint):
    with pytest.raises(UserError, match=complaint):
        interpolate(run, points, out=tmp_path / out, steps=2)
    assert not list(tmp_path.iterdir())


def test_nothing_to_add_is_explained(run, tmp_path):
    with pytest.raises(UserError, match="nothing to add"):
        arithmetic(run, [], [["1"]], out=tmp_path / "sum.png")


@pytest.mark.parametrize(("plus", "minus"), [([["1"], []], []), ([["1"]], [[]])])
def test_an_empty_group_is_explained(run, tmp_path, plus, minus):
    with pytest.raises(UserError, match="a group is empty"):
        arithmetic(run, plus, minus, out=tmp_path / "sum.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("truncation", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_truncations_are_explained(run, tmp_path, truncation):
    with pytest.raises(UserError, match="--truncation"):
        interpolate(run, ["1", "2"], out=tmp_path / "walk.png", steps=2, truncation=truncation)
    with pytest.raises(UserError, match="--truncation"):
        arithmetic(run, [["1"]], [], out=tmp_path / "sum.png", truncation=truncation)
    assert not list(tmp_path.iterdir())


def test_a_walk_that_stays_too_long_for_a_gif_is_explained():
    assert Image.open(io.BytesIO(gif([Image.new("RGB", (4, 4))] * 50, 50))).info["duration"] == 59 * 50
    with pytest.raises(UserError, match=r"11 minutes at most, and this walk stays longer: give fewer --steps"):
        gif([Image.new("RGB", (4, 4))] * 13_200, 6_600)


def test_a_film_has_its_frames_size(monkeypatch):
    """ffmpeg, which is not everywhere, is told what the bytes are that it gets."""
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue", "blue")]

    def run(command, input, capture_output):
        told = dict(pairwise(command))
        assert [told[flag] for flag in ("-s", "-r", "-f")] == ["6x4", "20", "rawvideo"]
        assert command.count("rgb24") == 1 and command.index("rgb24") < command.index("-i")
        assert input == b"\xff\0\0" * 24 + b"\0\0\xff" * 48
        Path(command[-1]).write_bytes(b"film")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(interpolate_module.subprocess, "run", run)
    assert mp4(frames) == b"film"


def test_a_film_can_be_played_everywhere(monkeypatch):
    """Players know 4:2:0 alone, which ffmpeg does not make of RGB by itself, and it takes even sides."""

    def run(command, input, capture_output):
        told = dict(pairwise(command[command.index("-") + 1 :]))
        assert told["-pix_fmt"] == "yuv420p" and told["-vf"] == "pad=ceil(iw/2)*2:ceil(ih/2)*2"
        Path(command[-1]).write_bytes(b"film")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(interpolate_module.subprocess, "run", run)
    assert mp4([Image.new("RGB", (5, 4))]) == b"film"


def test_what_ffmpeg_cannot_do_is_explained(monkeypatch):
    done = subprocess.CompletedProcess([], 1, stderr=b"some words\nUnknown encoder\n")
    monkeypatch.setattr(interpolate_module.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(UserError, match=r"ffmpeg cannot write the film \(Unknown encoder\)"):
        mp4([Image.new("RGB", (4, 4))])


def test_a_film_rests_at_its_points(run, monkeypatch, tmp_path):
    counted = []
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(interpolate_module, "mp4", lambda frames: counted.append(len(frames)) or b"film")
    interpolate(run, ["1", "2"], out=tmp_path / "walk.mp4", steps=4)
    assert counted == [2 * (10 + 3)] and (tmp_path / "walk.mp4").read_bytes() == b"film"


def test_a_walk_is_between_truncated_latents(run, networks, tmp_path):
    interpolate(run, ["3", "7"], out=tmp_path / "walk.png", steps=2, truncation=0.2)
    expected = generate(networks[0], latents([7], 100, truncation=0.2))[0]
    assert (cell(tmp_path / "walk.png", 2, 0) - expected).abs().max() < 2 / 127.5


def test_points_come_in_the_order_of_their_words(run, digit_files, tmp_path, monkeypatch):
    monkeypatch.setattr(endpoints, "STEPS", 4)
    first, second = map(str, digit_files[:2])
    _, found = open_points(run, [second, "5", first, second, "6"], truncation=0.5, fit=False)
    _, one = open_points(run, [second, first], truncation=None, fit=False)
    assert torch.equal(found[[1, 4]], latents([5, 6], 100, truncation=0.5))
    assert torch.allclose(found[[0, 2, 3]], one[[0, 1, 0]], atol=1e-4)


def test_images_of_another_kind_are_points_with_fit(run, tmp_path, monkeypatch):
    monkeypatch.setattr(endpoints, "STEPS", 4)
    Image.new("RGB", (30, 20), "red").save(tmp_path / "photo.png")
    photo = str(tmp_path / "photo.png")
    with pytest.raises(UserError, match="--fit"):
        interpolate(run, ["1", photo], out=tmp_path / "walk.png", steps=2)
    interpolate(run, ["1", photo], out=tmp_path / "walk.png", steps=2, fit=True)
    with pytest.raises(UserError, match="--fit"):
        arithmetic(run, [["1", photo]], [], out=tmp_path / "sum.png")
    arithmetic(run, [["1", photo]], [], out=tmp_path / "sum.png", fit=True)


def test_a_sum_says_what_is_where(run, networks, tmp_path, monkeypatch):
    """Members and under them the picture of their mean; the result among eight others that are near it."""
    said, drawn = [], []

    def spy_on_sheet(rows, headings):
        said.append(headings)
        return sheet(rows, headings)

    def spy_on_generate(generator, latent):
        drawn.append(latent)
        return generate(generator, latent)

    monkeypatch.setattr(arithmetic_module, "sheet", spy_on_sheet)
    monkeypatch.setattr(arithmetic_module, "generate", spy_on_generate)
    arithmetic(run, [["1", "2"], ["5"]], [["7"]], out=tmp_path / "sum.png")
    assert said == [["plus", "plus", "minus", "", "result, framed, and near it"]]
    z = latents([1, 2, 5, 7], 100)
    for place, latent in (((0, 1), z[1]), ((0, 3), z[:2].mean(0)), ((1, 3), z[2]), ((2, 0), z[3])):
        expected = generate(networks[0], latent[None])[0]
        assert (cell(tmp_path / "sum.png", *place, top=HEADING) - expected).abs().max() < 2 / 127.5
    away = (drawn[0] - (z[:2].mean(0) + z[2] - z[3])).abs().amax(1)
    assert away[4] < 1e-6
    assert all(0.2 < each <= 0.25 + 1e-6 for i, each in enumerate(away.tolist()) if i != 4)
    assert len(drawn[0].unique(dim=0)) == 9


def test_the_same_sum_is_the_same_picture(run, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(arithmetic_module, "sheet", lambda rows, _: drawn.append(rows) or Image.new("L", (500, 500)))
    for seed in (1, 2):
        torch.manual_seed(seed)
        arithmetic(run, [["1"]], [], out=tmp_path / "sum.png")
    first, again = ([image for row in rows for image in row if image is not None] for rows in drawn)
    assert torch.equal(torch.stack(first), torch.stack(again))


def test_an_impossible_out_is_said_before_images_are_inverted(run, digit_files, tmp_path, monkeypatch):
    monkeypatch.setattr(endpoints, "nearest_latents", lambda *_, **__: pytest.fail("inverted"))
    words = [str(digit_files[0]), "2"]
    with pytest.raises(UserError, match=r"end it in \.gif or"):
        interpolate(run, words, out=tmp_path / "walk.avi", steps=2)
    (tmp_path / "sum.png").mkdir()
    with pytest.raises(UserError, match="is a folder already"):
        arithmetic(run, [words], [], out=tmp_path / "sum.png")
