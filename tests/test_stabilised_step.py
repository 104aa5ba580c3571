"""Whole updates with stabilisers against the same written out as their papers print them, network by network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from fastdcgan import models, reference
from fastdcgan.step import TrainStep

BATCH, SIZE, STEPS = 6, 16, 5
RATES = (1e-3, 4e-4)  # of G and of D

OPTIONS: dict[str, dict[str, Any]] = {
    "hinge": {"loss": "hinge"},
    "lsgan": {"loss": "lsgan", "label_smoothing": 0.2},
    "smoothing": {"label_smoothing": 0.1},
    "spectral": {"spectral_norm": True},
    "diffaugment": {"diffaugment": True},
    "noise and decay": {"instance_noise": 0.3, "lr_decay": True},
    "r1 of what D sees": {"r1": 5.0, "r1_every": 2, "diffaugment": True, "instance_noise": 0.1},
    "penalty of what D sees": {"loss": "wgan-gp", "diffaugment": True, "instance_noise": 0.1},
    "all": {
        "loss": "wgan-gp",
        "spectral_norm": True,
        "r1": 1.0,
        "r1_every": 3,
        "diffaugment": True,
        "instance_noise": 0.1,
        "lr_decay": True,
    },
}


class Textbook:
    """The update in the reference's networks and torch's Adam, with the random numbers that the fast step drew."""

    def __init__(self, step: TrainStep, options: dict[str, Any]) -> None:
        self.step, self.options = step, options
        self.g, self.d = reference.Generator(SIZE, 3, 8, 4).double(), reference.Discriminator(SIZE, 3, 4).double()
        self.g.load_state_dict(step.generator.state_dict())
        self.d.load_state_dict(step.discriminator.state_dict())
        self.adams = [reference.adam(net, lr) for net, lr in zip((self.g, self.d), RATES, strict=True)]
        self.left = {name: vector.clone() for name, vector in step.spectral.left.items()} if step.spectral else {}
        self.right: dict[str, Tensor] = {}

    def update(self, number: int) -> None:
        """As `step.update` has just done."""
        left = 1 - number / STEPS  # of the run
        for adam, rate in zip(self.adams, RATES, strict=True):
            adam.param_groups[0]["lr"] = rate * left if self.options.get("lr_decay") else rate
        for name, vector in self.left.items():  # power iteration, Miyato et al. 2018, algorithm 1
            matrix = self.d.get_parameter(name).detach().flatten(1)
            self.right[name] = F.normalize(matrix.t() @ vector, dim=0)
            self.left[name] = F.normalize(matrix @ self.right[name], dim=0)
        real = self.step.source[self.step.index].permute(0, 3, 1, 2).double() / 127.5 - 1
        fake = self.g(self.step.noise)
        seen, seen_fake = self.see(real, 0, left), self.see(fake.detach(), 1, left)

        x, y = self.discriminate(seen), self.discriminate(seen_fake)
        target = 1 - self.options.get("label_smoothing", 0.0)
        ones, zeros = torch.ones_like(x), torch.zeros_like(x)
        bce = F.binary_cross_entropy_with_logits
        loss = {
            "bce": lambda: bce(x, target * ones) + bce(y, zeros),
            "hinge": lambda: (1 - x).clamp(min=0).mean() + (1 + y).clamp(min=0).mean(),
            "lsgan": lambda: ((x - target) ** 2).mean() / 2 + (y**2).mean() / 2,
            "wgan-gp": lambda: y.mean() - x.mean(),
        }[self.options.get("loss", "bce")]()
        if self.options.get("loss") == "wgan-gp":  # Gulrajani et al. 2017, eq. 3
            assert self.step.interpolation is not None
            between = seen_fake + self.step.interpolation * (seen - seen_fake)
            loss = loss + 10 * ((self.slope(between).norm(dim=1) - 1) ** 2).mean()
        every = self.options.get("r1_every", 1)
        if self.options.get("r1") and number % every == 0:  # Mescheder et al. 2018, eq. 9, seldom and so much heavier
            loss = loss + every * self.options["r1"] / 2 * (self.slope(seen) ** 2).sum(1).mean()
        self.adams[1].zero_grad()
        loss.backward()
        self.adams[1].step()

        z = self.discriminate(self.see(fake, 2, left))
        loss = {"bce": lambda: bce(z, ones), "lsgan": lambda: ((z - 1) ** 2).mean() / 2}.get(
            self.options.get("loss", "bce"), lambda: -z.mean()
        )()
        self.adams[0].zero_grad()
        loss.backward()
        self.adams[0].step()

    def see(self, images: Tensor, view: int, left: float) -> Tensor:
        views = self.step.views
        if views.draws is not None:
            images = torch.stack([augmented(*each) for each in zip(images, views.draws[view], strict=True)])
        if views.noise is not None:
            images = images + self.options["instance_noise"] * left * views.noise[view].permute(0, 3, 1, 2)
        return images

    def discriminate(self, images: Tensor, aside: bool = False) -> Tensor:
        """Logits; `aside` leaves the running statistics alone."""
        weights = {
            name: weight / (self.left[name] @ weight.flatten(1) @ self.right[name])
            for name, weight in self.d.named_parameters()
            if name in self.left
        }
        buffers = {name: buffer.clone() for name, buffer in self.d.named_buffers()} if aside else {}
        return functional_call(self.d, weights | buffers, (images,))

    def slope(self, images: Tensor) -> Tensor:
        """(N, values of an image): D's gradient there."""
        at = images.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.discriminate(at, aside=True).sum(), at, create_graph=True)
        return slope.flatten(1)


