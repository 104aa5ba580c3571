"""Whether other programs use the processor cores that this run computes on."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass

import torch

SECONDS = 2.0  # that a look goes back at least
# Measured: alone 19 involuntary switches a second of processor time and 99% of two cores; beside one or two busy
# threads 150 to 260, and 50 to 65%. It takes both: the run's own decoding threads bring 160 to 450, and 89 to 98%.
SWITCHES, SHARE = 70, 0.8


@dataclass(frozen=True)
class Reading:
    """What the process has used up to now: seconds of clock and of its threads, switches it did not ask for."""

    wall: float
    processor: float
    switches: int


class Contention:
    """Looks at every log point, and tells once, when two looks in a row have found the cores shared.

    OpenMP's threads wait for one another by spinning. Where another program holds the core of one, the others spin for
    nothing, so that half the cores gave a quarter of the speed. With ADVICE they sleep.
    """

    ADVICE = (
        "other programs use this processor too, which slows threads that wait for one another more than its share:"
        " stop, and go on with OMP_WAIT_POLICY=passive before the command"
    )

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()
        self.last, self.shared = read(), 0
        self.done = self.last is None or self.threads == 1 or "OMP_WAIT_POLICY" in os.environ

    def found(self) -> bool:
        """Whether to say so now."""
        now = read()
        if self.done or now is None or self.last is None or now.wall - self.last.wall < SECONDS:
            return False
        self.shared = self.shared + 1 if is_shared(self.threads, self.last, now) else 0
        self.last, self.done = now, self.shared == 2
        return self.done


def is_shared(threads: int, before: Reading, now: Reading) -> bool:
    """Whether so many busy threads lost their cores to others between the readings."""
    processor = now.processor - before.processor
    lost = processor < SHARE * threads * (now.wall - before.wall)
    return lost and now.switches - before.switches > SWITCHES * processor


def read() -> Reading | None:
    """None where the system does not say, or means something else by it."""
    if sys.platform != "linux":
        return None
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    return Reading(time.perf_counter(), used.ru_utime + used.ru_stime, used.ru_nivcsw)
