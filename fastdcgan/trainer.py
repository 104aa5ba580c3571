"""The training run, from a configuration to a folder of samples and checkpoints; read it from top to bottom."""

from __future__ import annotations

import dataclasses
import logging
import math
import shlex
import sys
from collections.abc import Set
from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from typing import NoReturn, TypeVar

import torch

from fastdcgan.alarms import LOST, Alarm
from fastdcgan.checkpoint import Checkpoint, complete, keep_if_best, load_newest, load_sound, step_of
from fastdcgan.config import TrainConfig, absolute, flag
from fastdcgan.console import say, speaks, spinner, training_progress
from fastdcgan.data import open_dataset, packed_size
from fastdcgan.data.dataset import LEFT_OUT, Dataset
from fastdcgan.distributed import World, join
from fastdcgan.errors import InOneLine, UserError
from fastdcgan.executors import make_executor
from fastdcgan.files import replace_file
from fastdcgan.heap import heap
from fastdcgan.models import build_discriminator, build_generator, sync_batch_norm
from fastdcgan.pace import USUAL, Pace
from fastdcgan.processor import choose_device, choose_precision, native_bf16
from fastdcgan.quality import COMPARED
from fastdcgan.runs import RunFolder, choose_folder, saved_config
from fastdcgan.saver import Saver, position, restore
from fastdcgan.signals import stop_signals
from fastdcgan.step import TrainStep
from fastdcgan.watch import Watch

T = TypeVar("T")

building = Lock()  # a network's first weights come from torch's own generator, which all threads share
ROLLBACKS = 3  # of one start; then the run ends: an alarm that comes back each time will not go away
OWN = {"data", "loader", "cache", "cache_dir", "run_dir", "resume"}  # what processes of one run may differ in

# What may change in a resumed run, and makes it another than the one that never stopped.
CHANGES = [
    "data",
    "loader",
    "compile",
    "batch_size",
    "sync_batchnorm",
    "seed",
    "precision",
    "flip",
    "crop",
    "loss",
    "label_smoothing",
    "r1",
    "r1_every",
    "diffaugment",
    "instance_noise",
    "lr",
    "lr_g",
    "lr_d",
    "lr_decay",
    "beta1",
    "beta2",
    "ema_decay",
]


class Interrupted(InOneLine, KeyboardInterrupt):
    """The run in `folder` was asked to end (by Ctrl-C, SIGTERM or SIGHUP) and has saved a checkpoint.

    Not an Exception: a loop over several runs that goes on after those that fail ends too.
    """

    def __init__(self, signal_number: int, folder: Path) -> None:
        super().__init__(f"stopped by a signal; a checkpoint is saved in {folder}")
        self.signal_number, self.folder = signal_number, folder


def train(config: TrainConfig, asked: Set[str] | None = None) -> Path:
    """Train as configured and return the run folder; under torchrun, together with the other processes.

    Afterwards the process is as it was, but for what `torch.backends` says of TF32 and of cuDNN's search for
    algorithms, and on a GPU for how its memory is taken (`gpu_memory`), which stay as the step set them.

    Args:
        config: `fastdcgan train --help` explains its fields. Paths may be text, image_size also a number or (height,
            width).
        asked: the fields of `config` that a resumed run takes from it, the others from its folder. Default: those that
            are not at their defaults.

    Raises:
        UserError: a mistake in the configuration or the data, before anything is written; what ends a run that has
            begun, saved as far as it can be: an alarm, images that are no longer there, a full disk.
        Interrupted: SIGINT, SIGTERM or SIGHUP; a checkpoint is saved and the way to go on has been said.
    """
    if not isinstance(config, TrainConfig):
        raise UserError(f"train takes a TrainConfig, not {config!r}: train(TrainConfig(data=...))")
    with ExitStack() as at_end:
        quiet(at_end, "torch.utils.cpp_extension")  # complains where there is no GPU
        at_end.callback(torch.set_num_threads, torch.get_num_threads())
        device = choose_device(config.device)
        at_end.callback(setattr, heap, "keeps", False)  # as a process has it that never trained
        # The caller's autocast, inference mode and no_grad must not reach the step: --precision alone decides on types.
        at_end.enter_context(torch.autocast(device.type, enabled=False))
        at_end.enter_context(torch.inference_mode(False))
        at_end.enter_context(torch.enable_grad())
        if torch.get_default_device() != torch.device("cpu"):
            at_end.enter_context(torch.device("cpu"))  # tensors made without a device go there
        at_end.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        world = join(device)
        at_end.callback(world.leave)
        if not speaks():  # warnings are the first process's to give, too
            quiet(at_end, "fastdcgan")
        return train_in(world, config, config.differs() if asked is None else asked, device, at_end)


