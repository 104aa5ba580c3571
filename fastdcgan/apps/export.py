"""A trained generator as a folder to give away: weights, a model card with samples, and a format for other programs."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdcgan import reference
from fastdcgan.apps.evaluate import better
from fastdcgan.apps.latent import generate, latents
from fastdcgan.apps.trained import fingerprint, open_run
from fastdcgan.checkpoint import write_safetensors
from fastdcgan.console import say, spinner
from fastdcgan.errors import UserError, check_utf8
from fastdcgan.files import printable, target, unfinished_name
from fastdcgan.grid import save_grid
from fastdcgan.models import AnyGenerator, Generator
from fastdcgan.runs import EXPORTED, Run, load_run
from fastdcgan.versions import versions

FILES = {"safetensors": EXPORTED, "onnx": "generator.onnx", "torchscript": "generator.pt", "pth": "netG.pth"}
AGREEMENT = 1e-4  # largest difference allowed between the exported network's pictures (-1..1) and the original's


def export(run: Path, *, format: str, out: Path, evaluation: Path | None = None, ema: bool = True) -> None:
    """Write the folder; it appears whole or not at all.

    It holds the weights as safetensors (`from_pretrained` reads them), README.md and samples.png, config.json, and for
    another format its file: ONNX and TorchScript take latents (N, latent_dim) and give images (N, C, H, W) in -1..1;
    netG.pth is the state_dict that the widely used PyTorch DCGAN example saves.

    Args:
        format: a key of `FILES`.
        out: a folder that does not exist, or is empty.
        evaluation: a file made by `fastdcgan evaluate`, whose numbers go into the model card.

    Raises:
        UserError: a run that cannot be used, a folder in the way, a missing package, or an exported network that does
            not compute what the original does.
    """
    if format not in FILES:
        raise UserError(f"--format {format} is not known: use one of {', '.join(FILES)}")
    missing = [name for name in ("onnx", "onnxscript") if format == "onnx" and importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--format onnx needs {' and '.join(missing)}: pip install onnx onnxscript onnxruntime")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} exists already: name a new folder")
    if not out.name:
        raise UserError(f"--out {out} has no name of its own: give that of a new folder")
    place = target(out)
    if place.is_mount():
        raise UserError(f"--out {out} is where a disk is mounted, which cannot be replaced: name a new folder in it")
    found = open_run(run, ema)
    numbers, count = ({}, None) if evaluation is None else read_evaluation(evaluation, found.generator)
    plain = plain_generator(found.generator)
    check_utf8("--out", out)  # or ONNX's and TorchScript's libraries cannot write there
    unfinished = unfinished_name(place)
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write_safetensors(plain.state_dict(), unfinished / EXPORTED)
        if format == "pth":
            content = io.BytesIO()  # torch has errors of its own for a full disk, some of which end the process
            torch.save(plain.state_dict(), content)
            (unfinished / FILES["pth"]).write_bytes(content.getvalue())
        elif format == "torchscript":
            write_torchscript(any_batch(plain), unfinished / FILES["torchscript"])
        elif format == "onnx":
            with spinner("exporting to ONNX"):
                write_onnx(any_batch(plain), unfinished / FILES["onnx"])
        save_grid(generate(found.generator, latents(range(36), found.generator.latent_dim)), unfinished / "samples.png")
        (unfinished / "config.json").write_text(json.dumps(describe(found), indent=1) + "\n")
        (unfinished / "README.md").write_text(model_card(found, format, numbers, count), encoding="utf-8")
        if place.exists():
            place.rmdir()
        unfinished.replace(place)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    say(f"exported: {', '.join(sorted(path.name for path in out.iterdir()))} in {printable(out)}")


def from_pretrained(path: str | Path, device: str | torch.device = "cpu") -> AnyGenerator:
    """The generator in a folder made by `fastdcgan export`, in evaluation mode.

    It takes latents (N, latent_dim), N(0, 1), and gives images (N, C, H, W) in -1..1.

    Raises:
        UserError: no such folder, or damaged.
    """
    file = Path(os.path.expanduser(path)) / EXPORTED
    if not file.is_file():
        raise UserError(f"{path} holds no {EXPORTED}: give a folder made by fastdcgan export")
    return load_run(file, device).generator


def plain_generator(generator: AnyGenerator) -> nn.Module:
    """The same network of PyTorch's own layers alone, on the CPU, in evaluation mode."""
    plain: nn.Module
    if isinstance(generator, Generator):
        plain = reference.Generator(generator.image_size, generator.channels, generator.latent_dim, generator.width)
    else:
        plain = reference.TutorialGenerator(generator.channels, generator.latent_dim)
    plain.load_state_dict({name: value.cpu() for name, value in generator.state_dict().items()})
    return plain.eval().requires_grad_(False)


def any_batch(plain: nn.Module) -> nn.Sequential:
    """The layers of a plain generator without its Python: a tracer would keep the number of images it saw there."""
    layers = list(plain.main)  # type: ignore[arg-type]
    if isinstance(plain, reference.Generator):
        layers.insert(0, nn.Unflatten(1, (plain.latent_dim, 1, 1)))
    return nn.Sequential(*layers).eval()


