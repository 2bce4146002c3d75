"""Which share of the work is ours, where several machines or processes do it together."""

from collections.abc import Mapping

from train.launch import Task, find_task


def find_part(part: str | None, environment: Mapping[str, str]) -> Task:
    """The share of this process: from i/n, else from torchrun's or srun's environment, else everything.

    Counting from 1 or from 0 is the same: only i modulo n matters. Raises `ValueError` for anything else.
    """
    if part is None:
        return find_task(environment)
    fields = part.split("/")
    if len(fields) != 2 or not all(field.isascii() and field.isdigit() for field in fields):
        raise ValueError(f"--part has to be i/n, such as 1/4, but is {part}")
    index, parts = map(int, fields)
    if parts < 1:
        raise ValueError(f"--part is {part}: there has to be at least one part")
    if index > parts:
        raise ValueError(f"--part is {part}: there are only {parts} parts; give 1/{parts} to {parts}/{parts}")
    return Task((index - 1) % parts, parts, "--part")
