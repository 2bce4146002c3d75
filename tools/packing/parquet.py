"""Raw images in the parquet files of a Hugging Face data set (`imagenet-1k`): columns `image: {bytes, path}`, `label`.

Labels are read first, images by row group: a parquet file can be read cheaply in its own order only, and shards want
another. So every row group is packed into a file of its own in the split's folder, and shards are put together from
those by offset. It needs the size of the shards once more on disk while it runs; what is finished survives a kill.
`pyarrow` is an extra: nothing else here needs it.
"""

import functools
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from pipeline.files import atomic_writer, open_locked
from pipeline.shards import MAX_LABEL_DIGITS, ClassName
from tools.packing.images import Packed
from tools.packing.listing import Listing, RawImageNet, open_file
from tools.packing.plan import Options, Plan, Sample, ShardPlan
from tools.packing.writer import SPILL, PackStats, pack_sample, run_jobs, write_packed

WNID = re.compile(r"(?<![a-z0-9])n\d{8}(?!\d)")
COLUMNS = {"image.bytes", "image.path", "label"}


def import_pyarrow() -> ModuleType:
    """`pyarrow.parquet`. Raises `ValueError` that tells how to get it."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            "parquet files need pyarrow, which is not installed here; run pip install pyarrow"
        ) from None
    return pyarrow.parquet


def find_parquet(raw: Path) -> dict[str, list[Path]]:
    """The parquet files of each split, in `raw` or `raw/data`, by the names that Hugging Face gives; test files have
    no labels and are left aside.

    Raises `FileNotFoundError` for a missing part and `ValueError` for one that is there twice.
    """
    paths = sorted(raw.glob("*.parquet")) or sorted(raw.glob("data/*.parquet"))
    parts: dict[tuple[str, str], dict[int, Path]] = {}
    for path in paths:
        if match := re.match(r"(.*)-(\d+)-of-(\d{1,6})(?!\d)", path.name):
            first = parts.setdefault((match[1], match[3]), {}).setdefault(int(match[2]), path)
            if first != path:  # the Hub keeps the files of earlier pushes, whose names end in another hash
                raise ValueError(
                    f"{path} and {first.name} are the same part of one set; keep the files of one push"
                )
    for (name, number), there in parts.items():
        if missing := sorted(set(range(int(number))) - set(there)):
            raise FileNotFoundError(
                f"{raw} lacks {name}-{missing[0]:0{len(number)}}-of-{number}; fetch it as well"
            )
    found = {split: [path for path in paths if path.name.startswith(split)] for split in ("train", "val")}
    for files in found.values():
        sets = {re.sub(r"[-_]?\d+(-of-\d+)?(-\w+)?$", r"\1", path.stem): path for path in files}
        if len(sets) > 1:
            first, second, *_ = sorted(sets.values())
            raise ValueError(
                f"{first} and {second.name} are of two sets, or two pushes of one; keep the files of one"
            )
    return found


def read_parquet(raw: Path, files: dict[str, list[Path]]) -> RawImageNet:
    """List parquet files: labels and names alone are read.

    Raises `ValueError` for files of another form and labels that are no class.
    """
    parquet = import_pyarrow()
    splits: dict[str, Listing] = {}
    wnids: dict[int, set[str]] = {}
    words: list[str] = []
    for split, paths in files.items():
        if not paths:
            continue
        listing = splits[split] = Listing(raw)
        for path in paths:
            archive = listing.add_file(path)
            try:
                source = parquet.ParquetFile(path)
                columns = {source.schema.column(k).path for k in range(len(source.schema))}
                if not columns >= COLUMNS:
                    raise ValueError(f"it lacks the columns {', '.join(sorted(COLUMNS - columns))}")
                image = source.schema_arrow.field("image").type
                if (kind := str(image.field("bytes").type)) not in ("binary", "large_binary"):
                    raise ValueError(f"its column image.bytes is of type {kind}, not binary")
                table = source.read(columns=["image.path", "label"])
                metadata = json.loads((source.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
            except Exception as error:  # pyarrow raises several kinds over damaged bytes
                reason = " ".join(str(error).split())
                raise ValueError(
                    f"{path} is no data set of images and labels ({reason}); fetch it again"
                ) from None
            words = class_words(metadata) or words
            names = table.column("image").combine_chunks().field("path").to_pylist()
            for row, (name, label) in enumerate(zip(names, table.column("label").to_pylist(), strict=True)):
                if not isinstance(label, int) or not 0 <= label < 10**MAX_LABEL_DIGITS:
                    raise ValueError(f"{path} labels row {row} as {label}, which is no class; fetch it again")
                listing.append(archive, name or f"{path.stem}_{row}", row, 0, label)
                wnids.setdefault(label, set()).update(WNID.findall(name or ""))
    if "train" not in splits or not all(splits.values()):
        raise ValueError(f"{raw} holds no images in parquet files called train-*; fetch them again")
    return RawImageNet("Hugging Face parquet files", class_names(wnids, words), splits, sequential=True)


def class_words(metadata: Any) -> list[str]:
    """What Hugging Face's description of a data set calls the classes; empty where it does not tell."""
    for name in ("info", "features", "label", "names"):
        metadata = metadata.get(name) if isinstance(metadata, dict) else None
    return [str(each) for each in metadata] if isinstance(metadata, list) else []


