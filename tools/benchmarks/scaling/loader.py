"""The training loader over threads, over processes, and over epochs.

Every contender has processes of its own, started once, of which those of one contender measure at the same time. A
process with one thread of DALI is busy with more than that: its main thread normalizes. So the time that processors
worked is measured as well.
"""

import itertools
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

import numpy as np

from pipeline.eigenbasis import Eigenbasis
from pipeline.loader import Batch, Loader, train_loader
from pipeline.machine import resident_bytes
from pipeline.settings import DataConfig, Speed
from pipeline.shards import ShardSet, open_shards
from tools.benchmarks.contenders.data import whole_shards
from tools.benchmarks.figure import Panel
from tools.benchmarks.measure import Table, rate, take_turns
from tools.benchmarks.scaling.part import SPAWN, Part, counted, in_new_process
from train.device import keep_freed_memory

MAX_IMAGES = 20_000
"""Of whole epochs: more of them tell nothing new."""
ENDLESS: list[Iterator[Batch]] = []
"""What a worker process takes batches from."""
BARRIER: list[Barrier] = []
"""Where it waits for the others of its contender."""
PATIENCE_S = 300.0
"""With them: one of them may have been killed."""


def scale_loader(
    shards: Path, batch_size: int, threads: list[int], ranks: list[int], seconds: float, repeats: int
) -> tuple[Part, float]:
    """Images per second over threads of one process, and over processes with a thread each.

    Returns also images per second and core, with one thread.
    """
    sizes = sorted(
        {(1, 1), *((1, number) for number in threads), *((n, 1) for n in ranks), *((1, n) for n in ranks)}
    )
    names = {(n, t): f"{counted(n, 'process')}, {counted(t, 'thread')}" + " each" * (n > 1) for n, t in sizes}
    busy: dict[str, list[float]] = {name: [] for name in names.values()}
    with ExitStack() as stack:
        pools = {size: stack.enter_context(loading_pool(shards, batch_size, *size)) for size in sizes}
        for ready in [pools[size].submit(wait_for_all) for size in sizes for _ in range(size[0])]:
            ready.result()  # all of them start at once, which takes seconds

        def measure(size: tuple[int, int]) -> float:
            rates, cores = zip(*pools[size].map(share_rate, [seconds] * size[0]), strict=True)
            busy[names[size]].append(sum(cores))
            return sum(rates)

        measured = take_turns({names[size]: partial(measure, size) for size in sizes}, repeats)

    # The first turn is left out, as `take_turns` does.
    per_core = {
        name: median(images / cores for images, cores in zip(measured[name], busy[name][1:], strict=True))
        for name in measured
    }
    each = {
        names[n, t]: {
            "processes": n,
            "threads": t,
            "cores_busy": median(busy[names[n, t]][1:]),
            "images_per_core_s": per_core[names[n, t]],
        }
        for n, t in sizes
    }

    def table(title: str, chosen: list[tuple[int, int]]) -> Table:
        return Table(title, "images/s", {names[size]: measured[names[size]] for size in chosen}, names[1, 1])

    over_threads = [(1, number) for number in sorted({1, *threads})]
    many = [number for number in sorted({1, *ranks})]
    over_ranks = sorted({(1, 1), *((1, number) for number in many), *((number, 1) for number in many)})
    one = names[1, 1]
    note = f"{one}: {each[one]['cores_busy']:.2f} cores are busy, {per_core[one]:.0f} images/s per busy core"
    panels = [
        Panel(
            "loader, 1 process",
            "images/s",
            "threads of DALI",
            {"measured": {number: measured[names[1, number]] for _, number in over_threads}},
            ideal=True,
        ),
        Panel(
            "loader, several processes",
            "images/s in all",
            "threads of DALI in all",
            {
                "processes of 1 thread": {number: measured[names[number, 1]] for number in many},
                "1 process": {number: measured[names[1, number]] for number in many},
            },
            ideal=True,
        ),
    ]
    tables = [table("loader over threads", over_threads), table("loader over processes", over_ranks)]
    return Part(tables, panels, [note], each), per_core[one]