def quiet(at_end: ExitStack, logger: str) -> None:
    """No warnings from a logger, until `at_end`."""
    log = logging.getLogger(logger)
    at_end.callback(log.setLevel, log.level)
    log.setLevel(logging.ERROR)


def train_in(world: World, config: TrainConfig, asked: Set[str], device: torch.device, at_end: ExitStack) -> Path:
    """`train`, as one of the processes of `world`; `at_end` is told what must be undone however it ends.

    Raises:
        UserError, Interrupted: as `train`.
    """
    # What to train.
    saved = world.from_first(lambda: saved_config(config))
    if saved is not None:
        config = config.resumed(saved, asked)
    check_alike(world, config)
    precision = choose_precision(config.precision, device)
    if config.image_size is None:
        config = dataclasses.replace(config, image_size=packed_size(config.data))

    height, width = config.size
    data, count = open_images(world, config, device)
    flip = data.flip if config.flip is None else config.flip
    gen_width, disc_width = config.widths
    with building, torch.random.fork_rng(devices=[]):  # and afterwards it is as the caller had it
        torch.default_generator.manual_seed(config.seed)
        generator = build_generator(config.arch, (height, width), data.channels, config.latent_dim, gen_width)
        discriminator = build_discriminator(config.arch, (height, width), data.channels, disc_width)
    generator, discriminator = generator.to(device), discriminator.to(device)
    if config.sync_batchnorm and world.size > 1:
        sync_batch_norm(generator)
        sync_batch_norm(discriminator)

    # Where it goes on: `done` steps of `total` lie behind it.
    place = config.run_dir if saved is not None else None
    resumed = world.from_first(lambda: load_newest(place) if place else None)
    known = complete(place) if place else []
    stream = data.stream(config.batch_size, position(resumed, world) if resumed else None)
    at_end.callback(stream.close)
    step = TrainStep(
        generator,
        discriminator,
        stream.source,
        stream.index,
        flip=flip,
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
        world=world,
    )
    done = restore(step, resumed, world) if resumed else 0
    total = steps_in_all(world, config, asked, data, count, resumed, done)
    if saved is not None:
        warn_of_changes(config, trained_with(resumed, saved), data.flip)
    step.synchronise()
    executor = make_executor(step, compile=config.compile, cuda_graph=config.cuda_graph)
    at_end.callback(executor.close)  # before the processes leave one another, and before the images go

    # Who writes, and where.
    folder = world.from_first(lambda: choose_folder(config, data.name))
    cache_dir = config.cache_dir and config.cache_dir.absolute()
    config = dataclasses.replace(config, data=absolute(config.data), cache_dir=cache_dir, run_dir=folder, resume=False)
    facts = {"images": count, "channels": data.channels, "device": str(device), "precision": precision}
    run = world.first(lambda: RunFolder(folder, config, facts | {"processes": world.size}, known))
    if run is not None:
        at_end.callback(run.unlock)
    before = resumed.progress.get("rollbacks", 0) if resumed else 0
    saver = Saver(run, world, total, before, damaged=[each for each in known if step_of(each) > done])
    at_end.callback(saver.thread.shutdown)
    at_end.callback(saver.wait)  # before the folder is unlocked
    watch, skipped = None, everyones(world, data.skipped)
    if run is not None:  # the first process
        watch = Watch(folder, config, data.sample(COMPARED, config.seed), device, done)
        at_end.callback(watch.close)
        with watch.writing():
            report_skipped(skipped, folder)
            if resumed:  # a kill may have come between the two
                keep_if_best(folder, resumed)
    say(
        f"{folder}: {count:,} images, {height}x{width}x{data.channels}, {total:,} steps of {config.batch_size}"
        + (f" in each of {world.size} processes" if world.size > 1 else "")
        + f", {device.type} {precision} {executor.name}"
        + (f", going on from step {done:,}" if done else "")
    )
    if device.type == "cuda" and not config.compile:
        say("hint: --compile records the whole step as one CUDA graph")
    if device.type == "cpu" and config.precision == "auto" and native_bf16():
        say("hint: this processor multiplies bfloat16 itself: --precision bf16 is faster, most for large images")

    def sound() -> int | None:  # the step before which nothing was amiss: what the run may have to go back to stays
        return watch.alarms.no_sign_before() if watch and config.on_divergence == "rollback" else None

    # The loop.
    equals = "=" if str(folder).startswith("-") else " "  # or the name would be taken for a flag
    go_on = f"fastdcgan train --run-dir{equals}{shlex.quote(str(folder))} --resume"
    pace = Pace({name: getattr(config, f"{name}_every") for name in USUAL}, world, device)
    with stop_signals() as stop, training_progress(done, total) as show:
        signal, begun = 0, done
        pace.start(done)
        while done < total and not signal:
            try:
                stream.advance()
            except UserError as error:
                if not speaks():  # the first process has not met it, and would only say that this one is gone
                    print(f"fastdcgan: {error}", file=sys.stderr, flush=True)
                if done == begun or world.size > 1:  # others would wait for this one
                    raise
                saver.save(step, stream, done, sound=sound())
                saver.wait()
                raise UserError(f"{error}; {last_saved(folder)}: put that right, then {go_on}") from error
            step.set_schedules(done / total)
            if step.compiled and done == begun:
                with spinner("compiling the step: a minute or two the first time, then kept for later runs"):
                    executor.run()
                pace.start(done + 1)
            else:
                executor.run()
            done += 1
            logs, samples, saves = (pace.due(name, done) or done == total for name in USUAL)
            raised: list[Alarm] = []
            if logs:
                metrics = world.means(step.read_metrics())
                pace.tick(done)
                with pace.measured("log"):
                    if watch:
                        figures = {"step": done, "images": stream.images, "epoch": stream.images / count}
                        figures |= metrics | step.gradient_norms()
                        if pace.step_seconds < math.inf:  # the first step compiles, and is not timed
                            figures["images_per_second"] = config.batch_size * world.size / pace.step_seconds
                        raised += watch.log(figures | {"peak_memory_bytes": peak_memory(device)})
            show(done, watch.status if watch else "")
            if samples:
                with pace.measured("sample"):
                    if watch:
                        raised += watch.sample(done, step, last=done == total)
            if saves:
                with pace.measured("checkpoint"):
                    distance = watch.quality.distance(step.average) if watch else None
                    saver.save(step, stream, done, distance, sound())
            if run and watch and pace.settled and (logs or samples or saves):
                with watch.writing():
                    run.keep_intervals(pace.every)
            if logs or samples:
                raised = world.broadcast_object(raised)
            if raised and (config.on_divergence != "warn" or any(alarm.kind == LOST for alarm in raised)):
                saver.wait()
                if config.on_divergence != "rollback":
                    end(folder, raised[0])
                if saver.rollbacks - before == ROLLBACKS:
                    end(folder, raised[0], f" after {ROLLBACKS} rollbacks")
                saver.rollbacks += 1
                done = roll_back(world, folder, step, raised, config.seed, saver.rollbacks)
                if watch:
                    watch.begin_again(done, raised[0], saver.rollbacks)
            # Processes get a signal each, or only some do, at different steps: they agree on where to stop.
            if world.size == 1 or pace.listens(done):
                signal = max(world.gather(stop.number))
        if done < total:
            saver.save(step, stream, done, sound=sound())
        saver.wait()
    skipped = everyones(world, data.skipped)
    if watch:
        with watch.writing():
            report_skipped(skipped, folder)
    if saver.lost is not None:
        what = f"step {saver.lost:,} could not be saved (see above); {last_saved(folder)}"
        raise UserError(f"{what}: make room, then {go_on}")
    if done < total:
        say(f"stopped after step {done:,} of {total:,}; to go on: {go_on}")
        raise Interrupted(signal, folder)
    most, picture = peak_memory(device) / 2**20, folder / "samples" / f"step-{done:06d}.png"
    result = picture if picture.exists() else f"{folder} was at step {done:,} already" if done == begun else folder
    say(f"done: {result}" + (f"  (peak memory {most:,.0f} MiB)" if most else ""))
    return folder


