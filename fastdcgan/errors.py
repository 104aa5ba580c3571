"""The one exception that stands for a mistake a user can put right, and what many commands need to make one."""

import os
from pathlib import Path

LAST_SEED = 2**32 - 1  # PyTorch's generators on a CPU take 32 bits: from a larger one the same numbers come again


class InOneLine(BaseException):
    """Shown in a notebook by its message alone."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback."""
        return [f"{type(self).__name__}: {self}"]


class UserError(InOneLine, Exception):
    """What is wrong and what to do about it, in one line.

    The command line prints the message without a traceback and exits with code 2.
    """


def first_line(error: BaseException | str) -> str:
    """The first line of what an error says, or its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def compiler_error(error: BaseException) -> str:
    """The line of torch.compile's report that says what is wrong."""
    return next((line for line in str(error).splitlines() if "error:" in line), first_line(error))


def check_at_least(flag: str, value: int, least: int) -> None:
    """Raises UserError for a flag's value that is too small."""
    if value < least:
        raise UserError(f"{flag} {value} is too small: at least {least}")


def check_seed(seed: int, count: int = 1) -> None:
    """Raises UserError for a seed that PyTorch does not tell from others, or where one of `count` from it on is."""
    last = LAST_SEED - count + 1
    if not 0 <= seed <= last:
        raise UserError(f"--seed {seed} is not possible: from 0 to {last}")


def check_seeds(seed: int, flag: str, count: int) -> None:
    """As `check_seed`, where a flag says how many."""
    check_seed(seed)
    left = LAST_SEED + 1 - seed
    if count > left:
        raise UserError(f"{flag} {count} is too large: from --seed {seed} on there are {left} seeds")


def check_utf8(flag: str, path: Path) -> None:
    """Raises UserError for a path with bytes that are no text, which libraries in C++ do not take."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{flag} {str(path)!r} is not possible: it needs a name in UTF-8") from None


def number_in(variable: str, otherwise: int) -> int:
    """The whole number in an environment variable, `otherwise` where it is not set.

    Raises:
        UserError: it is something else, or negative, or WORLD_SIZE is 0.
    """
    text = os.environ.get(variable, "").strip() or str(otherwise)
    if not text.isdecimal() or (variable == "WORLD_SIZE" and int(text) == 0):
        raise UserError(f"the environment has {variable}={text}: start with torchrun, or unset {variable}")
    return int(text)
