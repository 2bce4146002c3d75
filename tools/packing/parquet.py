"""Read and pack Hugging Face parquet files (`imagenet-1k`): columns `image: {bytes, path}` and `label`.

Labels are read first, images by row group: parquet files are fast to read in their own order only, and shards are
shuffled. So every row group is packed into its own segment file in the split's folder, and shards are assembled from
those by offset. While it runs this takes the size of the shards twice on disk; finished segments survive a kill.
`pyarrow` is an optional dependency.
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
    """Import `pyarrow.parquet`. Raises `ValueError` where it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            "parquet files: expected pyarrow, got no such package; run pip install pyarrow"
        ) from None
    return pyarrow.parquet


def find_parquet(raw: Path) -> dict[str, list[Path]]:
    """Find the parquet files of each split, in `raw` or `raw/data`, by Hugging Face's names; test files, which have no
    labels, are skipped.

    Raises `FileNotFoundError` for a missing part, `ValueError` for a duplicate.
    """
    paths = sorted(raw.glob("*.parquet")) or sorted(raw.glob("data/*.parquet"))
    parts: dict[tuple[str, str], dict[int, Path]] = {}
    for path in paths:
        if match := re.match(r"(.*)-(\d+)-of-(\d{1,6})(?!\d)", path.name):
            first = parts.setdefault((match[1], match[3]), {}).setdefault(int(match[2]), path)
            if first != path:  # the Hub keeps files of earlier pushes, under another hash
                raise ValueError(f"{path}: the same part as {first.name}; keep the files of one push")
    for (name, number), there in parts.items():
        if missing := sorted(set(range(int(number))) - set(there)):
            raise FileNotFoundError(
                f"{raw}: lacks {name}-{missing[0]:0{len(number)}}-of-{number}; download it"
            )
    by_split = {split: [path for path in paths if path.name.startswith(split)] for split in ("train", "val")}
    for files in by_split.values():
        sets = {re.sub(r"[-_]?\d+(-of-\d+)?(-\w+)?$", r"\1", path.stem): path for path in files}
        if len(sets) > 1:
            first, second, *_ = sorted(sets.values())
            raise ValueError(f"{first}: of another set or push than {second.name}; keep the files of one")
    return by_split


def read_parquet(raw: Path, files: dict[str, list[Path]]) -> RawImageNet:
    """List parquet files, reading labels and names only.

    Raises `ValueError` for other columns, and for labels that are not class indexes.
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
                    raise ValueError(f"lacks the columns {', '.join(sorted(COLUMNS - columns))}")
                image = source.schema_arrow.field("image").type
                if (kind := str(image.field("bytes").type)) not in ("binary", "large_binary"):
                    raise ValueError(f"image.bytes: expected binary, got {kind}")
                table = source.read(columns=["image.path", "label"])
                metadata = json.loads((source.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
            except Exception as error:  # pyarrow raises several kinds over damaged bytes
                reason = " ".join(str(error).split())
                raise ValueError(
                    f"{path}: not a data set of images and labels ({reason}); download it again"
                ) from None
            words = read_class_words(metadata) or words
            names = table.column("image").combine_chunks().field("path").to_pylist()
            for row, (name, label) in enumerate(zip(names, table.column("label").to_pylist(), strict=True)):
                if not isinstance(label, int) or not 0 <= label < 10**MAX_LABEL_DIGITS:
                    raise ValueError(
                        f"{path}: expected a class index in row {row}, got {label}; download it again"
                    )
                listing.append(archive, name or f"{path.stem}_{row}", row, 0, label)
                wnids.setdefault(label, set()).update(WNID.findall(name or ""))
    if "train" not in splits or not all(splits.values()):
        raise ValueError(f"{raw}: no images in parquet files called train-*; download them again")
    return RawImageNet("Hugging Face parquet files", infer_class_names(wnids, words), splits, sequential=True)


def read_class_words(metadata: Any) -> list[str]:
    """Read the class names from Hugging Face's metadata; empty if it has none."""
    for name in ("info", "features", "label", "names"):
        metadata = metadata.get(name) if isinstance(metadata, dict) else None
    return [str(each) for each in metadata] if isinstance(metadata, list) else []


def infer_class_names(wnids: dict[int, set[str]], words: list[str]) -> tuple[ClassName, ...]:
    """Name the classes by the wnid that all file names of a label share, if that gives sorted wnids, else by label."""
    number = max(max(wnids) + 1, len(words))
    texts = words if len(words) == number else [f"class {label}" for label in range(number)]
    wnids_by_label = [wnids.get(label, set()) for label in range(number)]
    if all(len(names) == 1 for names in wnids_by_label):
        names = [next(iter(names)) for names in wnids_by_label]
        if names == sorted(set(names)):
            return tuple(ClassName(wnid, text) for wnid, text in zip(names, texts, strict=True))
    return tuple(ClassName(f"{label:06d}", text) for label, text in enumerate(texts))


