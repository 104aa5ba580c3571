"""The fast networks: the reference's parameters, names and mathematics, in fewer and wider operations.

Substitutions, layer by layer, on channels-last tensors:
- BatchNorm and the activation after it become one `batch_norm_act`, with statistics per group of the batch, and the
  generator's last one joins the layer after it, so that what is between them need not be kept;
- the convolutions between images and feature maps, one at an end of each network, become one operation with the
  activation after them: `image_conv` and `image_conv_transpose`;
- the generator's projection from a 1x1 grid, and the discriminator's last convolution onto one, become matrix products;
- on a CPU, where that is faster, so do convolutions between the smallest grids;
- on a CPU, where that is faster, convolutions in training mode are Winograd's.
Weights lie in channels-last order, so that these products need no copy of them.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastdcgan import patches, reference, winograd
from fastdcgan.kernels import (
    batch_norm_act,
    batch_norm_image_conv_transpose,
    image_conv,
    image_conv_transpose,
)
from fastdcgan.kernels.batch_norm_act import reference as batch_norm_act_reference
from fastdcgan.reference import TutorialGenerator


class BatchNormAct2d(nn.BatchNorm2d):
    """BatchNorm2d followed by LeakyReLU (slope 0 is ReLU); its parameters and buffers are BatchNorm2d's.

    With `sync` set, its statistics in training mode are those of all processes of a `torch.distributed` run.
    """

    def __init__(self, norm: nn.BatchNorm2d, negative_slope: float) -> None:
        super().__init__(norm.num_features)
        self.load_state_dict(norm.state_dict())
        self.negative_slope = negative_slope
        self.sync = False

    def forward(self, x: Tensor, groups: int = 1) -> Tensor:
        """x (N, C, H, W) -> the same shape; in training mode each of `groups` equal slices of N has its own statistics,
        and the running statistics move as if the slices had come one after another."""
        momentum = self.share(groups)
        half = self.weight.dtype in (torch.float16, torch.bfloat16)  # after .half() or .bfloat16()
        # The kernels are compiled for one momentum: for a mean over batches, which has another each time, too often.
        if (half or self.momentum is None) and not self.sync:
            return batch_norm_act_reference(
                x, *self.tensors(), self.training, momentum, self.eps, self.negative_slope, groups
            )
        return batch_norm_act(
            x,
            *self.tensors(),
            training=self.training,
            momentum=momentum,
            eps=self.eps,
            negative_slope=self.negative_slope,
            groups=groups,
            sync=self.sync,
        )

    def share(self, groups: int = 1) -> float:
        """What this batch counts for in the running statistics: `momentum`, or as much as each batch before, for None.

        Raises:
            ValueError: momentum None with several groups, which would count differently.
        """
        if self.momentum is not None:
            return self.momentum
        if groups > 1:
            raise ValueError("BatchNorm with momentum=None, a plain mean over batches, takes one group at a time")
        return 1 / max(1, int(self.num_batches_tracked or 0))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight, bias, running mean and running variance, (C,) each."""
        assert self.running_mean is not None and self.running_var is not None
        return self.weight, self.bias, self.running_mean, self.running_var


class Projection(nn.ConvTranspose2d):
    """A transposed convolution whose input is one pixel: a matrix product from latent to base grid."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """x (N, C_in, 1, 1) -> (N, C_out, base height, base width), channels-last."""
        c_in, c_out, height, width = self.weight.shape
        grid = x.flatten(1) @ self.weight.permute(0, 2, 3, 1).reshape(c_in, -1)
        return grid.view(-1, height, width, c_out).permute(0, 3, 1, 2)


class Logit(nn.Conv2d):
    """A convolution whose output is one pixel: a matrix product from base grid to logit."""

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, base height, base width), channels-last -> (N, 1, 1, 1).

        Raises:
            ValueError: another grid: the discriminator's images have another size than it is for.
        """
        if x.shape[-2:] != self.weight.shape[-2:]:
            raise ValueError(f"the images end on a grid of {tuple(x.shape[-2:])}, not {tuple(self.weight.shape[-2:])}")
        return (x.permute(0, 2, 3, 1).flatten(1) @ self.weight.permute(0, 2, 3, 1).reshape(-1, 1)).view(-1, 1, 1, 1)


