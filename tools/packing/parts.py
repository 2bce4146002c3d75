"""Which share of the work is ours, where several machines or processes do it together."""

import os
from typing import NamedTuple

from train.launch import find_task


class Part(NamedTuple):
    """The share of this process in work that several share."""

    number: int
    """0 to `of` - 1."""
    of: int
    source: str = ""
    """What said so."""


def find_part(part: str | None, environment: "os._Environ[str] | dict[str, str]") -> Part:
    """The share of this process: from i/n, else from torchrun's or srun's environment, else everything.

    Counting from 1 or from 0 is the same: only i modulo n matters. Raises `ValueError` for anything else.
    """
    if part is not None:
        source, counts_from = "--part", 1
    elif "RANK" in environment and "WORLD_SIZE" in environment:
        part, source, counts_from = f"{environment['RANK']}/{environment['WORLD_SIZE']}", "RANK/WORLD_SIZE", 0
    else:
        task = find_task(environment)
        return Part(*task, "SLURM_PROCID/SLURM_STEP_NUM_TASKS") if task else Part(0, 1)
    fields = part.split("/")
    if len(fields) != 2 or not all(field.isascii() and field.isdigit() for field in fields):
        raise ValueError(f"{source} has to be i/n, such as 1/4, but is {part}")
    index, parts = map(int, fields)
    if parts < 1:
        raise ValueError(f"{source} is {part}: there has to be at least one part")
    if index > parts or (index == parts and not counts_from):
        raise ValueError(f"{source} is {part}: there are only {parts} parts")
    return Part((index - counts_from) % parts, parts, source)
