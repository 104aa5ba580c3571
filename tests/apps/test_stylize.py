"""`stylize`: nearer to the domain's statistics than the photograph, nearer to the photograph than the domain is."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fastdcgan.apps import stylize as stylize_module
from fastdcgan.apps.features import activations
from fastdcgan.apps.pictures import open_picture, save, to_picture
from fastdcgan.apps.stylize import beyond_seam, canvas_size, cut_out, quilt, recoloured, redraw, stylize
from fastdcgan.errors import UserError
from fastdcgan.models import Generator


def photograph(height: int, width: int) -> Tensor:
    """A bright disc on a slope of grey, with grain: (1, height, width) in -1..1."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    image = 0.8 * y - 0.2 + 1.2 * ((x**2 + y**2) < 0.3)
    grain = torch.randn(height, width, generator=torch.Generator().manual_seed(0))
    return (image + 0.15 * grain).clamp(-1, 1)[None]


def gram(features: Tensor) -> Tensor:
    """Covariance of the channels over all places and images: (C, C)."""
    return features.transpose(0, 1).flatten(1).cov()


def test_what_is_transparent_lies_on_white_in_a_jpeg(tmp_path):
    """At strength 0 the photograph comes back, here one of nothing."""
    generator = Generator(8, channels=4, latent_dim=5, width=4)
    torch.save(generator.state_dict(), tmp_path / "netG.pth")
    Image.new("RGBA", (16, 16)).save(tmp_path / "nothing.png")
    stylize(tmp_path / "netG.pth", tmp_path / "nothing.png", out=tmp_path / "out.jpg", strength=0.0, tiles=2)
    with Image.open(tmp_path / "out.jpg") as picture:
        assert picture.getextrema() == ((255, 255),) * 3


def test_what_is_transparent_lies_on_white_in_a_jpeg_of_any_suffix(tmp_path):
    torch.save(Generator(8, channels=4, latent_dim=5, width=4).state_dict(), tmp_path / "netG.pth")
    Image.new("RGBA", (16, 16)).save(tmp_path / "nothing.png")
    for name in ("out.jpeg", "out.JPG"):
        stylize(tmp_path / "netG.pth", tmp_path / "nothing.png", out=tmp_path / name, strength=0, tiles=1)
        assert Image.open(tmp_path / name).getextrema() == ((255, 255),) * 3


def test_style_moves_to_the_domain_and_content_stays(networks, digits):
    generator, discriminator = networks
    photo = photograph(96, 96)
    drawn = redraw(generator, photo, tiles=6)

    def style(images: Tensor) -> list[Tensor]:
        return [gram(each) for each in activations(discriminator, images)]

    def windows_of(image: Tensor) -> Tensor:
        return F.unfold(image[None], 16, stride=4)[0].T.reshape(-1, 1, 16, 16)

    domain = style(digits)

    def distance(image: Tensor) -> list[float]:
        found = style(windows_of(image))
        return [((a - b).norm() / b.norm()).item() for a, b in zip(found, domain, strict=True)]

    before, after = distance(photo), distance(drawn)
    print("style distance before", before, "after", after)
    assert sum(after) < 0.92 * sum(before) and after[-1] < 0.88 * before[-1]

    def blurred(image: Tensor) -> Tensor:
        return F.avg_pool2d(image, 4)

    content = (blurred(drawn) - blurred(photo)).square().mean()
    page = digits[:36].reshape(6, 6, 16, 16).permute(0, 2, 1, 3).reshape(1, 96, 96)
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


def test_the_canvas_keeps_proportions():
    assert canvas_size((300, 400), (64, 64), 3) == (192, 256)
    assert canvas_size((10, 1000), (16, 16), 1) == (16, 1600)
    assert canvas_size((100, 90), (64, 96), 2) == (213, 192)


def test_a_generator_alone_is_enough(run, digit_files, tmp_path):
    (weights,) = run.glob("checkpoints/step-000400/average.safetensors")
    stylize(weights, digit_files[0], out=tmp_path / "out.png", tiles=1)
    assert open_picture(tmp_path / "out.png").size == (16, 16)


