"""How a process keeps memory, seen from a process of its own by what the kernel counts."""

from tests.helpers import run_python

KEPT = """
import numpy as np
from pipeline.machine import resident_bytes
from train.device import keep_freed_memory, release_freed_memory

def held():
    return round(resident_bytes() / 1e6)

if {keep}:
    keep_freed_memory()
before = held()
blocks = [np.ones(1_000_000, np.uint8) for _ in range(200)]
anchor = np.ones(1_000_000, np.uint8)  # lies above them, so that only what is inside can be given back
full = held()
del blocks
freed = held()
release_freed_memory()
print(before, full, freed, held())
"""


def sizes(keep: bool) -> list[int]:
    """Resident megabytes of a process: before it takes 200 MB, with them, without them, and once they are released."""
    process = run_python("-c", KEPT.format(keep=keep))
    assert process.returncode == 0, process.stderr
    return [int(word) for word in process.stdout.split()]


def test_freed_memory_is_kept_until_it_is_released() -> None:
    before, full, freed, released = sizes(keep=True)
    assert full - before > 190 and full - freed < 10  # kept
    assert freed - released > 190  # given back
    _, full, freed, _ = sizes(keep=False)
    assert full - freed > 190  # so does glibc by itself
