"""`stylize`: nearer to the domain's statistics than the photograph, nearer to the photograph than the domain is."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fastdcgan.apps.features import activations
from fastdcgan.apps.pictures import open_picture, save, to_picture
from fastdcgan.apps.stylize import canvas_size, redraw, stylize
from fastdcgan.errors import UserError


def photograph(height: int, width: int) -> Tensor:
    """A bright disc on a slope of grey, with grain: (1, height, width) in -1..1."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    image = 0.8 * y - 0.2 + 1.2 * ((x**2 + y**2) < 0.3)
    grain = torch.randn(height, width, generator=torch.Generator().manual_seed(0))
    return (image + 0.15 * grain).clamp(-1, 1)[None]


def gram(features: Tensor) -> Tensor:
    """Covariance of the channels over all places and images: (C, C)."""
    return features.transpose(0, 1).flatten(1).cov()


def test_style_moves_to_the_domain_and_content_stays(networks, digits):
    generator, discriminator = networks
    photo = photograph(48, 48)
    drawn = redraw(generator, discriminator, photo, tiles=3)

    def style(images: Tensor) -> list[Tensor]:
        return [gram(each) for each in activations(discriminator, images)]

    def tiles_of(image: Tensor) -> Tensor:
        return F.unfold(image[None], 16, stride=16)[0].T.reshape(-1, 1, 16, 16)

    domain = style(digits)

    def distance(image: Tensor) -> list[float]:
        found = style(tiles_of(image))
        return [((a - b).norm() / b.norm()).item() for a, b in zip(found, domain, strict=True)]

    before, after = distance(photo), distance(drawn)
    print("style distance before", before, "after", after)
    assert sum(after) < sum(before) and after[-1] < 0.8 * before[-1]

    def blurred(image: Tensor) -> Tensor:
        return F.avg_pool2d(image, 4)

    content = (blurred(drawn) - blurred(photo)).square().mean()
    page = digits[:9].reshape(3, 3, 16, 16).permute(0, 2, 1, 3).reshape(1, 48, 48)
    random = (blurred(page) - blurred(photo)).square().mean()
    print("content distance", content, "of a random page of the domain", random)
    assert content < 0.5 * random


def test_any_size_and_strength(run, tmp_path):
    photo = photograph(37, 71)
    save(to_picture(photo), tmp_path / "photo.png")
    stylize(run, tmp_path / "photo.png", out=tmp_path / "none.png", strength=0.0, tiles=2)
    assert open_picture(tmp_path / "none.png").tobytes() == open_picture(tmp_path / "photo.png").tobytes()
    stylize(run, tmp_path / "photo.png", out=tmp_path / "all.png", strength=1.0, tiles=2)
    assert open_picture(tmp_path / "all.png").size == (71, 37)
    Image.new("RGB", (40, 30), "teal").save(tmp_path / "colour.jpg")
    stylize(run, tmp_path / "colour.jpg", out=tmp_path / "out.jpg", tiles=1)
    assert open_picture(tmp_path / "out.jpg").size == (40, 30)


def test_the_canvas_keeps_proportions_in_half_tiles():
    assert canvas_size((300, 400), (64, 64), 3) == (192, 256)
    assert canvas_size((10, 1000), (16, 16), 1) == (16, 1600)
    height, width = canvas_size((100, 90), (64, 96), 2)
    assert height % 32 == 0 and width % 48 == 0


@pytest.mark.parametrize("setting", [{"strength": 1.5}, {"strength": float("nan")}, {"tiles": 0}, {"seed": -1}])
def test_impossible_settings_are_explained(run, digit_files, tmp_path, setting):
    with pytest.raises(UserError, match="--" + next(iter(setting))):
        stylize(run, digit_files[0], out=tmp_path / "new" / "out.png", **setting)
    assert not (tmp_path / "new").exists()