def augmented(image: Tensor, draws: Tensor) -> Tensor:
    """DiffAugment of one image (C, H, W), pixel by pixel: Zhao et al. 2020, and their code for the ranges."""
    _, height, width = image.shape
    image = image + draws[0] - 0.5
    image = (image - image.mean(0)) * draws[1] * 2 + image.mean(0)
    image = (image - image.mean()) * (draws[2] + 0.5) + image.mean()
    moved = torch.zeros_like(image)
    most = int(SIZE * 0.125 + 0.5)
    down, right = (int(draw * (2 * most + 1)) - most for draw in draws[3:5])
    for y in range(height):
        for x in range(width):
            if 0 <= y + down < height and 0 <= x + right < width:
                moved[:, y, x] = image[:, y + down, x + right]
    hole = int(SIZE * 0.5 + 0.5)
    top, edge = (int(draw * (SIZE + 1 - hole % 2)) - hole // 2 for draw in draws[5:7])
    mask = torch.ones_like(image)
    mask[:, max(top, 0) : max(top + hole, 0), max(edge, 0) : max(edge + hole, 0)] = 0
    return moved * mask


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_updates_are_those_of_the_papers(options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    generator, discriminator = models.Generator(SIZE, 3, 8, 4).double(), models.Discriminator(SIZE, 3, 4).double()
    source = torch.randint(0, 256, (20, SIZE, SIZE, 3), dtype=torch.uint8)
    index = torch.arange(BATCH)
    rates = dict(zip(("lr_g", "lr_d"), RATES, strict=True))
    step = TrainStep(generator, discriminator, source, index, **rates, **options)
    textbook = Textbook(step, options)
    for number in range(STEPS):
        index.copy_(torch.randint(0, 20, (BATCH,)))
        step.set_schedules(number / STEPS)
        step.update()
        textbook.update(number)
    for kind, network in (("generator", textbook.g), ("discriminator", textbook.d)):
        for name, value in network.state_dict().items():
            found = step.learned_weights()[kind][name]
            # float64, but for Adam's first steps, which divide by gradients' size: 1e-9 of five steps of 1e-3.
            torch.testing.assert_close(found, value, rtol=1e-7, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
