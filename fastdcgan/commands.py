"""The commands of `fastdcgan`, their arguments and help. Each imports what it needs when it runs."""

from __future__ import annotations

import dataclasses
import functools
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg

from fastdcgan.config import TrainConfig
from fastdcgan.console import say
from fastdcgan.errors import UserError, check_at_least
from fastdcgan.files import make_writable

app = tyro.extras.SubcommandApp()
data_app = tyro.extras.SubcommandApp()
COMMANDS = ["data"]
RunArgument = Annotated[Positional[Path], arg(metavar="RUN")]
DataArgument = Annotated[Positional[str], arg(metavar="DATA")]


def command(
    function: Callable[..., None], name: str | None = None, to: tyro.extras.SubcommandApp | None = None
) -> None:
    """Add a command. Parsing only binds its arguments; `main` runs it, so that parse errors and its own stay apart."""

    @functools.wraps(function)
    def bind(*args: Any, **kwargs: Any) -> functools.partial[None]:
        return functools.partial(function, *args, **kwargs)

    COMMANDS.append(name or function.__name__)
    (to or app).command(name=name)(bind)


def train(config: OmitArgPrefixes[TrainConfig]) -> None:
    """Train a DCGAN: fastdcgan train, or fastdcgan train FOLDER --image-size 64 --compile."""
    from fastdcgan.trainer import Interrupted
    from fastdcgan.trainer import train as run

    try:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            from torch.distributed.elastic.multiprocessing.errors import record

            record(run)(config, asked(sys.argv[2:]))  # torchrun shows the traceback of the process that ended first
        else:
            run(config, asked(sys.argv[2:]))
    except Interrupted as interrupted:
        sys.exit(0 if interrupted.signal_number == signal.SIGTERM else 128 + interrupted.signal_number)


def sample(
    run: RunArgument,
    out: Path = Path("samples.png"),
    count: int = 64,
    seed: int = 0,
    truncation: float | None = None,
    ema: bool = True,
) -> None:
    """Draw pictures from a trained generator: a grid, or single PNGs in a folder.

    Args:
        run: a run folder, a checkpoint folder, an exported folder, or a generator's .pth or .safetensors file.
        out: a .png file for one grid, or a folder for single pictures.
        count: how many pictures.
        seed: of the first picture's latent; picture i of seed s is picture 0 of seed s + i.
        truncation: draw latents from within plus and minus this many standard deviations: plainer pictures, less
            variety. Default: no limit.
        ema: the moving average of the generator rather than its latest weights.
    """
    from fastdcgan.apps.sample import sample as run_sample

    run_sample(run, out=out, count=count, seed=seed, truncation=truncation, ema=ema)


def invert(
    run: RunArgument,
    images: Annotated[Positional[tuple[Path, ...]], arg(metavar="IMAGE...")],
    out: Path = Path("inverted"),
    fit: bool = False,
    restarts: int = 8,
    steps: int = 300,
    feature_weight: float = 0.0,
    seed: int = 0,
) -> None:
    """Find the latents whose pictures are nearest to given images.

    Args:
        run: a run folder or a checkpoint folder.
        images: image files of the size the run draws.
        out: folder for latents, reconstructions and sheet.png.
        fit: crop, resize and convert images that have another size or other channels.
        restarts: random starting points for each image.
        steps: of the search for the latents.
        feature_weight: weight of the difference in the discriminator's features, beside that in pixels.
        seed: random seed of the starting points.
    """
    from fastdcgan.apps.invert import invert_images

    invert_images(
        run,
        images,
        out=out,
        restarts=restarts,
        steps=steps,
        feature_weight=feature_weight,
        seed=seed,
        fit=fit,
    )


