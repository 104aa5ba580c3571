"""Points of the latent space as people name them: seeds, or image files, which are inverted."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fastdcgan.apps.invert import nearest_latents
from fastdcgan.apps.latent import latents
from fastdcgan.apps.pictures import read_pictures
from fastdcgan.apps.trained import open_both, open_run
from fastdcgan.console import progress
from fastdcgan.errors import LAST_SEED, UserError
from fastdcgan.models import AnyGenerator

STEPS = 300
DIGITS = 20  # at most, of a seed: int() refuses thousands of them


def open_points(run: Path, words: list[str], *, truncation: float | None, fit: bool) -> tuple[AnyGenerator, Tensor]:
    """The run's generator, and a latent for each of the words: (len(words), latent_dim) on the CPU.

    Args:
        words: seeds (whole numbers) or paths of images.
        truncation: of the seeds' latents, as in `latents`.
        fit: crop, resize and convert images that have another size or other channels.

    Raises:
        UserError: a word that is neither, or a seed, an image or a run that cannot be used.
    """
    seeds = {word: seed_of(word) for word in words if word.isdecimal()}
    images = list(dict.fromkeys(image_files(words)))
    for image in images:
        if not image.exists():
            raise UserError(f"{image} is neither a seed (a whole number from 0) nor an image file")
    latents([0], 1, truncation)  # one that is not possible is said before the images are inverted
    if not images:
        generator = open_run(run).generator
        return generator, latents([seeds[word] for word in words], generator.latent_dim, truncation)
    _, generator, discriminator = open_both(run)
    target = read_pictures(images, generator, fit)
    with progress("inverting the images", STEPS, "steps") as advance:
        found = nearest_latents(generator, discriminator, target, steps=STEPS, advance=advance).latent.cpu()
    point = dict(zip(images, found, strict=True))
    drawn = {word: latents([each], generator.latent_dim, truncation)[0] for word, each in seeds.items()}
    return generator, torch.stack([drawn[word] if word in seeds else point[Path(word)] for word in words])


def seed_of(word: str) -> int:
    """The seed that a word of digits names.

    Raises:
        UserError: it is too large.
    """
    if len(word) > DIGITS or int(word) > LAST_SEED:
        shown = word if len(word) <= DIGITS else f"{word[:DIGITS]}..."
        raise UserError(f"{shown} is not possible as a seed: from 0 to {LAST_SEED}")
    return int(word)


def image_files(words: list[str]) -> list[Path]:
    """The paths among the words: what is no seed."""
    return [Path(word) for word in words if not word.isdecimal()]
