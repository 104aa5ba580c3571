"""What a person sees while they wait: a bar on a terminal, plain lines elsewhere. Everything goes to standard error."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import ProgressColumn

WIDE = 100  # columns of a terminal that has room for a bar beside the figures
PLAIN_LINE_EVERY = 10.0  # seconds between lines where there is no terminal


def speaks() -> bool:
    """Whether this process tells the user what happens: of a run's, as torchrun numbers them, the first does."""
    rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    return not (rank.isdecimal() and size.isdecimal() and 0 < int(rank) < int(size))  # else it is none of several


def moves() -> bool:
    """Whether what is said can be drawn over: standard error is a terminal that knows how."""
    try:
        terminal = sys.stderr is not None and sys.stderr.isatty()
    except Exception:  # it is closed, or a program has put something there that cannot say
        return False
    return terminal and os.environ.get("TERM", "") not in ("dumb", "unknown") and speaks()


def say(message: str, anyone: bool = False) -> None:
    """One line to the user, on standard error; nothing where that has gone, which is no reason to end a run.

    Args:
        anyone: also from a process that does not speak for its run.
    """
    if anyone or speaks():
        try:
            print(message, file=sys.stderr, flush=True)
        except Exception:  # nobody reads it any more, the disk is full, or what a notebook has put there raises its own
            if sys.stderr is sys.__stderr__:  # or the interpreter complains when it ends
                sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # for as long as the process lives


@contextmanager
def progress(description: str, total: int, unit: str = "images") -> Iterator[Callable[[int], None]]:
    """A progress bar for `total` units of work; yields a function that takes the number of units just done."""
    done, started = 0, time.monotonic()

    def rate() -> str:
        return f"{done / max(time.monotonic() - started, 1e-9):,.0f} {unit}/s"

    if moves():
        from rich.progress import Progress, TextColumn

        screen = on_stderr()
        with Progress(TextColumn(description), *columns(screen, "rate", None), console=screen) as bar:
            task = bar.add_task(description, total=total, rate="")

            def advance(count: int) -> None:
                nonlocal done
                done += count
                bar.update(task, completed=done, rate=rate())

            yield advance
    else:
        last_line = started

        def advance(count: int) -> None:
            nonlocal done, last_line
            done += count
            if time.monotonic() - last_line >= PLAIN_LINE_EVERY:
                last_line = time.monotonic()
                say(f"{description}: {done:,} of {total:,} {unit} ({rate()})")

        yield advance
        say(f"{description}: {done:,} of {total:,} {unit} ({rate()})")


@contextmanager
def spinner(message: str) -> Iterator[None]:
    """Something that moves on a terminal, one plain line elsewhere, while a single long thing happens."""
    if moves():
        with on_stderr().status(message):
            yield
    else:
        say(message)
        yield


@contextmanager
def training_progress(done: int, total: int) -> Iterator[Callable[[int, str], None]]:
    """Progress of a training run from step `done` to `total`; yields a function that takes the step and a status."""
    if moves():
        from rich.progress import Progress

        screen = on_stderr()
        room = max(screen.width - 2 * len(str(total)) - len("/ 0:00:00  ") - (22 if screen.width >= WIDE else 0), 0)
        with Progress(*columns(screen, "status", 20), console=screen, refresh_per_second=4) as bar:
            task = bar.add_task("", total=total, completed=done, status="")

            def show(step: int, status: str) -> None:
                bar.update(task, completed=step, status=status[:room])  # or rich would cut the numbers too

            yield show
    else:
        started: tuple[int, float] | None = None
        last_line = time.monotonic()

        def show(step: int, status: str) -> None:
            nonlocal last_line, started
            now = time.monotonic()
            if started is None:  # the first step may have compiled: it says nothing of the others
                started, last_line = (step, now), now
            if now - last_line >= PLAIN_LINE_EVERY or step == total:
                last_line = now
                left = (now - started[1]) / max(step - started[0], 1) * (total - step)
                say(f"step {step:,} of {total:,}  {status}  {_clock(left)} left")

        yield show


def on_stderr() -> Console:
    """What rich draws on."""
    from rich.console import Console

    return Console(file=cast(IO[str], Lossy(sys.stderr)))


class Lossy:
    """A terminal that may go away: then what is drawn on it is lost, not the run."""

    def __init__(self, terminal: IO[str]) -> None:
        self._terminal = terminal

    def __getattr__(self, name: str) -> Any:
        return getattr(self._terminal, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._terminal.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._terminal.flush()


def columns(screen: Console, field: str, bar_width: int | None) -> list[ProgressColumn]:
    """Of a progress bar: how far, time left, a task's `field`; without the bar itself on a narrow terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    bar = [BarColumn(bar_width)] if screen.width >= WIDE else []
    return [*bar, MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[" + field + "]}")]


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
