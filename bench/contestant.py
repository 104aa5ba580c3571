"""A process for each contender, as each would have one outside a benchmark.

What one process does to itself would otherwise be done to all: the memory its C library keeps, switches of torch such
as TF32, its threads, the functions it has compiled. Contenders take turns all the same: each works only when asked.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from threading import Thread
from types import TracebackType
from typing import Any

import torch

from fastdcgan.bench import contenders
from fastdcgan.errors import UserError


class Failed(RuntimeError):
    """A contender could not do what it was asked for."""


class Contestant:
    """An object that lives in a process of its own, and whose methods are called from here.

    Processes start at once and build their objects beside each other; `ask` waits.
    """

    def __init__(self, kind: type, *arguments: Any) -> None:
        """`kind(*arguments)` is made over there: a class of a module, and arguments that can be pickled."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, kind, arguments))
        self._process.start()
        theirs.close()

    def ask(self, method: str, *arguments: Any) -> Any:
        """What the object's method returns.

        Raises:
            Failed: torch, a file or a user's mistake made an error there, told in one line; or the process died.
        """
        try:
            self._connection.send((method, arguments))
            failure, result = self._connection.recv()
        except (EOFError, OSError):
            raise Failed("its process ended; its last words are above") from None
        if failure:
            raise Failed(failure)
        return result

    def __enter__(self) -> Contestant:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        if error is not None:  # Ctrl-C, say: it may be at work
            self._process.terminate()
        self._process.join()


def _serve(connection: Connection, kind: type, arguments: tuple[Any, ...]) -> None:
    """Answer `ask` until nobody can ask any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the asker too, which then ends this process
    Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    # The workers of a DataLoader start as they do elsewhere, not as this process was started.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    contenders.quiet_compiler()
    made = kind(*arguments)
    while True:
        try:
            method, given = connection.recv()
        except EOFError:
            return
        failure, result = "", None
        try:
            result = getattr(made, method)(*given)
        except (RuntimeError, OSError, UserError, torch._dynamo.exc.TorchDynamoException) as error:
            failure = in_one_line(error)
        connection.send((failure, result))


def in_one_line(error: Exception) -> str:
    """The error's kind and the beginning of what it says; of one in a DataLoader's worker those of the worker's."""
    lines = str(error).strip().splitlines() or [""]
    return lines[-1][:200] if lines[0].startswith("Caught ") else f"{type(error).__name__}: {lines[0][:200]}"


def _end_with(asker: BaseProcess) -> None:
    """End this process when the asker's has ended, whatever it is at: a killed one cannot say so."""
    asker.join()
    os._exit(1)
