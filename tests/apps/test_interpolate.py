"""`interpolate` and `arithmetic`: the pictures between, and the picture of a sum."""

from __future__ import annotations

import shutil

import pytest
import torch
from PIL import Image

from fastdcgan.apps.arithmetic import arithmetic, combine
from fastdcgan.apps.interpolate import interpolate
from fastdcgan.apps.latent import generate, latents
from fastdcgan.apps.pictures import HEADING, open_picture, to_tensor
from fastdcgan.apps.sample import sample
from fastdcgan.errors import UserError

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


@pytest.mark.parametrize(
    ("points", "out", "complaint"),
    [
        (["1"], "walk.gif", "at least two"),
        (["1", "x.png"], "walk.gif", "x.png is neither"),
        (["1", "-2"], "walk.gif", "-2 is neither"),
        (["1", str(2**64)], "walk.gif", "seed"),
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


@pytest.mark.parametrize("truncation", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_truncations_are_explained(run, tmp_path, truncation):
    with pytest.raises(UserError, match="--truncation"):
        interpolate(run, ["1", "2"], out=tmp_path / "walk.png", steps=2, truncation=truncation)
    with pytest.raises(UserError, match="--truncation"):
        arithmetic(run, [["1"]], [], out=tmp_path / "sum.png", truncation=truncation)
    assert not list(tmp_path.iterdir())
