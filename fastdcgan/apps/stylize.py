"""A photograph redrawn by a generator, tile by tile: what it shows stays, what it is drawn with is the run's domain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdcgan.apps.latent import invert
from fastdcgan.apps.pictures import MODES, check_out, fitted, open_picture, save, to_picture, to_tensor
from fastdcgan.apps.trained import device_of, open_both
from fastdcgan.console import progress, say
from fastdcgan.errors import UserError
from fastdcgan.models import AnyDiscriminator, AnyGenerator

PRIOR = 0.05  # higher than for an inversion: a tile shall look like the domain rather than be exact
STEPS = 80
RESTARTS = 1
MOST_PIXELS = 4096  # a side, of the result


def stylize(run: Path, photo: Path, *, out: Path, strength: float = 0.7, tiles: int = 4, seed: int = 0) -> None:
    """Write the photograph in the style of the run's domain, at its own size (at most 4,096 pixels a side).

    Args:
        strength: 0 leaves the photograph, 1 only what the generator draws.
        tiles: across its shorter side; many small ones follow the photograph, few large ones the domain.

    Raises:
        UserError: a photograph or a run that cannot be used, or a setting that is not possible.
    """
    if not 0 <= strength <= 1:
        raise UserError(
            f"--strength {strength:g} is not possible: from 0, the photograph, to 1, the generator's picture"
        )
    if not 1 <= tiles <= 64:
        raise UserError(f"--tiles {tiles} is not possible: 1 to 64")
    if seed < 0:
        raise UserError(f"--seed {seed} is not possible: at least 0")
    _, generator, discriminator = open_both(run)
    picture = open_picture(photo)
    check_out(out, (".png", ".jpg", ".jpeg"))
    scale = min(1.0, MOST_PIXELS / max(picture.size))
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    image = to_tensor(fitted(picture, size, generator.channels))
    with progress("stylizing", STEPS, "steps") as advance:
        drawn = redraw(generator, discriminator, image, tiles=tiles, seed=seed, advance=advance)
    result = to_picture(torch.lerp(image, drawn, strength))
    save(result if out.suffix.lower() == ".png" else result.convert("L" if result.mode == MODES[1] else "RGB"), out)
    say(f"{photo} in the style of {run}: {out}")


def redraw(
    generator: AnyGenerator,
    discriminator: AnyDiscriminator,
    image: Tensor,
    *,
    tiles: int = 4,
    seed: int = 0,
    advance: Callable[[int], None] = lambda steps: None,
) -> Tensor:
    """The image, made of overlapping pictures of the generator that fade into each other.

    Each tile of the image is inverted; neighbours overlap by half.

    Args:
        image: (C, H, W) in -1..1, with the generator's channels.
        tiles: that would cover the shorter side without overlap.

    Returns:
        (C, H, W) in -1..1.
    """
    height, width = generator.image_size
    canvas = canvas_size((image.shape[1], image.shape[2]), (height, width), tiles)
    small = F.interpolate(image[None], canvas, mode="bilinear", antialias=True, align_corners=False)[0]
    corners = [
        (y, x)
        for y in range(0, canvas[0] - height + 1, height // 2)
        for x in range(0, canvas[1] - width + 1, width // 2)
    ]
    target = torch.stack([small[:, y : y + height, x : x + width] for y, x in corners]).to(device_of(generator))

    def data_loss(pictures: Tensor, which: Tensor) -> Tensor:
        return (pictures - target[which]).square().flatten(1).mean(1)

    drawn = invert(
        generator,
        discriminator,
        data_loss,
        len(corners),
        restarts=RESTARTS,
        steps=STEPS,
        prior=PRIOR,
        seed=seed,
        advance=advance,
    ).pictures.cpu()
    window = torch.outer(_fade(height), _fade(width))
    total, weight = torch.zeros_like(small), torch.zeros(canvas)
    for (y, x), tile in zip(corners, drawn, strict=True):
        total[:, y : y + height, x : x + width] += window * tile
        weight[y : y + height, x : x + width] += window
    return F.interpolate((total / weight)[None], image.shape[1:], mode="bicubic", antialias=True)[0].clamp(-1, 1)


def canvas_size(image: tuple[int, int], tile: tuple[int, int], tiles: int) -> tuple[int, int]:
    """(height, width) to draw at: in half tiles, `tiles` tiles along the shorter side, the image's proportions."""
    scale = tiles / min(image[0] / tile[0], image[1] / tile[1])
    halves = [max(2, round(2 * scale * side / each)) for side, each in zip(image, tile, strict=True)]
    return halves[0] * (tile[0] // 2), halves[1] * (tile[1] // 2)


def _fade(side: int) -> Tensor:
    """Weights across a tile that fall to almost nothing at its edges and add up evenly over its neighbours: (side,)."""
    return torch.sin(torch.pi * (torch.arange(side) + 0.5) / side).square() + 1e-3
