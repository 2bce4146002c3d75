"""Errors that a command line prints as one sentence, without a traceback (train/cli.py), and a check of settings."""

from dataclasses import fields
from typing import Any, Literal, get_args, get_origin


class UserError(ValueError):
    """The user's input is wrong; the message names the thing and the remedy (exit code 2)."""


class DataError(RuntimeError):
    """Data that was intact when it was packed fails while a program runs, or another process is lost (exit code 3)."""


def check_choices(settings: Any, section: str) -> None:
    """Raise `UserError` for a field of a dataclass whose type is a `Literal` that does not list its value."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if get_origin(field.type) is Literal and value not in get_args(field.type):
            raise UserError(f"{section}.{field.name}: expected one of {get_args(field.type)}, got {value!r}")
