"""The fast networks against the reference: names, values and gradients, in float64."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastdcgan import models, patches, reference

SIZES = [8, 28, 32, 48, 64, (64, 96)]  # base grids 4, 7, 4, 6, 4 and 4x6; 1 to 4 stages


def pair(kind: str, size: int | tuple[int, int], channels: int = 3) -> tuple[torch.nn.Module, torch.nn.Module]:
    args = (size, channels, 5, 4) if kind == "Generator" else (size, channels, 4)
    slow, fast = getattr(reference, kind)(*args).double(), getattr(models, kind)(*args).double()
    fast.load_state_dict(slow.state_dict())
    slow.load_state_dict(fast.state_dict())  # and back
    return slow, fast


def assert_same(slow: torch.nn.Module, fast: torch.nn.Module, x: torch.Tensor, **groups: int) -> None:
    xs, xf = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = torch.cat([slow(part) for part in xs.chunk(groups.get("groups", 1))])
    actual = fast(xf, **groups)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)  # float64: rounding alone
    direction = torch.randn_like(expected)
    gs = torch.autograd.grad(expected, [xs, *slow.parameters()], direction)
    gf = torch.autograd.grad(actual, [xf, *fast.parameters()], direction)
    for name, a, b in zip(["input", *dict(slow.named_parameters())], gf, gs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"gradient of {name}: {m}")
    for (name, a), b in zip(fast.named_buffers(), slow.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [1, 3])
def test_generator(size: int | tuple[int, int], channels: int) -> None:
    slow, fast = pair("Generator", size, channels)
    assert_same(slow, fast, torch.randn(6, 5, dtype=torch.float64))
    assert_same(slow.eval(), fast.eval(), torch.randn(2, 5, 1, 1, dtype=torch.float64))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("groups", [1, 2])
def test_discriminator(size: int | tuple[int, int], groups: int) -> None:
    slow, fast = pair("Discriminator", size)
    x = torch.randn(6, 3, *((size, size) if isinstance(size, int) else size), dtype=torch.float64)
    assert_same(slow, fast, x, groups=groups)
    assert_same(slow.eval(), fast.eval(), x)


@pytest.mark.parametrize("kind", ["Generator", "Discriminator"])
def test_first_weights_are_the_references(kind: str) -> None:
    states = []
    for module in (reference, models):
        torch.manual_seed(3)
        states.append(getattr(module, kind)(32, width=4).state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_weights_lie_channels_last() -> None:
    for network in (models.Generator(32, width=8), models.Discriminator(32, width=8)):
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in network.parameters() if p.ndim == 4)


def test_activations_stay_channels_last() -> None:
    seen = []
    network = models.Discriminator(64, width=4)
    for layer in network.main[:-1]:
        layer.register_forward_hook(lambda m, i, o: seen.append(o.is_contiguous(memory_format=torch.channels_last)))
    network(torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last))
    assert len(seen) == len(network.main) - 1 and all(seen)


@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (1, 2)])
def test_patches_are_the_convolutions(grid: tuple[int, int]) -> None:
    h, w = grid
    x, y = torch.randn(2, 3, 2 * h, 2 * w).double(), torch.randn(2, 5, h, w).double()
    weight = torch.randn(5, 3, 4, 4).double()
    torch.testing.assert_close(patches.conv2d(x, weight), F.conv2d(x, weight, stride=2, padding=1))
    expected = F.conv_transpose2d(y, weight, stride=2, padding=1)
    torch.testing.assert_close(patches.conv_transpose2d(y, weight), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("intel", [False, True])
def test_small_grids_are_matrix_products_where_those_are_faster(
    dtype: torch.dtype, intel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of up to 7 columns: one convolution of each network."""
    monkeypatch.setattr(patches, "FAST_SGEMM", intel)
    grids: list[int] = []
    for name, side in (("conv2d", -1), ("conv_transpose2d", 0)):
        operation = getattr(patches, name)
        monkeypatch.setattr(
            patches,
            name,
            lambda x, weight, operation=operation, side=side: (
                grids.append(x.shape[-1] >> -side),
                operation(x, weight),
            )[1],
        )
    for size, expected in ((64, [4]), (56, [7]), (48, [6]), (28, [7])):
        grids.clear()
        generator, discriminator = models.Generator(size, 3, 5, 4), models.Discriminator(size, 3, 4)
        for layer in (*generator.modules(), *discriminator.modules()):
            if isinstance(layer, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
                layer.to(dtype)
        images = generator(torch.randn(2, 5, dtype=dtype))
        by_g = grids.copy()
        grids.clear()
        discriminator(images)
        assert (by_g, grids) == ((expected, expected) if intel or dtype != torch.float32 else ([], [])), size


def test_patches_are_for_processors_alone() -> None:
    x = SimpleNamespace(is_cuda=False, dtype=torch.bfloat16)
    assert patches.are_faster(x, 4)  # type: ignore[arg-type]
    x.is_cuda = True
    assert not patches.are_faster(x, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [(66, 66), (72, 72), (70, 64), (64, 66)])
def test_images_that_end_on_the_same_grid_by_way_of_odd_sides(size: tuple[int, int], dtype: torch.dtype) -> None:
    """Patches and Winograd's tiles are of pairs of pixels; as for torch, the last of an odd side is left out."""
    slow, fast = reference.Discriminator(64, 3, 32).to(dtype), models.Discriminator(64, 3, 32).to(dtype)
    slow.load_state_dict(fast.state_dict())
    images = torch.randn(8, 3, *size, dtype=dtype)
    results = []
    for network in (slow, fast):
        x = images.clone().requires_grad_()
        logits = network(x)
        results.append((logits, torch.autograd.grad(logits.square().sum(), x)[0]))
    for expected, actual in zip(*results, strict=True):
        # In float32 a change of memory format alone moves gradients by 4e-3: signs at LeakyReLU's kink.
        assert (actual - expected).norm() < (1e-2 if dtype == torch.float32 else 1e-9) * expected.norm()


@pytest.mark.parametrize("kind", ["Generator", "Discriminator"])
def test_networks_take_part_in_torch_func(kind: str) -> None:
    """Where patches are taken: operators of our own have no such derivatives."""
    slow, fast = (network.eval() for network in pair(kind, 16))
    x = torch.randn(3, 5, dtype=torch.float64) if kind == "Generator" else torch.randn(3, 3, 16, 16).double()
    for derive in (
        lambda network: torch.func.grad(lambda x: network(x).square().sum())(x),
        lambda network: torch.func.jvp(network, (x,), (x.cos(),))[1],
        lambda network: torch.func.vmap(lambda each: network(each[None])[0])(x),
    ):
        torch.testing.assert_close(derive(fast), derive(slow), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["Generator", "Discriminator"])
def test_running_statistics_can_be_plain_means_over_batches(kind: str) -> None:
    """As torch.optim.swa_utils.update_bn makes them."""
    slow, fast = pair(kind, 16)
    batches = [torch.randn(4, 5) if kind == "Generator" else torch.randn(4, 3, 16, 16) for _ in range(3)]
    for network in (slow, fast):
        torch.optim.swa_utils.update_bn([batch.double() for batch in batches], network)
    for (name, a), b in zip(fast.named_buffers(), slow.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    norm = next(layer for layer in fast.modules() if isinstance(layer, models.BatchNormAct2d))
    norm.momentum = None
    with pytest.raises(ValueError, match="one group at a time"):
        norm(torch.randn(4, norm.num_features, 2, 2, dtype=torch.float64), groups=2)


def test_no_kernel_is_compiled_for_each_share_of_a_plain_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in ("batch_norm_act", "batch_norm_image_conv_transpose"):
        monkeypatch.setattr(models, kernel, lambda *_, **__: pytest.fail("would be compiled for this share"))
    for network, x in ((models.Generator(16, 3, 5, 4), (4, 5)), (models.Discriminator(16, 3, 4), (4, 3, 16, 16))):
        torch.optim.swa_utils.update_bn([torch.randn(x) for _ in range(2)], network)


def test_another_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="no architecture 'resnet'"):
        models.build_generator("resnet", (16, 16), 3, 5, 8)
    with pytest.raises(ValueError, match="no architecture 'resnet'"):
        models.build_discriminator("resnet", (16, 16), 3, 8)


def test_patches_differentiate_twice() -> None:
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(patches.conv2d, (x, weight))
    assert torch.autograd.gradgradcheck(patches.conv2d, (x, weight))
    y = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(patches.conv_transpose2d, (y, weight))
    assert torch.autograd.gradgradcheck(patches.conv_transpose2d, (y, weight))


def test_tutorial_pair_is_the_reference() -> None:
    fast, slow = models.build_discriminator("tutorial", (28, 28), 1, 64), reference.TutorialDiscriminator(1)
    fast.load_state_dict(slow.state_dict())
    images = models.build_generator("tutorial", (28, 28), 1, 10, 64)(torch.randn(4, 10))
    torch.testing.assert_close(fast(images, groups=2), slow(images))


@pytest.mark.parametrize("training", [True, False])
def test_hooks_are_called(training: bool) -> None:
    """Of every layer, also of those that are computed together where there are none."""
    network = models.Generator(16, 3, 5, 4).train(training)
    calls: list[str] = []
    for name, layer in network.main.named_children():
        layer.register_forward_hook(lambda *_, name=name: calls.append(name))
    network(torch.randn(4, 5))
    assert {"0", "1", "3", "4", "6"} <= set(calls)


def test_a_layer_can_be_normalised_by_a_hook() -> None:
    """As torch's older spectral norm does it: the weight it is given is another in every forward pass."""
    network = models.Generator(16, 3, 5, 4).train()
    last = torch.nn.utils.spectral_norm(network.main[-2])
    before = last.weight.detach().clone()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        network(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()
    network(torch.randn(4, 5))
    assert not torch.equal(last.weight, before)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("how", ["autocast", "half", "bfloat16"])
def test_networks_in_16_bits(how: str, training: bool) -> None:
    """As torch's own layers have them, within what 8 or 11 bits of a number are."""
    for kind, x in (("Generator", torch.randn(8, 5)), ("Discriminator", torch.randn(8, 3, 16, 16))):
        slow, fast = (network.float().train(training) for network in pair(kind, 16))
        if how == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                expected, found = slow(x), fast(x)
        else:
            for network in (slow, fast):
                getattr(network, how)()
            dtype = next(fast.parameters()).dtype
            expected, found = slow(x.to(dtype)), fast(x.to(dtype))
            for (name, a), b in zip(fast.named_buffers(), slow.buffers(), strict=True):
                assert a.dtype == b.dtype, name
                torch.testing.assert_close(a, b, rtol=0.02, atol=0.02, msg=name)
        assert found.shape == expected.shape
        torch.testing.assert_close(found.float(), expected.float(), rtol=0.05, atol=0.05)
        if training:
            found.float().sum().backward()
            assert all(p.grad is not None for p in fast.parameters())


def test_one_network_after_the_other_under_autocast() -> None:
    """The images that D is given are then what autocast has made of G's."""
    (slow_g, fast_g), (slow_d, fast_d) = (
        tuple(network.float() for network in pair(kind, 16)) for kind in ("Generator", "Discriminator")
    )
    noise = torch.randn(8, 5)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = slow_d(slow_g(noise)), fast_d(fast_g(noise))
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.05, atol=0.05)
    found.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in fast_g.parameters())