def loading_pool(shards: Path, batch_size: int, processes: int, threads: int) -> ProcessPoolExecutor:
    """Processes that each load their share; one task of `share_rate` for each makes them measure together."""
    ranks = SPAWN.SimpleQueue()
    for rank in range(processes):
        ranks.put(rank)
    share = (shards, batch_size, processes, threads, ranks, SPAWN.Barrier(processes))
    return ProcessPoolExecutor(processes, SPAWN, initializer=start_loading, initargs=share)


def start_loading(
    shards: Path, batch_size: int, processes: int, threads: int, ranks: "SimpleQueue[int]", barrier: Barrier
) -> None:
    """Start a worker: the rank is the next that nobody has."""
    loader = new_loader(open_shards(shards, "train"), shards, batch_size, threads, ranks.get(), processes)
    loader.open()
    ENDLESS.append(itertools.chain.from_iterable(itertools.repeat(loader)))
    BARRIER.append(barrier)


def wait_for_all() -> None:
    """Wait until every worker of the contender is there. Raises `BrokenBarrierError` where one never comes."""
    BARRIER[0].wait(PATIENCE_S)


def share_rate(seconds: float) -> tuple[float, float]:
    """Images per second of this worker while all others of its contender measure, and how many cores it keeps busy."""
    wait_for_all()
    started, worked = perf_counter(), process_time()
    size = len(next(ENDLESS[0]).labels)
    images_per_s = rate(lambda: next(ENDLESS[0]), size, seconds)
    return images_per_s, (process_time() - worked) / (perf_counter() - started)


def new_loader(
    train: ShardSet,
    shards: Path,
    batch_size: int,
    threads: int | None = None,
    rank: int = 0,
    num_ranks: int = 1,
) -> Loader:
    """The training loader on a CPU, in a process that keeps memory as the trainer's does."""
    keep_freed_memory()
    basis = Eigenbasis.load(shards / "pca.json", train.manifest_sha256)
    config = DataConfig(shards, speed=Speed(threads=threads))
    place = {"batch_size": batch_size, "seed": 0, "rank": rank, "num_ranks": num_ranks, "device": "cpu"}
    return train_loader(train, basis, config, **place)


def scale_epochs(shards: Path, batch_size: int, epochs: int) -> Part:
    """Speed and memory of one process, epoch by epoch."""
    rates, memory = in_new_process(load_epochs, shards, batch_size, epochs)
    speed, held = f"epochs 1 to {epochs}", f"memory behind epochs 1 to {epochs}"
    first = min(epochs // 4, epochs - 2)  # before, buffers fill
    growth_mb = 1000 * float(np.polyfit(range(first, epochs), memory[first:], 1)[0])
    note = f"behind epoch {first + 1}, memory grows by {growth_mb:.2f} MB an epoch (a straight line through {epochs})"
    numbers = range(1, epochs + 1)
    panels = [
        Panel("one epoch after the other", "images/s", "epoch", {speed: as_points(numbers, rates)}),
        Panel("memory, all of the process", "GB", "epochs done", {held: as_points(numbers, memory)}),
    ]
    tables = [
        Table("loader over epochs", "images/s", {speed: rates}, speed),
        Table("resident memory over epochs", "GB", {held: memory}, held),
    ]
    return Part(tables, panels, [note], {held: {"growth_mb_per_epoch": growth_mb}})


def as_points(numbers: range, values: list[float]) -> dict[int, list[float]]:
    """One value for each number."""
    return {number: [value] for number, value in zip(numbers, values, strict=True)}


def load_epochs(shards: Path, batch_size: int, epochs: int) -> tuple[list[float], list[float]]:
    """Images per second of each epoch, and resident memory behind it in GB; the first one's start-up is left out."""
    train = whole_shards(open_shards(shards, "train"), max(MAX_IMAGES, batch_size))
    loader = new_loader(train, shards, batch_size)
    loader.open()
    rates, memory = [], []
    for epoch in range(epochs):
        started = perf_counter()
        steps = sum(1 for _ in loader.epoch(epoch))
        rates.append(steps * batch_size / (perf_counter() - started))
        memory.append(resident_bytes() / 1e9)
    return rates, memory
