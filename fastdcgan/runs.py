"""Run folders: starting one, going on with one, and loading what was trained."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastdcgan import checkpoint
from fastdcgan.config import TrainConfig
from fastdcgan.errors import UserError
from fastdcgan.files import lock, replace_file, short
from fastdcgan.models import AnyDiscriminator, AnyGenerator, build_discriminator, build_generator
from fastdcgan.processor import choose_device, describe_device
from fastdcgan.versions import versions

N = TypeVar("N", bound=torch.nn.Module)
EXPORTED = "generator.safetensors"  # what an exported folder, which is no run, has beside its config.json


class RunFolder:
    """One run's folder, locked against a second process until `unlock`."""

    def __init__(self, path: Path, config: TrainConfig, facts: dict[str, Any], known: Sequence[Path] = ()) -> None:
        """Make the folder (or take one that exists, for a resumed run) and write its config.json.

        Args:
            config: of the run.
            facts: what the configuration alone does not say: number of images, channels, device, precision, processes;
                kept in config.json under "data".
            known: its checkpoints when the run to go on with was read.

        Raises:
            UserError: it cannot be written, or another process is training in it.
        """
        try:
            (path / "samples").mkdir(parents=True, exist_ok=True)
            self._lock = open(path / ".lock", "w")  # noqa: SIM115  # held until `unlock`
        except OSError as error:
            raise UserError(f"--run-dir {path} cannot be written: {error.strerror}") from error
        try:
            lock(self._lock, wait=False)
        except BlockingIOError:
            raise UserError(f"--run-dir {path}: another process is training there; choose another folder") from None
        if checkpoint.complete(path) != list(known):
            self.unlock()
            raise UserError(f"--run-dir {path}: another process has trained there meanwhile; choose another folder")
        self.path, self.facts = path, facts
        try:
            checkpoint.remove_unfinished(path)
            self.write_config(config)
        except OSError as error:
            self.unlock()
            raise UserError(f"--run-dir {path} cannot be written: {error.strerror}") from error
        except BaseException:  # such as Ctrl-C, whose traceback a notebook keeps, and with it the lock
            self.unlock()
            raise

    def unlock(self) -> None:
        """Let another process, or another run of this one, train in the folder."""
        self._lock.close()

    def keep_intervals(self, every: dict[str, int]) -> None:
        """Have a resumed run log, sample and save at the same steps as this one."""
        intervals: dict[str, Any] = {f"{name}_every": steps for name, steps in every.items()}
        config = dataclasses.replace(self.config, **intervals)
        if config != self.config:
            self.write_config(config)

    def write_config(self, config: TrainConfig) -> None:
        """Write config.json: from then on this is the run's configuration. Raises OSError."""
        content = {
            "config": config.as_json(),
            "data": self.facts,
            "versions": versions(),
            "device": describe_device(self.facts["device"]),
        }
        replace_file(self.path / "config.json", (json.dumps(content, indent=1) + "\n").encode())
        self.config = config


def choose_folder(config: TrainConfig, name: str) -> Path:
    """The folder of a new run over data called `name`: --run-dir, or a new runs/<name>-<time>, which is made here, as
    another process or thread may want one in the same second."""
    if config.run_dir is not None:
        return config.run_dir
    usual = Path("runs") / f"{short(name)}-{time.strftime('%Y%m%d-%H%M%S')}"
    with suppress(OSError):  # RunFolder says what is wrong with it
        usual.parent.mkdir(exist_ok=True)
        for number in itertools.count(1):
            path = usual if number == 1 else usual.with_name(f"{usual.name}-{number}")
            with suppress(FileExistsError):
                path.mkdir()
                return path
    return usual


