"""`invert`: finds the latent of a picture that the generator made, and walks stay on the sphere."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastdcgan.apps import invert as invert_module
from fastdcgan.apps.features import activations
from fastdcgan.apps.invert import PRIOR, invert_images, nearest_latents, rms
from fastdcgan.apps.latent import generate, invert, latents, slerp, walk
from fastdcgan.apps.pictures import open_picture, sheet, to_tensor
from fastdcgan.errors import UserError


def test_generated_pictures_are_recovered(networks):
    generator, discriminator = networks
    pictures = generate(generator, latents(range(1000, 1008), 100))
    found = nearest_latents(generator, discriminator, pictures)
    errors = [rms(a, b) for a, b in zip(found.pictures, pictures, strict=True)]
    nearest_of_64 = [
        min(rms(other, picture) for other in generate(generator, latents(range(64), 100))) for picture in pictures
    ]
    print("errors", errors, "of the nearest of 64 random pictures", nearest_of_64)
    assert max(errors) < 12  # of 255
    assert all(error < other / 3 for error, other in zip(errors, nearest_of_64, strict=True))


def test_the_feature_loss_brings_features_nearer(networks, digits):
    from fastdcgan.apps.features import activations

    generator, discriminator = networks
    goal = activations(discriminator, digits[:8])[-1]

    def distance(weight: float) -> float:
        found = nearest_latents(generator, discriminator, digits[:8], restarts=2, steps=100, feature_weight=weight)
        return (activations(discriminator, found.pictures)[-1] - goal).square().mean().item()

    assert distance(1.0) < distance(0.0)


def test_features_weigh_relative_to_their_size(networks, digits):
    """Each stage by its own mean square, so that a weight means the same for any discriminator."""
    found = nearest_latents(*networks, digits[:2], restarts=1, steps=4, feature_weight=0.5)
    pixels = (found.pictures - digits[:2]).square().flatten(1).mean(1)
    goals, got = (activations(networks[1], images) for images in (digits[:2], found.pictures))
    features = [(a - b).square().flatten(1).mean(1) / b.square().mean() for a, b in zip(got, goals, strict=True)]
    prior = torch.nn.functional.softplus(-networks[1](found.pictures)) + found.latent.square().mean(1) / 2
    expected = pixels + 0.5 * torch.stack(features).mean(0) + PRIOR * prior
    assert torch.allclose(found.loss, expected, rtol=1e-3)


def test_pictures_are_saved_where_nothing_can_be_printed(run, digit_files, tmp_path, monkeypatch, full):
    monkeypatch.setattr("sys.stdout", full)
    with pytest.raises(OSError, match="No space left"):
        invert_images(run, digit_files[:2], out=tmp_path / "out", restarts=1, steps=4)
    names = {"digit0.png", "digit1.png", "digit0.safetensors", "digit1.safetensors", "sheet.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_outputs_belong_together(run, networks, digit_files, tmp_path, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(invert_module, "sheet", lambda rows, names: shown.append((rows, names)) or sheet(rows, names))
    invert_images(run, digit_files, out=tmp_path / "out", restarts=2, steps=40)
    assert Image.open(tmp_path / "out" / "sheet.png").size == (2 * 96 + 2, 20 + 4 * 96 + 6)
    latent = load_file(tmp_path / "out" / "digit2.safetensors")["latent"]
    drawn = generate(networks[0], latent[None])[0]
    written = to_tensor(open_picture(tmp_path / "out" / "digit2.png"))
    assert (drawn - written).abs().max() < 2 / 127.5
    ((rows, names),) = shown
    digit = to_tensor(open_picture(digit_files[2]))
    assert names == ["image", "nearest"]
    assert torch.equal(rows[2][0], digit) and (rows[2][1] - written).abs().max() < 2 / 127.5
    error = 255 * ((drawn - digit) / 2).square().mean().sqrt()
    assert f"digit2: root-mean-square error {error:.1f} of 255" in capsys.readouterr().out.splitlines()


def test_images_of_another_kind_are_inverted_with_fit(run, tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "photo.png")
    with pytest.raises(UserError, match="--fit"):
        invert_images(run, [tmp_path / "photo.png"], out=tmp_path / "out", restarts=1, steps=4)
    invert_images(run, [tmp_path / "photo.png"], out=tmp_path / "out", restarts=1, steps=4, fit=True)
    assert open_picture(tmp_path / "out" / "photo.png").size == (16, 16)


def test_the_best_start_of_each_target_wins(networks):
    """Each target is the picture of another start, and with so few steps no start gets far."""
    starts = latents(range(20, 24), 100)
    targets = generate(networks[0], starts[[2, 0, 3]])
    found = nearest_latents(*networks, targets, restarts=4, steps=4, seed=20)
    likeness = torch.nn.functional.cosine_similarity(found.latent[:, None], starts, dim=2)
    assert likeness.argmax(1).tolist() == [2, 0, 3] and likeness.amax(1).min() > 0.8
    assert (found.loss < 0.1).all()


def test_the_loss_is_that_of_the_start_that_is_taken(networks, digits):
    """Also where several have come to the last stage."""
    found = nearest_latents(*networks, digits[:2], restarts=16, steps=4)
    pixels = (found.pictures - digits[:2]).square().flatten(1).mean(1)
    prior = torch.nn.functional.softplus(-networks[1](found.pictures)) + found.latent.square().mean(1) / 2
    assert torch.allclose(found.loss, pixels + PRIOR * prior, rtol=1e-3)


def test_the_seed_is_that_of_the_starts(networks, digits):
    found = [nearest_latents(*networks, digits[:1], restarts=2, steps=4, seed=seed).latent for seed in (3, 3, 4)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("steps", [4, 5, 7])
def test_as_many_steps_are_taken_as_asked_for(networks, digits, steps):
    taken = []
    nearest_latents(*networks, digits[:1], restarts=1, steps=steps, advance=taken.append)
    assert sum(taken) == steps


def test_the_prior_prefers_what_looks_real_and_is_near_the_middle(networks):
    """With nothing else to go by."""
    start = latents(range(4), 100)
    found = invert(
        *networks, lambda pictures, which: torch.zeros(len(pictures)), 1, restarts=4, steps=60, prior=1.0, seed=0
    )
    scores = networks[1](generate(networks[0], start))
    assert networks[1](found.pictures).item() > scores.max()
    assert found.latent.norm() < start.norm(dim=1).min()
    z = found.latent
    loss = torch.nn.functional.softplus(-networks[1](found.pictures)) + z.square().mean(1) / 2
    assert torch.allclose(found.loss, loss, atol=1e-4)


def test_slerp_keeps_the_length_and_meets_its_ends():
    start, end = latents([1, 2], 50)
    way = slerp(start, end, torch.linspace(0, 1, 11))
    assert torch.allclose(way[0], start, atol=1e-5) and torch.allclose(way[-1], end, atol=1e-5)
    assert torch.allclose(way.norm(dim=1), torch.lerp(start.norm(), end.norm(), torch.linspace(0, 1, 11)), atol=1e-4)
    angles = torch.cosine_similarity(way[:-1], way[1:]).arccos()
    assert torch.allclose(angles, angles[:1], atol=1e-3)  # equal steps
    assert torch.isfinite(slerp(start, start, torch.tensor([0.5]))).all()
    assert torch.isfinite(slerp(start, -start, torch.tensor([0.5]))).all()


def test_slerp_keeps_the_length_between_nearly_opposite_points():
    start, across = torch.eye(50)[:2]
    end = -start + 1e-3 * across
    assert slerp(start, end, torch.tensor([0.5]))[0].norm().item() == pytest.approx(1, abs=1e-3)


def test_a_walk_meets_every_point():
    points = latents([1, 2, 3], 50)
    way = walk(points, 7)
    assert way.shape == (15, 50)
    assert torch.allclose(way[[0, 7, 14]], points, atol=1e-5)
    assert way.norm(dim=1).min() >= points.norm(dim=1).min() - 1e-4  # on the sphere


def test_the_settings_are_those_of_the_search(run, digit_files, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        invert_module,
        "nearest_latents",
        lambda *given, **named: asked.append(named) or nearest_latents(*given, **named),
    )
    settings = {"restarts": 1, "steps": 5, "feature_weight": 0.5, "seed": 3}
    invert_images(run, digit_files[:1], out=tmp_path / "out", **settings)
    assert asked[0].items() >= settings.items()


@pytest.mark.parametrize("weight", [-1.0, float("nan"), 1e9])
def test_impossible_weights_are_explained(run, digit_files, tmp_path, weight):
    with pytest.raises(UserError, match="--feature-weight"):
        invert_images(run, digit_files[:1], out=tmp_path / "out", feature_weight=weight)
    assert not (tmp_path / "out").exists()