def test_shapes_are_known_without_numbers() -> None:
    generator, discriminator = models.Generator(16, 3, 5, 8).to("meta"), models.Discriminator(16, 3, 8).to("meta")
    images = generator(torch.empty(4, 5, device="meta"))
    assert (images.shape, discriminator(images).shape) == ((4, 3, 16, 16), (4,))


def test_images_of_another_size_are_refused() -> None:
    discriminator = models.Discriminator((64, 96), 3, 8).eval()
    for size in ((96, 64), (64, 64), (32, 192)):
        with pytest.raises((ValueError, RuntimeError)):
            discriminator(torch.randn(2, 3, *size))


@pytest.mark.parametrize(
    ("kind", "place", "layer"),
    [
        ("Generator", -1, nn.Sigmoid()),
        ("Generator", -3, nn.Dropout2d()),
        ("Generator", 2, nn.LeakyReLU(0.2)),
        ("Discriminator", 1, nn.ReLU()),
        ("Discriminator", 4, nn.Identity()),
    ],
)
def test_another_activation_is_refused(kind: str, place: int, layer: nn.Module) -> None:
    """It would be passed over, or come after the one that is fused."""
    network = getattr(models, kind)(16, 3, *([5] if kind == "Generator" else []), 8)
    network.main[place] = layer
    with pytest.raises(TypeError, match=f"a {type(layer).__name__} stands where .* fastdcgan.reference"):
        network(torch.randn(2, 5) if kind == "Generator" else torch.randn(2, 3, 16, 16))


