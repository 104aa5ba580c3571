"""`inpaint`: what it fills in is nearer to the truth than a plain colour, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from fastdcgan.apps import inpaint as inpaint_module
from fastdcgan.apps.inpaint import (
    PRIOR,
    box_mask,
    context_weight,
    inpaint,
    inpaint_images,
    poisson,
    random_mask,
    read_mask,
)
from fastdcgan.apps.latent import Inversion
from fastdcgan.apps.pictures import open_picture, sheet, to_tensor
from fastdcgan.errors import UserError


@pytest.mark.parametrize("kind", ["box", "random"])
def test_it_beats_the_mean_in_the_hole_over_32_images(networks, digits, kind):
    truth = digits[:32]
    if kind == "box":
        hole = box_mask((4, 4, 8, 8), truth.shape[-2:]).expand(32, 16, 16)
    else:
        hole = random_mask(0.5, 32, (16, 16), seed=1)
    completed = inpaint(*networks, truth.masked_fill(hole[:, None], float("nan")), hole, restarts=4, steps=160)
    inside, outside = hole[:, None], ~hole[:, None]
    mean = (truth * outside).sum((1, 2, 3)) / outside.sum((1, 2, 3))
    error = (completed - truth)[inside].square().mean()
    plain = (mean[:, None, None, None] - truth)[inside].square().mean()
    print(f"{kind}: mean squared error {error:.3f}, of the mean colour {plain:.3f}")
    assert error < 0.8 * plain
    assert torch.equal(completed[outside], truth[outside])


def test_poisson_blending_takes_an_offset_away():
    """A source that is the target plus a constant blends into the target itself, whatever the hole's shape."""
    random = torch.Generator().manual_seed(0)
    target = torch.rand(3, 20, 24, generator=random) - 0.5
    holes = {
        "box": box_mask((5, 6, 9, 8), (20, 24)),
        "at the edge": box_mask((0, 0, 12, 20), (20, 24)),
        "one pixel": box_mask((3, 3, 1, 1), (20, 24)),
        "scattered": torch.rand(20, 24, generator=random) < 0.7,
    }
    for name, hole in holes.items():
        blended = poisson(target + 0.3, target.masked_fill(hole, 0.9), hole)
        assert torch.allclose(blended, target, atol=1e-5), name


def test_context_weight_is_the_missing_share_of_the_window():
    hole = torch.zeros(1, 21, 21, dtype=torch.bool)
    hole[0, 10, 10] = True
    weight = context_weight(hole)[0]
    assert weight[10, 10] == 0 and weight[10, 14] == 0
    assert weight[10, 13] == pytest.approx(1 / 49) and weight[9, 9] == pytest.approx(1 / 49)


def test_context_weight_at_an_edge_counts_the_pixels_there_are():
    hole = torch.zeros(1, 21, 21, dtype=torch.bool)
    hole[0, 0, 0] = True
    assert context_weight(hole)[0, 0, 1] == pytest.approx(1 / (4 * 5))


def test_outputs_and_a_mask_from_a_file(run, digit_files, tmp_path):
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (4, 4, 12, 10))
    mask.save(tmp_path / "mask.png")
    inpaint_images(run, digit_files, mask=tmp_path / "mask.png", out=tmp_path / "out", restarts=2, steps=20)
    assert Image.open(tmp_path / "out" / "sheet.png").size == (3 * 96 + 4, 20 + 4 * 96 + 6)
    before, after = (to_tensor(open_picture(p)) for p in (digit_files[3], tmp_path / "out" / "digit3.png"))
    changed = (before != after)[0]
    assert changed[4:10, 4:12].any()
    changed[4:10, 4:12] = False
    assert not changed.any()


def hole_file(path, size, colour):
    Image.new("L", size, colour).save(path)
    return path


def test_impossible_holes_are_explained_and_nothing_is_written(run, digit_files, tmp_path):
    impossible = [
        ({}, "give one of --mask"),
        ({"box": (1, 1, 4, 4), "random_fraction": 0.5}, "give one of --mask"),
        ({"mask": hole_file(tmp_path / "small.png", (8, 8), 255)}, "8x8"),
        ({"mask": hole_file(tmp_path / "black.png", (16, 16), 0)}, "marks no pixel to fill: white is filled"),
        ({"mask": hole_file(tmp_path / "white.png", (16, 16), 255)}, "whole picture"),
        ({"mask": tmp_path / "absent.png"}, "does not exist"),
        ({"box": (10, 10, 8, 4)}, "not inside"),
        ({"box": (0, 0, 16, 16)}, "whole picture"),
        ({"random_fraction": 1.0}, "--random-fraction"),
    ]
    for hole, complaint in impossible:
        with pytest.raises(UserError, match="(?i)" + complaint):
            inpaint_images(run, digit_files, out=tmp_path / "out", **hole)
    assert not (tmp_path / "out").exists()


def test_a_mask_has_the_size_of_every_image(run, digit_files, tmp_path):
    Image.new("L", (20, 16), 128).save(tmp_path / "wide.png")
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (4, 4, 8, 8))
    mask.save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=r"mask\.png is 16x16, and .*wide\.png is 20x16"):
        images = [digit_files[0], tmp_path / "wide.png"]
        inpaint_images(run, images, mask=tmp_path / "mask.png", out=tmp_path / "out", fit=True, restarts=1, steps=4)


def test_images_of_another_kind_are_explained_and_fitted_on_demand(run, tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "photo.png")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "colour.png")
    (tmp_path / "text.png").write_text("not a picture")
    for name, complaint in (("photo", "30x20.*16x16.*--fit"), ("colour", "colour.*--fit"), ("text", "not a picture")):
        with pytest.raises(UserError, match=complaint):
            inpaint_images(run, [tmp_path / f"{name}.png"], box=(2, 2, 4, 4), out=tmp_path / "out")
    inpaint_images(run, [tmp_path / "photo.png"], box=(2, 2, 4, 4), out=tmp_path / "out", fit=True, restarts=1, steps=4)
    assert open_picture(tmp_path / "out" / "photo.png").size == (16, 16)


