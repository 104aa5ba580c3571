"""The one exception that stands for a mistake a user can put right."""


class UserError(Exception):
    """What is wrong and what to do about it, in one line.

    The command line prints the message without a traceback and exits with code 2.
    """
