"""Signals that ask a run to end, turned into an event that the loop looks at."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, current_thread, main_thread


class Stop(Event):
    """Set by a signal, which `number` then names."""

    number = 0


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turn the first SIGINT, SIGTERM or SIGHUP (unless nohup has it ignored) into an event, so that the step under way
    ends first; a second one kills.

    Except one that a single cause sends twice: SIGHUP when a terminal closes, and under torchrun SIGTERM, from
    whoever stops all processes and from torchrun, which itself kills those that take too long.
    """
    stop = Stop()
    numbers = [signal.SIGINT, signal.SIGTERM] if current_thread() is main_thread() else []  # Python's rule
    once = [signal.SIGTERM] if "TORCHELASTIC_RUN_ID" in os.environ else []
    if numbers and hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
        once.append(signal.SIGHUP)
    found = {number: signal.getsignal(number) for number in numbers}
    before = {number: action for number, action in found.items() if action is not None}  # None: not one of Python's

    def handler(number: int, frame: object) -> None:
        stop.number = number
        stop.set()
        for each, action in before.items():
            if each not in once:
                signal.signal(each, action)

    for number in before:
        signal.signal(number, handler)
    try:
        yield stop
    finally:
        for number, action in before.items():
            signal.signal(number, action)


@contextmanager
def signals_afterwards() -> Iterator[None]:
    """Have a signal wait until this is over."""
    with stop_signals() as stop:
        yield
    if stop.number:
        signal.raise_signal(stop.number)
