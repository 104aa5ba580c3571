"""Adversarial losses on logits. Each pair takes logits (N,) and returns a scalar in the logits' dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Objective:
    """What each network minimises: `discriminator(logits_real, logits_fake)` and `generator(logits_fake)`.

    `output` makes of logits what the metrics show as D(x) and D(G(z)): a probability for bce, else the logits.
    """

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]
    output: Callable[[Tensor], Tensor] = torch.sigmoid


def make_objective(loss: str, label_smoothing: float = 0.0) -> Objective:
    """The objective called `loss`, a key of OBJECTIVES.

    Args:
        label_smoothing: s, at least 0 and below 1: real images have the target 1 - s (Salimans et al. 2016, section
            3.4: one-sided); for "bce" and "lsgan", the losses with targets.

    Raises:
        ValueError: there is no such loss; label_smoothing for another one, or out of range.
    """
    if loss not in OBJECTIVES:
        raise ValueError(f"there is no loss {loss!r}: {', '.join(OBJECTIVES)}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is at least 0 and below 1, not {label_smoothing}")
    if label_smoothing == 0:
        return OBJECTIVES[loss]
    smoothed = {"bce": _bce_discriminator, "lsgan": _lsgan_discriminator}
    if loss not in smoothed:
        raise ValueError(f"label_smoothing needs a loss with targets, bce or lsgan, not {loss}")
    return Objective(
        partial(smoothed[loss], smoothing=label_smoothing), OBJECTIVES[loss].generator, OBJECTIVES[loss].output
    )


def _bce_discriminator(real: Tensor, fake: Tensor, smoothing: float = 0.0) -> Tensor:
    """-log(sigmoid(x)) = softplus(-x). The target 1 - s instead of 1 adds s * (softplus(x) - softplus(-x)) = s * x."""
    loss = F.softplus(-real).mean() + F.softplus(fake).mean()
    return loss + smoothing * real.mean() if smoothing else loss


def _bce_generator(fake: Tensor) -> Tensor:
    return F.softplus(-fake).mean()  # the non-saturating loss


def _hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def _lsgan_discriminator(real: Tensor, fake: Tensor, smoothing: float = 0.0) -> Tensor:
    return (real - (1 - smoothing)).square().mean() / 2 + fake.square().mean() / 2


def _lsgan_generator(fake: Tensor) -> Tensor:
    return (fake - 1).square().mean() / 2


def _critic(real: Tensor, fake: Tensor) -> Tensor:
    return fake.mean() - real.mean()


def _minus_mean(fake: Tensor) -> Tensor:
    return -fake.mean()


def _as_it_is(logits: Tensor) -> Tensor:
    return logits


OBJECTIVES = {
    "bce": Objective(_bce_discriminator, _bce_generator),  # Goodfellow et al. 2014, section 3
    "hinge": Objective(_hinge_discriminator, _minus_mean, _as_it_is),  # Lim and Ye 2017; Miyato et al. 2018, eq. 16
    "lsgan": Objective(_lsgan_discriminator, _lsgan_generator, _as_it_is),  # Mao et al. 2017, eq. 9
    "wgan-gp": Objective(_critic, _minus_mean, _as_it_is),  # Gulrajani et al. 2017, without its penalty
}
