"""How far sets of images are from each other, and how varied one is, without pretrained weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdcgan.pixels import to_floats

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, for five scales
SMALLEST = 16  # pixels a side of the coarsest level of a pyramid
PATCH, PATCHES = 7, 16  # pixels a side, and how many of each image
DIRECTIONS = 128
VISIBLE = 2 / 255  # deviation of a channel in -1..1: one of the steps that a picture's file has
BINOMIAL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


def sliced_wasserstein(
    a: Tensor, b: Tensor, *, repeats: int = 4, seed: int = 0, absolute: bool = False
) -> dict[int, float]:
    """Sliced Wasserstein distance between two sets of images, for each level of their Laplacian pyramids.

    As in Karras et al. 2018, section 5: patches of 7x7 pixels from each level, every channel normalised over its set,
    projected on random directions and sorted; the mean absolute difference of the sorted projections. Their figures
    are 1,000 times these, of 128 patches from each of 16,384 images. A channel that hardly varies in either set is
    centred alone.

    Args:
        a, b: (N, C, H, W), uint8 or floats in -1..1; of unequal sets the first of the larger are taken.
        repeats: independent draws of DIRECTIONS directions.
        absolute: normalise both sets over b, not each over itself: brightness, contrast and colours count too.

    Returns:
        the distance by the level's height in pixels, finest first; coarse levels compare layout, fine ones texture.
    """
    count = min(len(a), len(b))
    random = torch.Generator().manual_seed(seed)
    distances = {}
    sets = [to_floats(images[:count]) for images in (a, b)]
    # Scaled too, what no picture shows, such as noise in an alpha that is 1 everywhere, would count as a picture does.
    judged = [sets[1]] if absolute else sets
    varied = torch.stack([images.std((0, 2, 3)).cpu() for images in judged]).amax(0) >= VISIBLE
    for levels in zip(*map(laplacian_pyramid, sets), strict=True):
        found = [_patches(level, random) for level in levels]
        over = [found[1], found[1]] if absolute else found
        least = VISIBLE if absolute else 1e-8
        described = [_normalised(*each, varied, least) for each in zip(found, over, strict=True)]
        total = 0.0
        for _ in range(repeats):
            axes = F.normalize(torch.randn(described[0].shape[1], DIRECTIONS, generator=random), dim=0)
            projected = [(each @ axes.to(each.device)).sort(dim=0).values for each in described]
            total += (projected[0] - projected[1]).abs().mean().item()
        distances[levels[0].shape[2]] = total / repeats
    return distances


def mean_sliced_wasserstein(a: Tensor, b: Tensor, repeats: int = 4, absolute: bool = False) -> float:
    """`sliced_wasserstein`, the mean over the levels of the pyramid; 0 at best."""
    levels = sliced_wasserstein(a, b, repeats=repeats, absolute=absolute)
    return sum(levels.values()) / len(levels)


def laplacian_pyramid(images: Tensor) -> list[Tensor]:
    """(N, C, H, W) -> what each level adds to the next coarser one, finest first, down to 16 pixels a side."""
    levels = []
    while min(images.shape[2:]) >= 2 * SMALLEST and all(side % 2 == 0 for side in images.shape[2:]):
        coarse = _blur(images)[:, :, ::2, ::2]
        finer = torch.zeros_like(images)
        finer[:, :, ::2, ::2] = coarse
        levels.append(images - 4 * _blur(finer))
        images = coarse
    return [*levels, images]


def ms_ssim_diversity(images: Tensor, *, pairs: int = 1000, seed: int = 0) -> float:
    """How alike a set's pictures are: mean MS-SSIM of random pairs (Odena et al. 2017, section 4.2), at most 1.

    0.3 is varied, 1 is one picture over and over. It only means something beside the same figure for real images.

    Args:
        images: (N, C, H, W), uint8 or floats in -1..1, N at least 2.
    """
    random = torch.Generator().manual_seed(seed)
    first = torch.randint(len(images), (pairs,), generator=random)
    second = (first + torch.randint(1, len(images), (pairs,), generator=random)) % len(images)
    values = [
        ms_ssim(to_floats(images[i]), to_floats(images[j]))
        for i, j in zip(first.split(256), second.split(256), strict=True)
    ]
    return torch.cat(values).mean().item()


def ms_ssim(a: Tensor, b: Tensor) -> Tensor:
    """Multi-scale structural similarity (Wang et al. 2003) of images (N, C, H, W) in -1..1: (N,).

    Small pictures have fewer of the five scales, and the weights of those they have are scaled to a sum of 1.
    """
    scales = max(1, min(len(MS_SSIM_WEIGHTS), int(math.log2(min(a.shape[2:]) / 11)) + 1))
    weights = [weight / sum(MS_SSIM_WEIGHTS[:scales]) for weight in MS_SSIM_WEIGHTS[:scales]]
    result = torch.ones(len(a), device=a.device)
    for scale, weight in enumerate(weights):
        luminance, contrast = _ssim_parts(a, b)
        part = (luminance * contrast if scale == scales - 1 else contrast).flatten(1).mean(1)
        result = result * part.clamp(min=0) ** weight
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return result


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of images (N, C, H, W) in -1..1, with an 11x11 Gaussian window: (N,)."""
    luminance, contrast = _ssim_parts(a, b)
    return (luminance * contrast).flatten(1).mean(1)


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, of images in -1..1."""
    return 10 * math.log10(4 / max((a - b).square().mean().item(), 1e-12))


def _ssim_parts(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The luminance term, and the contrast and structure term, of SSIM at each pixel where the window fits."""
    down, across = (_gaussian_windows(side).to(a.device) for side in a.shape[2:])

    def mean(x: Tensor) -> Tensor:  # matrix products: small images are filtered faster so than by convolution
        return down @ x @ across.T

    a, b = a + 1, b + 1  # intensities: of signed values two nearly equal greys about 0 would count as opposites
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # for a range of 2
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    return (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1), (2 * covariance + c2) / (var_a + var_b + c2)