def check_alike(world: World, config: TrainConfig) -> None:
    """Raises UserError where the processes were started with different flags."""
    everyone = world.gather(config.as_json())
    for name in everyone[0].keys() - OWN:
        values = [each[name] for each in everyone]
        if any(value != values[0] for value in values):
            raise UserError(f"the processes differ in {flag(name)} ({values}): start all with the same")


def open_images(world: World, config: TrainConfig, device: torch.device) -> tuple[Dataset, int]:
    """The images, and how many there are, which is the same in all processes.

    Raises:
        UserError: as `open_dataset`, or the processes see different ones.
    """
    with world.first_on_each_machine():
        data = open_dataset(
            config.data,
            image_size=config.size,
            channels=config.channels,
            device=device,
            seed=config.seed,
            loader=config.loader,
            cache=config.cache,
            cache_dir=config.cache_dir,
            crop=config.crop,
            strict=config.strict,
            rank=world.rank,
            world_size=world.size,
        )
    alike = world.gather((*data.listed(), data.channels))
    if len(set(alike)) > 1:
        raise UserError(f"the processes see different images (files, names, channels: {alike}): give all the same data")
    return data, world.broadcast_object(data.count)  # the others may know of other files that they are broken


def steps_in_all(
    world: World,
    config: TrainConfig,
    asked: Set[str],
    data: Dataset,
    count: int,
    resumed: Checkpoint | None,
    done: int,
) -> int:
    """The step that the run ends with; `resumed` is where it goes on, with `done` steps of them behind it.

    Raises:
        UserError: it would end before that.
    """
    total = config.total_steps(count, world.size)
    if resumed and config.epochs is not None:
        same = resumed.progress["of"] == [config.epochs, config.batch_size, world.size]
        if same and not data.changed(resumed.progress["data"][0]):
            total = resumed.progress["total"]  # files may have turned out to be broken since: an epoch is shorter now
        else:
            seen = resumed.progress["images"]
            total = done + config.total_steps(count, world.size, seen)
            fewer = config.epochs != resumed.progress["of"][0]  # else it was over, whatever has changed since
            if "epochs" in asked and fewer and seen - config.epochs * count >= config.batch_size * world.size:
                behind = f"{seen / count:.4g} epochs"
                raise UserError(f"the run has {behind} behind it: --epochs {config.epochs:g} would end it before")
    if done > total:
        raise UserError(f"the run is at step {done:,} already: --steps {total} would end it before")
    return total


