"""A photograph made anew from pieces of a generator's pictures, chosen so that it can still be recognised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastdcgan.apps.latent import generate, latents
from fastdcgan.apps.pictures import fitted, opaque, open_picture, save, to_picture, to_tensor
from fastdcgan.apps.trained import open_run
from fastdcgan.console import progress, say
from fastdcgan.errors import UserError, check_seed
from fastdcgan.files import check_out, printable
from fastdcgan.models import AnyGenerator

SAMPLES = 192  # generated pictures that pieces are cut from
PIECES = 4096  # to choose from
CELLS = 3  # a side: what of a piece has to fit the photograph, so that its detail stays the domain's
FIT_TO_NEIGHBOURS = 0.6  # weight of the overlaps; the rest is that of the photograph
CHOICE = 0.1  # any piece whose error is within this share of the least may be taken, or a flat area would repeat one
LONGEST_RESULT = 4096  # side in pixels
LONGEST = 4 * LONGEST_RESULT  # side of what is drawn: more takes hours and gigabytes


def stylize(run: Path, photo: Path, *, out: Path, strength: float = 0.7, tiles: int = 8, seed: int = 0) -> None:
    """Write the photograph in the style of the run's domain, at its own size (at most 4,096 pixels a side).

    Args:
        run: also a generator alone.
        strength: 0 leaves the photograph, 1 only what the generator draws.
        tiles: of the generator's pictures, along the photograph's shorter side: many follow it closely.

    Raises:
        UserError: a photograph or a run that cannot be used, or a setting that is not possible.
    """
    if not 0 <= strength <= 1:
        raise UserError(
            f"--strength {strength:g} is not possible: from 0, the photograph, to 1, the generator's picture"
        )
    if not 1 <= tiles <= 64:
        raise UserError(f"--tiles {tiles} is not possible: 1 to 64")
    check_seed(seed, SAMPLES)
    generator = open_run(run).generator
    picture = open_picture(photo)
    check_out(out, (".png", ".jpg", ".jpeg"), [photo])
    scale = min(1.0, LONGEST_RESULT / max(picture.size))
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    image = to_tensor(fitted(picture, size, generator.channels))
    canvas = canvas_size((size[1], size[0]), generator.image_size, tiles)
    if max(canvas) > LONGEST:
        raise UserError(f"{photo} is too narrow for --tiles {tiles} along its shorter side: give fewer, or crop it")
    with progress("stylizing", canvas[0], "lines") as advance:
        drawn = redraw(generator, image, tiles=tiles, seed=seed, advance=advance)
    result = to_picture(torch.lerp(image, drawn, strength))
    save(result if out.suffix.lower() == ".png" else opaque(result), out)
    say(f"{printable(photo)} in the style of {printable(run)}: {printable(out)}")


def redraw(
    generator: AnyGenerator,
    image: Tensor,
    *,
    tiles: int = 8,
    seed: int = 0,
    advance: Callable[[int], None] = lambda lines: None,
) -> Tensor:
    """The image, in the domain's colours, quilted of pieces of generated pictures.

    Args:
        image: (C, H, W) in -1..1, with the generator's channels.
        tiles: of the generator's pictures that fit along the shorter side.
        advance: told of the lines of the canvas done.

    Returns:
        (C, H, W) in -1..1.
    """
    random = torch.Generator().manual_seed(seed)
    canvas = canvas_size((image.shape[1], image.shape[2]), generator.image_size, tiles)
    small = F.interpolate(image[None], canvas, mode="bilinear", antialias=True)[0]
    samples = generate(generator, latents(range(seed, seed + SAMPLES), generator.latent_dim)).cpu()
    side = max(4, min(generator.image_size) * 3 // 8)  # smaller ones show the photograph, not the domain
    quilted = quilt(recoloured(small, samples), cut_out(samples, side, random), random, advance)
    return F.interpolate(quilted[None], image.shape[1:], mode="bicubic", antialias=True)[0].clamp(-1, 1)


def canvas_size(image: tuple[int, int], tile: tuple[int, int], tiles: int) -> tuple[int, int]:
    """(height, width) to draw at: `tiles` tiles along the side that has fewer, the image's proportions."""
    scale = tiles / min(image[0] / tile[0], image[1] / tile[1])
    return round(scale * image[0]), round(scale * image[1])


