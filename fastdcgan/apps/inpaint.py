"""Filling holes in pictures, after Yeh et al. 2017, "Semantic Image Inpainting with Deep Generative Models"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from scipy.sparse.csgraph import laplacian
from scipy.sparse.linalg import spsolve
from sklearn.feature_extraction.image import grid_to_graph
from torch import Tensor
from torch.nn import functional as F

from fastdcgan.apps.invert import check_search
from fastdcgan.apps.latent import invert
from fastdcgan.apps.pictures import names, open_picture, read_pictures, save, sheet, to_picture
from fastdcgan.apps.trained import device_of, open_both
from fastdcgan.console import progress, say
from fastdcgan.errors import UserError
from fastdcgan.files import check_out, printable
from fastdcgan.models import AnyDiscriminator, AnyGenerator

WINDOW = 7  # pixels a side: known pixels within it of a hole count (the paper's equation 3)
PRIOR = 0.003  # the paper's lambda, though its loss is a sum where this one is a mean


def inpaint_images(
    run: Path,
    images: Sequence[Path],
    *,
    out: Path,
    mask: Path | None = None,
    box: tuple[int, int, int, int] | None = None,
    random_fraction: float | None = None,
    restarts: int = 8,
    steps: int = 300,
    seed: int = 0,
    blend: bool = True,
    fit: bool = False,
) -> None:
    """Write for each image its completion (NAME.png); sheet.png shows original, masked and completed side by side.

    Args:
        mask: a picture of the images' size, white (or bright) where they are to be filled.
        box: x, y, width and height of a hole, in pixels of the run's picture.
        random_fraction: of the pixels, drawn for each image from `seed`. Exactly one of these three.
        blend: Poisson blending of what is filled in; else it is pasted.

    Raises:
        UserError: images, a hole or a run that cannot be used, or a setting that is not possible.
    """
    check_search(restarts, steps, seed)
    if sum(hole is not None for hole in (mask, box, random_fraction)) != 1:
        raise UserError("where is the hole? Give one of --mask PICTURE, --box X,Y,WIDTH,HEIGHT, --random-fraction 0.5")
    _, generator, discriminator = open_both(run)
    target = read_pictures(images, generator, fit)
    size = target.shape[-2:]
    if mask is not None:
        hole = torch.stack([read_mask(mask, image, size, fit) for image in images])
    elif box is not None:
        hole = box_mask(box, size).expand(len(target), *size)
    else:
        assert random_fraction is not None
        hole = random_mask(random_fraction, len(target), size, seed)
    check_out(out)
    named = names(images, out, () if mask is None else [mask])
    with progress("inpainting", steps, "steps") as advance:
        completed = inpaint(
            generator,
            discriminator,
            target,
            hole,
            restarts=restarts,
            steps=steps,
            seed=seed,
            blend=blend,
            advance=advance,
        )
    masked = target.masked_fill(hole[:, None], 0.0)
    for name, picture in zip(named, completed, strict=True):
        save(to_picture(picture), out / f"{name}.png")
    rows = list(zip(target, masked, completed, strict=True))
    save(sheet(rows, ["original", "masked", "completed"]), out / "sheet.png")
    say(f"original, masked, completed: {printable(out / 'sheet.png')}")


def inpaint(
    generator: AnyGenerator,
    discriminator: AnyDiscriminator,
    target: Tensor,
    hole: Tensor,
    *,
    restarts: int = 8,
    steps: int = 300,
    seed: int = 0,
    blend: bool = True,
    advance: Callable[[int], None] = lambda steps: None,
) -> Tensor:
    """Fill the holes with what the generator draws where its picture fits the surroundings.

    Args:
        target: (N, C, H, W) in -1..1; what it has in the hole is not looked at.
        hole: bool (N, H, W).

    Returns:
        (N, C, H, W) in -1..1 on the CPU, equal to `target` outside the hole.
    """
    device = device_of(generator)
    weight = context_weight(hole)[:, None].to(device)
    known = target.masked_fill(hole[:, None], 0.0).to(device)

    def context_loss(pictures: Tensor, which: Tensor) -> Tensor:
        difference = (weight[which] * (pictures - known[which]).abs()).flatten(1).sum(1)
        return difference / (weight[which].flatten(1).sum(1) * pictures.shape[1])

    found = invert(
        generator,
        discriminator,
        context_loss,
        len(target),
        restarts=restarts,
        steps=steps,
        prior=PRIOR,
        seed=seed,
        advance=advance,
    )
    filling = found.pictures.cpu()
    if blend:
        filling = torch.stack([poisson(*each) for each in zip(filling, target, hole, strict=True)])
    return torch.where(hole[:, None], filling, target)


def context_weight(hole: Tensor) -> Tensor:
    """Importance of each pixel (equation 3 of the paper): for a known one the share of its window that is missing.

    Args:
        hole: bool (N, H, W).

    Returns:
        float32 (N, H, W), 0 in the hole.
    """
    missing = hole[:, None].float()
    share = F.avg_pool2d(missing, WINDOW, stride=1, padding=WINDOW // 2, count_include_pad=False)
    return (share * (1 - missing))[:, 0]


def poisson(source: Tensor, target: Tensor, hole: Tensor) -> Tensor:
    """Blend source into the target's hole: its gradients, the target's values at the rim (Pérez et al. 2003, eq. 7).

    Solved exactly for holes of any shape, also those that reach the picture's edge, where no value is prescribed.
    (OpenCV's seamlessClone does not fill the rim of the hole: what was to be replaced stays there.)

    Args:
        source, target: (C, H, W) in -1..1.
        hole: bool (H, W), not all of it True.

    Returns:
        (C, H, W) in -1..1, equal to target outside the hole.
    """
    inside = hole.flatten().numpy()
    guide, known = (image.flatten(1).T.double().numpy() for image in (source, target))  # (H * W, C)
    rows = laplacian(grid_to_graph(*hole.shape, dtype=np.float64)).tocsr()[inside]
    right = rows @ guide - rows[:, ~inside] @ known[~inside]
    blended = known.copy()
    blended[inside] = spsolve(rows[:, inside].tocsc(), right).reshape(right.shape)
    return torch.from_numpy(blended).T.reshape(target.shape).clamp(-1, 1).to(target.dtype)


def read_mask(path: Path, image: Path, size: tuple[int, int] | torch.Size, fit: bool) -> Tensor:
    """bool (height, width) from a mask's file, which has the image's size; True where it is bright (or opaque white).

    Raises:
        UserError: another size, or nothing, or everything, is masked.
    """
    mask = open_picture(path)
    expected = open_picture(image).size
    if mask.size != expected:
        raise UserError(
            f"--mask {path} is {mask.width}x{mask.height}, and {image} is {expected[0]}x{expected[1]}:"
            " make them one size"
        )
    if mask.mode == "RGBA":
        mask = Image.alpha_composite(Image.new("RGBA", mask.size, "black"), mask)
    grey = mask.convert("L")
    if fit:
        grey = ImageOps.fit(grey, (size[1], size[0]), Image.Resampling.BOX)
    return _checked(torch.from_numpy(np.array(grey) > 127), f"--mask {path}", ": white is filled, black is kept")


def box_mask(box: tuple[int, int, int, int], size: tuple[int, int] | torch.Size) -> Tensor:
    """bool (height, width), True in the box (x, y, width, height).

    Raises:
        UserError: it is not inside the picture, or all of it.
    """
    x, y, width, height = box
    text = f"--box {x},{y},{width},{height}"
    if min(x, y) < 0 or min(width, height) < 1 or x + width > size[1] or y + height > size[0]:
        raise UserError(f"{text} is not inside the picture, which is {size[1]}x{size[0]}: x,y,width,height in pixels")
    hole = torch.zeros(tuple(size), dtype=torch.bool)
    hole[y : y + height, x : x + width] = True
    return _checked(hole, text)


def random_mask(fraction: float, count: int, size: tuple[int, int] | torch.Size, seed: int) -> Tensor:
    """bool (count, height, width), True with probability `fraction`.

    Raises:
        UserError: a fraction that leaves nothing to fill or nothing to go by.
    """
    if not 0 < fraction < 1:
        raise UserError(f"--random-fraction {fraction:g} is not possible: above 0 and below 1")
    hole = torch.rand(count, *size, generator=torch.Generator().manual_seed(seed)) < fraction
    for each in hole:
        _checked(each, f"--random-fraction {fraction:g}")
    return hole


def _checked(hole: Tensor, what: str, hint: str = "") -> Tensor:
    if not hole.any():
        raise UserError(f"{what} marks no pixel to fill{hint}")
    if hole.all():
        raise UserError(f"{what} covers the whole picture, and there is nothing to go by{hint}")
    return hole
