"""Start-up and memory over the number of samples.

A set of any size is made of links to one real shard under as many names: every index is read, every shard opened, and
batches are real ones. The disk has no part in it: the shard and its index are in the page cache after the first turn.
"""

import contextlib
import io
import itertools
import json
import math
import resource
import tempfile
from collections.abc import Mapping
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

from pipeline.eigenbasis import read_eigenbasis
from pipeline.files import read_json, sha256, write_bytes, write_json
from pipeline.machine import available_bytes, resident_bytes
from pipeline.reader import INDEX_BYTES
from pipeline.shards import DataError, ShardSet, index_text, open_shards, read_index
from tools.benchmarks.figure import Panel
from tools.benchmarks.measure import Table, take_turns
from tools.benchmarks.scaling.loader import new_loader
from tools.benchmarks.scaling.part import Part, in_new_process


class StartUp(NamedTuple):
    """Of one process, from nothing to its first batch."""

    files_s: float
    """Seconds to read the manifest and to look at every shard."""
    index_s: float
    """Then to build the pipeline, which reads every index."""
    batch_s: float
    """Then to the first batch."""
    grown_gb: float
    """Resident memory, less what the process held before: Python and libraries, which processes share."""
    peak_gb: float
    """The most that it ever held, with those."""

    @property
    def total_s(self) -> float:
        """From nothing to the first batch."""
        return self.files_s + self.index_s + self.batch_s


def scale_samples(
    shards: Path, sizes: list[int], batch_size: int, repeats: int
) -> tuple[Part, dict[int, float]]:
    """Start-up and memory with so many samples. What fails is left out, with the reason.

    Returns also the memory that a process takes, in GB, by number of samples.
    """
    found: dict[int, list[StartUp]] = {size: [] for size in sizes}
    failed: dict[int, str] = {}
    with tempfile.TemporaryDirectory(prefix="bench-scaling-") as folder:

        def measure(size: int) -> float:
            if size in failed:
                return math.nan
            place = Path(folder) / str(size)
            try:
                check_room(size)
                if not place.exists():
                    make_links(open_shards(shards, "train"), shards, size, place)
                found[size].append(in_new_process(start_up, place, batch_size))
            except (ValueError, OSError, MemoryError, DataError, BrokenProcessPool) as error:
                failed[size] = str(error) or type(error).__name__
                return math.nan
            return found[size][-1].total_s

        take_turns({str(size): partial(measure, size) for size in sizes}, repeats)
    runs = {size: found[size][1:] for size in sizes if size not in failed}  # behind the first turn
    return as_part(runs, failed), {size: median(run.grown_gb for run in runs[size]) for size in runs}


def as_part(runs: Mapping[int, list[StartUp]], failed: Mapping[int, str]) -> Part:
    """Tables and panels of what was measured."""
    start, memory = "start-up with {} samples", "memory with {} samples"

    def of(field: str) -> dict[int, list[float]]:
        return {size: [getattr(run, field) for run in runs[size]] for size in runs}

    def named(name: str, field: str) -> dict[str, list[float]]:
        return {name.format(size): values for size, values in of(field).items()}

    titles = {
        start: ("until the first batch", "s", "total_s"),
        memory: ("growth of the process", "GB", "grown_gb"),
    }
    tables = [
        Table(title, unit, named(name, field), name.format(next(iter(runs))))
        for name, (title, unit, field) in titles.items()
        if runs
    ]
    each: dict[str, dict[str, Any]] = {}
    for size in runs:
        medians = {field: median(of(field)[size]) for field in StartUp._fields}
        each[start.format(size)] = {"samples": size} | {
            name: medians[name] for name in medians if name[-2:] == "_s"
        }
        each[memory.format(size)] = {"samples": size, "peak_gb": medians["peak_gb"]}
    missing = [
        {
            "contender": name.format(size),
            "table": title,
            "unit": unit,
            "samples": size,
            "not_measured": reason,
        }
        for size, reason in failed.items()
        for name, (title, unit, _) in titles.items()
    ]
    stages = {
        "until the first batch": "total_s",
        "of it DALI's index": "index_s",
        "of it the first batch": "batch_s",
        "of it manifest and files": "files_s",
    }
    panels = [
        Panel("start-up", "s", "samples", {label: of(field) for label, field in stages.items()}, log=True),
        Panel("memory, growth of the process", "GB", "samples", {"resident": of("grown_gb")}, log=True),
    ]
    notes = [
        f"{size} samples: {', '.join(f'{what} {median(of(field)[size]):.2f} s' for what, field in stages.items())}"
        for size in runs
    ]
    return Part(tables, panels if runs else [], notes, each, missing)


def check_room(samples: int) -> None:
    """Raise `ValueError` where the index would not fit into memory: the kernel would end some process for it."""
    needed = INDEX_BYTES * samples
    free = available_bytes()
    if needed > 0.8 * free:
        raise ValueError(f"DALI's index takes about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")


def make_links(train: ShardSet, shards: Path, samples: int, folder: Path) -> None:
    """Make a shard folder with a training split of exactly so many samples out of links to the largest shard of
    another; the last index lists what is left over."""
    (folder / "train").mkdir(parents=True)
    largest = max(range(len(train.tars)), key=lambda number: train.samples[number])
    each, tar, index = train.samples[largest], Path(train.tars[largest]), Path(train.indexes[largest])
    manifest = read_json(tar.with_name("manifest.json"))
    (row,) = (row for row in manifest["shards"] if row["name"] == tar.name)
    rows = []
    for number, first in enumerate(range(0, samples, each)):
        place = folder / "train" / f"train-{number:06d}.tar"
        place.symlink_to(tar.resolve())
        if samples - first >= each:
            place.with_suffix(".idx").symlink_to(index.resolve())
        else:
            write_bytes(place.with_suffix(".idx"), index_text(read_index(index)[: samples - first]).encode())
        rows.append(row | {"name": place.name, "samples": min(each, samples - first)})
    content = json.dumps(manifest | {"shards": rows, "num_samples": samples}).encode()
    write_bytes(folder / "train" / "manifest.json", content)
    write_bytes(folder / "classes.json", (shards / "classes.json").read_bytes())
    basis = read_eigenbasis(shards / "pca.json", train.manifest_sha256)
    write_json(folder / "pca.json", basis | {"manifest_sha256": sha256(content)})


def start_up(shards: Path, batch_size: int) -> StartUp:
    """Load one batch and tell what that took. Libraries are imported before."""
    held, times = resident_bytes(), [perf_counter()]
    with contextlib.redirect_stdout(
        io.StringIO()
    ):  # a warning of too little memory: that is what is measured
        loader = new_loader(open_shards(shards, "train"), shards, batch_size)
        times.append(perf_counter())
        loader.open()
    times.append(perf_counter())
    batch = next(iter(loader))
    times.append(perf_counter())
    assert len(batch.labels) == batch_size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    files_s, index_s, batch_s = (end - start for start, end in itertools.pairwise(times))
    return StartUp(files_s, index_s, batch_s, (resident_bytes() - held) / 1e9, peak / 1e9)
