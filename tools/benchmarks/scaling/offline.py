"""The packer over worker processes, and the eigenbasis' sums over threads."""

import tempfile
from functools import partial
from pathlib import Path
from time import perf_counter

from pipeline.shards import open_shards
from tools.benchmarks.contenders.data import whole_shards
from tools.benchmarks.figure import Panel
from tools.benchmarks.measure import Table, take_turns
from tools.benchmarks.pack import in_new_folder, pack_once
from tools.benchmarks.scaling.loader import MAX_IMAGES
from tools.benchmarks.scaling.part import Part, counted, in_new_process
from tools.moments import batch_sums

BATCH_SIZE = 64
"""As compute_pca's."""


def scale_offline(shards: Path, raw: Path, workers: list[int], repeats: int) -> Part:
    """Images per second of packing RAW at 256x256, and of summing the training shards."""
    packing = {f"pack, {counted(number, 'worker')}": number for number in workers}
    summing = {f"eigenbasis, {counted(number, 'thread')}": number for number in workers}
    with tempfile.TemporaryDirectory(prefix="bench-scaling-", dir=raw.resolve().parent) as folder:

        def pack(number: int) -> float:
            return in_new_folder(Path(folder), lambda place: pack_once(raw, place, number, "crop256"))

        packed = take_turns({name: partial(pack, number) for name, number in packing.items()}, repeats)
    summed = take_turns(
        {name: partial(in_new_process, sum_shards, shards, number) for name, number in summing.items()},
        repeats,
    )
    tables = [
        Table("packed at 256x256", "images/s", packed, next(iter(packing))),
        Table("sums for the eigenbasis", "images/s", summed, next(iter(summing))),
    ]
    panels = [
        Panel(
            title,
            "images/s",
            x,
            {"measured": {numbers[name]: measured[name] for name in numbers}},
            ideal=True,
        )
        for title, x, numbers, measured in (
            ("pack at 256x256", "worker processes", packing, packed),
            ("sums for the eigenbasis", "threads", summing, summed),
        )
    ]
    return Part(
        tables, panels, [], {name: {"workers": number} for name, number in (packing | summing).items()}
    )


def sum_shards(shards: Path, threads: int) -> float:
    """Images per second of summing, the pipeline's start left out."""
    counts = (
        sums.moments.num_images
        for sums in batch_sums(whole_shards(open_shards(shards, "train"), MAX_IMAGES), BATCH_SIZE, threads)
    )
    next(counts)
    started = perf_counter()
    return sum(counts) / (perf_counter() - started)
