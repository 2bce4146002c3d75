"""How a process keeps memory, seen from a process of its own by what the kernel and glibc count."""

import os

from tests.helpers import run_python

KEPT = """
import ctypes, os, re, threading

os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # with many cores a dozen threads would say nothing
import numpy as np
from pipeline.machine import resident_bytes
from train.device import keep_freed_memory

def arenas():
    libc = ctypes.CDLL(None)
    libc.fopen.restype = ctypes.c_void_p
    file = libc.fopen(b"{told}", b"w")
    libc.malloc_info(0, ctypes.c_void_p(file))
    libc.fclose(ctypes.c_void_p(file))
    return len(re.findall("<heap nr", open("{told}").read()))

def hold():
    block = np.ones(10_000, np.uint8)
    together.wait()
    del block

if {keep}:
    keep_freed_memory()
blocks = [np.ones(1_000_000, np.uint8) for _ in range(200)]
full = resident_bytes()
del blocks
together = threading.Barrier(12)
threads = [threading.Thread(target=hold) for _ in range(12)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(full - resident_bytes(), arenas())
"""


def test_freed_memory_is_kept_in_few_places(tmp_path: object) -> None:
    """Of 200 MB that are freed nearly all stay with the process, and a dozen threads share two arenas for each core; by
    itself glibc keeps nothing and gives each thread an arena."""
    given_back, arenas = {}, {}
    for keep in (False, True):
        process = run_python("-c", KEPT.format(keep=keep, told=f"{tmp_path}/arenas"))
        assert process.returncode == 0, process.stderr
        given_back[keep], arenas[keep] = map(int, process.stdout.split())
    assert given_back[False] > 190e6 and given_back[True] < 10e6
    cores = min(2, len(os.sched_getaffinity(0)))
    assert arenas[True] <= 2 * cores and (arenas[False] >= 12 or arenas[False] == 8 * cores)
