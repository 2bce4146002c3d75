"""Worker processes of the offline tools: as many jobs in flight as keep them busy, results as they finish.

Workers die with their parent and leave Ctrl-C to it, and one that dies of an image has said before which one it is at.
With one worker everything happens in this process.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from tqdm import tqdm

from pipeline.machine import share_of_cores
from pipeline.shards import DataError

Job = TypeVar("Job")
Result = TypeVar("Result")


def check_workers(workers: int | None) -> int:
    """The number of processes. Raises `ValueError` for none."""
    if workers is not None and workers < 1:
        raise ValueError(f"--workers must be at least 1, but is {workers}")
    return workers or share_of_cores()


def imap_unordered(
    function: Callable[[Job], Result], jobs: Iterable[Job], workers: int
) -> Iterator[tuple[int, Result]]:
    """Call `function` on every job in `workers` processes; yield (the job's number, result) as they finish.

    Jobs are taken from their iterable as workers get free, so that a long list of them costs no memory. Raises what the
    first failing call raised, and `DataError` when a process dies, with what it last said by `name_work`.
    """
    todo = enumerate(jobs)
    if workers == 1:
        yield from ((number, function(job)) for number, job in todo)
        return
    pending: dict[Future[Result], int] = {}
    spawn = multiprocessing.get_context("spawn")
    slots, started = spawn.RawArray(ctypes.c_char, workers * SLOT_BYTES), set[Any]()
    given = (os.getpid(), slots, spawn.Value("i", 0))
    with ProcessPoolExecutor(workers, spawn, initializer=start_worker, initargs=given) as pool:
        try:
            while True:
                with contextlib.nullcontext() if pending else ignore_interrupts():
                    while len(pending) < 2 * workers and (job := next(todo, None)) is not None:
                        pending[pool.submit(function, job[1])] = job[0]
                started.update(multiprocessing.active_children())
                if not pending:
                    return
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    yield pending.pop(future), future.result()
        except BrokenProcessPool:
            patience = time.monotonic() + 1  # another thread of the pool may be about to learn the exit code
            while not (where := describe_death(slots.raw, started)) and time.monotonic() < patience:
                time.sleep(0.01)
            for (
                process
            ) in multiprocessing.active_children():  # the pool waits for one that it was just starting
                process.kill()
            raise DataError(
                f"a worker process died{where}; run the same command again, perhaps with fewer --workers if memory is "
                "short: what was finished is kept; if it dies at the same image again, take that one out"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def map_shards(
    function: Callable[[Job], Result], jobs: list[Job], sizes: list[int], workers: int, what: str
) -> list[Result]:
    """Call `function` on every job in processes, with a progress bar over the jobs' bytes; results in the jobs'
    order. Raises as `imap_unordered`."""
    results: dict[int, Result] = {}
    with tqdm(total=sum(sizes), desc=what, unit="B", unit_scale=True, disable=None) as progress:
        for number, result in imap_unordered(function, jobs, min(workers, len(jobs))):
            results[number] = result
            progress.update(sizes[number])
    return [results[number] for number in range(len(jobs))]


@contextlib.contextmanager
def ignore_interrupts() -> Iterator[None]:
    """Processes that are started meanwhile ignore Ctrl-C, which reaches every process of a terminal: workers finish
    what they are at, and their parent, who hears it, sends them nothing further."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def start_worker(parent: int, slots: "ctypes.Array[ctypes.c_char]", count: Any) -> None:
    """Tie a worker's life to its parent's (Linux's PR_SET_PDEATHSIG), give it a slot of its own, and keep torch, if
    it is needed, on one core."""
    global own_slot
    os.environ["OMP_NUM_THREADS"] = "1"
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone already
        os._exit(1)
    with count.get_lock():
        own_slot = memoryview(slots).cast("B")[count.value * SLOT_BYTES : (count.value + 1) * SLOT_BYTES]
        count.value += 1


SLOT_BYTES = 512
"""For a process number and the name of an image, which is cut."""
own_slot: memoryview | None = None
"""This worker's slot, memory that it shares with its parent."""


def name_work(name: str) -> None:
    """Say what this process is about to do, in case that it dies of it; half a microsecond."""
    if own_slot is not None:
        own_slot[:] = f"{os.getpid()} {name}".encode(errors="replace")[:SLOT_BYTES].ljust(SLOT_BYTES, b"\0")


def describe_death(slots: bytes, processes: Iterable[Any]) -> str:
    """How the first of some processes died, and what it was at, as far as is known."""
    lines = [
        slots[k : k + SLOT_BYTES].rstrip(b"\0").decode(errors="replace")
        for k in range(0, len(slots), SLOT_BYTES)
    ]
    names = dict(line.split(" ", 1) for line in lines if line)
    for process in processes:
        if (code := process.exitcode) in (None, 0, -signal.SIGTERM):  # the pool ends the others by SIGTERM
            continue
        known = {each.value: each.name for each in signal.Signals}
        reason = known.get(-code, f"signal {-code}") if code < 0 else f"exit code {code}"
        name = names.get(str(process.pid))
        return f" ({reason})" + (f" at {name}" if name else "")
    return ""
