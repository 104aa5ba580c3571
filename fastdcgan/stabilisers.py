"""What keeps the two networks in balance, each off unless asked for: what the discriminator sees, how steep it is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

REAL, FAKE, FAKE_AGAIN = range(3)  # the views of one update: D's two, and G's
GP_WEIGHT = 10.0  # lambda of Gulrajani et al. 2017

TRANSLATION, CUTOUT = 0.125, 0.5  # of a side: Zhao et al. 2020
DRAWS = 7  # random numbers an image: brightness, saturation, contrast, two of the shift, two of the hole


class Views:
    """What the discriminator sees in place of images: augmented, then under noise, with new draws for each view.

    Args:
        images: (B, C, H, W), an example of a batch, whose device and dtype the buffers have (`draws` float32 at least).
        augment: DiffAugment (`diff_augment`).
        noise: instance noise (Sonderby et al. 2017; Arjovsky and Bottou 2017); `level`, a () tensor, is its deviation.
    """

    def __init__(self, images: Tensor, *, augment: bool, noise: bool) -> None:
        # bfloat16 has too few numbers in 0..1 for the places in a large image.
        exact = torch.promote_types(images.dtype, torch.float32)
        self.draws = images.new_zeros(3, len(images), DRAWS, dtype=exact) if augment else None
        # (3, B, H, W, C): where a tensor does not lie as its shape says, a CPU draws normal numbers one by one.
        self.noise = images.new_zeros(3, *images.permute(0, 2, 3, 1).shape) if noise else None
        self.level = images.new_zeros(())

    def draw(self, rng: torch.Generator) -> None:
        """New random numbers for the three views of an update."""
        if self.draws is not None:
            self.draws.uniform_(generator=rng)
        if self.noise is not None:
            self.noise.normal_(generator=rng)

    def see(self, images: Tensor, view: int) -> Tensor:
        """Images (B, C, H, W) as one view (REAL, FAKE or FAKE_AGAIN) shows them; differentiable."""
        if self.draws is not None:
            images = diff_augment(images, self.draws[view])
        if self.noise is not None:
            images = images + self.level * self.noise[view].permute(0, 3, 1, 2)
        return images


def diff_augment(images: Tensor, draws: Tensor) -> Tensor:
    """Colour, translation and cutout that gradients pass through: Zhao et al. 2020, "DiffAugment",
    with the ranges of their code.

    Args:
        images: (B, C, H, W).
        draws: (B, DRAWS), uniform in 0..1.
    """
    brightness, saturation, contrast, *places = (draw[:, None, None, None] for draw in draws.unbind(1))
    brightness, saturation, contrast = (colour.to(images.dtype) for colour in (brightness, saturation, contrast))
    images = images + (brightness - 0.5)
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * (2 * saturation) + grey
    mean = images.mean((1, 2, 3), keepdim=True)
    images = (images - mean) * (contrast + 0.5) + mean

    hole = torch.ones((), dtype=torch.bool, device=images.device)
    for axis, shift, centre in ((2, places[0], places[2]), (3, places[1], places[3])):
        side = images.shape[axis]
        at = torch.arange(side, device=images.device).view([-1 if i == axis else 1 for i in range(4)])
        most = int(side * TRANSLATION + 0.5)
        source = at + (_whole(shift, 2 * most + 1) - most)
        # What comes in from outside is 0. No pixel is taken twice with a weight: the gradient has one term for each.
        inside = (source >= 0) & (source < side)
        images = images.gather(axis, source.clamp(0, side - 1).expand_as(images)) * inside
        width = int(side * CUTOUT + 0.5)
        start = _whole(centre, side + 1 - width % 2) - width // 2
        hole = hole & (at >= start) & (at < start + width)
    return (images * ~hole).contiguous(memory_format=torch.channels_last)


def _whole(uniform: Tensor, count: int) -> Tensor:
    """Uniform in 0..1 -> a whole number of 0..count - 1."""
    return (uniform.float() * count).long().clamp(max=count - 1)


class SpectralNorm:
    """Miyato et al. 2018: each weight matrix divided by its largest singular value, which power iteration follows.

    The weights that the optimizer moves stay as they are under their plain names; `normalised` gives those to compute
    with. BatchNorm's scales stay free.

    Args:
        parameters: of the network, by name; those with two dimensions or more are normalised, as (rows, the rest).
    """

    FIRST_ITERATIONS = 15  # from a random start

    def __init__(self, parameters: Mapping[str, Tensor], rng: torch.Generator) -> None:
        self.parameters = {name: p for name, p in parameters.items() if p.dim() > 1}
        self.left, self.right = {}, {}
        for name, weight in self.parameters.items():
            exact = torch.promote_types(weight.dtype, torch.float32)
            rows, columns = weight.flatten(1).shape
            left = torch.empty(rows, device=weight.device, dtype=exact).normal_(generator=rng)
            self.left[name] = F.normalize(left, dim=0)
            self.right[name] = torch.zeros(columns, device=weight.device, dtype=exact)
        for _ in range(self.FIRST_ITERATIONS):
            self.advance()

    @torch.no_grad()
    def advance(self) -> None:
        """One power iteration for every weight."""
        for name, weight in self.parameters.items():
            left, right = self.left[name], self.right[name]
            matrix = weight.flatten(1).to(left.dtype)
            right.copy_(F.normalize(matrix.t() @ left, dim=0))
            left.copy_(F.normalize(matrix @ right, dim=0))

    def normalised(self, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The network's weights (or their full-precision masters), each over its singular value, which has a gradient.

        The singular vectors are constants, as in the paper's gradient (equation 12).
        """
        weights = self.parameters if weights is None else weights
        found = {}
        for name in self.parameters:
            exact = weights[name].to(self.left[name].dtype)
            sigma = self.left[name] @ (exact.flatten(1) @ self.right[name])
            found[name] = (exact / sigma).to(weights[name].dtype)
        return found

    def state(self) -> dict[str, Tensor]:
        """The singular vectors by name: the tensors themselves."""
        left = {f"left.{name}": value for name, value in self.left.items()}
        return left | {f"right.{name}": value for name, value in self.right.items()}


def r1_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """Half the mean squared gradient of D at real images: Mescheder et al. 2018, eq. 9, for gamma 1.

    Args:
        logits: (N,), computed from `images`.
        images: (N, C, H, W), requiring a gradient.

    Returns:
        a scalar, differentiable in the discriminator's weights, float32 at least.
    """
    return _gradients(logits, images).square().sum(1).mean() / 2


def gradient_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """How far the gradient's norm is from 1: Gulrajani et al. 2017, eq. 3, for lambda 1; arguments as `r1_penalty`."""
    norms = (_gradients(logits, images).square().sum(1) + 1e-12).sqrt()  # whose derivative at 0 is finite
    return (norms - 1).square().mean()


def _gradients(logits: Tensor, images: Tensor) -> Tensor:
    with torch.autograd.set_multithreading_enabled(False):  # as in `Adam.update`
        (gradients,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradients.to(torch.promote_types(gradients.dtype, torch.float32)).flatten(1)