def inpaint(
    run: RunArgument,
    images: Annotated[Positional[tuple[Path, ...]], arg(metavar="IMAGE...")],
    mask: Path | None = None,
    box: str | None = None,
    random_fraction: float | None = None,
    out: Path = Path("inpainted"),
    fit: bool = False,
    blend: bool = True,
    restarts: int = 8,
    steps: int = 300,
    seed: int = 0,
) -> None:
    """Fill holes in images with what the generator would draw there.

    Args:
        run: a run folder or a checkpoint folder.
        images: image files of the size the run draws.
        mask: a picture of the images' size, white where the hole is.
        box: X,Y,WIDTH,HEIGHT of the hole, in pixels.
        random_fraction: share of the pixels to remove, chosen at random.
        out: folder for the completed pictures and sheet.png (original, masked, completed).
        fit: crop, resize and convert images (and mask) that have another size or other channels.
        blend: Poisson blending of the filling, rather than pasting it.
        restarts: random starting points for each image.
        steps: of the search for the latents.
        seed: of the starts and of --random-fraction.
    """
    from fastdcgan.apps.inpaint import inpaint_images

    corners = None if box is None else whole_numbers("--box", box, 4)
    inpaint_images(
        run,
        images,
        out=out,
        mask=mask,
        box=None if corners is None else (corners[0], corners[1], corners[2], corners[3]),
        random_fraction=random_fraction,
        restarts=restarts,
        steps=steps,
        seed=seed,
        blend=blend,
        fit=fit,
    )


def interpolate(
    run: RunArgument,
    seeds: str = "0,1,2,3",
    steps: int = 32,
    out: Path = Path("walk.gif"),
    truncation: float | None = None,
    fit: bool = False,
) -> None:
    """Walk through the latent space: an animation, or a strip of pictures.

    Args:
        run: a run folder, a checkpoint folder, an exported folder, or a generator's .pth or .safetensors file.
        seeds: the points to walk through, separated by commas: seeds, or image files without a comma in their names,
            which are inverted first; that needs a run or a checkpoint.
        steps: pictures from each point to the next.
        out: .gif, .mp4 (needs ffmpeg), both of which return to the first point, or .png, a row for each way.
        truncation: as in `sample`.
        fit: crop, resize and convert image files that have another size or other channels.
    """
    from fastdcgan.apps.interpolate import interpolate as run_interpolate

    run_interpolate(run, words(seeds), out=out, steps=steps, truncation=truncation, fit=fit)


def arithmetic(
    run: RunArgument,
    plus: UseAppendAction[tuple[str, ...]] = (),
    minus: UseAppendAction[tuple[str, ...]] = (),
    out: Path = Path("arithmetic.png"),
    truncation: float | None = None,
    fit: bool = False,
) -> None:
    """Add and subtract groups of latents: --plus 1,2,3 --minus 4,5,6 --plus 7,8,9.

    Args:
        run: a run folder, a checkpoint folder, an exported folder, or a generator's .pth or .safetensors file.
        plus: a group whose mean is added: seeds or image files, separated by commas, so that no file's name may contain
            one. Images are inverted first, which needs a run or a checkpoint.
        minus: a group whose mean is taken away.
        out: a .png file: each group with its mean, and the result with eight neighbours.
        truncation: as in `sample`.
        fit: crop, resize and convert image files that have another size or other channels.
    """
    from fastdcgan.apps.arithmetic import arithmetic as run_arithmetic

    run_arithmetic(
        run, [words(each) for each in plus], [words(each) for each in minus], out=out, truncation=truncation, fit=fit
    )


def denoise(
    run: RunArgument,
    images: Annotated[Positional[tuple[Path, ...]], arg(metavar="IMAGE...")],
    sigma: float = 0.1,
    add_noise: bool = False,
    clean: tuple[Path, ...] = (),
    out: Path = Path("denoised"),
    fit: bool = False,
    restarts: int = 8,
    steps: int = 300,
    seed: int = 0,
) -> None:
    """Take noise out of images with what the generator knows.

    Args:
        run: a run folder or a checkpoint folder.
        images: image files of the size the run draws.
        sigma: standard deviation of the noise, where black is 0 and white 1.
        add_noise: the images are clean: add such noise first, and measure what comes back.
        clean: what the images are without noise, in their order, to measure against.
        out: folder for the denoised pictures and sheet.png.
        fit: crop, resize and convert images that have another size or other channels.
        restarts: random starting points for each image.
        steps: of the search for the latents.
        seed: of the starts and of --add-noise.
    """
    from fastdcgan.apps.denoise import denoise_images

    denoise_images(
        run,
        images,
        out=out,
        sigma=sigma,
        add_noise=add_noise,
        clean=clean,
        restarts=restarts,
        steps=steps,
        seed=seed,
        fit=fit,
    )