def everyones(world: World, lists: list[T]) -> list[T]:
    """What all processes have in such lists, one after the other."""
    return [each for of_rank in world.gather(lists) for each in of_rank]


def last_saved(run: Path) -> str:
    """From where a run can go on, in words."""
    return f"the last saved step is {max(map(step_of, complete(run)), default='none')}"


def end(run: Path, alarm: Alarm, why: str = "") -> NoReturn:
    """End the run for an alarm; `why` it could not go back, where it was to.

    Raises:
        UserError: always; it says where the best checkpoint is.
    """
    best = run / "checkpoints" / "best"
    raise UserError(
        f"the run ended at step {alarm.step:,}: {alarm.kind}{why}; the last sound step is {alarm.sound:,},"
        f" the best checkpoint {best if best.exists() else 'none'}; {run / 'alarms.jsonl'} says what to try"
    )


def roll_back(world: World, run: Path, step: TrainStep, raised: list[Alarm], seed: int, count: int) -> int:
    """Go on from the newest checkpoint before all alarms, with other noise and the images that come next anyway; for
    the `count`th time in this run.

    Raises:
        UserError: there is no such checkpoint.
    """
    sound = min(alarm.sound for alarm in raised)
    found = world.from_first(lambda: load_sound(run, sound))
    if found is None:
        end(run, raised[0], ", and there is no checkpoint from before it to go back to")
    done = restore(step, found, world)
    step.rng.manual_seed(world.seed(seed + 1000 * raised[0].step + count))
    return done


def trained_with(saved: Checkpoint | None, config: TrainConfig) -> TrainConfig:
    """The configuration a checkpoint was trained with; `config`, of config.json, where it does not say."""
    if saved is None or "config" not in saved.progress:
        return config
    return TrainConfig.from_json(saved.progress["config"])


def warn_of_changes(config: TrainConfig, saved: TrainConfig, flip: bool) -> None:
    """Say what a resumed run no longer has in common with one that never stopped; `flip` is the data's own choice."""
    scheduled = config.lr_decay != "none" or config.instance_noise > 0
    config, saved = (
        dataclasses.replace(each, flip=flip if each.flip is None else each.flip) for each in (config, saved)
    )
    for name in [*CHANGES, *(("steps", "epochs") if scheduled else ())]:
        now, before = getattr(config, name), getattr(saved, name)
        if now != before:
            say(f"note: {name} changes from {before} to {now}: the run is no longer the one that never stopped")


def report_skipped(skipped: list[tuple[str, str]], run: Path) -> None:
    """List the images (file, reason) that cannot be used in skipped.txt, and say how many there are."""
    path = run / "skipped.txt"
    before = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    known = dict(line.split("\t", 1) for line in before.splitlines() if "\t" in line)
    known |= {file: reason for file, reason in reversed(skipped) if reason != LEFT_OUT}
    reasons = {file: known.get(file, reason) for file, reason in skipped}
    lines = "".join(f"{file}\t{reason}\n" for file, reason in reasons.items())
    if not lines:
        path.unlink(missing_ok=True)  # they have been mended since
    elif before != lines:
        replace_file(path, lines.encode())
        say(f"{len(reasons):,} images cannot be used and are left out; {path} says which and why")


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on the GPU at most, or resident in the process at most; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