def class_names(wnids: dict[int, set[str]], words: list[str]) -> tuple[ClassName, ...]:
    """Classes in the order of the labels: by the wnid that all file names of a label share, if that gives sorted
    wnids, else by the number."""
    number = max(max(wnids) + 1, len(words))
    shown = words if len(words) == number else [f"class {label}" for label in range(number)]
    found = [wnids.get(label, set()) for label in range(number)]
    if all(len(names) == 1 for names in found):
        names = [next(iter(names)) for names in found]
        if names == sorted(set(names)):
            return tuple(ClassName(wnid, text) for wnid, text in zip(names, shown, strict=True))
    return tuple(ClassName(f"{label:06d}", text) for label, text in enumerate(shown))


def read_row_group(path: Path, group: int) -> Iterator[bytes]:
    """The images of one row group, in order; an empty one for a row without bytes. Raises `ValueError`."""
    try:
        source = import_pyarrow().ParquetFile(path, buffer_size=2**20)
        for batch in source.iter_batches(batch_size=32, row_groups=[group], columns=["image.bytes"]):
            for image in batch.column("image").field("bytes"):
                yield image.as_py() or b""
    except OSError as error:  # of pyarrow's decoders, too
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is damaged in row group {group} ({reason}); fetch it again") from None


class Segment(NamedTuple):
    """A row group to be packed."""

    path: Path
    """File to write: packed images one after the other, a JSON object about them, its CRC and its length."""
    samples: list[Sample]
    """Those of its rows that the split has, in order."""
    options: Options
    group: int
    """Number of the row group in its file."""
    first: int
    """Its first row in the file."""


class SpilledShard(NamedTuple):
    """A shard to be put together."""

    plan: ShardPlan
    places: list[tuple[str, int]]
    """Segment's file and position there of every sample."""


def pack_parquet(plan: Plan, numbers: list[int], workers: int) -> list[PackStats]:
    """Write the shards `numbers` of a split, reading every row group once. Raises `BlockingIOError` where another
    process packs the same split."""
    spill = plan.directory / SPILL.replace("*", plan.digest[:16])
    spill.mkdir(exist_ok=True)
    with open_locked(spill / "lock", wait=False):  # two processes would read everything twice
        segments = [
            (spill / f"segment-{number:06d}", *group) for number, group in enumerate(row_groups(plan.listing))
        ]
        left = [segment for segment in segments if not is_intact(segment[0])]
        jobs = (
            Segment(path, [(plan.key(row), plan.listing[row]) for row in rows.tolist()], plan.options, *group)
            for path, rows, *group in left
        )
        images, split = sum(len(rows) for _, rows, *_ in left), plan.directory.name
        read = run_jobs(pack_row_group, jobs, images, workers, f"reading {split}")

        # Where each row of the listing lies now: segment, position.
        segment_of, position = np.empty((2, len(plan.listing)), np.int64)
        for number, (_, rows, *_) in enumerate(segments):
            segment_of[rows], position[rows] = number, np.arange(len(rows))

        def spilled_shard(number: int) -> SpilledShard:
            rows = plan.order[slice(*plan.bounds(number))]
            files = [str(segments[segment][0]) for segment in segment_of[rows].tolist()]
            return SpilledShard(plan.shard(number), [*zip(files, position[rows].tolist(), strict=True)])

        images = sum(last - first for first, last in map(plan.bounds, numbers))
        shards = map(spilled_shard, numbers)
        written = run_jobs(write_spilled_shard, shards, images, workers, f"writing {split}")
    return [
        *(each._replace(images=0, bytes_written=0) for each in read),
        *(each._replace(bytes_read=0) for each in written),
    ]


