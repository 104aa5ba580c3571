"""The reference against the networks of the widely used PyTorch example, written out here by hand, and by formula."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastdcgan import reference

Weights = dict[str, torch.Tensor]


def example_generator(nz: int, ngf: int, nc: int) -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(nz, ngf * 8, 4, 1, 0, bias=False),
        nn.BatchNorm2d(ngf * 8),
        nn.ReLU(True),
        nn.ConvTranspose2d(ngf * 8, ngf * 4, 4, 2, 1, bias=False),
        nn.BatchNorm2d(ngf * 4),
        nn.ReLU(True),
        nn.ConvTranspose2d(ngf * 4, ngf * 2, 4, 2, 1, bias=False),
        nn.BatchNorm2d(ngf * 2),
        nn.ReLU(True),
        nn.ConvTranspose2d(ngf * 2, ngf, 4, 2, 1, bias=False),
        nn.BatchNorm2d(ngf),
        nn.ReLU(True),
        nn.ConvTranspose2d(ngf, nc, 4, 2, 1, bias=False),
        nn.Tanh(),
    )


def example_discriminator(ndf: int, nc: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(nc, ndf, 4, 2, 1, bias=False),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(ndf, ndf * 2, 4, 2, 1, bias=False),
        nn.BatchNorm2d(ndf * 2),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(ndf * 2, ndf * 4, 4, 2, 1, bias=False),
        nn.BatchNorm2d(ndf * 4),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(ndf * 4, ndf * 8, 4, 2, 1, bias=False),
        nn.BatchNorm2d(ndf * 8),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(ndf * 8, 1, 4, 1, 0, bias=False),
        nn.Sigmoid(),
    )


def test_agrees_with_the_example_at_its_size() -> None:
    ours, theirs = reference.Generator(64, 3, 100, 8), nn.Module()
    theirs.main = example_generator(100, 8, 3)
    theirs.load_state_dict(ours.state_dict())  # strict: the same names and shapes
    noise = torch.randn(4, 100, 1, 1)
    images = ours(noise)
    assert torch.equal(images, theirs.main(noise))
    critic, example = reference.Discriminator(64, 3, 8), nn.Module()
    example.main = example_discriminator(8, 3)
    example.load_state_dict(critic.state_dict())
    assert torch.equal(critic(images).sigmoid(), example.main(images).view(-1))


@pytest.mark.parametrize("size", [8, 28, 32, 48, (64, 96), (56, 40)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_any_size_and_channels(size: int | tuple[int, int], channels: int) -> None:
    generator = reference.Generator(size, channels, latent_dim=7, width=4)
    images = generator(torch.randn(2, 7))
    assert images.shape == (2, channels, *((size, size) if isinstance(size, int) else size))
    assert reference.Discriminator(size, channels, width=4)(images).shape == (2,)
    assert not any(isinstance(layer, nn.MaxPool2d | nn.AvgPool2d) for layer in generator.modules())


def test_widths_double_inwards_up_to_sixteen_times() -> None:
    weights = [p for p in reference.Generator(256, width=2).parameters() if p.ndim == 4]
    assert [w.shape[1] for w in weights] == [32, 32, 16, 8, 4, 2, 3]


def test_initial_weights() -> None:
    network = reference.Generator(64)
    wide = network.main[3].weight
    assert abs(wide.mean()) < 1e-4 and abs(wide.std() - 0.02) < 1e-4  # 2 million draws
    scale = torch.cat([m.weight for m in network.modules() if isinstance(m, nn.BatchNorm2d)])
    assert abs(scale.mean() - 1) < 4e-3 and abs(scale.std() - 0.02) < 3e-3  # 960 draws
    assert all((m.bias == 0).all() for m in network.modules() if isinstance(m, nn.BatchNorm2d))


def test_tutorial_pair() -> None:
    generator, discriminator = reference.TutorialGenerator(1, 16), reference.TutorialDiscriminator(1)
    assert [m.out_features for m in generator.main if isinstance(m, nn.Linear)] == [256, 512, 1024, 784]
    convs = [m for m in discriminator.main if isinstance(m, nn.Conv2d)]
    assert [(m.out_channels, m.kernel_size, m.stride) for m in convs] == [(64, (3, 3), (2, 2)), (128, (3, 3), (2, 2))]
    images = generator(torch.randn(3, 16, 1, 1))
    assert images.shape == (3, 1, 28, 28) and images.abs().max() <= 1
    assert discriminator(images).shape == (3,)


def test_the_step_is_the_published_one() -> None:
    """Against a second derivation: the value function as printed in the paper, Adam's first step by its formula."""

    def gradients(function: Callable[[Weights], torch.Tensor], at: Weights) -> Weights:
        leaves = {name: value.clone().requires_grad_() for name, value in at.items()}
        return dict(zip(leaves, torch.autograd.grad(function(leaves), list(leaves.values())), strict=True))

    torch.set_default_dtype(torch.float64)
    try:
        g, d = reference.Generator(8, 1, 3, 2), reference.Discriminator(8, 1, 2)
        real, noise = torch.rand(4, 1, 8, 8) * 2 - 1, torch.randn(4, 3)
        before_g, before_d = ({n: p.detach().clone() for n, p in net.named_parameters()} for net in (g, d))

        def logits(net_d: Weights, x: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(d, (net_d, {}), x)

        def value(net_d: Weights) -> torch.Tensor:  # Goodfellow et al., equation 1, negated
            fake = torch.func.functional_call(g, (before_g, {}), noise)
            return -(logits(net_d, real).sigmoid().log() + (1 - logits(net_d, fake).sigmoid()).log()).mean()

        grad_d = gradients(value, before_d)
        # Adam's first step is lr * g / (|g| + eps), whatever the betas.
        after_d = {n: p - 2e-4 * grad_d[n] / (grad_d[n].abs() + 1e-8) for n, p in before_d.items()}

        def generator_value(net_g: Weights) -> torch.Tensor:
            return -logits(after_d, torch.func.functional_call(g, (net_g, {}), noise)).sigmoid().log().mean()

        grad_g = gradients(generator_value, before_g)
        after_g = {n: p - 2e-4 * grad_g[n] / (grad_g[n].abs() + 1e-8) for n, p in before_g.items()}
        losses = reference.reference_step(g, d, reference.adam(g), reference.adam(d), real, noise)
        for net, expected in ((d, after_d), (g, after_g)):
            for name, parameter in net.named_parameters():
                torch.testing.assert_close(parameter, expected[name], rtol=1e-9, atol=1e-12)
        assert losses["loss_d"] == pytest.approx(value(before_d).item(), rel=1e-9)
        assert losses["d_real"] == pytest.approx(F.sigmoid(logits(before_d, real)).mean().item(), rel=1e-9)
    finally:
        torch.set_default_dtype(torch.float32)
