"""What the parts of `bench scaling` have in common."""

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple, TypeVar

from tools.benchmarks.figure import Panel
from tools.benchmarks.measure import Table

T = TypeVar("T")
SPAWN = multiprocessing.get_context("spawn")


class Part(NamedTuple):
    """What was measured over one quantity or two."""

    tables: list[Table]
    """For the screen, and a row per contender."""
    panels: list[Panel]
    """For the figure."""
    notes: list[str]
    """Sentences for the screen."""
    each: Mapping[str, Mapping[str, Any]]
    """What a contender's row has besides."""
    missing: Sequence[Mapping[str, Any]] = ()
    """Rows of what could not be measured, with the reason."""

    def show(self) -> None:
        """Print it."""
        for table in self.tables:
            table.show()
        for row in self.missing:
            print(f"{row['contender']:<40} not measured: {row['not_measured']}")
        print("\n".join([*self.notes, ""]), flush=True)


def counted(number: int, what: str) -> str:
    """ "1 thread", "2 threads", "2 processes"."""
    return f"{number} {what}" + ("" if number == 1 else "es" if what.endswith("s") else "s")


def up_to(cores: int, beyond: int = 0) -> list[int]:
    """1, 2, 4, ... up to the cores, and `beyond` more one by one: on two cores all numbers."""
    doubled = [2**power for power in range(cores.bit_length())]
    return sorted({*doubled, *range(cores, cores + beyond + 1)})


def in_new_process(work: Callable[..., T], *arguments: Any) -> T:
    """Call `work` in a process that has done nothing else; raises what it raises, `BrokenProcessPool` if it dies."""
    with ProcessPoolExecutor(1, SPAWN) as pool:
        return pool.submit(work, *arguments).result()
