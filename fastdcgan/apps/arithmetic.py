"""Sums and differences of latents, drawn in the manner of figure 7 of the DCGAN paper (Radford et al. 2016)."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import ImageDraw, ImageFont
from torch import Tensor

from fastdcgan.apps.endpoints import image_files, open_points
from fastdcgan.apps.latent import generate
from fastdcgan.apps.pictures import GAP, HEADING, save, sheet
from fastdcgan.console import say
from fastdcgan.errors import UserError
from fastdcgan.files import check_name, check_out, printable

NOISE = 0.25  # of the eight pictures around the result: uniform within plus and minus this, as in the paper


def arithmetic(
    run: Path,
    plus: list[list[str]],
    minus: list[list[str]],
    *,
    out: Path,
    truncation: float | None = None,
    fit: bool = False,
) -> None:
    """Add and subtract the means of groups of latents.

    In the picture each group is a column: its members, and under them what their mean looks like, first the groups
    that are added, then those taken away. To the right, in the middle of a square, stands the result in a frame, with
    eight neighbours of it around.

    Args:
        plus, minus: groups of seeds or image files; at least one to add.

    Raises:
        UserError: nothing to add, or points or a run that cannot be used.
    """
    if not plus or not all(plus + minus):
        raise UserError("there is nothing to add, or a group is empty: --plus 1,2,3 --minus 4,5,6 --plus 7,8,9")
    groups = plus + minus
    words = [word for group in groups for word in group]
    check_name(out, (".png",), image_files(words))
    generator, latent = open_points(run, words, truncation=truncation, fit=fit)
    check_out(out, (".png",))
    members = latent.split([len(group) for group in groups])
    means = torch.stack([each.mean(0) for each in members])
    result = combine(means, len(plus))
    random = torch.rand(8, len(result), generator=torch.Generator().manual_seed(0))
    around = result + NOISE * (2 * random - 1)
    square = generate(generator, torch.cat([around[:4], result[None], around[4:]])).cpu()

    longest = max(3, *(len(group) for group in groups))
    rows: list[list[Tensor | None]] = [[] for _ in range(longest + 1)]
    for each, mean in zip(members, means, strict=True):
        column = [
            *generate(generator, each).cpu(),
            *[None] * (longest - len(each)),
            *generate(generator, mean[None]).cpu(),
        ]
        for row, image in zip(rows, column, strict=True):
            row.append(image)
    for i, row in enumerate(rows):
        row += [None, *(square[3 * i : 3 * i + 3] if i < 3 else [])]
    page = sheet(rows, [*["plus"] * len(plus), *["minus"] * len(minus), "", "result, framed, and near it"])
    step_x = (page.width + GAP) // (len(groups) + 4)
    step_y = (page.height - HEADING + GAP) // len(rows)
    draw, x, y = ImageDraw.Draw(page), (len(groups) + 2) * step_x, HEADING + step_y
    draw.rectangle((x - GAP, y - GAP, x + step_x - 1, y + step_y - 1), outline="black", width=GAP)
    beside = len(groups) * step_x + 3 * GAP, HEADING + longest * step_y + step_y // 2
    draw.text(beside, "mean" if len(groups) == 1 else "means", "black", ImageFont.load_default(14), anchor="lm")
    save(page, out)
    say(f"groups, under them their means, and the result: {printable(out)}")


def combine(means: Tensor, added: int) -> Tensor:
    """The sum of the first `added` of means (n, latent_dim) less the others: (latent_dim,)."""
    return means[:added].sum(0) - means[added:].sum(0)