@pytest.mark.parametrize("network", [models.Generator(16, 3, 10, 8), models.Discriminator(16, 3, 8)])
def test_another_batch_norm_in_the_place_of_ours_is_refused(network: nn.Module) -> None:
    """It would do what ours does without the activation."""
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    with pytest.raises(TypeError, match="sync_batch_norm"):
        converted(torch.randn(2, 10) if isinstance(network, models.Generator) else torch.randn(2, 3, 16, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)  # G's last layers are joined in float32
@pytest.mark.parametrize("kind", ["Generator", "Discriminator"])
def test_another_momentum_and_eps_are_heeded(kind: str, dtype: torch.dtype) -> None:
    slow, fast = (network.to(dtype) for network in pair(kind, 16))
    for layer in (*slow.modules(), *fast.modules()):
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum, layer.eps = 0.3, 0.2
    x = torch.randn(6, 5, dtype=dtype) if kind == "Generator" else torch.randn(6, 3, 16, 16, dtype=dtype)
    for training in (True, False):
        torch.testing.assert_close(fast.train(training)(x), slow.train(training)(x), rtol=1e-4, atol=1e-5)
    for (name, a), b in zip(fast.named_buffers(), slow.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_hooks_of_the_backward_pass_are_called() -> None:
    network = models.Generator(16, 3, 5, 4)
    calls: list[str] = []
    for name in ("4", "6"):  # which are computed together where there are none
        network.main.get_submodule(name).register_full_backward_hook(lambda *_, name=name: calls.append(name))
    network(torch.randn(4, 5)).sum().backward()
    assert sorted(calls) == ["4", "6"]
