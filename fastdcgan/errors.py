"""The one exception that stands for a mistake a user can put right, and a check that every command needs."""

LAST_SEED = 2**63 - 1


class UserError(Exception):
    """What is wrong and what to do about it, in one line.

    The command line prints the message without a traceback and exits with code 2.
    """


def check_seed(seed: int) -> None:
    """Raises UserError for one that PyTorch does not take."""
    if not 0 <= seed <= LAST_SEED:
        raise UserError(f"--seed {seed} is not possible: from 0 to {LAST_SEED}")
