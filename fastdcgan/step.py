"""One GAN update on static buffers; `executors` runs it: eager, compiled, or as one CUDA graph.

`TrainStep.update` is the whole update. It computes what `reference.reference_step` computes, with less work:
- real and fake images go through the discriminator as one batch, with BatchNorm statistics for each half;
- the generator's update computes no weight gradients of the discriminator.
Other losses are in `objectives`, penalties and augmentation in `stabilisers`.

A CUDA graph replays the kernels that were recorded, with the addresses and the Python numbers of the recording. So
that it can be recorded, `update` keeps five rules, and whoever changes it must keep them:
- Its inputs, `source` and `index`, stay where they are: the data's stream writes the next batch into them between runs.
- What changes from step to step is a tensor on the device: learning rates, Adam's step count, the moving average's
  decay, the level of noise. `set_schedules` sets the schedules, between runs.
- Nothing is read back and no branch depends on a tensor: metrics add up in `sums`, which `read_metrics` fetches.
- Gradients are what `torch.autograd.grad` returns, not `.grad`, so they live in the graph's own memory.
- All random numbers come from `rng`, which `executors.Captured` registers with the graph: every replay draws new ones.
The one condition in Python, whether the R1 penalty is due, chooses between two graphs.
"""

from __future__ import annotations

import copy
import logging
from types import FunctionType, MethodType
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastdcgan.distributed import ALONE, World
from fastdcgan.gpu_memory import take_no_more_than_needed
from fastdcgan.heap import heap
from fastdcgan.kernels import uint8_to_float
from fastdcgan.models import AnyDiscriminator, AnyGenerator
from fastdcgan.objectives import make_objective
from fastdcgan.optimizer import Adam
from fastdcgan.spans import span
from fastdcgan.stabilisers import (
    FAKE,
    FAKE_AGAIN,
    GP_WEIGHT,
    REAL,
    SpectralNorm,
    Views,
    gradient_penalty,
    r1_penalty,
)

log = logging.getLogger("fastdcgan")

# Both losses, and the means of D(x) and D(G(z)) as `Objective.output` gives them, before D's update.
METRICS = ("loss_d", "loss_g", "d_real", "d_fake")


