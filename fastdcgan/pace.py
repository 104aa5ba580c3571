"""How often a run logs, draws samples and saves: often enough to follow it, seldom enough not to slow it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastdcgan.distributed import World

USUAL = {"log": 20, "sample": 100, "checkpoint": 500}  # steps
SHARE = 0.005  # of the training time, that each may take where its interval was not asked for
HEARD_WITHIN = 5.0  # seconds in which all processes learn that one of them was asked to stop; torchrun kills after 30
TRIALS = 3  # the first one warms up; the shorter of the others counts, as a disk may hang, or somebody press Ctrl-Z
LONGEST = 600.0  # seconds of training to which an interval is stretched, whatever the work takes


class Pace:
    """The intervals of a run: those asked for, and the usual ones, stretched where they would take more than SHARE.

    Where a step is short, the usual number of them takes less time than writing a line about them does.

    Args:
        asked: steps by name, a key of USUAL; None leaves it to this class.
        world: whose first process decides.
        device: what a measurement waits for.
    """

    def __init__(self, asked: dict[str, int | None], world: World, device: torch.device) -> None:
        self.every = {name: asked[name] or usual for name, usual in USUAL.items()}
        self.trials = {name: 0 if asked[name] is None else TRIALS for name in USUAL}
        self.shortest = dict.fromkeys(USUAL, math.inf)  # seconds, of the trials that count
        self.world, self.device = world, device
        self.mark, self.step_seconds = (0, time.perf_counter()), math.inf
        self.listening = 1  # steps between two exchanges of whether to stop: as long as no step has been timed, each

    @property
    def settled(self) -> bool:
        """Whether the intervals stay as they are."""
        return min(self.trials.values()) == TRIALS

    def due(self, name: str, done: int) -> bool:
        """Whether it is time, after `done` steps."""
        return done % self.every[name] == 0

    def listens(self, done: int) -> bool:
        """Whether the processes, after `done` steps, ask one another whether to stop."""
        return done % self.listening == 0

    def start(self, done: int) -> None:
        """Steps take their usual time from here on: the first one compiles."""
        self.mark = done, time.perf_counter()

    def tick(self, done: int) -> None:
        """`done` steps are over, and the device has done them: a log point has read their losses."""
        now = time.perf_counter()
        if done > self.mark[0]:
            self.step_seconds = (now - self.mark[1]) / (done - self.mark[0])
            self.listening = self.world.broadcast_object(max(int(HEARD_WITHIN / self.step_seconds), 1))
        self.mark = done, now

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """Around the work itself, in all processes; its last trial stretches the interval if it must."""
        if self.trials[name] == TRIALS:
            yield
            return
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        seconds = time.perf_counter() - start
        if self.trials[name]:
            self.shortest[name] = min(seconds, self.shortest[name])
        self.trials[name] += 1
        if self.trials[name] == TRIALS:
            found = stretched(self.every[name], self.shortest[name], self.step_seconds)
            self.every[name] = self.world.broadcast_object(found)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def stretched(every: int, seconds: float, step_seconds: float) -> int:
    """The least multiple of `every` at which work of so many seconds takes at most SHARE of the steps' time, or the
    largest within LONGEST."""
    needed = math.ceil(seconds / (SHARE * every * step_seconds) - 1e-9)
    return every * max(1, min(needed, int(LONGEST / (every * step_seconds))))
