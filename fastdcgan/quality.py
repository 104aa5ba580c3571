"""How varied a generator's pictures are and how near they come to the data, on fixed latents, now and then in a run."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastdcgan.distances import VISIBLE, mean_sliced_wasserstein
from fastdcgan.pixels import to_floats

COMPARED, COMPARED_IN_DIVERSITY = 256, 64  # pictures
CHUNK = 64  # pictures drawn at once


class Quality:
    """Measures on the run's device against a fixed choice of real images.

    Args:
        real: uint8 (N, H, W, C), N at least 2; up to COMPARED are used.
        latent_dim, seed: of the fixed latents.

    Attributes:
        varied: whether most of the real images differ, so that samples that do not have collapsed.
    """

    def __init__(self, real: Tensor, latent_dim: int, seed: int, device: torch.device) -> None:
        self.real = to_floats(real[:COMPARED].permute(0, 3, 1, 2)).to(device)
        random = torch.Generator().manual_seed(seed)
        self.latents = torch.randn(len(self.real), latent_dim, generator=random).to(device)
        few = self.real[:COMPARED_IN_DIVERSITY]
        distinct = torch.unique(few, dim=0)  # or those that are there twice have no distance at all
        shown = distinct if len(distinct) > 1 else self.real[:2]
        self.compared = len(shown)
        least = VISIBLE * math.sqrt(self.real[0].numel())  # what is less apart than this, no picture's file can show
        self.apart, self.nearest = (max(value, least) for value in distances_apart(shown))
        # Of a set that is mostly one picture, or a few, a perfect generator's samples are alike too.
        self.varied = 2 * len(distinct) > len(few) and self.apart > least

    def diversity(self, pictures: Tensor) -> dict[str, float]:
        """How far apart pictures (N, C, H, W) are, as a share of what real images are: of as many, distinct ones.

        Returns:
            diversity: the mean distance of two; 0 is one picture over and over, 1 as varied as the data.
            nearest: the mean distance to the nearest other; near 0 with a handful of pictures, each many times.
        """
        apart, nearest = distances_apart(pictures[: self.compared].float())
        return {"diversity": apart / self.apart, "nearest": nearest / self.nearest}

    @torch.no_grad()
    def distance(self, generator: nn.Module) -> float:
        """Sliced Wasserstein distance to the real images, the mean over the levels of the pyramid; 0 at best.

        In the real images' own units: normalised each over itself, a set of nearly grey pictures would be as near.
        """
        drawn = torch.cat([generator(latents).float() for latents in self.latents.split(CHUNK)])
        return mean_sliced_wasserstein(drawn, self.real, repeats=1, absolute=True)


@torch.no_grad()
def distances_apart(pictures: Tensor) -> tuple[float, float]:
    """Mean distance of two of the pictures (N, C, H, W), and of each to its nearest: Euclidean, in all pixels."""
    rows = pictures.flatten(1)
    apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")  # exactly 0 for equal pictures
    mean = apart.sum() / (len(rows) * (len(rows) - 1))
    nearest = apart.fill_diagonal_(torch.inf).min(1).values.mean()
    return mean.item(), nearest.item()
