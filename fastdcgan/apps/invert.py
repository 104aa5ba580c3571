"""The latents of given pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from fastdcgan.apps.features import activations
from fastdcgan.apps.latent import STAGES, Inversion, invert
from fastdcgan.apps.pictures import names, read_pictures, save, sheet, to_picture
from fastdcgan.apps.trained import device_of, open_both
from fastdcgan.console import progress, say
from fastdcgan.errors import UserError, check_at_least, check_seeds
from fastdcgan.files import check_out, printable
from fastdcgan.models import AnyDiscriminator, AnyGenerator

PRIOR = 0.003
MOST_WEIGHT = 1e6


def invert_images(
    run: Path,
    images: Sequence[Path],
    *,
    out: Path,
    restarts: int = 8,
    steps: int = 300,
    feature_weight: float = 0.0,
    seed: int = 0,
    fit: bool = False,
) -> None:
    """Write for each image its latent (NAME.safetensors) and its reconstruction (NAME.png); sheet.png shows both.

    Raises:
        UserError: images or a run that cannot be used, or a setting that is not possible.
    """
    check_search(restarts, steps, seed)
    if not 0 <= feature_weight <= MOST_WEIGHT:
        raise UserError(f"--feature-weight {feature_weight:g} is not possible: 0 to {MOST_WEIGHT:g}")
    _, generator, discriminator = open_both(run)
    target = read_pictures(images, generator, fit)
    check_out(out)
    named = names(images, out)
    with progress("inverting", steps, "steps") as advance:
        found = nearest_latents(
            generator,
            discriminator,
            target,
            restarts=restarts,
            steps=steps,
            feature_weight=feature_weight,
            seed=seed,
            advance=advance,
        )
    pictures = found.pictures.cpu()
    for name, picture, latent in zip(named, pictures, found.latent.cpu(), strict=True):
        save(to_picture(picture), out / f"{name}.png")
        save(to_safetensors({"latent": latent}), out / f"{name}.safetensors")
    save(sheet(list(zip(target, pictures, strict=True)), ["image", "nearest"]), out / "sheet.png")
    say(f"given pictures and their nearest in the run: {printable(out / 'sheet.png')}")
    for name, image, picture in zip(named, target, pictures, strict=True):  # last: standard output may be full
        print(f"{printable(name)}: root-mean-square error {rms(picture, image):.1f} of 255")


def nearest_latents(
    generator: AnyGenerator,
    discriminator: AnyDiscriminator,
    target: Tensor,
    *,
    restarts: int = 8,
    steps: int = 300,
    feature_weight: float = 0.0,
    seed: int = 0,
    advance: Callable[[int], None] = lambda steps: None,
) -> Inversion:
    """The latents whose pictures are nearest to `target` (N, C, H, W) in -1..1, by squared pixel difference.

    Args:
        feature_weight: of the squared difference between the discriminator's features, relative to the pixels'.
    """
    target = target.to(device_of(generator))
    goals = activations(discriminator, target)

    def data_loss(pictures: Tensor, which: Tensor) -> Tensor:
        loss = (pictures - target[which]).square().flatten(1).mean(1)
        if feature_weight > 0:
            for goal, feature in zip(goals, activations(discriminator, pictures), strict=True):
                scale = feature_weight / (len(goals) * goal.square().mean())
                loss = loss + scale * (feature - goal[which]).square().flatten(1).mean(1)
        return loss

    return invert(
        generator,
        discriminator,
        data_loss,
        len(target),
        restarts=restarts,
        steps=steps,
        prior=PRIOR,
        seed=seed,
        advance=advance,
    )


def check_search(restarts: int, steps: int, seed: int) -> None:
    """Raises UserError for settings of an inversion that are not possible."""
    check_at_least("--restarts", restarts, 1)
    check_seeds(seed, "--restarts", restarts)
    check_at_least("--steps", steps, STAGES)


def rms(a: Tensor, b: Tensor) -> float:
    """Root-mean-square difference of two images in -1..1, in steps of 255."""
    return float(torch.sqrt((a - b).square().mean()) * 127.5)