def test_colours_become_the_samples():
    random = torch.Generator().manual_seed(0)
    mixed = torch.randn(3, 3, generator=random)
    image = 0.2 * torch.randn(3, 40, 50, generator=random)
    samples = torch.einsum("cd,ndhw->nchw", 0.1 * mixed, torch.randn(9, 3, 20, 20, generator=random)) + 0.1
    found, wanted = recoloured(image, samples).flatten(1), samples.transpose(0, 1).flatten(1)
    assert torch.allclose(found.mean(1), wanted.mean(1), atol=0.01)
    assert torch.allclose(found.cov(), wanted.cov(), atol=0.003)
    within = samples[:1].clamp(-1, 1)
    assert (recoloured(within[0], within) - within[0]).abs().max() < 0.01  # what has them already stays
    assert torch.isfinite(recoloured(torch.full((3, 8, 8), 0.5), samples)).all()


@pytest.mark.parametrize("size", [(8, 20), (20, 8)])
def test_pieces_are_cut_from_anywhere_in_oblong_pictures(size):
    samples = torch.arange(2 * size[0] * size[1]).float().view(2, 1, *size)
    pieces = cut_out(samples, 4, torch.Generator().manual_seed(0))
    corners = pieces[:, 0, 0, 0].long() % (size[0] * size[1])
    y, x = corners // size[1], corners % size[1]
    assert (y.min(), y.max(), x.min(), x.max()) == (0, size[0] - 4, 0, size[1] - 4)
    assert (pieces[:, 0, 3, 3] - pieces[:, 0, 0, 0] == 3 * size[1] + 3).all()


def test_the_seam_takes_the_cheapest_way():
    cost = torch.ones(4, 5)
    for row, column in enumerate((1, 2, 2, 3)):
        cost[row, column] = 0
    assert beyond_seam(cost).int().argmax(1).tolist() == [1, 2, 2, 3]
    assert beyond_seam(cost)[0].tolist() == [False, True, True, True, True]


@pytest.mark.parametrize("downwards", [True, False])
def test_a_piece_is_cut_from_its_neighbour_along_the_seam(downwards):
    """Above it as well as to the left."""
    random = torch.Generator().manual_seed(0)
    pieces = torch.randn(20, 1, 8, 8, generator=random)  # which overlap by 2
    quilted = quilt(torch.zeros(1, 14, 8) if downwards else torch.zeros(1, 8, 14), pieces, random)
    if not downwards:
        quilted, pieces = quilted.mT, pieces.mT
    (first,) = (piece for piece in pieces if torch.equal(piece[:, :6], quilted[:, :6]))
    (second,) = (piece for piece in pieces if torch.equal(piece[:, 2:], quilted[:, 8:]))
    new = beyond_seam((second[:, :2] - first[:, 6:]).square().sum(0).T).T
    assert 0 < new.sum() < new.numel()
    assert torch.equal(quilted[:, 6:8], torch.where(new, second[:, :2], first[:, 6:]))


def test_a_quilt_of_pieces_of_the_image_is_the_image():
    """Every piece the quilt needs is there, so each is chosen and no seam shows."""
    image = torch.rand(3, 22, 31, generator=torch.Generator().manual_seed(0)) * 2 - 1  # 22 = 2 + 5 * 4, 31 > 2 + 7 * 4
    padded = F.pad(image[None], (0, 3, 0, 0), mode="replicate")[0]
    pieces = padded.unfold(1, 6, 1).unfold(2, 6, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, 6, 6)
    lines: list[int] = []
    quilted = quilt(image, pieces, torch.Generator().manual_seed(0), lines.append)
    assert torch.equal(quilted, image)
    assert len(lines) == 5 and sum(lines) == 22


def test_flat_areas_do_not_repeat_one_piece():
    random = torch.Generator().manual_seed(0)
    pieces = 0.05 * torch.randn(500, 1, 8, 8, generator=random)
    quilted = quilt(torch.zeros(1, 50, 50), pieces, random)
    blocks = quilted.unfold(1, 4, 6).unfold(2, 4, 6).reshape(-1, 16)
    assert len(blocks.unique(dim=0)) > 0.5 * len(blocks)


