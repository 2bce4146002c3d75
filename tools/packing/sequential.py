"""Packing from a source that is slow at random reads (a hard disk, parquet files): each archive is read once, in order.

An external merge sort. First, segments of the source are packed and spilled into the split's folder, each in the order
of the shards; then shards are put together from a window of every segment at a time. It needs the size of the shards
once more on disk while it runs, and a bounded part of the memory; the shards are the same to the byte. Finished
segments survive a kill as finished shards do.
"""

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.files import atomic_writer, open_locked, sha256, write_bytes, write_json
from tools.packing.images import Packed
from tools.packing.manifest import SPILL
from tools.packing.pack import Done, pack_sample, run_units, write_packed
from tools.packing.parquet import row_groups, rows_of
from tools.packing.plan import Options, Plan, Sample, ShardPlan

WINDOW_BYTES = 2**27
"""Of raw images per segment, and of packed images that a process holds while it writes shards."""


class Segment(NamedTuple):
    """A stretch of the source."""

    path: Path
    """Where it is spilled to, without suffix: `.bin` (images), `.npy` (int64 rows of place in the order, end in `.bin`,
    raw size), `.json` (notes and skipped images; written last, vouches for the others)."""
    places: list[int]
    """Places of its images in the order of the shards."""
    samples: list[Sample]
    options: Options
    group: tuple[int, int] | None
    """In a parquet file: row group, and its first row."""


class Merge(NamedTuple):
    """Shards to be put together by one process."""

    shards: list[tuple[int, ShardPlan]]
    """Place of the first image, and the shard."""
    segments: list[Path]
    window: int
    """Images to hold at a time."""


def pack_in_order(plan: Plan, numbers: list[int], workers: int, parquet: bool) -> list[Done]:
    """Write the shards `numbers` of a split; returns what was done, reading and writing each once."""
    spill = plan.directory / SPILL.replace("*", plan.digest[:16])
    spill.mkdir(exist_ok=True)
    with open_locked(spill / "lock", wait=False):  # two processes would read everything twice
        return merge_sort(plan, numbers, workers, parquet, spill)