def test_a_box_is_x_y_width_height():
    hole = box_mask((3, 1, 4, 2), (6, 9))
    assert hole.shape == (6, 9) and hole.sum() == 8 and hole[1:3, 3:7].all()


@pytest.mark.parametrize("box", [(-1, 0, 3, 3), (0, -4, 3, 2), (7, 0, 3, 3), (0, 4, 3, 3), (1, 1, 0, 2), (1, 1, 2, 0)])
def test_a_box_lies_inside_the_picture(box):
    with pytest.raises(UserError, match="is not inside the picture, which is 9x6"):
        box_mask(box, (6, 9))


def test_a_share_is_of_the_pixels_and_of_each_image():
    hole = random_mask(0.2, 3, (40, 40), seed=0)
    assert hole.float().mean().item() == pytest.approx(0.2, abs=0.03)
    assert not torch.equal(hole[0], hole[1]) and not torch.equal(hole[1], hole[2])


def test_a_mask_is_white_where_the_hole_is_whatever_its_kind(tmp_path):
    Image.new("L", (8, 6), 50).save(tmp_path / "image.png")
    grey, clear = Image.new("L", (8, 6), 60), Image.new("RGBA", (8, 6), (255, 255, 255, 0))
    for name, mask in (("grey", grey), ("clear", clear)):
        mask.paste("white", (1, 2, 5, 6))
        mask.save(tmp_path / f"{name}.png")
        hole = read_mask(tmp_path / f"{name}.png", tmp_path / "image.png", (6, 8), fit=False)
        assert hole.sum() == 16 and hole[2:6, 1:5].all(), name
    fitted = read_mask(tmp_path / "grey.png", tmp_path / "image.png", (3, 3), fit=True)  # of 8x6 the middle 6x6
    assert fitted.tolist() == [[False] * 3, [True, True, False], [True, True, False]]


def test_a_mask_is_fitted_to_an_oblong_picture(tmp_path):
    mask = Image.new("L", (24, 12), 0)
    mask.paste(255, (12, 0, 24, 12))
    mask.save(tmp_path / "mask.png")
    hole = read_mask(tmp_path / "mask.png", tmp_path / "mask.png", (4, 8), fit=True)
    assert hole.tolist() == [[False] * 4 + [True] * 4] * 4


def test_the_sheet_shows_what_was_taken_out(run, digit_files, digits, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(inpaint_module, "sheet", lambda rows, names: shown.append((rows, names)) or sheet(rows, names))
    inpaint_images(run, digit_files[:1], box=(4, 2, 8, 10), out=tmp_path / "out", restarts=1, steps=4)
    ((((original, masked, completed),), names),) = shown
    hole = box_mask((4, 2, 8, 10), (16, 16))[None]
    assert names == ["original", "masked", "completed"]
    assert (original - digits[0]).abs().max() < 1e-6
    assert (masked[hole] == 0).all() and torch.equal(masked[~hole], original[~hole])
    assert torch.equal(completed[~hole], original[~hole]) and not torch.equal(completed[hole], masked[hole])


def test_blending_and_the_seed_can_be_chosen(run, digit_files, tmp_path, monkeypatch):
    blended, holes = [], []

    def spy(*arguments, blend, **others):
        assert (others["restarts"], others["steps"], others["seed"]) == (1, 4, len(blended) // 2 + 1)
        blended.append(blend)
        holes.append(arguments[3])
        return inpaint(*arguments, blend=blend, **others)

    monkeypatch.setattr(inpaint_module, "inpaint", spy)
    for i, (blend, seed) in enumerate(((True, 1), (False, 1), (False, 2))):
        where = {"random_fraction": 0.5, "out": tmp_path / str(i), "restarts": 1, "steps": 4}
        inpaint_images(run, digit_files[:1], blend=blend, seed=seed, **where)
    assert blended == [True, False, False]
    assert torch.equal(holes[0], holes[1]) and not torch.equal(holes[1], holes[2])
    pictures = [(tmp_path / str(i) / "digit0.png").read_bytes() for i in range(3)]
    assert len(set(pictures)) == 3


def test_the_search_is_for_what_fits_the_surroundings(networks, digits, monkeypatch):
    """By the mean weighed difference, whatever the number of channels, as the prior's weight is relative to it; with
    the settings that were asked for."""
    asked = []

    def found(generator, discriminator, loss, count, **settings):
        asked.append((loss(pictures[:, : target.shape[1]], torch.tensor([0, 1])), count, settings))
        return Inversion(torch.zeros(2, 100), pictures[:, : target.shape[1]], torch.zeros(2))

    monkeypatch.setattr(inpaint_module, "invert", found)
    hole = box_mask((4, 2, 8, 10), (16, 16)).expand(2, 16, 16)
    weight = context_weight(hole)[:, None]
    pictures = digits[2:4].expand(-1, 3, -1, -1)
    for channels in (1, 3):
        target = digits[:2].expand(-1, channels, -1, -1)
        inpaint(*networks, target, hole, restarts=2, steps=5, seed=3, blend=False)
    expected = (weight * (digits[2:4] - digits[:2]).abs()).flatten(1).sum(1) / weight.flatten(1).sum(1)
    for loss, count, settings in asked:
        assert torch.allclose(loss, expected, atol=1e-6) and count == 2
        assert settings.items() >= {"restarts": 2, "steps": 5, "seed": 3, "prior": PRIOR}.items()
