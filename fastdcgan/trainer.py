"""The training run, from a configuration to a folder of samples and checkpoints; read it from top to bottom."""

from __future__ import annotations

import dataclasses
import logging
import resource
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import NoReturn

import torch

from fastdcgan import checkpoint
from fastdcgan.alarms import Alarm, Alarms
from fastdcgan.checkpoint import Checkpoint
from fastdcgan.config import TrainConfig
from fastdcgan.console import say, spinner, training_progress
from fastdcgan.data import open_dataset
from fastdcgan.data.dataset import Dataset, Stream
from fastdcgan.errors import UserError
from fastdcgan.models import build_discriminator, build_generator
from fastdcgan.monitor import GRID, Monitor
from fastdcgan.quality import COMPARED, Quality
from fastdcgan.runs import RunFolder, choose_folder, saved_config
from fastdcgan.step import TrainStep, make_executor

ROLLBACKS = 3  # then the run ends: what comes back every time is no accident

# What may change in a resumed run, and makes it another than the one that never stopped.
CHANGES = (
    *("batch_size", "seed", "precision", "flip", "loss", "label_smoothing", "r1", "r1_every", "diffaugment"),
    *("instance_noise", "lr", "lr_g", "lr_d", "lr_decay"),
)


class Interrupted(Exception):
    """The run was asked to end (by Ctrl-C or SIGTERM) and has saved a checkpoint."""

    def __init__(self, signal_number: int) -> None:
        self.signal_number = signal_number


