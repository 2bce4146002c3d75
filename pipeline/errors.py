"""Errors that a command line prints as one sentence, without a traceback (train/cli.py)."""


class UserError(ValueError):
    """The user's input is wrong; the message names the thing and the remedy (exit code 2)."""


class DataError(RuntimeError):
    """Data that was intact when it was packed fails while a program runs, or another process is lost (exit code 3)."""
