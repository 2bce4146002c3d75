"""Worker processes of the offline tools: as many jobs in flight as keep them busy, results as they finish.

Workers die with their parent and leave Ctrl-C to it. With one worker everything happens in this process.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from pipeline.machine import share_of_cores
from pipeline.shards import DataError

Job = TypeVar("Job")
Result = TypeVar("Result")


def check_workers(workers: int | None) -> int:
    """The number of processes. Raises `ValueError` for none."""
    if workers is not None and workers < 1:
        raise ValueError(f"--workers must be at least 1, but is {workers}")
    return workers or share_of_cores()


def as_they_finish(
    function: Callable[[Job], Result], jobs: Iterable[Job], workers: int
) -> Iterator[tuple[int, Result]]:
    """Call `function` on every job in `workers` processes; yield (the job's number, result) as they finish.

    Jobs are taken from their iterable as workers get free, so that a long list of them costs no memory. Raises what the
    first failing call raised, and `DataError` when a process dies.
    """
    todo = enumerate(jobs)
    if workers == 1:
        yield from ((number, function(job)) for number, job in todo)
        return
    pending: dict[Future[Result], int] = {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=start_worker, initargs=(os.getpid(),)) as pool:
        try:
            while True:
                with contextlib.nullcontext() if pending else interrupts_ignored():
                    while len(pending) < 2 * workers and (job := next(todo, None)) is not None:
                        pending[pool.submit(function, job[1])] = job[0]
                if not pending:
                    return
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    yield pending.pop(future), future.result()
        except BrokenProcessPool:
            for process in multiprocessing.active_children():  # the pool waits for one that it was just starting
                process.kill()
            raise DataError(
                "a worker process died (killed, or out of memory?); run the same command again, perhaps with fewer "
                "--workers: what was finished is kept"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def in_order(function: Callable[[Job], Result], jobs: Iterable[Job], workers: int) -> Iterator[Result]:
    """As `as_they_finish`, but results in the order of their jobs; those that finish early wait in memory."""
    early: dict[int, Result] = {}
    due = 0
    for number, result in as_they_finish(function, jobs, workers):
        early[number] = result
        while due in early:
            yield early.pop(due)
            due += 1


@contextlib.contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Processes that are started meanwhile ignore Ctrl-C, which reaches every process of a terminal: workers finish
    what they are at, and their parent, who hears it, sends them nothing further."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def start_worker(parent: int) -> None:
    """Tie a worker's life to its parent's (Linux's PR_SET_PDEATHSIG), and keep torch, if it is needed, on one core."""
    os.environ["OMP_NUM_THREADS"] = "1"
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone already
        os._exit(1)