class TrainStep:
    """Both networks, both optimizers, the generator's moving average and every buffer one update touches.

    Making one sets switches of the whole process: cuDNN's search for algorithms, TF32 (`set_precision`), on a GPU how
    memory is taken (`gpu_memory`), and on a CPU what becomes of freed memory (`heap`).

    Args:
        generator, discriminator: freshly built or loaded, float32 (on a CPU also float64), on the device; with
            precision "bf16" their convolutions and linear layers are cast to bfloat16 here and float32 masters kept.
        source, index: uint8 (M, H, W, C) and int64 (B,), on the device: the next batch is always `source[index]`.
        flip: mirror each real image with probability 1/2.
        precision: "fp32", "tf32" or "bf16": what convolutions and matrix products compute in.
        loss: a key of `OBJECTIVES`; label_smoothing as in `make_objective`.
        lr_g, lr_d: learning rates of the two networks; betas: of Adam (Kingma and Ba 2015), for both.
        ema_decay: of the generator's moving average once the run is long; (1 + t) / (10 + t) after t steps until then,
            as in TensorFlow's ExponentialMovingAverage with `num_updates`.
        seed: of all that is drawn: noise, flips, augmentation and the like; each process of `world` has its own.
        world: the processes that train these networks together (see `synchronise`).
        r1: weight of `r1_penalty`, added every `r1_every` updates with `r1_every` times the weight (Karras et al. 2020,
            section 3.1).
        spectral_norm, diffaugment: as in `SpectralNorm` and `diff_augment`.
        instance_noise: deviation of the noise on what D sees at the start of the run, falling to 0 at its end.
        lr_decay: both learning rates fall linearly to 0 at the end of the run.

    Raises:
        ValueError: an option that there is not, is out of range, or does not go with another; a frozen parameter.
    """

    def __init__(
        self,
        generator: AnyGenerator,
        discriminator: AnyDiscriminator,
        source: Tensor,
        index: Tensor,
        *,
        flip: bool = False,
        precision: str = "fp32",
        loss: str = "bce",
        lr_g: float = 2e-4,
        lr_d: float = 2e-4,
        betas: tuple[float, float] = (0.5, 0.999),
        ema_decay: float = 0.999,
        seed: int = 0,
        label_smoothing: float = 0.0,
        r1: float = 0.0,
        r1_every: int = 16,
        spectral_norm: bool = False,
        diffaugment: bool = False,
        instance_noise: float = 0.0,
        lr_decay: bool = False,
        world: World = ALONE,
    ) -> None:
        if not 0 <= ema_decay <= 1 or not r1 >= 0 or r1_every < 1:
            raise ValueError(f"ema_decay={ema_decay}, r1={r1}, r1_every={r1_every}: in 0..1, at least 0, at least 1")
        device = source.device
        heap.keeps = device.type == "cpu"
        if device.type == "cuda":
            take_no_more_than_needed(world.size)
        self.generator, self.discriminator = generator.train(), discriminator.train()
        self.source, self.index = source, index
        self.objective = make_objective(loss, label_smoothing)
        self.average = copy.deepcopy(generator).eval().requires_grad_(False)
        self.ema_decay = ema_decay
        self.average_decay = torch.zeros((), dtype=torch.float32, device=device)
        masters_g, masters_d = set_precision(generator, precision), set_precision(discriminator, precision)
        self.adam_g = Adam(generator, lr_g, betas, masters_g, self.average, self.average_decay, world)
        self.adam_d = Adam(discriminator, lr_d, betas, masters_d, world=world)
        self.dtype = next(generator.parameters()).dtype
        self.rng = torch.Generator(device).manual_seed(world.seed(seed))
        self.noise = torch.zeros(len(index), generator.latent_dim, device=device, dtype=self.dtype)
        self.flips = torch.zeros(len(index), device=device, dtype=torch.uint8) if flip else None
        self.sums = torch.zeros(len(METRICS) + 1, dtype=torch.float32, device=device)  # of METRICS; how many steps

        self.rates = (lr_g, lr_d)
        self.lr_decay, self.instance_noise = lr_decay, instance_noise
        self.r1, self.r1_every, self.updates = r1, r1_every, 0
        self.compiled = False
        batch = torch.empty(len(index), *source.shape[1:], device=device, dtype=self.dtype).permute(0, 3, 1, 2)
        self.views = Views(batch, augment=diffaugment, noise=instance_noise > 0)
        self.spectral = SpectralNorm(self.adam_d.parameters, self.rng) if spectral_norm else None
        self.interpolation = batch.new_zeros(len(index), 1, 1, 1) if loss == "wgan-gp" else None
        self.world = world
        self.set_schedules(0.0)

    def update(self) -> None:
        """One update of the discriminator, then one of the generator."""
        with span("data"):
            real = self.draw()
        with span("generator"):
            fake = self.generate(self.noise)

        with span("discriminator"):
            if self.spectral is not None:
                self.spectral.advance()
            loss_d, outputs = self.discriminator_loss(real, fake.detach())
            penalised = self.penalised()
            self.adam_d.update(loss_d + self.penalty(real, fake.detach()) if penalised else loss_d)

        self.discriminator.requires_grad_(False)  # while G's autograd graph is built: D's weights stay out of it
        try:
            with span("generator"):
                loss_g = self.generator_loss(fake)
        finally:
            self.discriminator.requires_grad_(True)
        with span("generator"):
            self.keep_books(loss_d.detach(), loss_g.detach(), outputs)
            self.adam_g.update(loss_g)
        self.updates += 1

    def set_schedules(self, progress: float) -> None:
        """Set what falls over the run, `progress` of which (0..1) is over: learning rates, level of noise."""
        if self.lr_decay:
            for adam, rate in zip((self.adam_g, self.adam_d), self.rates, strict=True):
                adam.lr.fill_(rate * (1 - progress))
        if self.instance_noise > 0:
            self.views.level.fill_(self.instance_noise * (1 - progress))

    def draw(self) -> Tensor:
        """Draw the step's random numbers and return the real batch, (B, C, H, W) in -1..1, channels-last."""
        self.noise.normal_(generator=self.rng)
        if self.flips is not None:
            self.flips.random_(0, 2, generator=self.rng)
        self.views.draw(self.rng)
        if self.interpolation is not None:
            self.interpolation.uniform_(generator=self.rng)
        return uint8_to_float(self.source, self.index, self.flips, dtype=self.dtype)

    def generate(self, noise: Tensor) -> Tensor:
        """Images (B, C, H, W) in -1..1 from latents (B, latent_dim); a method, so that `compile` can replace it."""
        return self.generator(noise)

    def discriminate(self, images: Tensor, groups: int = 1) -> Tensor:
        """Logits (N,) of images as they are, float32 at least."""
        if self.spectral is None:
            return _at_least_float32(self.discriminator(images, groups=groups))
        return _at_least_float32(
            functional_call(self.discriminator, self.spectral.normalised(), (images,), kwargs={"groups": groups})
        )

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """What D minimises, a () tensor, at images (B, C, H, W) each; and D(x) and D(G(z)), as in METRICS, (2,)."""
        real, fake = self.views.see(real, REAL), self.views.see(fake, FAKE)
        logits_real, logits_fake = self.discriminate(torch.cat((real, fake)), groups=2).chunk(2)
        loss = self.objective.discriminator(logits_real, logits_fake)
        outputs = [self.objective.output(logits).mean() for logits in (logits_real, logits_fake)]
        return loss, torch.stack(outputs).detach()

    def generator_loss(self, fake: Tensor) -> Tensor:
        """What G minimises, a () tensor, at the images (B, C, H, W) that it drew."""
        return self.objective.generator(self.discriminate(self.views.see(fake, FAKE_AGAIN)))

    def penalised(self) -> bool:
        """Whether the next update has a penalty on D's gradient."""
        return self.interpolation is not None or self.r1_is_due()

    def r1_is_due(self) -> bool:
        """Whether the next update has the R1 penalty: all in which one update can differ from another."""
        return self.r1 > 0 and self.updates % self.r1_every == 0

    def penalty(self, real: Tensor, fake: Tensor) -> Tensor:
        """What D's update adds to its loss for the steepness of D, at the images as D sees them."""
        real = self.views.see(real, REAL)
        total = torch.zeros((), device=real.device)
        if self.interpolation is not None:
            between = torch.lerp(self.views.see(fake, FAKE), real, self.interpolation).detach().requires_grad_()
            total = total + GP_WEIGHT * gradient_penalty(self.discriminate_for_penalty(between), between)
        if self.r1_is_due():
            real = real.detach().requires_grad_()
            total = total + self.r1 * self.r1_every * r1_penalty(self.discriminate_for_penalty(real), real)
        return total

    def discriminate_for_penalty(self, images: Tensor) -> Tensor:
        """As `discriminate`, once more for the same update: BatchNorm's running statistics stay where they are."""
        weights = {name: buffer.clone() for name, buffer in self.discriminator.named_buffers()}
        if self.spectral is not None:
            weights |= self.spectral.normalised()
        return _at_least_float32(functional_call(self.discriminator, weights, (images,)))

    def keep_books(self, loss_d: Tensor, loss_g: Tensor, outputs: Tensor) -> None:
        """Add to the metrics' sums, set the moving average's decay for this step, and let the averaged BatchNorm
        statistics follow as the weights do."""
        with torch.no_grad():
            self.sums += torch.cat((torch.stack((loss_d, loss_g)), outputs, outputs.new_ones(1)))
            steps = self.adam_g.steps
            torch.clamp((1 + steps) / (10 + steps), max=self.ema_decay, out=self.average_decay)
            # Of all buffers together: a few launches.
            means, values = _of_kind(self.average, floating=True), _of_kind(self.generator, floating=True)
            if means:
                away = torch._foreach_sub(values, means)
                torch._foreach_mul_(away, 1 - self.average_decay)
                torch._foreach_add_(means, away)
            if counts := _of_kind(self.average, floating=False):
                torch._foreach_copy_(counts, _of_kind(self.generator, floating=False))

    def __deepcopy__(self, memo: dict[int, object]) -> NoReturn:
        raise TypeError("a TrainStep is not copied: make another, and give it `weights` and `state`")

    def compile(self) -> None:
        """Compile the forward functions, and with them their gradients; done at the next update, not here."""
        names = ["generate", "discriminator_loss", "generator_loss"]
        if self.source.is_cuda:
            names.append("keep_books")  # saves a dozen launches; on a CPU compiling it costs more than it saves
        for name in names:
            setattr(self, name, torch.compile(_copy(getattr(self, name)), fullgraph=True, dynamic=False))
        self.compiled = True
        if self.interpolation is not None or self.r1 > 0:
            log.warning("the penalty on the discriminator's gradient runs uncompiled: it is differentiated twice")

    def uncompile(self) -> None:
        """Give up what was compiled, which refers to this step: that would stay, with its images in the GPU's memory,
        until Python looks for cycles."""
        for name in ("generate", "discriminator_loss", "generator_loss", "keep_books"):
            vars(self).pop(name, None)
        self.compiled = False

    def read_metrics(self) -> dict[str, float]:
        """Means of METRICS since the last call. Waits for the device, which `update` never does."""
        *sums, steps = self.sums.tolist()
        self.sums.zero_()
        return {name: total / max(steps, 1) for name, total in zip(METRICS, sums, strict=True)}

    @torch.no_grad()
    def latest_pictures(self, latents: Tensor) -> Tensor:
        """What the generator's latest weights draw in evaluation mode, beside which `average` draws its own."""
        return functional_call(self.average, self.learned_weights()["generator"], (latents,))

    def gradient_norms(self) -> dict[str, float]:
        """Norm of each network's gradient as Adam averages it: its first moment, over about 1 / (1 - beta1) updates."""
        norms = [
            torch.stack(torch._foreach_norm(list(adam.exp_avg.values()))).norm() for adam in (self.adam_d, self.adam_g)
        ]
        return dict(zip(("grad_norm_d", "grad_norm_g"), torch.stack(norms).tolist(), strict=True))

    def state(self) -> dict[str, Tensor]:
        """What beyond the networks the next step depends on, by name: the tensors themselves, but of `rng` a copy."""
        state = {f"adam_g.{name}": value for name, value in self.adam_g.state().items()}
        state |= {f"adam_d.{name}": value for name, value in self.adam_d.state().items()}
        if self.spectral is not None:  # `weights` gives the discriminator as it computes: here are those it learns
            state |= {f"spectral.weight.{name}": self.adam_d.masters[name] for name in self.spectral.parameters}
            state |= {f"spectral.{name}": value for name, value in self.spectral.state().items()}
        return state | {"sums": self.sums, "rng": self.rng.get_state()}

    def synchronise(self) -> None:
        """Give all processes the first one's networks and optimizers; averaged gradients keep them the same."""
        networks = [value for values in self.learned_weights().values() for value in values.values()]
        self.world.broadcast(networks + [value for name, value in self.state().items() if name not in ("rng", "sums")])
        self.refresh_copies()

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state` returned, after `load_weights`; the learning rates stay this step's own.

        Raises:
            ValueError: other names or shapes than this step's.
        """
        own = self.state()
        _check_fit(own, state)
        for name, value in own.items():
            value.copy_(state[name])
        self.rng.set_state(state["rng"])
        self.refresh_copies()
        self.updates = int(self.adam_d.steps)
        for adam, rate in zip((self.adam_g, self.adam_d), self.rates, strict=True):
            adam.lr.fill_(rate)

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Full-precision `state_dict`s by network, as it computes: generator, discriminator, average."""
        weights = self.learned_weights()
        if self.spectral is not None:
            with torch.no_grad():
                weights["discriminator"] |= self.spectral.normalised(self.adam_d.masters)
        return weights

    def learned_weights(self) -> dict[str, dict[str, Tensor]]:
        """As `weights`, but the tensors themselves that the optimizers move."""
        return {
            "generator": self.generator.state_dict() | self.adam_g.masters,
            "discriminator": self.discriminator.state_dict() | self.adam_d.masters,
            "average": self.average.state_dict(),
        }

    @torch.no_grad()
    def load_weights(self, weights: dict[str, dict[str, Tensor]]) -> None:
        """Continue from what `weights` returned; the networks' low-precision weights follow their masters.

        Raises:
            ValueError: other names or shapes than these networks'.
        """
        for kind, own in self.learned_weights().items():
            _check_fit(own, weights[kind])
        for kind, own in self.learned_weights().items():
            for name, value in own.items():
                value.copy_(weights[kind][name])
        self.refresh_copies()

    @torch.no_grad()
    def refresh_copies(self) -> None:
        """Have the networks compute with their masters' values."""
        for adam in (self.adam_g, self.adam_d):
            for low, master in zip(adam.copies, adam.masters.values(), strict=True):
                if low is not None:
                    low.copy_(master)


def set_precision(network: nn.Module, precision: str) -> dict[str, Tensor]:
    """Make the network compute in "fp32", "tf32" or "bf16"; returns float32 copies of the weights that this casts.

    BatchNorm keeps its float32 parameters. TF32 is a switch of the whole process, not of one network.

    Raises:
        ValueError: another precision.
    """
    if precision not in ("fp32", "tf32", "bf16"):
        raise ValueError(f"there is no precision {precision!r}: fp32, tf32 or bf16")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    # Sizes never change: let cuDNN try its algorithms in the first step, and all of them, not the ten it thinks best.
    torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = True, 0
    masters: dict[str, Tensor] = {}
    if precision == "bf16":
        for layer_name, layer in network.named_modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                for name, parameter in layer.named_parameters():
                    masters[f"{layer_name}.{name}"] = parameter.detach().clone()
                    parameter.data = parameter.data.bfloat16()
    return masters


def _copy(method: MethodType) -> MethodType:
    """The same method with code of its own: torch.compile remembers what it made by code, eight times at most, and a
    process may train more often, each time other networks or with other constants."""
    found = method.__func__
    assert not hasattr(found, "__wrapped__"), "the code of a decorator is shared by all that it decorates"
    own = FunctionType(
        found.__code__.replace(), found.__globals__, found.__name__, found.__defaults__, found.__closure__
    )
    return MethodType(own, method.__self__)


def _of_kind(network: nn.Module, floating: bool) -> list[Tensor]:
    """The network's buffers that are floating-point numbers, or those that are not."""
    return [buffer for buffer in network.buffers() if buffer.is_floating_point() == floating]


def _check_fit(own: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    if own.keys() != saved.keys() or any(own[name].shape != saved[name].shape for name in own):
        raise ValueError("what was saved belongs to other networks")


def _at_least_float32(logits: Tensor) -> Tensor:
    """Losses are computed in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
