"""The latent space: points by seed, ways between points, and the points whose pictures fit something (inversion)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdcgan.apps.trained import device_of
from fastdcgan.errors import UserError, check_seed
from fastdcgan.models import AnyDiscriminator, AnyGenerator

STAGES = 4  # of an inversion: after each of the first ones the worse half of the starts is given up
BATCH = 64

# (pictures (M, C, H, W) in -1..1, which of the N targets each belongs to (M,)) -> loss of each (M,)
DataLoss = Callable[[Tensor, Tensor], Tensor]


def latents(seeds: Iterable[int], latent_dim: int, truncation: float | None = None) -> Tensor:
    """One latent a seed, float32 (seeds, latent_dim), N(0, 1): each depends on its own seed alone, on no device.

    Args:
        truncation: draw from the normal distribution cut off at plus and minus this (Brock et al. 2019, section 3.1),
            mapped by quantiles, so that a seed's picture changes smoothly with it.

    Raises:
        UserError: a truncation or a seed that is not possible.
    """
    seeds = list(seeds)
    for seed in seeds:
        check_seed(seed)
    if truncation is not None and not 0 < truncation < float("inf"):
        raise UserError(f"--truncation {truncation:g} is not possible: above 0 (2 cuts little off, 0.5 a lot)")
    z = torch.stack([_draw(latent_dim, seed) for seed in seeds])
    if truncation is None:
        return z
    edge = torch.special.ndtr(torch.tensor(-truncation, dtype=torch.float64))
    return torch.special.ndtri(edge + (1 - 2 * edge) * torch.special.ndtr(z.double())).float()


def _draw(count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")


@torch.no_grad()
def generate(generator: AnyGenerator, latent: Tensor) -> Tensor:
    """Images (N, C, H, W) in -1..1, on the generator's device, for latents (N, latent_dim) on any."""
    return torch.cat([generator(part) for part in latent.to(device_of(generator)).split(BATCH)])


def slerp(start: Tensor, end: Tensor, amount: Tensor) -> Tensor:
    """Spherical interpolation (Shoemake 1985): normal latents lie near a sphere, and a straight line leaves it.

    Args:
        start, end: (latent_dim,); their lengths are interpolated too.
        amount: (n,) in 0..1.

    Returns:
        (n, latent_dim); a straight line where both point in one direction, or in opposite ones.
    """
    start, end, amount, dtype = start.double(), end.double(), amount.double(), start.dtype  # for nearly opposite points
    cosine = F.cosine_similarity(start, end, dim=0).clamp(-1, 1)
    angle = torch.arccos(cosine)
    amount = amount[:, None]
    if torch.sin(angle) < 1e-4:
        return (start + amount * (end - start)).to(dtype)
    a, b = torch.sin((1 - amount) * angle), torch.sin(amount * angle)
    direction = (a * F.normalize(start, dim=0) + b * F.normalize(end, dim=0)) / torch.sin(angle)
    return (direction * (start.norm() + amount * (end.norm() - start.norm()))).to(dtype)


def walk(points: Tensor, steps: int) -> Tensor:
    """From each of `points` (n, latent_dim) to the next in `steps` equal steps: ((n - 1) * steps + 1, latent_dim)."""
    amounts = torch.linspace(0, 1, steps + 1)[:-1]
    ways = [slerp(start, end, amounts) for start, end in pairwise(points)]
    return torch.cat([*ways, points[-1:]])


@dataclass(frozen=True)
class Inversion:
    """Latents (N, latent_dim), their pictures (N, C, H, W) in -1..1 and their losses (N,), on the network's device."""

    latent: Tensor
    pictures: Tensor
    loss: Tensor


def invert(
    generator: AnyGenerator,
    discriminator: AnyDiscriminator,
    data_loss: DataLoss,
    count: int,
    *,
    restarts: int,
    steps: int,
    prior: float,
    seed: int = 0,
    advance: Callable[[int], None] = lambda steps: None,
) -> Inversion:
    """Find the latents whose pictures minimise data_loss + prior * (-log D(G(z)) + |z|^2 / (2 latent_dim)).

    The first prior term is that of Yeh et al. 2017 (non-saturating here), the second the latents' own distribution.
    All targets and all starts go through the networks as one batch. Adam descends in four stages at falling speed,
    and after each of the first three the better half of a target's starts goes on.

    Args:
        generator, discriminator: frozen, in evaluation mode.
        data_loss: how far pictures are from their targets.
        count: N, targets.
        restarts: random starts for each target.
        steps: of Adam, over all stages.
        advance: told of the steps done.

    Returns:
        The best of each target's starts.
    """
    device = device_of(generator)
    starts = latents(range(seed, seed + restarts), generator.latent_dim).to(device)
    z = starts.repeat(count, 1)  # (count * restarts, latent_dim), the starts of a target beside each other
    each = restarts
    for stage in range(STAGES):
        which = torch.arange(count, device=device).repeat_interleave(each)
        z = z.detach().requires_grad_()
        adam = torch.optim.Adam([z], lr=0.0, betas=(0.9, 0.99))  # the rate is set before each step
        stage_steps = steps // STAGES + (stage < steps % STAGES)
        for step in range(stage_steps):
            done = (stage + step / stage_steps) / STAGES
            adam.param_groups[0]["lr"] = 0.01 + 0.14 * (1 + math.cos(math.pi * done)) / 2
            total = _loss(generator, discriminator, data_loss, z, which, prior)
            (z.grad,) = torch.autograd.grad(total.sum(), z)
            adam.step()
            advance(1)
        with torch.no_grad():
            total = _loss(generator, discriminator, data_loss, z, which, prior).view(count, each)
            each = max(1, each // 2) if stage < STAGES - 1 else 1
            best = total.topk(each, dim=1, largest=False).indices  # (count, each)
            z = z.view(count, -1, z.shape[1]).gather(1, best[..., None].expand(-1, -1, z.shape[1])).flatten(0, 1)
    loss = total.gather(1, best).flatten()
    return Inversion(z.detach(), generate(generator, z.detach()), loss)


def _loss(
    generator: AnyGenerator,
    discriminator: AnyDiscriminator,
    data_loss: DataLoss,
    z: Tensor,
    which: Tensor,
    prior: float,
) -> Tensor:
    """The loss of each latent: (M,)."""
    pictures = generator(z)
    loss = data_loss(pictures, which)
    if prior > 0:
        loss = loss + prior * (F.softplus(-discriminator(pictures)) + z.square().mean(1) / 2)
    return loss
