"""Checkpoints of a run under way: taken from the step, written in the background, gone back to."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdcgan import checkpoint
from fastdcgan.checkpoint import Checkpoint
from fastdcgan.console import say
from fastdcgan.data.dataset import Stream
from fastdcgan.distributed import World
from fastdcgan.errors import UserError
from fastdcgan.runs import RunFolder
from fastdcgan.step import TrainStep


class Saver:
    """Writes a run's checkpoints in a thread of its own: training waits for the copy in memory, not for the disk.

    Args:
        run: None in all processes but the first, which writes for all: their networks are the same, and their random
            numbers, sums and positions in the data are sent to it.
        total: steps of the whole run, for a resumed one.
        rollbacks: how often the run has gone back so far.
        damaged: its checkpoints that cannot be read.
    """

    def __init__(
        self, run: RunFolder | None, world: World, total: int, rollbacks: int = 0, damaged: Iterable[Path] = ()
    ) -> None:
        self.run, self.world, self.total, self.rollbacks, self.damaged = run, world, total, rollbacks, set(damaged)
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future[int | None] | None = None
        self.lost: int | None = None  # the step of the last checkpoint, if it could not be written

    def save(
        self,
        step: TrainStep,
        stream: Stream,
        done: int,
        distance: float | None = None,
        sound: int | None = None,
    ) -> None:
        """Begin to write a checkpoint, once the one before is written.

        Args:
            distance: of the run's pictures from the data; the checkpoint with the smallest is kept as checkpoints/best.
            sound: as in `checkpoint.save`.
        """
        own = step.rng.get_state(), step.sums.cpu(), stream.state()
        random, sums, positions = zip(*self.world.gather(own), strict=True)
        if self.run is None:
            return
        self.wait()
        state = step.state() | {"rng": torch.stack(random), "sums": torch.stack(sums)}
        tensors = {
            kind: {name: value.detach().to("cpu", copy=True) for name, value in values.items()}
            for kind, values in (step.weights() | {"state": state}).items()
        }
        progress = {"step": done, "images": stream.images, "data": positions, "distance_to_data": distance}
        progress |= {"total": self.total, "of": [self.run.config.epochs, self.run.config.batch_size, self.world.size]}
        progress |= {"rollbacks": self.rollbacks, "config": self.run.config.as_json()}
        self.writing = self.thread.submit(write, self.run, Checkpoint(tensors, progress), sound, self.damaged)

    def wait(self) -> None:
        """Return when everything is on the disk."""
        if self.writing is not None:
            self.lost = self.writing.result()
            self.writing = None


def write(run: RunFolder, taken: Checkpoint, sound: int | None, damaged: set[Path]) -> int | None:
    """Write a checkpoint; where it cannot be written, warn: the older one still stands, and training goes on.

    Args:
        damaged: as in `checkpoint.save`; what is written is taken out of it.

    Returns:
        its step, if it could not be written.
    """
    done, distance = taken.progress["step"], taken.progress["distance_to_data"]
    if not all(bool(value.isfinite().all()) for kind in taken.tensors.values() for value in kind.values()):
        say(f"warning: no checkpoint at step {done:,}: some weights are not finite; the older ones stay")
        return None
    try:
        if not (run.path / "config.json").exists():  # else the rest of the run would be in a folder that is none
            raise FileNotFoundError(errno.ENOENT, "the run folder is no longer there", str(run.path))
        folder = checkpoint.save(run.path, done, taken, run.config.keep, sound, damaged)
        damaged.discard(folder)
    except OSError as error:
        say(f"warning: the checkpoint at step {done:,} could not be written ({error}); training goes on without it")
        return done
    try:
        if distance is not None:
            checkpoint.keep_best(run.path, folder, distance)
    except OSError as error:
        say(f"warning: step {done:,} could not be copied to checkpoints/best ({error}), which stays as it was")
    return None


def restore(step: TrainStep, saved: Checkpoint, world: World) -> int:
    """Have the step go on from a checkpoint; returns the number of updates behind it.

    A process goes on with its own random numbers where the checkpoint has as many processes, else with new ones.

    Raises:
        UserError: it is a checkpoint of other networks than the step's.
    """
    done = int(saved.progress["step"])
    state = dict(saved.tensors["state"])
    random, sums = state["rng"], state["sums"].view(-1, len(step.sums))  # (processes, bytes), (processes, n)
    state["sums"] = sums[world.rank] if len(sums) == world.size else sums.mean(0)
    if len(random) == world.size and random.shape[1:] == step.rng.get_state().shape:
        state["rng"] = random[world.rank].clone()  # set_state reads from where a view's storage begins
    else:
        change = f"{world.size} processes where there were {len(random)}: other batches from the same place in the data"
        if len(random) == world.size:
            change = "another kind of device: other rounding"
        say(f"note: {change}, and other noise; the run is no longer the one that never stopped")
        step.rng.manual_seed(world.seed(done))
        state["rng"] = step.rng.get_state()
    try:
        step.load_weights(saved.tensors)
        step.load_state(state)
    except ValueError:
        raise UserError(
            f"the checkpoint of step {done:,} is of other networks than config.json's: put back what was changed"
        ) from None
    return done


def position(saved: Checkpoint, world: World) -> dict[str, Any]:
    """Where this process goes on in the data: where it was, or with another number of processes where all have been."""
    positions: list[dict[str, Any]] = saved.progress["data"]
    if len(positions) == world.size:
        return positions[world.rank]
    unusable = np.unique(np.concatenate([np.asarray(each["unusable"], dtype=np.int64) for each in positions]))
    # Element k of a rank's order is element rank + size * k of all. They drift apart by the broken files each has met.
    reached = min(rank + len(positions) * int(each["taken"]) for rank, each in enumerate(positions))
    return positions[0] | {"taken": reached, "world_size": 1, "unusable": unusable.tolist()}