def write_torchscript(generator: nn.Sequential, path: Path) -> None:
    """A file for torch.jit.load, in Python and C++."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated
        content = io.BytesIO()
        torch.jit.save(torch.jit.trace(generator, _example(generator)), content)
        path.write_bytes(content.getvalue())
        traced = torch.jit.load(io.BytesIO(path.read_bytes()))
    _agree("TorchScript", traced, generator)


def write_onnx(generator: nn.Sequential, path: Path) -> None:
    """An ONNX file with input "latent" and output "images", any batch size; compared where onnxruntime is installed."""
    log = logging.getLogger("torch.onnx")
    with contextlib.ExitStack() as at_end, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        at_end.callback(log.setLevel, log.level)
        log.setLevel(logging.ERROR)
        torch.onnx.export(
            generator,
            (_example(generator),),
            str(path),
            input_names=["latent"],
            output_names=["images"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    if importlib.util.find_spec("onnxruntime") is None:
        say("onnxruntime is not installed: the ONNX file has not been compared with the original")
        return
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    _agree("ONNX", lambda z: torch.from_numpy(session.run(None, {"latent": z.numpy()})[0]), generator)


def read_evaluation(path: Path, generator: AnyGenerator) -> tuple[dict[str, dict[str, float]], int | None]:
    """The measurements of the generator, in a file made by `fastdcgan evaluate`, and how many images they are of, if it
    says so.

    Raises:
        UserError: not such a file, or one of other weights.
    """
    try:
        content = json.loads(path.read_text())
        results: dict[str, dict[str, float]] = content["results"]
        found = {name: {key: float(value) for key, value in each.items()} for name, each in results.items()}
        weights = content.get("weights")
        count = int(content["images"]) if "images" in content else None
        if not found:
            raise ValueError("nothing was measured")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise UserError(f"--evaluation {path} is not a file made by fastdcgan evaluate") from None
    if weights is None:
        raise UserError(f"--evaluation {path} does not say which weights it is of (older files do not): evaluate again")
    if weights != fingerprint(generator):
        what = "of another run, or of another step, or of the run's other weights (--ema, --no-ema)"
        raise UserError(f"--evaluation {path} is {what}: evaluate what is exported")
    return found, count


def describe(run: Run) -> dict[str, Any]:
    """What the folder's config.json says of the generator."""
    generator = run.generator
    return {
        "library": "fastdcgan",
        "architecture": type(generator).__name__,
        "image_size": list(generator.image_size),
        "channels": generator.channels,
        "latent_dim": generator.latent_dim,
        "width": getattr(generator, "width", None),
        "step": run.step,
        "versions": versions(),
    }


def model_card(run: Run, format: str, numbers: dict[str, dict[str, float]], count: int | None) -> str:
    """README.md in the form that model hubs read; `numbers` of so many images, empty where nothing was measured."""
    generator = run.generator
    height, width = generator.image_size
    parameters = sum(value.numel() for value in generator.parameters())
    rows = [
        ("image", f"{height} x {width} pixels, {generator.channels} channel{'s' * (generator.channels > 1)}, in -1..1"),
        ("latent", f"{generator.latent_dim} values, N(0, 1)"),
        ("parameters", f"{parameters:,}"),
    ]
    if run.config is not None and run.step is not None:
        rows += [
            ("trained on", printable("/".join(Path(run.config.data).parts[-2:])).replace("|", "\\|")),
            ("steps", f"{run.step:,}, over {run.images:,} images"),
        ]
    facts = "\n".join(f"| {name} | {value} |" for name, value in rows)
    other = "" if format == "safetensors" else f"\nThe same network as {format}: [{FILES[format]}]({FILES[format]}).\n"
    text = f"""---
library_name: fastdcgan
pipeline_tag: unconditional-image-generation
tags: [dcgan, gan]
---
# DCGAN generator

![Pictures of the first 36 seeds, not selected](samples.png)

| | |
|---|---|
{facts}

```python
import torch
from fastdcgan import from_pretrained

generator = from_pretrained(".")
images = generator(torch.randn(16, {generator.latent_dim}))  # (16, {generator.channels}, {height}, {width}) in -1..1
```
{other}"""
    if numbers:
        names = list(numbers)
        lines = [
            f"| {key} | "
            + " | ".join(f"{numbers[n][key]:.3f}" if key in numbers[n] else "" for n in names)
            + f" | {better(key)} is better |"
            for key in numbers[names[0]]
        ]
        head = f"| | {' | '.join(names)} | |\n|---|{'---|' * len(names)}---|\n"
        text += "\n## Measured with `fastdcgan evaluate`\n\n" + head + "\n".join(lines) + "\n"
        text += "" if count is None else f"\nEach of {count:,} images, against as many real ones.\n"
    return text


def _example(generator: nn.Sequential, seeds: range = range(2)) -> torch.Tensor:
    """Latents that the generator takes."""
    first = generator[0]
    latent_dim = first.unflattened_size[0] if isinstance(first, nn.Unflatten) else first.in_features
    return latents(seeds, int(latent_dim))  # type: ignore[arg-type]


def _agree(name: str, exported: Callable[[torch.Tensor], torch.Tensor], generator: nn.Sequential) -> None:
    """Raises UserError where the exported network computes something else."""
    z = _example(generator, range(100, 105))
    difference = (exported(z) - generator(z)).abs().max().item()
    if not difference <= AGREEMENT:
        raise UserError(
            f"the {name} file differs from the run by {difference:.1e}: use --format safetensors, and report it"
        )