def train(config: TrainConfig) -> Path:
    """Train as configured and return the run folder.

    Raises:
        UserError: a mistake in the configuration or the data, before anything is written; an alarm that ends the run.
        Interrupted: SIGINT or SIGTERM; a checkpoint is saved and the way to go on has been said.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # complains where there is no GPU
    saved = saved_config(config)
    if saved is not None:
        warn_of_changes(config, saved)
        config = config.resumed(saved)
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)

    height, width = config.size
    data = open_dataset(
        config.data,
        image_size=(height, width),
        channels=config.channels,
        device=device,
        seed=config.seed,
        loader=config.loader,
        cache="off" if config.crop == "random" else config.cache,
        cache_dir=config.cache_dir,
        crop=config.crop,
        strict=config.strict,
    )
    torch.manual_seed(config.seed)
    gen_width, disc_width = config.widths
    generator = build_generator(config.arch, (height, width), data.channels, config.latent_dim, gen_width).to(device)
    discriminator = build_discriminator(config.arch, (height, width), data.channels, disc_width).to(device)

    resumed = checkpoint.load_newest(config.run_dir, say) if saved is not None and config.run_dir else None
    stream = data.stream(config.batch_size, resumed.progress["data"] if resumed else None)
    step = TrainStep(
        generator,
        discriminator,
        stream.source,
        stream.index,
        flip=data.flip if config.flip is None else config.flip,
        precision=precision,
        loss=config.loss,
        lr_g=config.rates[0],
        lr_d=config.rates[1],
        betas=(config.beta1, config.beta2),
        ema_decay=config.ema_decay,
        seed=config.seed,
        label_smoothing=config.label_smoothing,
        r1=config.r1,
        r1_every=config.r1_every,
        spectral_norm=config.spectral_norm,
        diffaugment=config.diffaugment,
        instance_noise=config.instance_noise,
        lr_decay=config.lr_decay == "linear",
    )
    done, total = 0, config.total_steps(data.count)
    if resumed:
        done = resumed.progress["step"]
        step.load_weights(resumed.tensors)
        step.load_state(resumed.tensors["state"])
    executor = make_executor(step, compile=config.compile, cuda_graph=config.cuda_graph)

    folder = choose_folder(config, data.name)
    config = dataclasses.replace(config, run_dir=folder, resume=False)
    facts = {"images": data.count, "channels": data.channels, "device": str(device), "precision": precision}
    run = RunFolder(folder, config, facts)
    saver = Saver(run)
    report_skipped(data, run.path)
    monitor = Monitor(run.path, done)
    latents = torch.randn(GRID, config.latent_dim, generator=torch.Generator().manual_seed(config.seed)).to(device)
    some = torch.randperm(data.count, generator=torch.Generator().manual_seed(config.seed))[:COMPARED].tolist()
    real = data.take(some)
    monitor.picture("real", real[:GRID].permute(0, 3, 1, 2) / 127.5 - 1, done)
    quality = Quality(real, config.latent_dim, config.seed, device)
    alarms, rollbacks = Alarms(config.loss, config.label_smoothing, done), 0
    say(
        f"{run.path}: {data.count:,} images, {height}x{width}x{data.channels}, {total:,} steps of {config.batch_size},"
        f" {device.type} {precision} {executor.name}" + (f", going on from step {done:,}" if done else "")
    )
    if device.type == "cuda" and not config.compile:
        say("hint: --compile records the whole step as one CUDA graph, which is several times faster")

    with stop_signals() as stop, training_progress(done, total) as show:
        status, last_log, last_images = "", time.monotonic(), stream.images
        while done < total and not stop.is_set():
            stream.advance()
            step.at(done / total)
            if config.compile and status == "":
                with spinner("compiling the step: a minute or two the first time, then kept for later runs"):
                    executor.run()
                status, last_log, last_images = "first step done", time.monotonic(), stream.images
            else:
                executor.run()
            done += 1
            raised: list[Alarm] = []
            if done % config.log_every == 0 or done == total:
                metrics = step.read_metrics() | step.gradient_norms()
                raised += alarms.look_at_metrics(done, metrics)
                now = time.monotonic()
                rate = (stream.images - last_images) / max(now - last_log, 1e-9)
                last_log, last_images = now, stream.images
                monitor.log(
                    {
                        "step": done,
                        "images": stream.images,
                        "epoch": stream.images / data.count,
                        **metrics,
                        "images_per_second": rate,
                        "peak_memory_bytes": peak_memory(device),
                    }
                )
                status = (
                    f"{rate:,.0f} images/s  loss D {metrics['loss_d']:.2f} G {metrics['loss_g']:.2f}"
                    f"  D(x) {metrics['d_real']:.2f}  D(G(z)) {metrics['d_fake']:.2f}"
                )
            show(done, status)
            if done % config.sample_every == 0 or done == total:
                with torch.no_grad():
                    pictures = step.average(latents)
                monitor.picture(f"step-{done:06d}", pictures, done)
                monitor.picture(f"raw-step-{done:06d}", step.latest_pictures(latents), done)
                varied = quality.diversity(pictures)
                monitor.log({"step": done, **varied}, "quality")
                raised += alarms.look_at_samples(done, **varied)
            if done % config.checkpoint_every == 0 or done == total:
                saver.save(step, stream, done, quality.distance(step.average))
            for alarm in raised:
                monitor.alarm(alarm)
                say(f"warning: step {done:,}: {alarm.message}")
            if raised and config.on_divergence != "warn":
                saver.wait()
                sound = min(alarm.sound for alarm in raised)
                if config.on_divergence == "stop" or rollbacks == ROLLBACKS:
                    monitor.close()
                    stream.close()
                    end(run, raised[0])
                rollbacks += 1
                done = roll_back(run, step, raised[0], sound, rollbacks)
                monitor.close()
                monitor, alarms = Monitor(run.path, done), Alarms(config.loss, config.label_smoothing, done)
        if stop.is_set() and done < total:
            saver.save(step, stream, done)
        saver.wait()
    report_skipped(data, run.path)
    monitor.close()
    stream.close()
    if done < total:
        say(f"stopped after step {done:,} of {total:,}; to go on: fastdcgan train --run-dir {run.path} --resume")
        raise Interrupted(stop.number)
    say(f"done: {run.path / 'samples' / f'step-{done:06d}.png'}  (peak memory {peak_memory(device) / 2**20:,.0f} MiB)")
    return run.path


class Saver:
    """Writes a run's checkpoints in a thread of its own: training waits for the copy in memory, not for the disk."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future[None] | None = None

    def save(self, step: TrainStep, stream: Stream, done: int, distance: float | None = None) -> None:
        """Begin to write a checkpoint, once the one before is written.

        Args:
            distance: of the run's pictures from the data; the checkpoint with the smallest is kept as checkpoints/best.
        """
        self.wait()
        tensors = {
            kind: {name: value.detach().to("cpu", copy=True) for name, value in values.items()}
            for kind, values in (step.weights() | {"state": step.state()}).items()
        }
        progress = {"step": done, "images": stream.images, "data": stream.state(), "distance": distance}
        self.writing = self.thread.submit(write, self.run, Checkpoint(tensors, progress))

    def wait(self) -> None:
        """Return when everything is on the disk."""
        if self.writing is not None:
            self.writing.result()
            self.writing = None