def saved_config(config: TrainConfig) -> TrainConfig | None:
    """The configuration of the run to go on with, or None to start a new one.

    Raises:
        UserError: --run-dir holds something that is not a run, or a run and --resume was not given; --resume without
            --run-dir; a config.json that cannot be read.
    """
    path = config.run_dir
    if path is None:
        if config.resume:
            newest = max((p.parent for p in Path("runs").glob("*/config.json")), key=os.path.getmtime, default=None)
            hint = f"the newest is {newest}" if newest else "there is none under runs/"
            raise UserError(f"--resume needs --run-dir with the run to go on with; {hint}")
        return None
    if not path.exists():
        return None
    if not path.is_dir():
        raise UserError(f"--run-dir {path} is a file: name a folder")
    if not (path / "config.json").exists():
        started = {".lock", ".config.json.unfinished"}  # all that a kill may have left, beside an empty samples
        if any(path.glob("samples/*")) or {item.name for item in path.iterdir()} - started - {"samples"}:
            raise UserError(f"--run-dir {path} exists and is not a run: name another folder")
        return None
    if not config.resume:
        written = [path / "metrics.jsonl", path / "quality.jsonl", *path.glob("samples/step-*")]
        if not checkpoint.complete(path) and not any(each.exists() for each in written):
            return None  # nothing was trained: the images, for one, turned out to be too few
        raise UserError(f"--run-dir {path} already holds a run: add --resume to go on with it, or name another folder")
    return read_config(path)


def read_config(path: Path) -> TrainConfig:
    """The configuration in a run folder, with the channels that the data turned out to have.

    Raises:
        UserError: config.json is missing or damaged.
    """
    try:
        content = json.loads((path / "config.json").read_text())
        values = dict(content["config"])
        if values.get("channels") is None:
            values["channels"] = dict(content.get("data", {})).get("channels")
        return TrainConfig.from_json(values)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path / 'config.json'} cannot be read: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Run:
    """What was trained, in evaluation mode on one device.

    `generator` is the moving average unless it was loaded with ema=False. `discriminator` is None for a generator's
    file alone, `config` also where there is no config.json. `step` is the number of updates behind it, `images` that of
    the images they have seen; None where the file does not say.
    """

    folder: Path
    generator: AnyGenerator = field(repr=False)
    discriminator: AnyDiscriminator | None = field(repr=False)
    config: TrainConfig | None
    step: int | None
    images: int | None


def load_run(path: str | Path, device: str | torch.device = "cpu", ema: bool = True) -> Run:
    """Load a trained generator, and its discriminator where there is one.

    Args:
        path: a run folder (its newest checkpoint), one checkpoint folder, a folder made by `fastdcgan export`, or a
            .pth or .safetensors file with a generator's weights, also one saved by the widely used PyTorch example.
        device: where the networks go.
        ema: the generator's moving average rather than its latest weights, which a run or a checkpoint alone has.

    Raises:
        UserError: nothing there, or not a generator, or damaged, or without its latest weights; never runs code from a
            file.
    """
    if torch.device(device).type == "cuda":
        choose_device("cuda")  # raises where there is none
    with torch.inference_mode(False), torch.device("cpu"):  # whatever the caller has set
        return _load(Path(os.path.expanduser(path)), device, ema)


def _load(path: Path, device: str | torch.device, ema: bool) -> Run:
    """`load_run`, without the caller's settings."""
    if not path.exists():
        raise UserError(f"{path} does not exist: give a run folder, a checkpoint folder or a generator's file")
    if (path / EXPORTED).is_file() and not (path / "state.json").exists():
        path = path / EXPORTED
    if path.is_file():
        if not ema:
            raise UserError(f"{path} holds one network's weights alone: leave --no-ema out, or give a run folder")
        return Run(path.parent, _generator(read_weights(path), path).to(device).eval(), None, None, None, None)
    if (path / "state.json").exists():
        saved, folder = checkpoint.load(path), path.resolve().parent.parent
    else:
        newest = checkpoint.load_newest(path)
        if newest is None:
            if (path / "config.json").exists():
                raise UserError(
                    f"{path} has no checkpoint: a run under way writes its first after --checkpoint-every steps, and"
                    " none as long as some of its weights are not finite"
                )
            near = [each.parent for pattern in ("../config.json", "*/config.json") for each in path.glob(pattern)]
            hint = f"give a run, such as {max(near, key=os.path.getmtime)}" if near else "train one: fastdcgan train"
            raise UserError(f"{path} has no checkpoint: {hint}")
        saved, folder = newest, path
    config = read_config(folder) if (folder / "config.json").exists() else None
    generator = _generator(saved.tensors["average" if ema else "generator"], path)
    discriminator = _discriminator(saved.tensors["discriminator"], path)
    step, images = saved.progress["step"], saved.progress["images"]
    return Run(folder, generator.to(device).eval(), discriminator.to(device).eval(), config, step, images)