def row_groups(listing: Listing) -> Iterator[tuple[np.ndarray, int, int]]:
    """Of every row group that has images of a listing: their rows in it (int64), number and first row in its file."""
    columns = listing.columns()
    for number, name in enumerate(listing.files):
        in_file = np.flatnonzero(columns["file"] == number)
        metadata = import_pyarrow().ParquetFile(Path(listing.root, name)).metadata
        first = 0
        for group in range(metadata.num_row_groups):
            last = first + metadata.row_group(group).num_rows
            rows = in_file[(first <= columns["offset"][in_file]) & (columns["offset"][in_file] < last)]
            if len(rows):
                yield rows, group, first
            first = last


def pack_row_group(work: Segment) -> PackStats:
    """Pack the images of a row group into its file."""
    samples = {sample[1].offset: sample for sample in work.samples}
    ends, sizes = [0], list[int]()
    notes: dict[str, list[str]] = {}
    with atomic_writer(work.path) as file:
        for row, raw in enumerate(read_row_group(Path(work.samples[0][1].file), work.group), work.first):
            if row not in samples:
                continue
            result, size = pack_sample(samples[row], work.options, raw)
            jpeg = result.jpeg if isinstance(result, Packed) else b""
            if isinstance(result, str) or result.found:
                notes[str(len(sizes))] = [result] if isinstance(result, str) else [result.found, result.done]
            file.write(jpeg)
            ends.append(ends[-1] + len(jpeg))
            sizes.append(size)
        about = json.dumps({"ends": ends, "sizes": sizes, "notes": notes}).encode()
        file.write(about + zlib.crc32(about).to_bytes(4, "little") + len(about).to_bytes(4, "little"))
    return PackStats(len(sizes), sum(sizes), ends[-1])


@functools.cache
def read_segment(path: str) -> tuple[np.ndarray, np.ndarray, dict[str, list[str]]]:
    """Of a segment's file: ends of its images after a 0, sizes of the raw ones (int64), and notes by position."""
    with Path(path).open("rb") as file:
        end = file.seek(-8, os.SEEK_END)
        crc, length = (int.from_bytes(file.read(4), "little") for _ in range(2))
        file.seek(end - length)
        content = file.read(length)
    if zlib.crc32(content) != crc:
        raise ValueError(f"{path} is damaged; remove it and pack again")
    about = json.loads(content)
    return np.array(about["ends"]), np.array(about["sizes"]), about["notes"]


def is_intact(path: Path) -> bool:
    """Whether a segment's file is there and complete."""
    try:
        read_segment.__wrapped__(str(path))
    except (OSError, ValueError):
        return False
    return True


def write_spilled_shard(work: SpilledShard) -> PackStats:
    """Put a shard together."""

    def read_packed(path: str, position: int) -> tuple[Packed | str, int]:
        ends, sizes, notes = read_segment(path)
        start, end = ends[position : position + 2].tolist()
        note = notes.get(str(position), ["", ""])
        if len(note) == 1:
            return note[0], int(sizes[position])
        return Packed(os.pread(open_file(path).descriptor, end - start, start), *note), int(sizes[position])

    packed = (read_packed(*place) for place in work.places)
    return write_packed(work.plan, zip(work.plan.samples, packed, strict=True))
