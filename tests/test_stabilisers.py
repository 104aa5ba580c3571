"""Each stabiliser against a formula written out once more, and the step with each of them switched on."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from fastdcgan import checkpoint, models
from fastdcgan.config import TrainConfig
from fastdcgan.errors import UserError
from fastdcgan.executors import make_executor
from fastdcgan.objectives import make_objective
from fastdcgan.runs import load_run
from fastdcgan.stabilisers import DRAWS, REAL, SpectralNorm, Views, diff_augment, gradient_penalty, r1_penalty
from fastdcgan.step import TrainStep
from fastdcgan.trainer import train

BATCH, SIZE = 6, 16
EACH = {
    "hinge": {"loss": "hinge"},
    "lsgan": {"loss": "lsgan"},
    "wgan-gp": {"loss": "wgan-gp"},
    "smoothing": {"label_smoothing": 0.1},
    "r1": {"r1": 5.0, "r1_every": 2},
    "spectral": {"spectral_norm": True},
    "diffaugment": {"diffaugment": True},
    "noise": {"instance_noise": 0.2},
    "decay": {"lr_decay": True},
    "all": {
        "loss": "wgan-gp",
        "r1": 1.0,
        "r1_every": 3,
        "spectral_norm": True,
        "diffaugment": True,
        "instance_noise": 0.1,
        "lr_decay": True,
    },
}
each = pytest.mark.parametrize("options", EACH.values(), ids=EACH.keys())


def make_step(dtype: torch.dtype = torch.float32, channels: int = 3, **options: object) -> TrainStep:
    torch.manual_seed(1)
    generator = models.Generator(SIZE, channels, 8, 4).to(dtype)
    discriminator = models.Discriminator(SIZE, channels, 4).to(dtype)
    source = torch.randint(0, 256, (20, SIZE, SIZE, channels), dtype=torch.uint8)
    return TrainStep(generator, discriminator, source, torch.arange(BATCH), seed=5, **options)  # type: ignore[arg-type]


def everything(step: TrainStep) -> dict[str, Tensor]:
    found = {f"{kind}.{name}": value for kind, weights in step.weights().items() for name, value in weights.items()}
    return {name: value.detach().clone() for name, value in (found | step.state()).items()}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("loss", ["bce", "smoothed bce", "hinge", "lsgan", "smoothed lsgan", "wgan-gp"])
def test_objectives(loss: str) -> None:
    real, fake = [-3.0, 0.2, 0.9, 4.0], [-2.0, -0.5, 0.3, 5.0]
    target = 0.9 if "smoothed" in loss else 1.0
    by_hand = {
        "bce": (
            lambda x: -target * math.log(sigmoid(x)) - (1 - target) * math.log(1 - sigmoid(x)),
            lambda x: -math.log(1 - sigmoid(x)),
            lambda x: -math.log(sigmoid(x)),
        ),
        "hinge": (lambda x: max(0, 1 - x), lambda x: max(0, 1 + x), lambda x: -x),
        "lsgan": (lambda x: 0.5 * (x - target) ** 2, lambda x: 0.5 * x**2, lambda x: 0.5 * (x - 1) ** 2),
        "wgan-gp": (lambda x: -x, lambda x: x, lambda x: -x),
    }[loss.split()[-1]]
    objective = make_objective(loss.split()[-1], label_smoothing=1 - target)
    d = objective.discriminator(torch.tensor(real, dtype=torch.float64), torch.tensor(fake, dtype=torch.float64))
    g = objective.generator(torch.tensor(fake, dtype=torch.float64))
    assert d.item() == pytest.approx(sum(map(by_hand[0], real)) / 4 + sum(map(by_hand[1], fake)) / 4)
    assert g.item() == pytest.approx(sum(map(by_hand[2], fake)) / 4)
    shown = sigmoid if "bce" in loss else float  # as D(x): with other losses the discriminator's bare output
    assert objective.output(torch.tensor(real, dtype=torch.float64)).tolist() == pytest.approx([shown(x) for x in real])
    if loss in ("hinge", "wgan-gp"):
        with pytest.raises(ValueError, match="with targets"):
            make_objective(loss, label_smoothing=0.1)


@pytest.mark.parametrize(("height", "width", "channels"), [(16, 16, 3), (28, 20, 1)])
def test_diff_augment(height: int, width: int, channels: int) -> None:
    images = torch.rand(40, channels, height, width, dtype=torch.float64) * 2 - 1
    draws = torch.rand(40, DRAWS, dtype=torch.float64)
    draws[0], draws[1] = 0.0, 1.0  # the ends of the ranges
    seen = diff_augment(images, draws)
    holes = set()
    for image, draw, found in zip(images, draws.tolist(), seen, strict=True):
        x = image + draw[0] - 0.5
        x = (x - x.mean(0)) * 2 * draw[1] + x.mean(0)
        x = (x - x.mean()) * (draw[2] + 0.5) + x.mean()
        expected = torch.zeros_like(x)
        hole = []
        shifts = []
        for side, shift, centre in ((height, draw[3], draw[5]), (width, draw[4], draw[6])):
            most, hole_side = int(side / 8 + 0.5), int(side / 2 + 0.5)
            shifts.append(min(int(shift * (2 * most + 1)), 2 * most) - most)
            start = min(int(centre * (side + 1 - hole_side % 2)), side - hole_side % 2) - hole_side // 2
            hole.append(range(start, start + hole_side))
        for i in range(height):
            for j in range(width):
                y, z = i + shifts[0], j + shifts[1]
                if 0 <= y < height and 0 <= z < width and not (i in hole[0] and j in hole[1]):
                    expected[:, i, j] = x[:, y, z]
        torch.testing.assert_close(found, expected)
        holes.add((hole[0].start, hole[1].start, *shifts))
    assert len(holes) > 10
    small = images[:2, :, :8, :8].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: diff_augment(x, draws[2:4]), (small,), fast_mode=True)


def test_every_place_in_a_large_image_is_drawn() -> None:
    """bfloat16 has 129 numbers from 0.5 to 1, and half of an image of 512 pixels more places than that."""
    views = Views(torch.zeros(4000, 1, 512, 1, dtype=torch.bfloat16), augment=True, noise=False)
    views.draw(torch.Generator().manual_seed(0))
    assert views.draws is not None
    far = (views.draws[REAL, :, 3] * 513).long()
    assert len(far[far > 256].unique()) == 256
    assert views.see(torch.ones(4000, 1, 512, 1, dtype=torch.bfloat16), REAL).dtype == torch.bfloat16


def test_what_is_drawn_is_spread_as_the_papers_have_it() -> None:
    """The other tests of whole updates take the draws as they are."""
    step = make_step(loss="wgan-gp", diffaugment=True, instance_noise=0.1)
    seen: dict[str, list[Tensor]] = {"interpolation": [], "draws": [], "noise": []}
    for _ in range(100):
        step.draw()
        assert step.interpolation is not None and step.views.draws is not None and step.views.noise is not None
        for name, values in zip(seen, (step.interpolation, step.views.draws, step.views.noise), strict=True):
            seen[name].append(values.flatten().clone())
    found = {name: torch.cat(values) for name, values in seen.items()}
    for name in ("interpolation", "draws"):  # uniform in 0..1
        assert 0 <= found[name].min() < 0.05 and 0.95 < found[name].max() <= 1, name
        assert abs(found[name].mean() - 0.5) < 0.07, name  # 600 draws or more: six times the mean's deviation
    assert abs(found["noise"].mean()) < 0.01 and abs(found["noise"].std() - 1) < 0.01  # of 1.4 million, as N(0, 1)


def test_no_buffer_of_a_stabiliser_moves() -> None:
    """A captured graph goes on reading and writing where they lay when it was recorded."""
    step = make_step(**EACH["all"])

    def places() -> dict[str, int]:
        buffers = {name: value for name, value in step.state().items() if name != "rng"}
        buffers |= {"views.draws": step.views.draws, "views.noise": step.views.noise, "level": step.views.level}
        buffers |= {"interpolation": step.interpolation}  # type: ignore[dict-item]
        return {name: value.data_ptr() for name, value in buffers.items()}

    before = places()
    for _ in range(2):
        step.set_schedules(0.5)
        step.update()
    step.load_state({name: value.clone() for name, value in step.state().items()})
    assert places() == before


def test_no_stabiliser_waits_for_the_host() -> None:
    """Nor has a number of its own on the host, which a captured graph would repeat."""
    step = make_step(**EACH["all"])
    with NoHostNumbers():
        step.update()
    with pytest.raises(AssertionError, match="to the host"), NoHostNumbers():
        float(step.views.level)  # the check can fail


class NoHostNumbers(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func.overloadpacket.__name__ != "_local_scalar_dense", "a number goes to the host"
        return func(*args, **(kwargs or {}))


def test_the_first_update_divides_by_a_singular_value_already() -> None:
    """Not by what a random vector makes of it, which can be a tenth."""
    step = make_step(torch.float64, spectral_norm=True)
    assert step.spectral is not None
    for name, normalised in step.spectral.normalised().items():
        largest = torch.linalg.svdvals(normalised.flatten(1))[0].item()
        assert 1 - 1e-9 < largest < 1.02, f"{name}: {largest}"  # 15 iterations: within 2%


def test_spectral_norm_is_the_largest_singular_value() -> None:
    step = make_step(torch.float64, spectral_norm=True)
    assert step.spectral is not None
    for _ in range(500):
        step.spectral.advance()
    for name, normalised in step.spectral.normalised().items():
        weight = step.adam_d.parameters[name]
        torch.testing.assert_close(
            normalised, weight / torch.linalg.svdvals(weight.flatten(1))[0], rtol=1e-4, atol=0, msg=name
        )
    assert set(step.spectral.parameters) == {n for n, p in step.discriminator.named_parameters() if p.dim() == 4}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_latest_pictures_are_the_saved_generators(precision: str) -> None:
    step = make_step(precision=precision)
    step.update()
    before = everything(step)
    plain = models.Generator(SIZE, 3, 8, 4).eval()
    plain.load_state_dict(step.weights()["generator"])
    latents = torch.randn(4, 8)
    assert torch.equal(step.latest_pictures(latents), plain(latents))
    assert not torch.equal(step.latest_pictures(latents), step.average(latents))
    assert all(torch.equal(value, before[name]) for name, value in everything(step).items())


def test_spectral_norms_gradient_holds_the_singular_vectors_still() -> None:
    weight = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    norm = SpectralNorm({"w": weight}, torch.Generator().manual_seed(0))
    towards = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((norm.normalised()["w"] * towards).sum(), weight)
    u, v = norm.left["w"], norm.right["w"]
    sigma = u @ weight.flatten(1) @ v
    expected = (towards.flatten(1) - (weight.flatten(1) / sigma * towards.flatten(1)).sum() * torch.outer(u, v)) / sigma
    torch.testing.assert_close(gradient.flatten(1), expected)  # Miyato et al. 2018, eq. 12


def test_the_saved_discriminator_is_the_one_that_computes() -> None:
    step = make_step(spectral_norm=True)
    step.update()
    images = torch.rand(BATCH, 3, SIZE, SIZE) * 2 - 1
    plain = models.Discriminator(SIZE, 3, 4)
    plain.load_state_dict(step.weights()["discriminator"])
    torch.testing.assert_close(plain(images), step.discriminate_for_penalty(images))
    assert not torch.allclose(step.discriminator(images), step.discriminate_for_penalty(images))


def test_the_saved_discriminator_is_of_the_masters() -> None:
    """Under bfloat16 too: over their singular value, and not rounded."""
    step = make_step(spectral_norm=True, precision="bf16")
    step.update()
    assert step.spectral is not None
    saved = step.weights()["discriminator"]
    for name in step.spectral.parameters:
        master = step.adam_d.masters[name]
        assert saved[name].dtype == torch.float32
        sigma = master.norm() / saved[name].norm()
        torch.testing.assert_close(saved[name] * sigma, master, rtol=1e-5, atol=0)  # a few float32 roundings of 6e-8


def test_under_bfloat16_singular_values_and_penalties_are_float32s() -> None:
    weight = torch.randn(8, 6, 4, 4).bfloat16()
    norm = SpectralNorm({"w": weight}, torch.Generator().manual_seed(0))
    exact = weight.float() / (norm.left["w"] @ weight.float().flatten(1) @ norm.right["w"])
    assert torch.equal(norm.normalised()["w"], exact.bfloat16())  # one rounding, at the end
    x = torch.randn(5, 2, 3, 3).bfloat16().requires_grad_()
    for penalty in (r1_penalty, gradient_penalty):
        assert penalty(smooth(x), x).dtype == torch.float32


def test_a_penalty_of_a_flat_discriminator_has_a_gradient() -> None:
    """At norm 0 the root's own is infinite, and 0 times that is not a number."""
    x, weight = torch.randn(5, 2, 3, 3, requires_grad=True), torch.zeros(18, requires_grad=True)
    penalty = gradient_penalty(x.flatten(1) @ weight, x)
    (gradient,) = torch.autograd.grad(penalty, weight)
    assert penalty.item() == pytest.approx(1, abs=1e-5) and gradient.isfinite().all()  # (0 - 1)^2, but for the 1e-12


