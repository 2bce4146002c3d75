"""What lighting costs: the loader's graph with it and without it, in turn, by the clock and by the processor's time."""

import gc
import statistics
from pathlib import Path
from time import perf_counter, process_time
from typing import Literal

import torch

from pipeline.decode import Decoder
from pipeline.eigenbasis import Eigenbasis
from pipeline.graph import train_pipeline
from pipeline.lighting import moved_means
from pipeline.machine import num_cores, raise_open_files
from pipeline.normalize import BatchMemory, normalize
from pipeline.settings import Augmentation
from pipeline.shards import open_shards
from tools.benchmarks.measure import Table, take_turns
from tools.benchmarks.record import check_out, describe, record
from train.device import keep_freed_memory, pick_device

WARM_UP = 5
"""Batches before the clock starts."""


def bench_lighting(
    shards: Path,
    batch_size: int,
    threads: int | None,
    batches: int,
    repeats: int,
    device: str,
    out: Path | None,
) -> None:
    """See `tools/bench.py lighting`."""
    if min(batch_size, batches) < 1 or repeats < 2 or (threads is not None and threads < 1):
        raise ValueError("--batch-size, --batches and --threads must be at least 1, --repeats at least 2")
    check_out(out)
    keep_freed_memory()  # as the trainer does
    train = open_shards(shards, "train")
    basis = Eigenbasis.load(shards / "pca.json", train.manifest_sha256)
    threads = threads or num_cores()
    place = pick_device(device)
    kind: Literal["gpu", "cpu"] = "gpu" if place.type == "cuda" else "cpu"
    raise_open_files(len(train.tars))
    memory, lighting = BatchMemory(), Augmentation().lighting
    processor: dict[bool, list[float]] = {True: [], False: []}

    def run(lit: bool) -> float:
        # Built anew each time: of two equal pipelines one is faster by some per cent for as long as it lives.
        pipe = train_pipeline(
            train,
            basis,
            Augmentation(),
            shuffle_buffer=1024,
            data_seed=0,
            rank=0,
            num_ranks=1,
            decoder=Decoder(kind, train.any_size),
            device=kind,
            lit=lit,
            batch_size=batch_size,
            num_threads=threads,
            device_id=(place.index or 0) if kind == "gpu" else None,
            seed=0,
        )

        for batch in range(WARM_UP + batches):
            if batch == WARM_UP:
                used, started = process_time(), perf_counter()
            _, images, *rest = (torch.from_dlpack(output.as_tensor()) for output in pipe.run())
            if rest:  # on a CPU
                mirrored, light = rest if lit else (rest[0], torch.zeros(batch_size, 3))
                means = torch.from_numpy(moved_means(light.numpy(), basis, lighting)).float()
                normalize(images, mirrored, means, lighting.divisor, None, memory.take(tuple(images.shape)))
        rate = batches * batch_size / (perf_counter() - started)
        processor[lit].append((process_time() - used) / batches / batch_size)
        del pipe
        gc.collect()
        return rate

    lit, unlit = "the loader's graph", "the same without lighting"
    measured = take_turns({unlit: lambda: run(False), lit: lambda: run(True)}, repeats)
    print(f"{describe(train)}; batch {batch_size}, {threads} threads, {repeats} repeats, on {kind}")
    table = Table("what lighting costs", "images/s", measured, unlit)
    table.show()
    shares = [a / b for a, b in zip(processor[True][1:], processor[False][1:], strict=True)]
    tell("speed", [a / b for a, b in zip(measured[lit], measured[unlit], strict=True)])
    tell("processor time", shares)
    if out:
        settings = {
            "shards": train.manifest_sha256,
            "batch_size": batch_size,
            "threads": threads,
            "batches": batches,
        }
        settings |= {"device": kind, "processor_time": statistics.mean(shares)}
        record(out, "lighting", [table], describe(train), settings)


def tell(what: str, ratios: list[float]) -> None:
    """Print the mean of ratios of turns and how sure it is."""
    error = statistics.stdev(ratios) / len(ratios) ** 0.5
    print(
        f"{what} with lighting, of that without: {statistics.mean(ratios):.3f} +- {error:.3f} (standard error)"
    )