@pytest.mark.parametrize(
    "setting", [{"strength": 1.5}, {"strength": float("nan")}, {"tiles": 0}, {"seed": -1}, {"seed": 2**32 - 191}]
)
def test_impossible_settings_are_explained(run, digit_files, tmp_path, setting):
    with pytest.raises(UserError, match="--" + next(iter(setting))):
        stylize(run, digit_files[0], out=tmp_path / "new" / "out.png", **setting)
    assert not (tmp_path / "new").exists()


def test_tiles_and_seed_change_what_is_drawn(run, tmp_path):
    save(to_picture(photograph(32, 48)), tmp_path / "photo.png")

    def drawn(**setting):
        stylize(run, tmp_path / "photo.png", out=tmp_path / "out.png", **{"tiles": 2, "strength": 1.0} | setting)
        return open_picture(tmp_path / "out.png").tobytes()

    plain = drawn()
    assert drawn() == plain and len({plain, drawn(seed=1), drawn(tiles=3), drawn(strength=0.9)}) == 4


def test_the_result_of_a_large_photo_has_its_proportions(run, tmp_path, monkeypatch):
    monkeypatch.setattr(stylize_module, "LONGEST_RESULT", 48)
    save(to_picture(photograph(40, 64)), tmp_path / "photo.png")
    stylize(run, tmp_path / "photo.png", out=tmp_path / "out.png", tiles=1)
    assert open_picture(tmp_path / "out.png").size == (48, 30)


def test_an_oblong_photo_is_drawn_on_an_oblong_canvas(tmp_path, monkeypatch):
    """And the limit of what is drawn is that of the canvas that is used."""
    torch.save(Generator((8, 12), channels=1, latent_dim=5, width=4).state_dict(), tmp_path / "netG.pth")
    Image.new("L", (60, 20), 99).save(tmp_path / "wide.png")
    total = []

    def redraw(generator, image, *, tiles, seed, advance):
        total.append(stylize_module.canvas_size(tuple(image.shape[1:]), generator.image_size, tiles))
        return image

    asked = []
    as_ever = stylize_module.progress
    monkeypatch.setattr(stylize_module, "redraw", redraw)
    monkeypatch.setattr(
        stylize_module, "progress", lambda what, count, unit: asked.append(count) or as_ever(what, count, unit)
    )
    stylize(tmp_path / "netG.pth", tmp_path / "wide.png", out=tmp_path / "out.png", tiles=2)
    assert asked == [total[0][0]] == [16]


def test_a_photo_too_narrow_for_its_tiles_is_explained(run, tmp_path, monkeypatch):
    monkeypatch.setattr(stylize_module, "LONGEST", 64)
    save(to_picture(photograph(8, 40)), tmp_path / "narrow.png")
    with pytest.raises(UserError, match=r"narrow\.png is too narrow for --tiles 2"):
        stylize(run, tmp_path / "narrow.png", out=tmp_path / "out.png", tiles=2)


def test_a_large_photo_is_made_smaller_by_means(networks, monkeypatch):
    """Fine lines become grey, not what of them lies where the smaller picture's pixels are."""
    seen = []
    monkeypatch.setattr(stylize_module, "recoloured", lambda image, samples: seen.append(image) or image)
    redraw(networks[0], torch.tensor([-1.0, 1.0, 1.0, -1.0]).repeat(16).expand(1, 64, 64), tiles=1)
    assert seen[0].shape == (1, 16, 16) and seen[0].abs().max() < 0.5


def test_pieces_are_three_eighths_of_the_shorter_side(monkeypatch):
    """Of an oblong generator's pictures: larger ones would hardly differ from one another."""
    sides = []

    def cut(samples, side, random):
        sides.append(side)
        return cut_out(samples, side, random)

    monkeypatch.setattr(stylize_module, "cut_out", cut)
    for size in ((16, 28), (28, 16), (32, 32)):
        image = photograph(size[0] * 2, size[1] * 2)
        redraw(Generator(size, channels=1, latent_dim=5, width=4).eval(), image, tiles=1)
    assert sides == [6, 6, 12]