class Conv(nn.Conv2d):
    """k4 s2 p1, by the algorithm that is fastest."""

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C_in, 2h, 2w) -> (N, C_out, h, w); an odd side's last pixel counts as for torch."""
        height, width = x.shape[-2:]
        if height % 2 == width % 2 == 0:
            if self.training and winograd.is_faster(x, (height // 2, width // 2), self.in_channels):
                return winograd.conv2d(x, self.weight)
            if patches.are_faster(x, width // 2):
                return patches.conv2d(x, self.weight)
        return super().forward(x)


class ConvTranspose(nn.ConvTranspose2d):
    """Transposed k4 s2 p1, by the algorithm that is fastest."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """x (N, C_in, h, w) -> (N, C_out, 2h, 2w)."""
        height, width = x.shape[-2:]
        if self.training and winograd.is_faster(x, (height, width), self.out_channels):
            return winograd.conv_transpose2d(x, self.weight)
        if patches.are_faster(x, width):
            return patches.conv_transpose2d(x, self.weight)
        return super().forward(x)


class ImageConv(nn.Conv2d):
    """The discriminator's first convolution, k4 s2 p1, with its LeakyReLU."""

    def forward(self, x: Tensor) -> Tensor:
        """x (N, channels, 2h, 2w) -> (N, C_out, h, w)."""
        return image_conv(x, as_autocast_has(self.weight, x), negative_slope=0.2)


class ImageConvTranspose(nn.ConvTranspose2d):
    """The generator's last convolution, transposed k4 s2 p1, with its tanh."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """x (N, C_in, h, w) -> (N, channels, 2h, 2w) in -1..1."""
        return image_conv_transpose(x, as_autocast_has(self.weight, x))

    def after(self, norm: BatchNormAct2d, x: Tensor) -> Tensor:
        """The same of norm(x), in training mode without keeping that."""
        plain = norm.training and not norm.sync and norm.weight.dtype == torch.float32 and norm.momentum is not None
        if not plain or _hooked(norm) or _hooked(self):
            return self(norm(x))
        return batch_norm_image_conv_transpose(
            x,
            *norm.tensors(),
            as_autocast_has(self.weight, x),
            momentum=norm.share(),
            eps=norm.eps,
            negative_slope=norm.negative_slope,
        )


class Fused(nn.Identity):
    """Holds the place of an activation that the layer before it computes."""


class Generator(reference.Generator):
    __doc__ = reference.Generator.__doc__

    def __init__(
        self, image_size: int | tuple[int, int] = 64, channels: int = 3, latent_dim: int = 100, width: int = 64
    ) -> None:
        super().__init__(image_size, channels, latent_dim, width)
        _fuse(self.main)
        self.main[0].__class__ = Projection
        self.main[-2].__class__ = ImageConvTranspose
        self.main[-1] = Fused()
        self.to(memory_format=torch.channels_last)

    def forward(self, latent: Tensor) -> Tensor:
        check_fused(self.main)
        count_batches(self.main, 1)
        x = latent.view(len(latent), self.latent_dim, 1, 1)
        *layers, norm, _, conv, _ = self.main
        for layer in layers:
            x = layer(x)
        assert isinstance(norm, BatchNormAct2d) and isinstance(conv, ImageConvTranspose)
        return conv.after(norm, x)


class Discriminator(reference.Discriminator):
    __doc__ = reference.Discriminator.__doc__

    def __init__(self, image_size: int | tuple[int, int] = 64, channels: int = 3, width: int = 64) -> None:
        super().__init__(image_size, channels, width)
        _fuse(self.main)
        self.main[0].__class__ = ImageConv
        self.main[1] = Fused()
        self.main[-1].__class__ = Logit
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor, groups: int = 1) -> Tensor:
        """Images (N, channels, height, width) in -1..1 -> logits (N,); `groups` as in `BatchNormAct2d`."""
        check_fused(self.main)
        count_batches(self.main, groups)
        x = images
        for layer in self.main:
            x = layer(x, groups) if isinstance(layer, BatchNormAct2d) else layer(x)
        return x.view(-1)


class TutorialDiscriminator(reference.TutorialDiscriminator):
    __doc__ = reference.TutorialDiscriminator.__doc__

    def __init__(self, channels: int = 1) -> None:
        super().__init__(channels)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor, groups: int = 1) -> Tensor:
        """Images (N, channels, 28, 28) in -1..1 -> logits (N,); without BatchNorm `groups` changes nothing."""
        return super().forward(images)


AnyGenerator = Generator | TutorialGenerator
AnyDiscriminator = Discriminator | TutorialDiscriminator


def build_generator(arch: str, image_size: tuple[int, int], channels: int, latent_dim: int, width: int) -> AnyGenerator:
    """The generator of architecture "dcgan" or "tutorial" (which has one size and no width); ValueError for others."""
    _check_arch(arch)
    if arch == "tutorial":
        return TutorialGenerator(channels, latent_dim)
    return Generator(image_size, channels, latent_dim, width)


def build_discriminator(arch: str, image_size: tuple[int, int], channels: int, width: int) -> AnyDiscriminator:
    """The discriminator of architecture "dcgan" or "tutorial"; ValueError for others."""
    _check_arch(arch)
    if arch == "tutorial":
        return TutorialDiscriminator(channels)
    return Discriminator(image_size, channels, width)


def _check_arch(arch: str) -> None:
    if arch not in ("dcgan", "tutorial"):
        raise ValueError(f"there is no architecture {arch!r}: dcgan or tutorial")


def sync_batch_norm(network: nn.Module) -> None:
    """Have the network's BatchNorm layers take their statistics over all processes."""
    for layer in network.modules():
        if isinstance(layer, BatchNormAct2d):
            layer.sync = True


def check_fused(main: nn.Sequential) -> None:
    """See that no layer was replaced whose work is done elsewhere, or which does more than its name says.

    Raises:
        TypeError: a BatchNorm, which is without its activation now, or an activation, which would not be called.
    """
    if any(isinstance(layer, _BatchNorm) and not isinstance(layer, BatchNormAct2d) for layer in main):
        raise TypeError("a BatchNormAct2d was replaced by another BatchNorm: use fastdcgan.models.sync_batch_norm")
    for layer, after in pairwise(main):
        if isinstance(layer, BatchNormAct2d | ImageConv | ImageConvTranspose) and not isinstance(after, Fused):
            raise TypeError(
                f"a {type(after).__name__} stands where {type(layer).__name__} has its activation already: layers can"
                " be exchanged in the networks of fastdcgan.reference"
            )


def count_batches(main: nn.Sequential, groups: int) -> None:
    """Move the `num_batches_tracked` of all BatchNorm layers in training mode: on a GPU one launch for them all."""
    layers = [layer for layer in main if isinstance(layer, BatchNormAct2d) and layer.training]
    counts = [layer.num_batches_tracked for layer in layers if layer.num_batches_tracked is not None]
    if counts:
        torch._foreach_add_(counts, groups)


def as_autocast_has(weight: Tensor, x: Tensor) -> Tensor:
    """The weight in the type of x where autocast is on: x is what it left the layer before, or an image."""
    on = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
    return weight.to(x.dtype) if on else weight


def _hooked(layer: nn.Module) -> bool:
    """Whether something is to be called when this layer is, such as what older spectral norms and pruning add."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def _fuse(main: nn.Sequential) -> None:
    """Replace the reference's layers by the fast ones, keeping their numbers and their parameters."""
    for i, layer in enumerate(main):
        if isinstance(layer, nn.BatchNorm2d):
            main[i] = BatchNormAct2d(layer, getattr(main[i + 1], "negative_slope", 0.0))
            main[i + 1] = Fused()
        elif isinstance(layer, nn.Conv2d):
            layer.__class__ = Conv  # only what it computes with changes
        elif isinstance(layer, nn.ConvTranspose2d):
            layer.__class__ = ConvTranspose
