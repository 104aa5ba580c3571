"""Precision, recall, density and coverage: whether generated features lie among real ones, and real among generated.

And the nearest real images, which show whether the generator draws the set by heart.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def prdc(real: Tensor, fake: Tensor, k: int = 5) -> dict[str, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    Args:
        real, fake: features (N, d) and (M, d); N and M above k.
        k: neighbours that make up an image's surroundings.

    Returns:
        precision: share of fakes within the surroundings of some real image;
        recall: share of reals within those of some fake;
        density: how many reals' surroundings a fake lies in, in units of k (1 is what real images have; not bounded);
        coverage: share of reals with a fake in their surroundings.
    """
    reach_real, reach_fake = _reach(real, k), _reach(fake, k)
    between = torch.cdist(real, fake)  # (N, M)
    in_real = between < reach_real[:, None]
    return {
        "precision": in_real.any(0).float().mean().item(),
        "recall": (between < reach_fake).any(1).float().mean().item(),
        "density": in_real.sum(0).float().mean().item() / k,
        "coverage": in_real.any(1).float().mean().item(),
    }


def nearest_images(pictures: Tensor, among: Iterable[Tensor]) -> Tensor:
    """Of the pictures in the batches `among` (M, C, H, W), those whose pixels are nearest to each of `pictures`.

    Args:
        pictures: (N, C, H, W).

    Returns:
        (N, C, H, W).
    """
    found, least = torch.zeros_like(pictures), torch.full((len(pictures),), torch.inf)
    for batch in among:
        # Not by products, which would drown small differences between bright pictures in what these have in common.
        apart = torch.cdist(pictures.flatten(1), batch.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
        distance, which = apart.min(1)
        nearer = distance < least
        found[nearer], least[nearer] = batch[which[nearer]], distance[nearer]
    return found


def _reach(features: Tensor, k: int) -> Tensor:
    """The distance of each to its k-th nearest other: (N,)."""
    return torch.cdist(features, features).kthvalue(k + 1, dim=1).values
