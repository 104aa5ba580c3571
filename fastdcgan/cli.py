"""The command line `fastdcgan`: what of `commands` is asked for, run; a user's mistake is one line and exit code 2."""

from __future__ import annotations

import contextlib
import difflib
import errno
import functools
import importlib.metadata
import io
import os
import sys
import threading
import warnings

from fastdcgan.commands import COMMANDS, app, spelled_out, train
from fastdcgan.console import say, speaks
from fastdcgan.errors import UserError, compiler_error, first_line, number_in


def main(argv: list[str] | None = None) -> None:
    """Run one command line. Exits with 0, with 2 after one line about a user's mistake, with 130 after Ctrl-C, with 129
    where the terminal was closed, or with 141 where nobody reads what it prints."""
    # Where standard input, output or error was closed by whoever started this: or the next file to be opened would take
    # its place, here and in what this starts.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    if argv is not None:
        sys.argv[1:] = argv
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # for as long as the process lives
    threading.excepthook = in_a_thread
    # Pillow warns of large pictures, which are no fault, and of EXIF blocks cut short, which nobody can mend.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names have letters that not every terminal knows
    try:
        os.getcwd()
    except FileNotFoundError:  # what torch's libraries say of it is hard to understand
        sys.exit(complain("the folder that this was started in is gone: change to one that exists"))
    try:
        if sys.argv[1:] == ["--version"]:
            print(f"fastdcgan {importlib.metadata.version('fastdcgan')}")
        else:
            run = parse(sys.argv[1:])
            # Before torch, which imports it from C++, where Ctrl-C would be lost and leave half of it.
            import numpy  # noqa: F401

            if run.func is train or speaks() or "TORCHELASTIC_RUN_ID" not in os.environ:
                run()  # of torchrun's processes the first one does what is not done together
        sys.stdout.flush()  # here, where it is known what to do about a pipe that is closed
    except UserError as error:
        sys.exit(complain(str(error)))
    except BrokenPipeError:  # whoever read the output has had enough
        give_up_stdout()
        sys.exit(141)  # as a process that SIGPIPE ends
    except OSError as error:
        if (why := why_not_printed()) is not None:
            sys.exit(complain(f"standard output cannot be written ({why}): send it elsewhere"))
        if (what := in_plain_words(error)) is not None:
            sys.exit(complain(what))
        where = f" ({error.filename})" if error.filename else ""
        if error.errno == errno.ENOSPC:
            sys.exit(complain(f"the disk is full{where}: make room and try again"))
        sys.exit(complain(f"a file cannot be used{where}: {error.strerror or error}; look at its permissions and name"))
    except (RuntimeError, MemoryError, ImportError) as error:
        if (what := in_plain_words(error)) is None:
            raise
        sys.exit(complain(what))
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)


def why_not_printed() -> str | None:
    """Why standard output cannot be written, which then goes nowhere; None where it can."""
    try:
        sys.stdout.flush()
    except OSError as error:
        give_up_stdout()
        return error.strerror
    return None


def give_up_stdout() -> None:
    """What waits to be printed goes nowhere; or the interpreter complains when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def in_plain_words(error: Exception) -> str | None:
    """What a user can do about an error of torch, Triton or numpy that is not this program's; None for all others."""
    text = str(error)
    short = (
        "out of memory",
        "can't allocate memory",
        "calculation overflowed",
        "STATUS_ALLOC_FAILED",
        "failed to map segment",  # of a library
    )
    if isinstance(error, MemoryError) or any(words in text for words in short):
        return (
            "there is not enough memory: take less at a time, with a smaller --batch-size, --image-size, --gen-width,"
            " --count or --restarts, or free some"
        )
    if "unable to find an engine" in text or "CUBLAS_STATUS_NOT_INITIALIZED" in text:
        return (
            f"cuDNN or cuBLAS cannot work ({first_line(error)}): most often GPU memory is short, so take less at a"
            " time, with a smaller --batch-size, --image-size or --gen-width, or free some"
        )
    if number_in("WORLD_SIZE", 1) > 1 and ("Connection closed by peer" in text or "Connection reset by peer" in text):
        return (
            "another process of this run has ended: see what it said, put that right, and go on from the last"
            " checkpoint with --resume"
        )
    if "C compiler" in text:
        return (
            "the kernels for the GPU are compiled when they are first used: install a C compiler, such as gcc, and"
            " Python's headers"
        )
    dynamo = sys.modules.get("torch._dynamo.exc")  # which takes seconds to import, where nothing is compiled
    if dynamo is not None and isinstance(error, dynamo.BackendCompilerFailed):  # not what it says of this program
        return (
            f"the step cannot be compiled ({compiler_error(error)}): put that right, such as room for the compiler's"
            " files (in TORCHINDUCTOR_CACHE_DIR, by default in TMPDIR), or leave --compile out"
        )
    return None


def in_a_thread(failed: threading.ExceptHookArgs) -> None:
    """Print what ended a thread, unless it could not write: TensorBoard raises that again where it is used."""
    if not isinstance(failed.exc_value, OSError):
        threading.__excepthook__(failed)


def parse(argv: list[str]) -> functools.partial[None]:
    """The command that the arguments ask for, its own arguments bound.

    Raises:
        UserError: arguments that do not fit.
    """
    argv = spelled_out(argv)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return app.cli(prog="fastdcgan", args=argv)
    except SystemExit as end:
        if end.code in (0, None):
            sys.stdout.flush()
            raise
        raise UserError(f"{in_one_line(errors.getvalue())}; see {where_it_says(argv)}") from None


def in_one_line(box: str) -> str:
    """The message in the box that tyro draws, without the box and without what it repeats from the help."""
    words: list[str] = []
    for line in box.splitlines()[1:]:
        text = line.strip("│╭╮╰╯─ ")
        if text.strip("-"):  # else it is a rule, of hyphens where the terminal knows no other letters than ASCII's
            words.append(text)
        elif words:
            break
    return " ".join(words).rstrip(".")


def where_it_says(argv: list[str]) -> str:
    """The command line whose help says what these arguments could be."""
    commands = [name for name in argv[:2] if name in COMMANDS]
    if not commands and argv and not argv[0].startswith("-"):
        near = difflib.get_close_matches(argv[0], COMMANDS, 1)
        return f"fastdcgan --help{f' (did you mean {near[0]}?)' if near else ''}"
    return " ".join(["fastdcgan", *commands, "--help"])


def complain(message: str) -> int:
    """One line on standard error; returns the exit code of a user's mistake."""
    say(f"fastdcgan: {' '.join(message.split())}")
    return 2