def bench(
    data: Path | None = None,
    image_size: str = "64",
    batch_size: tuple[int, ...] = (64,),
    width: int = 64,
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto",
    device: Literal["auto", "cuda", "cpu"] = "auto",
    only: tuple[str, ...] = (),
    repetitions: int | None = None,
    block_seconds: float = 1.0,
    per_layer: bool = False,
    follow: bool = False,
    json: Path | None = None,
) -> None:
    """Measure images/s of a training step against the plain example, a tuned one, and the hardware's limit.

    Args:
        data: a folder of images: measure from files to weights instead, each contender with the loader it would use.
        image_size: pixels, a side or HEIGHTxWIDTH.
        batch_size: one or more.
        width: channels of the layer next to the image in both networks, as --gen-width and --disc-width of train.
        precision: of the contenders other than the plain example.
        device: auto takes a GPU if there is one.
        only: some of example, example-fp32, skilled, skilled-fp16, fast-eager, fast-compiled, fast-captured.
            Default: all that the device can run.
        repetitions: rounds in which the contenders take turns (default 7), or epochs with --data (default 3).
        block_seconds: that each contender runs in a round, at least one step.
        per_layer: print the least time of every layer and pass.
        follow: measure also what logs, samples and checkpoints of a run take of its time.
        json: file for the results.
    """
    silence_torchs_profiler()
    from fastdcgan.bench import contenders
    from fastdcgan.bench.end_to_end import bench_data
    from fastdcgan.bench.throughput import bench as bench_step
    from fastdcgan.processor import choose_device

    shape = contenders.Shape(image_size=TrainConfig(image_size=image_size).size, width=width)
    unknown = set(only) - set(contenders.NAMES)
    if unknown:
        raise UserError(f"--only {' '.join(sorted(unknown))} is not known: use {', '.join(contenders.NAMES)}")
    if min(batch_size, default=0) < 2:
        raise UserError("--batch-size needs one number or more, each at least 2")
    if repetitions is not None:
        check_at_least("--repetitions", repetitions, 1)
    check_at_least("--width", width, 1)
    if not 0 < block_seconds < float("inf"):
        raise UserError(f"--block-seconds {block_seconds:g} is not possible: a number above 0")
    if data is not None and not data.is_dir():
        raise UserError(f"--data {data} is not a folder: give one that holds image files")
    if data is not None and (per_layer or follow):
        raise UserError("--per-layer and --follow are about the step alone: leave them or --data out")
    if json is not None:
        if json.is_dir():
            raise UserError(f"--json {json} is a folder: give the name of a file")
        make_writable(json.parent, f"--json {json}")
    if only and not contenders.entries(only, precision, choose_device(device)):
        raise UserError(f"--only {' '.join(only)} needs a GPU: leave it out to compare what this device can run")
    shared: dict[str, Any] = {
        "shape": shape,
        "batch_sizes": batch_size,
        "device": choose_device(device),
        "names": tuple(only) or contenders.NAMES,
        "precision": precision,
        "json": json,
        "command": shlex.join(["fastdcgan", *sys.argv[1:]]),
    }
    if data is not None:
        bench_data(data=data, epochs=repetitions or 3, **shared)
    else:
        bench_step(
            repetitions=repetitions or 7, block_seconds=block_seconds, per_layer=per_layer, follow=follow, **shared
        )


def profile(
    data: Annotated[Positional[str], arg(metavar="[DATA]")] = "fake",
    image_size: str = "64",
    batch_size: int = 64,
    width: int = 64,
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto",
    device: Literal["auto", "cuda", "cpu"] = "auto",
    compile: bool = False,
    cuda_graph: bool = False,
    steps: int = 5,
    out: Path = Path("profile"),
    nsight: bool = False,
) -> None:
    """Show where the time and memory of a training step go: a table of operators, a trace, a memory snapshot.

    Args:
        data: as DATA of train.
        image_size: pixels, a side or HEIGHTxWIDTH.
        batch_size: images a step.
        width: channels of the layer next to the image in both networks, as --gen-width and --disc-width of train.
        precision: as of train.
        device: auto takes a GPU if there is one.
        compile: profile the compiled step.
        cuda_graph: profile the compiled step replayed as one CUDA graph.
        steps: to record, after the warm-up.
        out: folder for table.txt, trace.json and the memory snapshot.
        nsight: write nothing, but mark the steps for Nsight Systems or Nsight Compute (see profiles/README.md).
    """
    silence_torchs_profiler()
    from fastdcgan.bench.profiling import profile_training
    from fastdcgan.processor import choose_device, choose_precision

    where = choose_device(device)
    if cuda_graph and where.type != "cuda":
        raise UserError("--cuda-graph needs a GPU; --compile alone profiles the compiled step on the CPU")
    profile_training(
        data=data,
        image_size=TrainConfig(image_size=image_size).size,
        batch_size=batch_size,
        width=width,
        precision=choose_precision(precision, where),
        device=where,
        executor="fast-captured" if cuda_graph else "fast-compiled" if compile else "fast-eager",
        steps=steps,
        out=out,
        nsight=nsight,
    )