def read_row_group(path: Path, group: int) -> Iterator[bytes]:
    """Yield the images of one row group, empty for a row without bytes. Raises `ValueError`."""
    try:
        source = import_pyarrow().ParquetFile(path, buffer_size=2**20)
        for batch in source.iter_batches(batch_size=32, row_groups=[group], columns=["image.bytes"]):
            for image in batch.column("image").field("bytes"):
                yield image.as_py() or b""
    except OSError as error:  # pyarrow's decoders raise it, too
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: damaged in row group {group} ({reason}); download it again") from None


class Segment(NamedTuple):
    """A row group to be packed."""

    path: Path
    """Segment file to write: packed images, a JSON trailer, its CRC and its length."""
    samples: list[Sample]
    """Its rows in the split, in order."""
    options: Options
    group: int
    """Number of the row group in its file."""
    first: int
    """Its first row in the file."""


class SpilledShard(NamedTuple):
    """A shard to be assembled."""

    plan: ShardPlan
    places: list[tuple[str, int]]
    """Segment file and position of every sample."""


def pack_parquet(plan: Plan, numbers: list[int], workers: int) -> list[PackStats]:
    """Write the shards `numbers` of a split, reading every row group once. Raises `BlockingIOError` if another process
    packs the split."""
    spill = plan.directory / SPILL.replace("*", plan.digest[:16])
    spill.mkdir(exist_ok=True)
    with open_locked(spill / "lock", wait=False):  # a second process would read everything again
        segments = [
            (spill / f"segment-{number:06d}", *group)
            for number, group in enumerate(list_row_groups(plan.listing))
        ]
        unfinished = [segment for segment in segments if not is_intact(segment[0])]
        jobs = (
            Segment(path, [(plan.key(row), plan.listing[row]) for row in rows.tolist()], plan.options, *group)
            for path, rows, *group in unfinished
        )
        images, split = sum(len(rows) for _, rows, *_ in unfinished), plan.directory.name
        read = run_jobs(pack_row_group, jobs, images, workers, f"reading {split}")

        # Segment and position of each row of the listing.
        segment_of, position = np.empty((2, len(plan.listing)), np.int64)
        for number, (_, rows, *_) in enumerate(segments):
            segment_of[rows], position[rows] = number, np.arange(len(rows))

        def plan_spilled_shard(number: int) -> SpilledShard:
            rows = plan.order[slice(*plan.bounds(number))]
            files = [str(segments[segment][0]) for segment in segment_of[rows].tolist()]
            return SpilledShard(plan.shard(number), [*zip(files, position[rows].tolist(), strict=True)])

        images = sum(last - first for first, last in map(plan.bounds, numbers))
        shards = map(plan_spilled_shard, numbers)
        written = run_jobs(write_spilled_shard, shards, images, workers, f"writing {split}")
    return [
        *(each._replace(images=0, bytes_written=0) for each in read),
        *(each._replace(bytes_read=0) for each in written),
    ]


def list_row_groups(listing: Listing) -> Iterator[tuple[np.ndarray, int, int]]:
    """Yield, per row group with images of a listing, their rows (int64), its number and its first row in the file."""
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
    """Pack the images of a row group into its segment file."""
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
        trailer = json.dumps({"ends": ends, "sizes": sizes, "notes": notes}).encode()
        file.write(trailer + zlib.crc32(trailer).to_bytes(4, "little") + len(trailer).to_bytes(4, "little"))
    return PackStats(len(sizes), sum(sizes), ends[-1])


@functools.cache
def read_segment(path: str) -> tuple[np.ndarray, np.ndarray, dict[str, list[str]]]:
    """Read a segment's trailer: image boundaries, from 0, sizes of the raw files (int64), and notes by position."""
    with Path(path).open("rb") as file:
        end = file.seek(-8, os.SEEK_END)
        crc, length = (int.from_bytes(file.read(4), "little") for _ in range(2))
        file.seek(end - length)
        content = file.read(length)
    if zlib.crc32(content) != crc:
        raise ValueError(f"{path}: damaged; remove it and pack again")
    trailer = json.loads(content)
    return np.array(trailer["ends"]), np.array(trailer["sizes"]), trailer["notes"]


def is_intact(path: Path) -> bool:
    """Return True if a segment file exists and is complete."""
    try:
        read_segment.__wrapped__(str(path))
    except (OSError, ValueError):
        return False
    return True


def write_spilled_shard(work: SpilledShard) -> PackStats:
    """Assemble a shard from segments."""

    def read_packed(path: str, position: int) -> tuple[Packed | str, int]:
        ends, sizes, notes = read_segment(path)
        start, end = ends[position : position + 2].tolist()
        note = notes.get(str(position), ["", ""])
        if len(note) == 1:
            return note[0], int(sizes[position])
        return Packed(os.pread(open_file(path).descriptor, end - start, start), *note), int(sizes[position])

    packed = (read_packed(*place) for place in work.places)
    return write_packed(work.plan, zip(work.plan.samples, packed, strict=True))
