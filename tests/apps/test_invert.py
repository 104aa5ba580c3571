"""`invert`: finds the latent of a picture that the generator made, and walks stay on the sphere."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastdcgan.apps.invert import invert_images, nearest, rms
from fastdcgan.apps.latent import generate, latents, slerp, walk
from fastdcgan.apps.pictures import open_picture, to_tensor


def test_generated_pictures_are_recovered(networks):
    generator, discriminator = networks
    pictures = generate(generator, latents(range(1000, 1008), 100))
    found = nearest(generator, discriminator, pictures)
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
        found = nearest(generator, discriminator, digits[:8], restarts=2, steps=100, feature_weight=weight)
        return (activations(discriminator, found.pictures)[-1] - goal).square().mean().item()

    assert distance(1.0) < distance(0.0)


def test_outputs_belong_together(run, networks, digit_files, tmp_path):
    invert_images(run, digit_files, out=tmp_path / "out", restarts=2, steps=40)
    assert Image.open(tmp_path / "out" / "sheet.png").size == (2 * 96 + 2, 20 + 4 * 96 + 6)
    latent = load_file(tmp_path / "out" / "digit2.safetensors")["latent"]
    drawn = generate(networks[0], latent[None])[0]
    written = to_tensor(open_picture(tmp_path / "out" / "digit2.png"))
    assert (drawn - written).abs().max() < 2 / 127.5


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
