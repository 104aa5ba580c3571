"""Opening a trained run for use: on the fastest device, its weights frozen, its mistakes explained."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from fastdcgan.errors import UserError
from fastdcgan.models import AnyDiscriminator, AnyGenerator
from fastdcgan.processor import choose_device
from fastdcgan.runs import Run, load_run


def open_run(path: Path, ema: bool = True) -> Run:
    """Load a run on the GPU, if there is one, in evaluation mode, with gradients for inputs only.

    Args:
        path: what `load_run` takes.
        ema: the generator's moving average rather than its latest weights.

    Raises:
        UserError: nothing there, no checkpoint, damaged or not finite, or not for pictures of 1, 3 or 4 channels.
    """
    run = load_run(path, choose_device("auto"), ema)
    if run.generator.channels not in (1, 3, 4):
        raise UserError(f"{path} makes pictures of {run.generator.channels} channels, which no picture file has")
    for network in (run.generator, run.discriminator):
        if network is not None:
            network.requires_grad_(False)
    return run


def open_both(path: Path, ema: bool = True) -> tuple[Run, AnyGenerator, AnyDiscriminator]:
    """The run with both of its networks, as `open_run` gives it.

    Raises:
        UserError: also where there is a generator only.
    """
    run = open_run(path, ema)
    if run.discriminator is None:
        raise UserError(f"{path} holds a generator alone, and this needs the discriminator too: give a run folder")
    return run, run.generator, run.discriminator


def fingerprint(network: torch.nn.Module) -> str:
    """SHA-256 of the names, types, shapes and values of a network's weights, in hexadecimal."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)} ".encode())
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()


def device_of(network: torch.nn.Module) -> torch.device:
    return next(network.parameters()).device
