"""The specification: the classic DCGAN networks and the classic training step, eager, as a textbook would print them.

Radford, Metz and Chintala, "Unsupervised representation learning with deep convolutional generative adversarial
networks", 2016 (https://arxiv.org/abs/1511.06434). Parameter names and, at 64x64, the architecture are those of the
widely used PyTorch example, so `netG.pth` and `netD.pth` load here and ours load there. The fast networks and
the fast step are tested against this file.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdcgan.image_size import stages

MAX_MULTIPLIER = 16  # widths double at every halving of the image up to here, so 256 pixels stay affordable


class Generator(nn.Module):
    """Latent vector to image.

    A transposed convolution projects the latent to the base grid (4 to 7 pixels a side); each stage then doubles the
    grid with a strided transposed convolution, BatchNorm and ReLU; the last one ends in Tanh.

    Args:
        image_size: pixels, a side or (height, width); each b * 2^k with b in 4..7 and one k for both.
        channels: of the image.
        latent_dim: length of the latent vector.
        width: channels of the last hidden layer; they double towards the base grid, up to 16 times.

    Raises:
        ValueError: an impossible image size, with the nearest possible ones.
    """

    def __init__(
        self, image_size: int | tuple[int, int] = 64, channels: int = 3, latent_dim: int = 100, width: int = 64
    ) -> None:
        super().__init__()
        self.image_size, self.channels, self.latent_dim, self.width = _pair(image_size), channels, latent_dim, width
        base, widths = _plan(self.image_size, width)
        layers: list[nn.Module] = [nn.ConvTranspose2d(latent_dim, widths[-1], base, bias=False)]
        for wide, narrow in zip(widths[::-1], [*widths[-2::-1], channels], strict=True):
            layers += [nn.BatchNorm2d(wide), nn.ReLU(), nn.ConvTranspose2d(wide, narrow, 4, 2, 1, bias=False)]
        self.main = nn.Sequential(*layers, nn.Tanh())
        self.apply(_init)

    def forward(self, latent: Tensor) -> Tensor:
        """Latent (N, latent_dim) or (N, latent_dim, 1, 1), N(0, 1) -> images (N, channels, height, width) in -1..1."""
        return self.main(latent.view(len(latent), self.latent_dim, 1, 1))


class Discriminator(nn.Module):
    """Image to one logit: strided convolutions, LeakyReLU 0.2, BatchNorm except in the first and last layer.

    Args and errors as in `Generator`; `width` is the first layer's.
    """

    def __init__(self, image_size: int | tuple[int, int] = 64, channels: int = 3, width: int = 64) -> None:
        super().__init__()
        self.image_size, self.channels, self.width = _pair(image_size), channels, width
        base, widths = _plan(self.image_size, width)
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
        for narrow, wide in pairwise(widths):
            layers += [nn.Conv2d(narrow, wide, 4, 2, 1, bias=False), nn.BatchNorm2d(wide), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, base, bias=False))
        self.apply(_init)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, channels, height, width) in -1..1 -> logits (N,): positive means real."""
        return self.main(images).view(-1)


class TutorialGenerator(nn.Module):
    """The fully connected generator many tutorials print for 28x28 digits: z -> 256 -> 512 -> 1024 -> pixels."""

    def __init__(self, channels: int = 1, latent_dim: int = 100) -> None:
        super().__init__()
        self.image_size, self.channels, self.latent_dim = (28, 28), channels, latent_dim
        self.main = nn.Sequential(
            nn.Linear(latent_dim, 256),
            nn.ReLU(),
            nn.Linear(256, 512),
            nn.ReLU(),
            nn.Linear(512, 1024),
            nn.ReLU(),
            nn.Linear(1024, channels * 28 * 28),
            nn.Tanh(),
            nn.Unflatten(1, (channels, 28, 28)),
        )

    def forward(self, latent: Tensor) -> Tensor:
        """Latent (N, latent_dim) or (N, latent_dim, 1, 1) -> images (N, channels, 28, 28) in -1..1."""
        return self.main(latent.view(len(latent), self.latent_dim))


class TutorialDiscriminator(nn.Module):
    """The tutorials' 28x28 discriminator: two strided convolutions (64, 128), LeakyReLU, one linear layer."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.image_size, self.channels = (28, 28), channels
        self.main = nn.Sequential(
            nn.Conv2d(channels, 64, 3, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(64, 128, 3, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(128 * 7 * 7, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, channels, 28, 28) in -1..1 -> logits (N,): positive means real."""
        return self.main(images).view(-1)


def adam(network: nn.Module, lr: float = 2e-4, betas: tuple[float, float] = (0.5, 0.999)) -> torch.optim.Adam:
    """The paper's optimizer for one network."""
    return torch.optim.Adam(network.parameters(), lr=lr, betas=betas)


def reference_step(
    generator: nn.Module,
    discriminator: nn.Module,
    optimizer_g: torch.optim.Optimizer,
    optimizer_d: torch.optim.Optimizer,
    real: Tensor,
    noise: Tensor,
) -> dict[str, float]:
    """One alternating update of both networks in training mode (Goodfellow et al. 2014, non-saturating loss).

    Args:
        real: images (N, C, H, W) in -1..1.
        noise: latents (N, latent_dim).

    Returns:
        loss_d and loss_g (nats), d_real and d_fake (mean probability the discriminator gave, before its update).
    """
    ones, zeros = real.new_ones(len(real)), real.new_zeros(len(real))

    optimizer_d.zero_grad()
    logits_real = discriminator(real)
    loss_real = F.binary_cross_entropy_with_logits(logits_real, ones)
    loss_real.backward()
    fake = generator(noise)
    logits_fake = discriminator(fake.detach())
    loss_fake = F.binary_cross_entropy_with_logits(logits_fake, zeros)
    loss_fake.backward()
    optimizer_d.step()

    optimizer_g.zero_grad()
    loss_g = F.binary_cross_entropy_with_logits(discriminator(fake), ones)
    loss_g.backward()
    optimizer_g.step()

    return {
        "loss_d": (loss_real + loss_fake).item(),
        "loss_g": loss_g.item(),
        "d_real": logits_real.sigmoid().mean().item(),
        "d_fake": logits_fake.sigmoid().mean().item(),
    }


def _pair(image_size: int | tuple[int, int]) -> tuple[int, int]:
    return (image_size, image_size) if isinstance(image_size, int) else image_size


def _plan(image_size: tuple[int, int], width: int) -> tuple[tuple[int, int], list[int]]:
    """Base grid (height, width) and the channels of every stage, from the one next to the image inwards."""
    k = stages(*image_size)
    return (image_size[0] >> k, image_size[1] >> k), [width * min(2**i, MAX_MULTIPLIER) for i in range(k)]


def _init(module: nn.Module) -> None:
    """Weights N(0, 0.02), BatchNorm scale N(1, 0.02) and shift 0 (the paper's section 4)."""
    if next(module.parameters(recurse=False), torch.empty(0)).is_meta:
        return  # there is nothing to fill, for which torch would import its compiler
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