def write(run: RunFolder, taken: Checkpoint) -> None:
    """Write a checkpoint; where it cannot be written, warn: the older one still stands, and training goes on."""
    done, distance = taken.progress["step"], taken.progress["distance"]
    if not all(bool(value.isfinite().all()) for kind in taken.tensors.values() for value in kind.values()):
        say(f"warning: no checkpoint at step {done:,}: some weights are not finite; the older ones stay")
        return
    try:
        folder = checkpoint.save(run.path, done, taken, run.config.keep)
        if distance is not None:
            checkpoint.keep_best(run.path, folder, distance)
    except OSError as error:
        say(f"warning: the checkpoint at step {done:,} could not be written ({error}); training goes on without it")


def end(run: RunFolder, alarm: Alarm) -> NoReturn:
    """End the run for an alarm.

    Raises:
        UserError: always; it says where the best checkpoint is.
    """
    best = run.path / "checkpoints" / "best"
    raise UserError(
        f"the run ended at step {alarm.step:,}: {alarm.kind}; the last sound step is {alarm.sound:,},"
        f" the best checkpoint {best if best.exists() else 'none'}; {run.path / 'alarms.jsonl'} says what to try"
    )


def roll_back(run: RunFolder, step: TrainStep, alarm: Alarm, sound: int, count: int) -> int:
    """Go on from the newest checkpoint of `sound` or before, with other noise and the images that come next anyway.

    Raises:
        UserError: there is no such checkpoint.
    """
    found = checkpoint.load_sound(run.path, sound, say)
    if found is None:
        end(run, alarm)
    step.load_weights(found.tensors)
    step.load_state(found.tensors["state"])
    step.rng.manual_seed(run.config.seed + 1000 * alarm.step + count)
    say(f"back to step {found.progress['step']:,} with other noise ({count} of {ROLLBACKS} times)")
    return int(found.progress["step"])


def choose_device(wanted: str) -> torch.device:
    """The device of --device.

    Raises:
        UserError: cuda asked for and not there.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no NVIDIA GPU here; use --device cpu, or check nvidia-smi")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def choose_precision(wanted: str, device: torch.device) -> str:
    """The precision of --precision; auto is bf16 on a GPU that computes in it, fp32 elsewhere."""
    if wanted != "auto":
        return wanted
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def warn_of_changes(config: TrainConfig, saved: TrainConfig) -> None:
    """Say what a resumed run no longer has in common with one that never stopped."""
    for name in CHANGES:
        asked, before = getattr(config, name), getattr(saved, name)
        if asked != before and asked != TrainConfig.__dataclass_fields__[name].default:
            say(f"note: {name} changes from {before} to {asked}: the run is no longer the one that never stopped")


def report_skipped(data: Dataset, run: Path) -> None:
    """List the images that cannot be used in skipped.txt, and say how many there are."""
    path = run / "skipped.txt"
    lines = "".join(f"{file}\t{reason}\n" for file, reason in data.skipped)
    if lines and (not path.exists() or path.read_text() != lines):
        path.write_text(lines)
        say(f"{len(data.skipped):,} images cannot be used and are left out; {path} says which and why")


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on the GPU at most, or resident in the process at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Stop(Event):
    """Set by a signal, which `number` then names."""

    number = 0


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turn the first SIGINT or SIGTERM into an event, so that the step under way ends first; a second one kills."""
    stop = Stop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handler(number: int, frame: object) -> None:
        stop.number = number
        stop.set()
        for each, action in before.items():
            signal.signal(each, action)

    for number in before:
        signal.signal(number, handler)
    try:
        yield stop
    finally:
        for number, action in before.items():
            signal.signal(number, action)