def smooth(x: Tensor) -> Tensor:
    """A discriminator without BatchNorm whose gradient at x is known: sum of sin."""
    return x.flatten(1).sin().sum(1)


def test_penalties_against_a_known_gradient() -> None:
    x = torch.randn(5, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    norms = [sum(math.cos(v) ** 2 for v in row) ** 0.5 for row in x.flatten(1).tolist()]
    assert r1_penalty(smooth(x), x).item() == pytest.approx(sum(n * n for n in norms) / 5 / 2)
    assert gradient_penalty(smooth(x), x).item() == pytest.approx(sum((n - 1) ** 2 for n in norms) / 5)


@pytest.mark.parametrize("penalty", [r1_penalty, gradient_penalty])
@pytest.mark.parametrize("spectral", [False, True])
def test_penalties_have_the_right_gradient(penalty: object, spectral: bool) -> None:
    step = make_step(torch.float64, spectral_norm=spectral, r1=1.0)
    images = torch.rand(BATCH, 3, SIZE, SIZE, dtype=torch.float64) * 2 - 1
    names = list(step.adam_d.parameters)

    def of_weights(*weights: Tensor) -> Tensor:
        x = images.detach().requires_grad_()
        given = dict(zip(names, weights, strict=True))
        if step.spectral is not None:
            given |= step.spectral.normalised(given)
        given |= {name: buffer.clone() for name, buffer in step.discriminator.named_buffers()}
        return penalty(functional_call(step.discriminator, given, (x,)), x)  # type: ignore[operator]

    weights = [p.detach().clone().requires_grad_() for p in step.adam_d.parameters.values()]
    assert torch.autograd.gradcheck(of_weights, weights, fast_mode=True, atol=1e-6)


@pytest.mark.parametrize("loss", ["bce", "wgan-gp"])
def test_the_update_adds_the_penalty_to_the_loss(loss: str) -> None:
    """D's first gradient, written out: Adam's first moment is (1 - beta1) times it."""
    step = make_step(torch.float64, loss=loss, r1=3.0, r1_every=4)
    d = models.Discriminator(SIZE, 3, 4).double()
    d.load_state_dict(step.discriminator.state_dict())
    before = {name: buffer.clone() for name, buffer in step.discriminator.named_buffers()}
    g = models.Generator(SIZE, 3, 8, 4).double()
    g.load_state_dict(step.generator.state_dict())
    step.update()
    real = step.source[step.index].permute(0, 3, 1, 2).double() / 127.5 - 1
    fake = g(step.noise).detach()
    total = make_objective(loss).discriminator(d(real), d(fake))
    x = real.clone().requires_grad_()
    (slope,) = torch.autograd.grad(d(x).sum(), x, create_graph=True)
    total = total + 4 * 3.0 * 0.5 * slope.pow(2).sum((1, 2, 3)).mean()
    if loss == "wgan-gp":
        assert step.interpolation is not None
        x = (step.interpolation * real + (1 - step.interpolation) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(d(x).sum(), x, create_graph=True)
        total = total + 10 * (slope.flatten(1).norm(dim=1) - 1).pow(2).mean()
    gradients = torch.autograd.grad(total, list(d.parameters()))
    for (name, moment), gradient in zip(step.adam_d.exp_avg.items(), gradients, strict=True):
        torch.testing.assert_close(moment, 0.5 * gradient, rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    counts = [b for n, b in step.discriminator.named_buffers() if n.endswith("num_batches_tracked")]
    assert all(int(c) == 3 for c in counts)  # real, fake, and fake for G: the penalty moved no statistics
    assert any(not torch.equal(b, before[n]) for n, b in step.discriminator.named_buffers())


def test_r1_is_lazy_and_counts_on_after_a_resume() -> None:
    step = make_step(r1=1.0, r1_every=3)
    due = []
    for _ in range(7):
        due.append(step.penalised())
        step.update()
    assert due == [True, False, False, True, False, False, True]
    other = make_step(r1=1.0, r1_every=3)
    other.load_weights(step.weights())
    other.load_state(step.state())
    assert other.updates == 7 and not other.penalised()


def test_schedules_reach_the_device() -> None:
    step = make_step(lr_g=1e-3, lr_d=4e-3, lr_decay=True, instance_noise=0.2)
    places = step.adam_g.lr.data_ptr(), step.views.level.data_ptr()
    for progress, left in ((0.0, 1.0), (0.25, 0.75), (1.0, 0.0)):
        step.set_schedules(progress)
        assert (float(step.adam_g.lr), float(step.adam_d.lr)) == pytest.approx((1e-3 * left, 4e-3 * left))
        assert float(step.views.level) == pytest.approx(0.2 * left)
    assert places == (step.adam_g.lr.data_ptr(), step.views.level.data_ptr())


def test_the_three_views_differ_and_come_from_the_steps_own_generator() -> None:
    step, plain, images = make_step(diffaugment=True, instance_noise=0.1), make_step(), torch.rand(BATCH, 3, SIZE, SIZE)
    elsewhere = torch.get_rng_state()
    step.draw()
    views = [step.views.see(images, i) for i in range(3)]
    assert all(not torch.equal(views[i], views[j]) for i in range(3) for j in range(i))
    step.draw()
    assert not torch.equal(step.views.see(images, 0), views[0])
    assert torch.equal(torch.get_rng_state(), elsewhere)
    assert torch.equal(plain.views.see(images, 0), images)


@each
def test_updates_change_the_run_and_repeat(options: dict[str, object]) -> None:
    steps = [make_step(**options), make_step(**options), make_step()]
    for step in steps:
        for i in range(3):
            step.set_schedules(i / 3)
            step.update()
    first, again, plain = (everything(step) for step in steps)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(value.isfinite().all() for value in first.values() if value.is_floating_point())
    assert not torch.equal(first["generator.main.0.weight"], plain["generator.main.0.weight"])
    assert set(plain) <= set(first)


@each
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_to_the_same_bits(options: dict[str, object], precision: str) -> None:
    whole, rest = (make_step(precision=precision, **options) for _ in range(2))
    for i in range(5):
        if i == 2:
            weights = {kind: {n: v.clone() for n, v in w.items()} for kind, w in whole.weights().items()}
            state = {name: value.clone() for name, value in whole.state().items()}
            rest.load_weights(weights)
            rest.load_state(state)
        for step in (whole, rest) if i >= 2 else (whole,):
            step.set_schedules(i / 5)
            step.update()
    expected, found = everything(whole), everything(rest)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.mark.parametrize("options", [EACH["all"], {**EACH["spectral"], **EACH["diffaugment"], "label_smoothing": 0.1}])
def test_compiled_agrees_with_eager(options: dict[str, object], caplog: pytest.LogCaptureFixture) -> None:
    steps = [make_step(torch.float64, **options) for _ in range(2)]
    executors = [make_executor(s, compile=s is steps[1], cuda_graph="auto") for s in steps]
    for i in range(3):
        for step, executor in zip(steps, executors, strict=True):
            step.set_schedules(i / 3)
            executor.run()
    expected, found = (everything(step) for step in steps)
    for name, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    assert torch.equal(expected["rng"], found["rng"])
    said = [r.getMessage() for r in caplog.records if "uncompiled" in r.getMessage()]
    assert len(said) == (1 if "r1" in options else 0)


FLAGS = {
    "loss": "lsgan",
    "label_smoothing": 0.1,
    "r1": 2.0,
    "r1_every": 2,
    "spectral_norm": True,
    "diffaugment": True,
    "instance_noise": 0.1,
    "lr_g": 1e-4,
    "lr_d": 4e-4,
    "lr_decay": "linear",
}


def test_schedules_reach_a_whole_run(tmp_path: Path) -> None:
    config = TrainConfig(image_size="16", gen_width=4, latent_dim=8, batch_size=16, steps=8, lr_decay="linear")
    run = train(dataclasses.replace(config, run_dir=tmp_path / "run", device="cpu", lr_g=1e-3, lr_d=4e-3))
    state = checkpoint.load(checkpoint.complete(run)[-1]).tensors["state"]
    # Of the last step, before which 7 of 8 were done.
    assert (float(state["adam_g.lr"]), float(state["adam_d.lr"])) == pytest.approx((1e-3 / 8, 4e-3 / 8))


def test_a_resumed_run_moves_at_the_rate_it_was_given(tmp_path: Path) -> None:
    config = TrainConfig(image_size="16", gen_width=4, latent_dim=8, batch_size=16, steps=2, device="cpu")
    run = train(dataclasses.replace(config, run_dir=tmp_path / "run"))
    train(dataclasses.replace(config, run_dir=run, resume=True, steps=4, lr_g=1e-3))
    state = checkpoint.load(checkpoint.complete(run)[-1]).tensors["state"]
    assert (float(state["adam_g.lr"]), float(state["adam_d.lr"])) == (1e-3, 2e-4)


def test_a_killed_run_with_every_stabiliser_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    config = TrainConfig(
        image_size="16", gen_width=4, latent_dim=8, batch_size=16, steps=6, checkpoint_every=3, device="cpu"
    )
    config = dataclasses.replace(config, **FLAGS)  # type: ignore[arg-type]
    straight = train(dataclasses.replace(config, run_dir=tmp_path / "straight"))
    run = train(dataclasses.replace(config, run_dir=tmp_path / "run"))
    checkpoint.complete(run)[-1].rename(run / "gone")  # as if killed before it
    train(TrainConfig(run_dir=run, resume=True))
    a, b = (checkpoint.load(checkpoint.complete(r)[-1]) for r in (straight, run))
    assert [(k, n) for k, w in a.tensors.items() for n in w if not torch.equal(w[n], b.tensors[k][n])] == []
    loaded = load_run(run)
    assert loaded.discriminator is not None and loaded.config is not None and loaded.config.rates == (1e-4, 4e-4)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"label_smoothing": 0.1, "loss": "hinge"}, "--loss hinge has none"),
        ({"label_smoothing": 1.0}, "--label-smoothing 1"),
        ({"r1": -1.0}, "--r1 -1"),
        ({"r1_every": 0}, "--r1-every 0"),
        ({"instance_noise": float("nan")}, "--instance-noise nan"),
        ({"lr_g": 0.0}, "--lr-g 0"),
    ],
)
def test_impossible_values(values: dict[str, object], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        TrainConfig(**values)  # type: ignore[arg-type]


def test_spectral_norm_cannot_come_in_the_middle_of_a_run() -> None:
    with pytest.raises(UserError, match="--spectral-norm"):
        TrainConfig(spectral_norm=True).resumed(TrainConfig(), {"spectral_norm"})


def test_spectral_norm_divides_linear_layers_too() -> None:
    norm = SpectralNorm(dict(models.TutorialDiscriminator().named_parameters()), torch.Generator().manual_seed(0))
    assert {weight.dim() for weight in norm.normalised().values()} == {2, 4}


def test_the_losses_that_are_shown_are_without_the_penalty() -> None:
    """Alarms compare D's with what it is at its lowest."""
    shown = []
    for options in ({}, {"r1": 50.0, "r1_every": 1}):
        step = make_step(**options)
        step.update()
        shown.append(step.read_metrics()["loss_d"])
    assert shown[0] == shown[1]


def test_under_bfloat16_losses_of_normalised_weights_are_float32s() -> None:
    step = make_step(precision="bf16", spectral_norm=True)
    assert step.discriminate(step.draw()).dtype == torch.float32


def test_each_image_has_draws_of_its_own() -> None:
    step = make_step(loss="wgan-gp", diffaugment=True, instance_noise=0.1)
    step.draw()
    assert step.interpolation is not None and step.views.draws is not None and step.views.noise is not None
    assert step.interpolation.shape == (BATCH, 1, 1, 1) and len(step.interpolation.unique()) == BATCH
    assert step.views.noise.shape == (3, BATCH, SIZE, SIZE, 3)
    for drawn in (step.views.draws[..., 0], step.views.noise[..., 0, 0, 0]):
        assert len(drawn.unique()) == 3 * BATCH


def test_a_run_begins_at_the_level_of_noise_that_was_given() -> None:
    assert float(make_step(instance_noise=0.2).views.level) == pytest.approx(0.2)


def test_singular_vectors_begin_where_the_steps_own_generator_says() -> None:
    weight, elsewhere = torch.randn(4, 3, 2, 2), torch.get_rng_state()
    first, again = (SpectralNorm({"w": weight}, torch.Generator().manual_seed(3)).left["w"] for _ in range(2))
    assert torch.equal(first, again) and torch.equal(torch.get_rng_state(), elsewhere)
