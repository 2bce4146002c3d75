"""Run jobs in worker processes, two in flight per worker.

Workers die with their parent and ignore Ctrl-C. Each records the image that it works on in shared memory, so that a
crash can name it. With one worker everything runs in this process.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from tqdm import tqdm

from pipeline.errors import DataError, UserError
from pipeline.machine import share_of_cores

LOG_EVERY_S = 60.0
"""Seconds between lines of progress where there is no terminal, such as in a job's log."""
Job = TypeVar("Job")
Result = TypeVar("Result")


def check_workers(workers: int | None) -> int:
    """Return the number of processes, by default one per core. Raises `UserError` below 1."""
    if workers is not None and workers < 1:
        raise UserError(f"--workers: expected at least 1, got {workers}")
    return workers or share_of_cores()


def run_jobs(
    function: Callable[[Job], Result],
    jobs: Iterable[Job],
    sizes: Sequence[int],
    workers: int,
    description: str,
    unit: str = "B",
) -> list[Result]:
    """Call `function` on every job in `workers` processes; return the results in the order of the jobs.

    Args:
        function: What to call; picklable.
        jobs: Consumed as workers become free.
        sizes: Of each job, in `unit`, for the progress bar.
        workers: Number of processes.
        description: Title of the progress bar.
        unit: Of `sizes`.

    Raises what the first failing call raised, and `DataError` when a process dies, naming its last `set_current_item`.
    """
    results: dict[int, Result] = {}
    every_s = 0.1 if sys.stderr.isatty() else LOG_EVERY_S
    bar = tqdm(
        total=sum(sizes), desc=description, unit=unit, unit_scale=True, mininterval=every_s, delay=every_s
    )
    with bar as progress:
        for number, result in imap_unordered(function, jobs, min(workers, len(sizes))):
            results[number] = result
            progress.update(sizes[number])
    return [results[number] for number in range(len(results))]


def imap_unordered(
    function: Callable[[Job], Result], jobs: Iterable[Job], workers: int
) -> Iterator[tuple[int, Result]]:
    """Yield (job number, result) as jobs finish; otherwise as `run_jobs`."""
    todo = enumerate(jobs)
    if workers <= 1:
        yield from ((number, function(job)) for number, job in todo)
        return
    pending: dict[Future[Result], int] = {}
    spawn = multiprocessing.get_context("spawn")
    slots, started = spawn.RawArray(ctypes.c_char, workers * SLOT_BYTES), set[Any]()
    initargs = (os.getpid(), slots, spawn.Value("i", 0))
    with ProcessPoolExecutor(workers, spawn, initializer=start_worker, initargs=initargs) as pool:
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
            deadline = time.monotonic() + 1  # another thread of the pool may not have the exit code yet
            while not (crash := describe_crash(slots.raw, started)) and time.monotonic() < deadline:
                time.sleep(0.01)
            for process in multiprocessing.active_children():  # the pool would wait for one still starting
                process.kill()
            raise DataError(
                f"a worker process died{crash}; run the same command to resume, with fewer --workers if memory is "
                "short; if it dies at the same image again, remove that image"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def ignore_interrupts() -> Iterator[None]:
    """Start workers that ignore Ctrl-C: they finish their job, and the parent stops the pool."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def start_worker(parent: int, slots: "ctypes.Array[ctypes.c_char]", count: Any) -> None:
    """Make a worker die with its parent (PR_SET_PDEATHSIG), assign it a slot, and limit torch to one thread."""
    global own_slot
    os.environ["OMP_NUM_THREADS"] = "1"
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:  # the parent is gone already
        os._exit(1)
    with count.get_lock():
        own_slot = memoryview(slots).cast("B")[count.value * SLOT_BYTES : (count.value + 1) * SLOT_BYTES]
        count.value += 1


SLOT_BYTES = 512
"""For a process id and the name of an image, truncated."""
own_slot: memoryview | None = None
"""This worker's slot in memory shared with its parent."""


def set_current_item(name: str) -> None:
    """Record what this process works on, in case it crashes; half a microsecond."""
    if own_slot is not None:
        own_slot[:] = f"{os.getpid()} {name}".encode(errors="replace")[:SLOT_BYTES].ljust(SLOT_BYTES, b"\0")


def describe_crash(slots: bytes, processes: Iterable[Any]) -> str:
    """Describe how the first crashed process ended, and its current item; empty if none crashed."""
    for process in processes:
        if (code := process.exitcode) in (None, 0, -signal.SIGTERM):  # the pool ends the others by SIGTERM
            continue
        prefix = f"{process.pid} ".encode()
        items = [slots[k : k + SLOT_BYTES].rstrip(b"\0") for k in range(0, len(slots), SLOT_BYTES)]
        names = [
            item.removeprefix(prefix).decode(errors="replace") for item in items if item.startswith(prefix)
        ]
        reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f" ({reason})" + "".join(f" at {name}" for name in names)
    return ""
