"""The configuration of a training run: every field is a flag of `fastdcgan train`, its docstring the flag's help."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from fastdcgan import image_size
from fastdcgan.dataset_names import NAMES
from fastdcgan.errors import UserError, check_at_least, check_seed, check_utf8
from fastdcgan.files import expand_braces

# What a data set is trained at unless the flags say otherwise: (image size, width, steps); others get DEFAULTS.
PRESETS = {
    "digits": (32, 32, 1_000),
    "fake": (32, 32, 1_000),
    "mnist": (28, 32, 4_000),
    "fashion-mnist": (28, 32, 4_000),
    "cifar10": (32, 64, 20_000),
    "svhn": (32, 64, 20_000),
}
DEFAULTS = (64, 64, 20_000)
MOST_COUNT, MOST_EPOCHS, MOST = 10**12, 1e9, 1e6


@dataclass(frozen=True)
class TrainConfig:
    """Train a DCGAN. Without DATA: handwritten digits, about a minute on a laptop."""

    #: A name (digits, fake, mnist, fashion-mnist, cifar10, svhn, celeba) or a path: a folder of images (nested or
    #: flat), a .zip of images, WebDataset .tar shards, an LSUN LMDB, a packed .npy.
    data: Annotated[Positional[str], arg(metavar="[DATA]")] = "digits"

    #: Compile the step with torch.compile; on a GPU also record it as one CUDA graph.
    compile: bool = False
    #: Record the whole step as one CUDA graph; auto: on a GPU, with --compile.
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    #: What convolutions compute in; weights, statistics, losses and optimizer stay float32. auto: bf16 on a GPU that
    #: has it, else fp32.
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    #: Where to train; auto takes a GPU if there is one.
    device: Literal["auto", "cuda", "cpu"] = "auto"

    #: Pixels, a side or HEIGHTxWIDTH; each b * 2^k with b in 4..7 (28, 32, 48, 64, 96, 128, 64x96, ...).
    #: Default: 64; 32 for digits, fake, cifar10 and svhn, 28 for mnist and fashion-mnist; a packed .npy's own.
    image_size: str | None = None
    #: 1 grayscale, 3 colour, 4 colour with transparency. Default: 1 or 3, as the data has it, and what is
    #: transparent lies on white; a packed .npy's own.
    channels: Literal[1, 3, 4] | None = None
    #: Mirror each image with probability 1/2 (--flip, --no-flip). Default: for colour pictures, not for digits.
    flip: bool | None = None
    #: Which part of a picture whose proportions are not --image-size's; random is another one every epoch, and cannot
    #: be cached.
    crop: Literal["centre", "random"] = "centre"
    #: What decodes the images; auto takes DALI where it is installed.
    loader: Literal["auto", "dali", "torch"] = "auto"
    #: Where the resized images are kept after the first epoch; auto by size against free memory.
    cache: Literal["auto", "device", "host", "disk", "off"] = "auto"
    #: Folder of --cache disk, of downloads, and of what was found of each file. Default:
    #: fastdcgan in ~/.cache, or in XDG_CACHE_HOME.
    cache_dir: Path | None = None
    #: End at the first image that cannot be used, rather than going on without it.
    strict: bool = False

    #: Images a step, at least 2; with torchrun, in each process.
    batch_size: int = 64
    #: With torchrun: BatchNorm statistics over the batches of all processes, rather than over each one's own.
    sync_batchnorm: bool = False
    #: Updates of both networks. Default: 20,000; 1,000 for digits and fake, 4,000 for mnist and fashion-mnist.
    steps: int | None = None
    #: The same in passes over the data; give one of the two.
    epochs: float | None = None
    #: tutorial: the small 28x28 pair many tutorials print, whose widths are its own.
    arch: Literal["dcgan", "tutorial"] = "dcgan"
    #: Length of the latent vector.
    latent_dim: int = 100
    #: Channels of the generator's last hidden layer, doubling inwards. Default: 64; 32 for digits, fake, mnist and
    #: fashion-mnist.
    gen_width: int | None = None
    #: Channels of the discriminator's first layer, doubling inwards. Default: as --gen-width.
    disc_width: int | None = None

    #: The adversarial loss. wgan-gp has a penalty on the discriminator's gradient: a step takes about twice as long.
    loss: Literal["bce", "hinge", "lsgan", "wgan-gp"] = "bce"
    #: The discriminator's target for real images is 1 minus this (0.1 is usual); with bce and lsgan.
    label_smoothing: float = 0.0
    #: Weight of the R1 penalty on the discriminator's gradient at real images (1 to 10 are usual); 0 is without.
    r1: float = 0.0
    #: Steps from one R1 penalty to the next; its weight is multiplied by this.
    r1_every: int = 16
    #: Divide each of the discriminator's weights by its largest singular value.
    spectral_norm: bool = False
    #: Show the discriminator images in other colours, shifted and with a hole: for small sets of images.
    diffaugment: bool = False
    #: Standard deviation of Gaussian noise on all the discriminator sees, in pixels from -1 to 1 (0.1 is usual); falls
    #: to 0 over the run.
    instance_noise: float = 0.0
    #: Adam's learning rate, of both networks.
    lr: float = 2e-4
    #: The generator's learning rate. Default: --lr.
    lr_g: float | None = None
    #: The discriminator's learning rate. Default: --lr.
    lr_d: float | None = None
    #: linear: both learning rates fall to 0 over the run.
    lr_decay: Literal["none", "linear"] = "none"
    #: Adam's first beta.
    beta1: float = 0.5
    #: Adam's second beta.
    beta2: float = 0.999
    #: Decay of the generator's moving average, which draws the samples; less in the first steps.
    ema_decay: float = 0.999

    #: Of weights, noise, flips and the order of the images.
    seed: int = 0
    #: Where everything goes. Default: runs/<data>-<time>.
    run_dir: Path | None = None
    #: Go on with the run in --run-dir from its newest checkpoint (or start it, if there is none).
    resume: bool = False
    #: Steps between lines of metrics. Default: 20, or more, so that it takes at most 0.5% of the time.
    log_every: int | None = None
    #: Steps between sample grids. Default: 100, or more, likewise.
    sample_every: int | None = None
    #: Steps between checkpoints. Default: 500, or more, likewise.
    checkpoint_every: int | None = None
    #: Checkpoints kept; older ones are deleted. checkpoints/best, the one nearest to the data, stays beside them, and
    #: with --on-divergence rollback one that is old enough to go back to.
    keep: int = 3
    #: At an alarm (numbers that are not finite, large losses, steep gradients, a discriminator that always wins,
    #: samples all alike, or all noise): say so, end the run, or go back to the last sound checkpoint with other noise,
    #: three times at most until it is resumed. Gradients that are not finite end the run with warn too.
    on_divergence: Literal["warn", "stop", "rollback"] = "warn"

    def __post_init__(self) -> None:
        """Check what can be checked without looking at the data or the device. Paths may be given as text, sizes as one
        number or (height, width), numbers as numpy's.

        Raises:
            UserError: an impossible value.
        """
        if isinstance(self.data, Path):
            object.__setattr__(self, "data", str(self.data))
        if not isinstance(self.data, str):
            what = f"DATA is a {type(self.data).__qualname__}: give a dataset's name or a path"
            raise UserError(f"{what} (numpy.save makes one of an array of uint8 (images, height, width, channels))")
        for field in dataclasses.fields(self):
            if getattr(getattr(self, field.name), "ndim", None) == 0:
                object.__setattr__(self, field.name, getattr(self, field.name).item())
        if isinstance(self.image_size, tuple | list):
            object.__setattr__(self, "image_size", "x".join(map(str, self.image_size)))
        elif isinstance(self.image_size, int):
            object.__setattr__(self, "image_size", str(self.image_size))
        for name in ("cache_dir", "run_dir"):
            if isinstance(getattr(self, name), str | Path):
                object.__setattr__(self, name, Path(os.path.expanduser(getattr(self, name))))
        for field in dataclasses.fields(self):
            if not _fits(getattr(self, field.name), str(field.type)):
                raise UserError(f"{flag(field.name)} {getattr(self, field.name)!r} is not possible: {field.type}")
        if not self.data:
            raise UserError("DATA is empty: name a dataset or give a path")
        if self.run_dir:
            check_utf8("--run-dir", self.run_dir)  # or TensorBoard cannot write there
            if "\0" in str(self.run_dir) or any(len(os.fsencode(part)) > 255 for part in self.run_dir.parts):
                raise UserError("--run-dir is not possible: no folder can have such a name")
        counts = ["steps", "latent_dim", "gen_width", "disc_width", "log_every", "sample_every", "checkpoint_every"]
        for name in [*counts, "keep", "r1_every"]:
            if getattr(self, name) is not None:
                check_at_least(flag(name), getattr(self, name), 1)
                if getattr(self, name) > MOST_COUNT:
                    raise UserError(f"{flag(name)} {getattr(self, name)} is too large: at most {MOST_COUNT:,}")
        check_seed(self.seed)
        if self.batch_size < 2:
            raise UserError(f"--batch-size {self.batch_size} is too small: BatchNorm needs at least 2 images")
        if self.epochs is not None and not 0 < self.epochs <= MOST_EPOCHS:
            raise UserError(f"--epochs {self.epochs:g} is not possible: a number above 0, {MOST_EPOCHS:g} at most")
        if self.steps is not None and self.epochs is not None:
            raise UserError("--steps and --epochs say the same thing: give one of them")
        for name in ("lr", "lr_g", "lr_d"):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate <= MOST:
                raise UserError(f"{flag(name)} {rate} is not possible: a number above 0, {MOST:g} at most")
        for name in ("r1", "instance_noise"):
            if not 0 <= getattr(self, name) <= MOST:
                raise UserError(
                    f"{flag(name)} {getattr(self, name):g} is not possible: 0 (without) or above, {MOST:g} at most"
                )
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{flag(name)} {getattr(self, name):g} is not possible: at least 0 and below 1")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"--label-smoothing {self.label_smoothing:g} is not possible: at least 0 and below 1")
        if self.label_smoothing and self.loss not in ("bce", "lsgan"):
            raise UserError(f"--label-smoothing needs a loss with targets (bce, lsgan): --loss {self.loss} has none")
        if self.sync_batchnorm and (self.r1 > 0 or self.loss == "wgan-gp"):
            raise UserError(
                "--sync-batchnorm cannot be differentiated twice, as --r1 and --loss wgan-gp do: leave one of them out"
            )
        height, width = self.size
        try:
            image_size.stages(height, width)
        except ValueError as error:
            raise UserError(f"--image-size: {error}") from None
        if self.arch == "tutorial" and (height, width) != (28, 28):
            raise UserError("--arch tutorial has 28x28 pixels only: leave --image-size out or give 28")

    @property
    def size(self) -> tuple[int, int]:
        """Image height and width in pixels.

        Raises:
            UserError: --image-size is not one.
        """
        if self.image_size is None:
            return (28, 28) if self.arch == "tutorial" else (self._preset[0],) * 2
        try:
            return image_size.parse(self.image_size)
        except ValueError as error:
            raise UserError(f"--image-size: {error}") from None

    @property
    def widths(self) -> tuple[int, int]:
        """Widths of generator and discriminator: channels of the layer beside the images."""
        gen = self.gen_width or self._preset[1]
        return gen, self.disc_width or gen

    @property
    def _preset(self) -> tuple[int, int, int]:
        return PRESETS.get(self.data, DEFAULTS)

    @property
    def rates(self) -> tuple[float, float]:
        """Learning rates of generator and discriminator."""
        return self.lr_g or self.lr, self.lr_d or self.lr

    def total_steps(self, images: int, processes: int = 1, seen: int = 0) -> int:
        """Updates in the whole run, over a set of `images` images, in each of so many processes.

        With --epochs those that are left after `seen` images.
        """
        if self.epochs is not None:
            left = math.ceil((self.epochs * images - seen) / (self.batch_size * processes))
            return max(left, 0 if seen else 1)
        return self.steps or self._preset[2]

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON has them."""
        return {
            name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainConfig:
        """The reverse of `as_json`.

        Raises:
            UserError: a field this version does not know, or a value of another type than the field's.
        """
        new = set(values) - {field.name for field in dataclasses.fields(cls)}
        if new:
            raise UserError(f"config.json has a field '{min(new)}' that this version does not know: update fastdcgan")
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(f"config.json: {error}") from None

    def differs(self) -> set[str]:
        """The names of the fields that are not at their defaults."""
        return {field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default}

    def resumed(self, saved: TrainConfig, asked: Set[str]) -> TrainConfig:
        """The saved run's configuration with the fields of this one that are named in `asked`.

        Data that is no longer where it was may be named anew.

        Raises:
            UserError: a change that would make it another run: its networks or its data would be others. Or no data.
        """
        before, now = saved._fixed, self._fixed
        place = before["data"]
        moved = place not in NAMES and not os.path.exists(place) and not os.path.exists(next(expand_braces(place)))
        for name in sorted(asked & before.keys()):
            if before[name] != now[name] and not (name == "data" and moved):
                raise UserError(
                    f"{flag(name)} {getattr(self, name)} cannot change in a resumed run, which has {before[name]}:"
                    " leave it out, or train in another --run-dir"
                )
        changed = {name: getattr(self, name) for name in asked - before.keys()}
        if moved and "data" not in asked:
            raise UserError(f"there is no {before['data']} any more: name the data's new place before --run-dir")
        if moved:
            changed["data"] = now["data"]
        if "steps" in changed or "epochs" in changed:
            saved = dataclasses.replace(saved, steps=None, epochs=None)
        return dataclasses.replace(saved, **(changed | {"run_dir": self.run_dir}))  # the folder may have moved

    @property
    def _fixed(self) -> dict[str, Any]:
        """What a resumed run cannot change, in words that say the same where the same is meant."""
        return {
            "data": absolute(self.data),
            "image_size": "{}x{}".format(*self.size),
            "channels": self.channels,
            "latent_dim": self.latent_dim,
            "gen_width": self.widths[0],
            "disc_width": self.widths[1],
            "arch": self.arch,
            "spectral_norm": self.spectral_norm,
        }


def absolute(data: str) -> str:
    """DATA as any folder can be trained from: a name as it is, a path from the root on."""
    return data if data in NAMES else os.path.abspath(os.path.expanduser(data))


def flag(field: str) -> str:
    """The command-line flag of a field."""
    return "DATA" if field == "data" else "--" + field.replace("_", "-")


def _fits(value: object, kind: str) -> bool:
    """Whether a value can stand in a field whose annotation, as it is written, is `kind`."""
    if value is None:
        return "None" in kind
    if isinstance(value, bool):
        return "bool" in kind
    if "Literal" in kind:
        return repr(value) in kind
    if isinstance(value, int):
        return "int" in kind or ("float" in kind and abs(value) < 2**1000)  # a float can hold it
    if isinstance(value, float):
        return "float" in kind
    return ("str" if isinstance(value, str) else "Path" if isinstance(value, Path) else "nothing") in kind
