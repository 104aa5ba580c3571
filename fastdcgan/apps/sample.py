"""Pictures from a trained generator."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from fastdcgan.apps.latent import BATCH, generate, latents
from fastdcgan.apps.pictures import save, to_picture
from fastdcgan.apps.trained import open_run
from fastdcgan.console import progress, say
from fastdcgan.errors import UserError, check_at_least, check_seeds
from fastdcgan.files import check_out, printable, target
from fastdcgan.grid import save_grid


def sample(
    run: Path, *, out: Path, count: int = 64, seed: int = 0, truncation: float | None = None, ema: bool = True
) -> None:
    """Write `count` pictures: one grid where `out` ends in .png, else a folder of PNGs named by their seed.

    Raises:
        UserError: not a run, or a count, seed or truncation that is not possible, or `out` cannot be written.
    """
    check_at_least("--count", count, 1)
    check_seeds(seed, "--count", count)
    latents([seed], 1, truncation)  # what is not possible is said before anything is written
    generator = open_run(run, ema).generator
    one_grid = out.suffix.lower() in Image.registered_extensions()  # which check_out then wants to be .png
    check_out(out, (".png",) if one_grid else ())
    grid: list[Tensor] = []
    with progress("sampling", count, "images") as advance:
        for first in range(seed, seed + count, BATCH):
            seeds = range(first, min(first + BATCH, seed + count))
            images = generate(generator, latents(seeds, generator.latent_dim, truncation)).cpu()
            if one_grid:
                grid.append(images)
            else:
                for each, image in zip(seeds, images, strict=True):
                    save(to_picture(image), out / f"seed-{each:06d}.png")
            advance(len(seeds))
    if one_grid:
        try:
            save_grid(torch.cat(grid), target(out))
        except OSError as error:
            raise UserError(f"--out {out} cannot be written: {error.strerror or error}") from error
    say(f"{count} pictures: {printable(out)}")
