"""Benchmark our reader: its CPU time next to that of DALI's, and how much it slows a thread that launches kernels.

Aims: at least twice as many samples per CPU-second as DALI's reader; for the thread that launches, a median within 10 %
and a 99th percentile within a factor of 2 of those without a reader.
"""

from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from threading import Event, Thread
from time import perf_counter, sleep
from typing import Any

import numpy as np

from pipeline.augment import CROP_SIDE
from pipeline.order import order_global
from pipeline.reader import SampleReader
from pipeline.shards import ShardSet
from tools.benchmarks import common

OURS, DALI = "our reader, one thread", "DALI's webdataset reader"
ALONE, READING = "alone", "while our reader reads 30,000 samples/s"
SAMPLES_PER_S = 30_000
"""More than a GPU trains on."""
LAUNCHES, LOOPS = 300, 1000
"""Operations per loop, about those of a training step; loops per turn."""


def bench_reader(
    shards: ShardSet,
    batch_size: int,
    seconds: float,
    repeats: int,
    out: Path | None,
    context: dict[str, Any],
) -> None:
    """Measure reading from the page cache, without decoding; rows get `context`."""
    with closing(SampleReader(shards, random=False)) as reader:
        for shard in range(len(shards.tars)):
            reader.read_through(shard)
    steps = {OURS: read_samples(shards, batch_size), DALI: read_with_dali(shards, batch_size)}
    turns = {
        name: partial(common.measure, partial(next, step), batch_size, seconds)
        for name, step in steps.items()
    }
    rates = common.interleave(turns, repeats)
    common.report_rates("reading alone, from memory", rates, DALI, out, **context)
    report_loops(*time_loops(shards, batch_size, repeats), out, context)


def read_samples(shards: ShardSet, batch_size: int) -> Iterator[None]:
    """Read batches in random order, as each of the loader's threads does, forever."""
    from pipeline.graph import wrap_encoded

    with closing(SampleReader(shards, random=True)) as reader:
        for epoch in count():
            order = order_global(np.arange(shards.num_samples), 0, epoch, shards.num_samples)
            for first in range(0, shards.num_samples - batch_size + 1, batch_size):
                encoded = reader.read(order[first : first + batch_size])
                assert len(wrap_encoded(encoded.images)) == batch_size
                reader.release(encoded)
                yield


def read_with_dali(shards: ShardSet, batch_size: int, threads: int = 1, crop: bool = False) -> Iterator[Any]:
    """Read batches in random order by DALI's reader, forever; with `crop` random crops of a pixel store."""
    from nvidia.dali import Pipeline, fn, types

    indexes = [str(Path(tar).with_suffix(".idx")) for tar in shards.tars]
    extension = "npy" if shards.is_decoded else "jpg"
    files = {"paths": list(shards.tars), "index_paths": indexes, "ext": [extension, "cls"]}
    options: dict[str, Any] = {"random_shuffle": True, "initial_fill": 4096, "dont_use_mmap": True}
    pipe = Pipeline(batch_size, threads, None, seed=0)
    with pipe:
        images, labels = fn.readers.webdataset(**options | files)  # type: ignore[misc]
        if crop:
            x, y = fn.random.uniform(range=(0.0, 1.0)), fn.random.uniform(range=(0.0, 1.0))
            pixels = fn.reshape(fn.decoders.numpy(images, dtype=types.UINT8), layout="HWC")
            images = fn.crop(pixels, crop=(CROP_SIDE, CROP_SIDE), crop_pos_x=x, crop_pos_y=y)
        pipe.set_outputs(images, labels)
    while True:
        yield pipe.run()


def time_loops(shards: ShardSet, batch_size: int, repeats: int) -> tuple[dict[str, np.ndarray], float]:
    """Time loops of small torch operations in turns, alone and while another thread reads.

    Returns milliseconds, (repeats, LOOPS) by contender, and the samples that were read per second.
    """
    import torch

    times: dict[str, list[list[float]]] = {ALONE: [], READING: []}
    rates, number, samples = [], torch.zeros(8), read_samples(shards, batch_size)
    next(samples)  # opens the files

    def read(stop: Event) -> None:
        start = perf_counter()
        for n, _ in enumerate(samples, start=1):
            sleep(max(0, start + n * batch_size / SAMPLES_PER_S - perf_counter()))
            if stop.is_set():
                break
        rates.append(n * batch_size / (perf_counter() - start))

    def time_loop() -> float:
        start = perf_counter()
        for _ in range(LAUNCHES):
            number.add_(1)
        return 1e3 * (perf_counter() - start)

    for turn in range(repeats + 1):
        for name in list(times)[:: 1 if turn % 2 else -1]:
            stop = Event()
            threads = [Thread(target=read, args=(stop,))] if name == READING else []
            for thread in threads:
                thread.start()
            times[name].append([time_loop() for _ in range(LOOPS)])
            stop.set()
            for thread in threads:
                thread.join()
    return {name: np.array(turns[1:]) for name, turns in times.items()}, median(rates[1:])


def report_loops(
    times: dict[str, np.ndarray], samples_per_s: float, out: Path | None, context: dict[str, Any]
) -> None:
    """Print medians and 99th percentiles, and their ratios to those alone, turn by turn; append them to `out`."""
    title, rows = f"{LAUNCHES} small torch operations", []
    print(f"{title + ', ms':<40}   median      p99  ratio  ratio of p99")
    percentiles = {name: np.percentile(loops, [50, 99], axis=1) for name, loops in times.items()}
    for name, values in percentiles.items():
        middle, p99 = np.median(values, axis=1).tolist()
        ratio, p99_ratio = np.median(values / percentiles[ALONE], axis=1).tolist()
        print(f"{name:<40} {middle:>8.3f} {p99:>8.3f} {ratio:>6.2f} {p99_ratio:>13.2f}")
        row = {"contender": name, "table": title, "unit": "ms", "reference": ALONE, "ratio": ratio}
        row |= {"p99_ratio": p99_ratio, "median": middle, "p99": p99}
        rows.append(row | {"values": values[0].tolist(), "values_p99": values[1].tolist()})
    print(f"the reader read {samples_per_s:,.0f} samples/s")
    common.append_rows(out, rows, samples_per_s=samples_per_s, **context)