def merge_sort(plan: Plan, numbers: list[int], workers: int, parquet: bool, spill: Path) -> list[Done]:
    """Spill what is not spilled yet, then merge; see `pack_in_order`."""
    stretches = list(segment_rows(plan, parquet))
    paths = [spill / f"segment-{number:06d}" for number in range(len(stretches))]
    left = [number for number, path in enumerate(paths) if not is_spilled(path)]
    place_of = np.empty(len(plan.order), np.int64)
    place_of[plan.order] = np.arange(len(plan.order))
    units = (segment(plan, place_of, paths[number], *stretches[number]) for number in left)
    images = sum(len(stretches[number][0]) for number in left)
    done = run_units(spill_segment, units, images, workers, f"reading {plan.directory.name}")
    packed_bytes = sum(path.with_suffix(".bin").stat().st_size for path in paths)
    window = max(1, WINDOW_BYTES * len(plan.order) // max(1, packed_bytes))
    per_unit = max(1, window // plan.options.samples_per_shard)
    merges = (
        Merge([(plan.bounds(number)[0], plan.shard(number)) for number in numbers[k : k + per_unit]], paths, window)
        for k in range(0, len(numbers), per_unit)
    )
    images = sum(last - first for first, last in map(plan.bounds, numbers))
    written = run_units(merge_shards, merges, images, workers, f"writing {plan.directory.name}")
    read = [result._replace(images=0, bytes_written=0) for result in done]
    return read + [result._replace(bytes_read=0) for result in written]


def is_spilled(path: Path) -> bool:
    """Whether a segment is there, as its note says."""
    try:
        note = json.loads(path.with_suffix(".json").read_bytes())
        rows = path.with_suffix(".npy").read_bytes()
        sound = note["bin_bytes"] == path.with_suffix(".bin").stat().st_size and note["npy_sha256"] == sha256(rows)
        return sound and note["results_sha256"] == sha256(json.dumps(note["results"]).encode())
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return False


def segment_rows(plan: Plan, parquet: bool) -> Iterator[tuple[np.ndarray, tuple[int, int] | None]]:
    """Rows of the listing, stretch by stretch as they lie in the source; with the row group in a parquet file."""
    listing = plan.listing
    file, offset = np.frombuffer(listing.file, np.int32), np.frombuffer(listing.offset, np.int64)
    rows = np.lexsort((offset, file))
    if not parquet:
        ends = np.cumsum(np.frombuffer(listing.size, np.int64)[rows])
        cuts = np.flatnonzero(np.diff(ends // WINDOW_BYTES)) + 1
        yield from ((stretch, None) for stretch in np.split(rows, cuts))
        return
    for number, name in enumerate(listing.files):
        first = 0
        in_file = rows[np.searchsorted(file[rows], number) : np.searchsorted(file[rows], number, "right")]
        for group, num_rows in enumerate(row_groups(Path(listing.root, name))):
            low, high = np.searchsorted(offset[in_file], (first, first + num_rows))
            if high > low:
                yield in_file[low:high], (group, first)
            first += num_rows


def segment(plan: Plan, place_of: np.ndarray, path: Path, rows: np.ndarray, group: tuple[int, int] | None) -> Segment:
    """All that a worker needs to spill a stretch; `place_of`: int64, place in the order by row."""
    samples = [(plan.key(row), plan.listing[row]) for row in rows.tolist()]
    return Segment(path, place_of[rows].tolist(), samples, plan.options, group)


def raw_files(work: Segment) -> Iterator[bytes | None]:
    """The files of a segment's images, in order, from a parquet file; None for images that are read by offset."""
    if work.group is None:
        yield from (None for _ in work.samples)
        return
    group, first = work.group
    wanted = {image.offset for _, image in work.samples}
    for row, raw in enumerate(rows_of(Path(work.samples[0][1].file), group), first):
        if row in wanted:
            yield raw


def spill_segment(work: Segment) -> Done:
    """Pack the images of a segment and write them in the order of the shards."""
    packed: dict[int, tuple[Packed | str, int]] = {}
    for place, sample, raw in zip(work.places, work.samples, raw_files(work), strict=True):
        packed[place] = pack_sample(sample, work.options, raw)
    rows: list[tuple[int, int, int]] = []
    results: dict[str, list[str]] = {}
    end = 0
    with atomic_writer(work.path.with_suffix(".bin")) as file:
        for place, (result, size) in sorted(packed.items()):
            if isinstance(result, Packed):
                file.write(result.jpeg)
                end += len(result.jpeg)
                if result.found:
                    results[str(place)] = [result.found, result.done]
            else:
                results[str(place)] = [result]
            rows.append((place, end, size))
    table = io.BytesIO()
    np.save(table, np.array(rows, np.int64))
    write_bytes(work.path.with_suffix(".npy"), table.getvalue())
    sums = {"npy_sha256": sha256(table.getvalue()), "results_sha256": sha256(json.dumps(results).encode())}
    write_json(work.path.with_suffix(".json"), {"bin_bytes": end, **sums, "results": results})
    return Done(len(rows), sum(size for _, _, size in rows), end)


def merge_shards(work: Merge) -> Done:
    """Put shards together from all segments."""
    total = Done()
    for first, plan in work.shards:
        images = spilled(work.segments, first, first + len(plan.samples), work.window)
        done = write_packed(plan, zip(plan.samples, images, strict=True))
        total = Done(
            total.images + done.images, total.bytes_read + done.bytes_read, total.bytes_written + done.bytes_written
        )
    return total


def spilled(segments: list[Path], first: int, last: int, window: int) -> Iterator[tuple[Packed | str, int]]:
    """The packed images of the places `first` to `last`, from a window of every segment at a time."""
    for low in range(first, last, window):
        held: dict[int, tuple[Packed | str, int]] = {}
        for path in segments:
            held.update(read_window(path, low, min(low + window, last)))
        yield from (held[place] for place in range(low, min(low + window, last)))


def read_window(path: Path, low: int, high: int) -> Iterator[tuple[int, tuple[Packed | str, int]]]:
    """(place, result) of what one segment has of a window: one read."""
    rows = np.load(path.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
    start, stop = np.searchsorted(rows[:, 0], (low, high)).tolist()
    if start == stop:
        return
    begin = int(rows[start - 1, 1]) if start else 0
    with path.with_suffix(".bin").open("rb", buffering=0) as file:
        content = os.pread(file.fileno(), int(rows[stop - 1, 1]) - begin, begin)
    results = json.loads(path.with_suffix(".json").read_bytes())["results"]
    position = 0
    for place, end, size in rows[start:stop].tolist():
        note = results.get(str(place), ["", ""])
        jpeg = content[position : end - begin]
        position = end - begin
        yield place, ((Packed(jpeg, *note) if len(note) == 2 else note[0]), size)