def read_weights(file: Path) -> dict[str, Tensor]:
    """A network's weights by name from a .safetensors or .pth file, without the prefixes that wrappers add.

    Raises:
        UserError: not such a file, damaged, or a pickle with more than tensors in it.
    """
    try:
        if file.suffix == ".safetensors":
            weights: Any = load_file(file)
        else:
            with warnings.catch_warnings(action="ignore"):  # that it is TorchScript, which is refused below
                weights = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise UserError(f"{file} is not a .safetensors file, nor a .pth file of weights and nothing else") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{file} does not hold a network's weights by name (a state_dict)")
    plain = {re.sub(r"^((_orig_mod|module)\.)+", "", str(name)): value for name, value in weights.items()}
    plain.pop("n_averaged", None)  # of torch.optim.swa_utils.AveragedModel
    for name, value in plain.items():
        if not value.is_floating_point() and not name.endswith("num_batches_tracked"):
            raise UserError(f"{file} holds {name} as {value.dtype}: save the weights as floating-point numbers")
    return plain


def _generator(weights: dict[str, Tensor], path: Path) -> AnyGenerator:
    """Build the generator that these weights fit and load them."""
    layers = _layers(weights)
    if not layers:
        raise UserError(f"{path} does not hold a generator: it has no layers")
    first, last, complaint = layers[0], layers[-1], f"{path} does not hold a DCGAN's generator"
    if first.ndim == 2:
        tutorial = "tutorial", (28, 28), last.shape[0] // (28 * 28), first.shape[1], 0
        generator = _empty(partial(build_generator, *tutorial))
    else:
        k = len(layers) - 1
        size = first.shape[2] << k, first.shape[3] << k
        plan = "dcgan", size, last.shape[1], first.shape[0], last.shape[0]
        try:
            generator = _build(partial(build_generator, *plan), weights, complaint)
        except ValueError:
            raise UserError(f"{complaint}: its layers make {size[0]}x{size[1]}") from None
    _fill(generator, weights, complaint)
    return generator


def _discriminator(weights: dict[str, Tensor], path: Path) -> AnyDiscriminator:
    """Build the discriminator that these weights fit and load them."""
    layers = _layers(weights)
    first, last, complaint = layers[0], layers[-1], f"{path} does not hold a DCGAN's discriminator"
    if last.ndim == 2:
        discriminator = _empty(partial(build_discriminator, "tutorial", (28, 28), first.shape[1], 0))
    else:
        k = len(layers) - 1
        size = last.shape[2] << k, last.shape[3] << k
        plan = "dcgan", size, first.shape[1], first.shape[0]
        discriminator = _build(partial(build_discriminator, *plan), weights, complaint)
    _fill(discriminator, weights, complaint)
    return discriminator


def _layers(weights: dict[str, Tensor]) -> list[Tensor]:
    """The weights of convolutions and linear layers, first layer first: files list main.10 before main.3."""
    numbered = sorted(
        weights.items(), key=lambda item: [int(part) if part.isdecimal() else 0 for part in item[0].split(".")]
    )
    return [value for _, value in numbered if value.ndim in (2, 4)]


def _build(build: Callable[[], N], weights: dict[str, Tensor], complaint: str) -> N:
    """The network, or UserError where it is much larger than the weights: that of another kind may not fit memory."""
    with torch.device("meta"):
        numbers = sum(value.numel() for value in build().state_dict().values())
    if numbers > 2 * sum(value.numel() for value in weights.values()):
        raise UserError(f"{complaint}: its layers do not follow one another as that one's do")
    return _empty(build)


def _empty(build: Callable[[], N]) -> N:
    """The float32 network without weights yet: initial ones would move the caller's random numbers."""
    with torch.device("meta"):
        network = build().float()
    network = network.to_empty(device="cpu")
    for buffer in network.buffers():  # old files lack the number of batches
        buffer.zero_()
    return network


def _fill(network: torch.nn.Module, weights: dict[str, Tensor], complaint: str) -> None:
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{complaint}: {str(error).splitlines()[-1].strip()}") from error
    if not all(value.float().isfinite().all() for value in weights.values()):  # some types cannot say
        raise UserError(f"{complaint} that can be used: some of its weights are not finite; take an older checkpoint")
