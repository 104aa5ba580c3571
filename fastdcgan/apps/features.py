"""What the discriminator sees: the activations of each of its layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdcgan.apps.trained import device_of
from fastdcgan.models import AnyDiscriminator, BatchNormAct2d, Discriminator, ImageConv, TutorialDiscriminator


def activations(discriminator: AnyDiscriminator, images: Tensor) -> list[Tensor]:
    """The output of each convolution stage, after its activation, from the image inwards.

    Args:
        discriminator: in evaluation mode.
        images: (N, C, H, W) in -1..1, of the discriminator's size or (for its convolutions do not mind) any other
            that is at least as large.

    Returns:
        (N, width of the stage, H / 2^i, W / 2^i) for stages i = 1, 2, ...
    """
    found, x = [], images
    for layer in list(discriminator.main)[:-1]:
        x = layer(x)
        if isinstance(layer, nn.LeakyReLU | BatchNormAct2d | ImageConv):
            found.append(x)
    return found


def untrained(discriminator: AnyDiscriminator, images: Tensor) -> AnyDiscriminator:
    """The same architecture with initial weights, always the same ones.

    Args:
        images: (N, C, H, W) in -1..1, which its BatchNorm statistics are taken from.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # and no GPU's
        if isinstance(discriminator, Discriminator):
            fresh: AnyDiscriminator = Discriminator(
                discriminator.image_size, discriminator.channels, discriminator.width
            )
        else:
            fresh = TutorialDiscriminator(discriminator.channels)
    fresh.to(device_of(discriminator)).requires_grad_(False)
    for layer in fresh.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    fresh(images.to(device_of(discriminator)))
    return fresh.eval()