def recoloured(image: Tensor, samples: Tensor) -> Tensor:
    """The image with the samples' mean colour and covariance of colours, each colour moved as little as possible.

    The linear map between two normal distributions that moves least (Pitié and Kokaram 2007).

    Args:
        image: (C, H, W) in -1..1.
        samples: (N, C, h, w) in -1..1.
    """
    channels = len(image)
    given, wanted = image.flatten(1), samples.transpose(0, 1).flatten(1)
    some = 1e-4 * torch.eye(channels)  # an image of a single colour has no covariance
    root = _power(given.cov().reshape(channels, channels) + some, 0.5)
    inverse = _power(given.cov().reshape(channels, channels) + some, -0.5)
    target = wanted.cov().reshape(channels, channels) + some
    moved = inverse @ _power(root @ target @ root, 0.5) @ inverse @ (given - given.mean(1, keepdim=True))
    return (moved + wanted.mean(1, keepdim=True)).reshape(image.shape).clamp(-1, 1)


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """Of a symmetric positive definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp(min=1e-8) ** exponent) @ vectors.T


def cut_out(samples: Tensor, side: int, random: torch.Generator) -> Tensor:
    """Square pieces from anywhere in the samples (N, C, H, W): (PIECES, C, side, side)."""
    count, _, height, width = samples.shape
    limits = count, height - side + 1, width - side + 1
    i, y, x = (torch.randint(limit, (PIECES, 1, 1), generator=random) for limit in limits)
    span = torch.arange(side)
    return samples.permute(0, 2, 3, 1)[i, y + span[:, None], x + span].permute(0, 3, 1, 2)


def quilt(
    image: Tensor, pieces: Tensor, random: torch.Generator, advance: Callable[[int], None] = lambda lines: None
) -> Tensor:
    """Texture transfer by image quilting (Efros and Freeman 2001), in one pass.

    From the top left, each piece overlaps its neighbours by a quarter. It is chosen, at random among the best, for
    small differences there and for colours that fit the image's, averaged over CELLS x CELLS cells; and it is cut from
    its neighbours along the line where both differ least.

    Args:
        image: (C, H, W), at least as large as a piece.
        pieces: (M, C, side, side).

    Returns:
        (C, H, W), every pixel of it from a piece.
    """
    height, width = image.shape[1:]
    side = pieces.shape[-1]
    overlap = max(2, side // 4)
    step = side - overlap
    rows, columns = -(-(height - overlap) // step), -(-(width - overlap) // step)
    missing = columns * step + overlap - width, rows * step + overlap - height
    image = F.pad(image[None], (0, missing[0], 0, missing[1]), mode="replicate")[0]
    canvas = torch.zeros_like(image)
    coarse = _Known(F.adaptive_avg_pool2d(pieces, CELLS))
    tops, lefts = _Known(pieces[:, :, :overlap]), _Known(pieces[..., :overlap])
    for y in range(0, rows * step, step):
        wanted = image[:, y : y + side].unfold(2, side, step).permute(2, 0, 1, 3)  # (columns, C, side, side)
        fits = coarse.differences(F.adaptive_avg_pool2d(wanted, CELLS))
        for column, x in enumerate(range(0, columns * step, step)):
            here = canvas[:, y : y + side, x : x + side]
            error = (1 - FIT_TO_NEIGHBOURS) * fits[column]
            if y > 0:
                error = error + FIT_TO_NEIGHBOURS * tops.differences(here[None, :, :overlap])[0]
            if x > 0:
                error = error + FIT_TO_NEIGHBOURS * lefts.differences(here[None, ..., :overlap])[0]
            good = (error <= error.min() * (1 + CHOICE)).nonzero()[:, 0]
            piece = pieces[good[torch.randint(len(good), (1,), generator=random)]][0]
            new = torch.ones(side, side, dtype=torch.bool)
            difference = (piece - here).square().sum(0)
            if y > 0:
                new[:overlap] &= beyond_seam(difference[:overlap].T).T
            if x > 0:
                new[:, :overlap] &= beyond_seam(difference[:, :overlap])
            canvas[:, y : y + side, x : x + side] = torch.where(new, piece, here)
        advance(step if y + step < rows * step else height - y)
    return canvas[:, :height, :width]


class _Known:
    """Vectors (m, ...) that many others are compared with."""

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors.flatten(1)
        self.squares = self.vectors.square().sum(1)

    def differences(self, others: Tensor) -> Tensor:
        """Mean squared difference of each of others (n, ...) from each of the vectors: (n, m)."""
        flat = others.flatten(1)
        squares = torch.addmm(self.squares, flat, self.vectors.T, alpha=-2) + flat.square().sum(1, keepdim=True)
        return squares.clamp_(min=0) / flat.shape[1]


def beyond_seam(cost: Tensor) -> Tensor:
    """Cut along the cheapest way from the first row to the last that moves by one column a row at most.

    Args:
        cost: (n, m).

    Returns:
        bool (n, m): True on the way and to the right of it.
    """
    total = cost.numpy().copy()
    for i in range(1, len(total)):
        above = np.pad(total[i - 1], 1, constant_values=np.inf)
        total[i] += np.minimum(np.minimum(above[:-2], above[1:-1]), above[2:])
    ends = [int(total[-1].argmin())]
    for row in total[-2::-1]:
        first = max(0, ends[-1] - 1)
        ends.append(first + int(row[first : ends[-1] + 2].argmin()))
    return torch.arange(cost.shape[1]) >= torch.tensor(ends[::-1])[:, None]