def _patches(level: Tensor, random: torch.Generator) -> Tensor:
    """PATCHES patches of each image (N, C, H, W): (N * PATCHES, 7, 7, C)."""
    n, _, height, width = level.shape
    side = min(PATCH, height, width)
    i = torch.arange(n).repeat_interleave(PATCHES)
    y = torch.randint(height - side + 1, (n * PATCHES,), generator=random)
    x = torch.randint(width - side + 1, (n * PATCHES,), generator=random)
    span = torch.arange(side)
    rows, columns = (y[:, None] + span)[:, :, None], (x[:, None] + span)[:, None, :]
    return level.permute(0, 2, 3, 1)[i[:, None, None], rows, columns]


def _normalised(patches: Tensor, over: Tensor, varied: Tensor, least: float) -> Tensor:
    """Patches (N, 7, 7, C) less the mean of those in `over`, channel by channel, and where `varied`, bool (C,), says so
    in units of their deviation, or of `least` if that is more: (N, C * 49)."""
    scale = torch.where(varied.to(over.device), over.std((0, 1, 2)).clamp(min=least), 1.0)
    return ((patches - over.mean((0, 1, 2))) / scale).flatten(1)


def _blur(images: Tensor) -> Tensor:
    """Burt and Adelson's 5x5 binomial filter."""
    height, width = images.shape[2:]
    images = F.pad(images, (2, 2, 2, 2), mode="reflect")
    images = sum(weight * images[:, :, i : i + height] for i, weight in enumerate(BINOMIAL))  # type: ignore[assignment]
    return sum(weight * images[..., i : i + width] for i, weight in enumerate(BINOMIAL))  # type: ignore[return-value]


def _gaussian_windows(side: int) -> Tensor:
    """A row for each place where SSIM's window of 11 pixels (or all there are) fits in `side`: its weights."""
    window = min(11, side)
    weights = torch.exp(-(torch.arange(window) - (window - 1) / 2).square() / (2 * 1.5**2))
    rows = torch.zeros(side - window + 1, side)
    for i, row in enumerate(rows):
        row[i : i + window] = weights / weights.sum()
    return rows