def silence_torchs_profiler() -> None:
    """Keep what its C++ remarks on itself off the terminal; takes effect where torch is not imported yet."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def data_check(data: DataArgument, strict: bool = False) -> None:
    """Decode every image of a folder, .zip, .tar or LMDB, and list those that cannot be used and why.

    Args:
        data: path of the images.
        strict: stop at the first image that cannot be used, with exit code 2.
    """
    from fastdcgan.data.check import check

    check(data, strict=strict)


def data_pack(
    data: DataArgument,
    out: Path,
    image_size: str = "64",
    channels: Literal[1, 3, 4] | None = None,
    loader: Literal["auto", "dali", "torch"] = "auto",
    strict: bool = False,
) -> None:
    """Decode and resize a set once, into one file to train on: fastdcgan train set.npy.

    Args:
        data: a name or path, as for train.
        out: the .npy file; given again after an interruption, the command goes on where it was.
        image_size: pixels, a side or HEIGHTxWIDTH.
        channels: 1 grayscale, 3 colour, 4 colour with transparency; default: what the data has.
        loader: what decodes the images.
        strict: stop at the first image that cannot be used.
    """
    from fastdcgan.data.pack import pack

    size = TrainConfig(data=data, image_size=image_size).size
    try:
        pack(data, image_size=size, out=out, channels=channels, loader=loader, strict=strict)
    except KeyboardInterrupt:
        say("the same command goes on from here")
        raise


def stylize(
    run: RunArgument,
    photo: Annotated[Positional[Path], arg(metavar="PHOTO")],
    strength: float = 0.7,
    tiles: int = 8,
    out: Path = Path("stylized.png"),
    seed: int = 0,
) -> None:
    """Redraw a photograph with what a generator has learned to draw.

    Args:
        run: a run folder, a checkpoint folder, an exported folder or a generator's file, trained on the domain
            whose style is wanted.
        photo: an image file of any size.
        strength: from 0, the photograph, to 1, only what the generator draws.
        tiles: pictures of the generator across the photograph's shorter side: many follow it closely, few look more
            like the domain.
        out: a .png or .jpg file.
        seed: random seed of the drawing.
    """
    from fastdcgan.apps.stylize import stylize as run_stylize

    run_stylize(run, photo, out=out, strength=strength, tiles=tiles, seed=seed)


def probe(
    run: RunArgument,
    data: str,
    test_data: str | None = None,
    images: int = 5000,
    out: Path = Path("probe.json"),
    seed: int = 0,
) -> None:
    """Measure what the discriminator has learned to see: a linear classifier on its features.

    Args:
        run: a run folder or a checkpoint folder.
        data: images in one folder a class, or a named set (cifar10, ...).
        test_data: another such set to measure on. Default: a fifth of each class of DATA.
        images: to train the classifier on, and to measure it on, at most.
        out: a .json file; a picture goes beside it.
        seed: random seed that picks the images.
    """
    from fastdcgan.apps.probe import probe as run_probe

    run_probe(run, data=data, test_data=test_data, out=out, images=images, seed=seed)


def evaluate(
    run: RunArgument,
    data: str,
    images: int = 2000,
    features: Path | None = None,
    fid: bool = False,
    inception_weights: Path | None = None,
    out: Path = Path("evaluation.json"),
    seed: int = 0,
    ema: bool = True,
) -> None:
    """Measure how good a run's pictures are, beside real images measured the same way.

    Args:
        run: a run folder or a checkpoint folder.
        data: real images, as in `fastdcgan train`.
        images: real images to compare with, and as many generated ones; at most half of DATA, as the other half is
            measured beside them.
        features: a run whose discriminator's features precision and recall are measured in. Default: those of an
            untrained one, with the same weights for all networks of one shape.
        fid: also FID, KID and inception score (needs torch-fidelity; minutes on a CPU).
        inception_weights: a file with the Inception network for --fid. Default: torch-fidelity fetches it.
        out: a .json file; two pictures go beside it: real and generated images, and the nearest images of the whole
            set.
        seed: of the pictures, and of which real images.
        ema: the moving average of the generator rather than its latest weights.
    """
    from fastdcgan.apps.evaluate import evaluate as run_evaluate

    run_evaluate(
        run,
        data=data,
        out=out,
        images=images,
        features=features,
        fid=fid,
        inception_weights=inception_weights,
        seed=seed,
        ema=ema,
    )


def export(
    run: RunArgument,
    format: Literal["safetensors", "onnx", "torchscript", "pth"] = "safetensors",
    out: Path = Path("exported"),
    evaluation: Path | None = None,
    ema: bool = True,
) -> None:
    """Write the generator as a folder to give away: weights, model card, samples.

    Args:
        run: a run folder, a checkpoint folder, an exported folder, or a generator's .pth or .safetensors file.
        format: what to write beside the safetensors: onnx and torchscript run without fastdcgan, pth loads in the
            PyTorch example.
        out: a new folder.
        evaluation: a file made by `fastdcgan evaluate`, for the model card.
        ema: the moving average of the generator rather than its latest weights.
    """
    from fastdcgan.apps.export import export as run_export

    run_export(run, format=format, out=out, evaluation=evaluation, ema=ema)


def report(run: RunArgument, out: Path | None = None) -> None:
    """Write a run's curves, samples, alarms and configuration as one HTML file.

    Args:
        run: a run folder.
        out: a .html file. Default: report.html in the run folder.
    """
    from fastdcgan.report import report as run_report

    run_report(run, out)


def compare(
    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN...")], out: Path = Path("compare.html")
) -> None:
    """Lay the curves of several runs over one another, in one HTML file.

    Args:
        runs: two to eight run folders.
        out: a .html file.
    """
    from fastdcgan.report import compare as run_compare

    run_compare(list(runs), out)


def spelled_out(argv: list[str]) -> list[str]:
    """The arguments with --flip, a switch with a third state, unset, as tyro knows it: --flip=True."""
    answers = {"--flip": "--flip=True", "--no-flip": "--flip=False"}
    words: list[str] = []
    for before, word in zip(["", *argv], argv, strict=False):
        if before == "--flip" and word in ("True", "False", "None"):
            words[-1] = f"--flip={word}"
        else:
            words.append(answers.get(word, word))
    return words


def asked(argv: list[str]) -> set[str]:
    """The fields of TrainConfig that the arguments of `train` name: also those that have their default's value."""
    switches = {field.name for field in dataclasses.fields(TrainConfig) if "bool" in str(field.type)}
    names, words = set[str](), iter(spelled_out(argv))
    for word in words:
        if word == "--":  # what follows is no flag
            return names - {"resume"} | {"data" for _ in words}
        name, equals, _ = word.removeprefix("--").replace("-", "_").partition("=")
        if not word.startswith("--"):
            names.add("data")
        elif name.removeprefix("no_") in switches:
            names.add(name.removeprefix("no_"))
        else:
            names.add(name)
            if not equals:
                next(words, None)
    return names - {"resume"}


def words(text: str) -> list[str]:
    """The words in "a,b,c"."""
    return [word.strip() for word in text.split(",") if word.strip()]


def whole_numbers(flag: str, text: str, count: int) -> list[int]:
    """The numbers in "1,2,3".

    Raises:
        UserError: something else, or another count of them.
    """
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != count:
        raise UserError(f"{flag} {text} is not {count} whole numbers separated by commas")
    return numbers


command(train)
command(report)
command(compare)
command(sample)
command(interpolate)
command(arithmetic)
command(invert)
command(inpaint)
command(denoise)
command(stylize)
command(probe)
command(evaluate)
command(export)
command(bench)
command(profile)
command(data_check, "check", data_app)
command(data_pack, "pack", data_app)
data_app.__doc__ = "Look at a set's files, or pack it into one."
app.command(data_app, name="data")
