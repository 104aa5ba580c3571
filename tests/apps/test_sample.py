"""`sample`: the right pictures, of the right size, each from its own seed."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image

from fastdcgan.apps import sample as sample_module
from fastdcgan.apps.latent import generate, latents
from fastdcgan.apps.pictures import open_picture, to_tensor
from fastdcgan.apps.sample import sample
from fastdcgan.errors import LAST_SEED, UserError


def test_a_grid_has_room_for_every_picture(run, tmp_path):
    sample(run, out=tmp_path / "grid.png", count=10)
    assert Image.open(tmp_path / "grid.png").size == (3 * 18 + 2, 4 * 18 + 2)


def test_a_grid_may_have_a_suffix_in_capitals(run, tmp_path):
    sample(run, out=tmp_path / "GRID.PNG", count=4)
    assert Image.open(tmp_path / "GRID.PNG").size == (2 * 18 + 2, 2 * 18 + 2)


def test_a_folder_has_one_picture_a_seed_across_batches(run, tmp_path):
    sample(run, out=tmp_path / "many", count=70, seed=5)
    sample(run, out=tmp_path / "one", count=1, seed=74)
    assert sorted(p.name for p in (tmp_path / "many").iterdir()) == [f"seed-{i:06d}.png" for i in range(5, 75)]
    many, one = (to_tensor(open_picture(tmp_path / folder / "seed-000074.png")) for folder in ("many", "one"))
    assert (many - one).abs().max() <= 2 / 127.5  # a matrix product rounds otherwise in another batch


def test_a_last_seed_that_is_not_possible_is_said_before_anything_is_written(run, tmp_path):
    with pytest.raises(UserError, match=f"--count 70 is too large: from --seed {LAST_SEED - 66} on there are 67 seeds"):
        sample(run, out=tmp_path / "many", count=70, seed=LAST_SEED - 66)
    assert not (tmp_path / "many").exists()


def test_no_two_seeds_are_of_one_picture():
    assert not torch.equal(latents([LAST_SEED], 100), latents([LAST_SEED - 2**31], 100))
    assert torch.equal(
        torch.randn(9, generator=torch.Generator().manual_seed(LAST_SEED + 1)),
        torch.randn(9, generator=torch.Generator().manual_seed(0)),
    ), "PyTorch takes more bits now: so can LAST_SEED"


def test_the_average_is_not_the_latest_weights(run, tmp_path):
    sample(run, out=tmp_path / "average.png", count=4)
    sample(run, out=tmp_path / "latest.png", count=4, ema=False)
    assert (tmp_path / "average.png").read_bytes() != (tmp_path / "latest.png").read_bytes()


def test_truncated_latents_keep_their_order_within_the_bounds():
    free, cut = latents(range(200), 20), latents(range(200), 20, truncation=0.7)
    assert cut.abs().max() < 0.7 < free.abs().max()
    assert torch.equal(free[:, 0].argsort(), cut[:, 0].argsort())
    # the variance of a normal distribution cut at +-a is 1 - 2 a phi(a) / (2 Phi(a) - 1)
    density, inside = math.exp(-(0.7**2) / 2) / math.sqrt(2 * math.pi), math.erf(0.7 / math.sqrt(2))
    assert cut.var() == pytest.approx(1 - 2 * 0.7 * density / inside, rel=0.05)
    assert torch.allclose(latents(range(5), 20, truncation=8.0), latents(range(5), 20), atol=1e-5)


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ({"count": 0}, "--count"),
        ({"count": 10**21}, "--count 1000000000000000000000 is too large"),
        ({"seed": -1}, "--seed"),
        ({"seed": 2**32}, f"--seed {2**32} is not possible: from 0 to {2**32 - 1}"),
        ({"truncation": 0.0}, "--truncation"),
        ({"out": "grid.jpg"}, "end it in .png"),
    ],
)
def test_impossible_settings_are_named_and_nothing_is_written(run, tmp_path, setting, complaint):
    with pytest.raises(UserError, match=complaint):
        sample(run, **setting | {"out": tmp_path / "new" / setting.get("out", "grid.png")})
    assert not (tmp_path / "new").exists()


def test_a_grid_that_cannot_be_written_is_a_line(run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sample_module, "save_grid", full)
    with pytest.raises(UserError, match=r"grid\.png cannot be written: No space left on device"):
        sample(run, out=tmp_path / "grid.png", count=1)


def test_pictures_are_drawn_from_truncated_latents(run, networks, tmp_path):
    sample(run, out=tmp_path / "out", count=1, seed=3, truncation=0.2)
    expected = generate(networks[0], latents([3], 100, truncation=0.2))[0]
    assert (to_tensor(open_picture(tmp_path / "out" / "seed-000003.png")) - expected).abs().max() < 2 / 127.5
