"""Which share of the work is ours, where several machines or processes do it together."""

import os
from typing import NamedTuple


class Part(NamedTuple):
    """The share of this process in work that several share."""

    number: int
    """0 to `of` - 1."""
    of: int
    source: str = ""
    """What said so."""


def find_part(part: str | None, environment: "os._Environ[str] | dict[str, str]") -> Part:
    """The share of this process: from i/n, else from torchrun's or Slurm's environment, else everything.

    Counting from 1 or from 0 is the same: only i modulo n matters. Raises `ValueError` for anything else.
    """
    if part is None:
        for number, of in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
            if number in environment and of in environment:
                part, source, counts_from = f"{environment[number]}/{environment[of]}", f"{number}/{of}", 0
                break
        else:
            return Part(0, 1)
    else:
        source, counts_from = "--part", 1
    fields = part.split("/")
    if len(fields) != 2 or not all(field.isascii() and field.isdigit() for field in fields):
        raise ValueError(f"{source} has to be i/n, such as 1/4, but is {part}")
    index, parts = map(int, fields)
    if parts < 1:
        raise ValueError(f"{source} is {part}: there has to be at least one part")
    if index > parts or (index == parts and not counts_from):
        raise ValueError(f"{source} is {part}: there are only {parts} parts")
    return Part((index - counts_from) % parts, parts, source)
