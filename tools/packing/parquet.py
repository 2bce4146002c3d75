"""Read and pack Hugging Face parquet files (`imagenet-1k`): columns `image: {bytes, path}` and `label`.

Labels are read first. Then, as parquet files are fast to read only in their own order and shards are shuffled, every
row group is packed in its order into a shard of the spill folder, and the packed images are copied from there to their
shards. Meanwhile this takes twice the size of the shards on disk; finished row groups survive a kill. `pyarrow` is an
optional dependency.
"""

import json
import os
import re
from array import array
from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from pipeline.errors import UserError
from pipeline.files import open_locked
from pipeline.shards import MAX_LABEL_DIGITS, ClassName
from tools.packing.images import Packed
from tools.packing.index import read_index
from tools.packing.listing import Listing, RawImageNet
from tools.packing.plan import Plan, Sample, ShardPlan
from tools.packing.pool import run_jobs
from tools.packing.writer import (
    SPILL,
    PackStats,
    find_unfinished,
    pack_sample,
    read_sidecars,
    write_packed,
    write_shard,
)

WNID = re.compile(r"(?<![a-z0-9])n\d{8}(?!\d)")
Notes = dict[str, tuple[str, str] | str]
COLUMNS = {"image.bytes", "image.path", "label"}


def import_pyarrow() -> ModuleType:
    """Import `pyarrow.parquet`. Raises `UserError` where it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "parquet files: expected pyarrow, got no such package; run pip install pyarrow"
        ) from None
    return pyarrow.parquet


def find_parquet(raw: Path) -> dict[str, list[Path]]:
    """Find the parquet files of each split, in `raw` or `raw/data`, by Hugging Face's names; test files, which have no
    labels, are skipped. Raises `UserError` unless all parts of one upload are there."""
    paths = sorted(raw.glob("*.parquet")) or sorted(raw.glob("data/*.parquet"))
    by_split = {split: [path for path in paths if path.name.startswith(split)] for split in ("train", "val")}
    for files in by_split.values():
        # A folder may also hold files of an earlier upload (push), with another hash or another number of parts.
        parts = [re.fullmatch(r"([^-]+)-(\d+)-of-(\d{1,6})(-\w+)?", path.stem) for path in files]
        found = [(part[1], int(part[2]), int(part[3])) for part in parts if part]
        name, _, total = found[0] if found else ("", 0, 0)
        if found and (len(found) != len(files) or sorted(found) != [(name, k, total) for k in range(total)]):
            raise UserError(
                f"{files[0]}: expected parts 0 to {total - 1} of {total} once each, got {len(files)} files; download "
                "what is missing, keep the files of one push"
            )
    return by_split


def read_parquet(raw: Path, files: dict[str, list[Path]]) -> RawImageNet:
    """List parquet files, reading labels and names only.

    Raises `UserError` for other columns, and for labels that are not class indexes.
    """
    parquet = import_pyarrow()
    splits: dict[str, Listing] = {}
    wnids: dict[int, set[str]] = {}
    words: list[str] = []
    for split, paths in files.items():
        listing = splits[split] = Listing(raw)
        for path in paths:
            try:
                source = parquet.ParquetFile(path)
                columns = {source.schema.column(k).path for k in range(len(source.schema))}
                if not columns >= COLUMNS:
                    raise UserError(f"lacks the columns {', '.join(sorted(COLUMNS - columns))}")
                kind = str(source.schema_arrow.field("image").type.field("bytes").type)
                if kind not in ("binary", "large_binary"):
                    raise UserError(f"image.bytes: expected binary, got {kind}")
                groups = range(source.num_row_groups)
                tables = [source.read_row_group(group, columns=["image.path", "label"]) for group in groups]
                metadata = json.loads((source.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
            except Exception as error:  # pyarrow raises several kinds over damaged bytes
                reason = " ".join(str(error).split())
                raise UserError(
                    f"{path}: not a data set of images and labels ({reason}); download it again"
                ) from None
            words = read_class_words(metadata) or words
            row = 0
            for table in tables:
                archive = listing.add_file(path)  # one a row group
                names = table.column("image").combine_chunks().field("path").to_pylist()
                for name, label in zip(names, table.column("label").to_pylist(), strict=True):
                    if not isinstance(label, int) or not 0 <= label < 10**MAX_LABEL_DIGITS:
                        raise UserError(
                            f"{path}: expected a class index in row {row}, got {label}; download it again"
                        )
                    listing.append(archive, name or f"{path.stem}_{row}", row, 0, label)
                    wnids.setdefault(label, set()).update(WNID.findall(name or ""))
                    row += 1
    splits = {split: listing for split, listing in splits.items() if files[split]}
    if "train" not in splits or not all(splits.values()):
        raise UserError(f"{raw}: no images in parquet files called train-*; download them again")
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


def pack_parquet(plan: Plan, numbers: list[int], workers: int) -> list[PackStats]:
    """Write the shards `numbers` of a split, reading every row group once. Raises `BlockingIOError` if another process
    packs the split."""
    files = plan.listing.files  # one a row group
    spill = replace(
        plan,
        directory=plan.directory / SPILL.replace("*", plan.digest[:16]),
        order=np.arange(len(plan.listing)),
        starts=np.searchsorted(plan.listing.columns()["file"], np.arange(len(files) + 1)),
    )
    spill.directory.mkdir(exist_ok=True)
    with open_locked(spill.directory / "lock", wait=False):  # a second process would read everything again
        todo, split = find_unfinished(spill), plan.directory.name
        read = run_jobs(
            pack_row_group, map(spill.shard, todo), spill.num_images(todo), workers, f"reading {split}", "img"
        )
        packed, notes = list_packed(spill)
        shards = map(replace(plan, listing=packed).shard, numbers)
        jobs = ((each, {key: notes[key] for key, _ in each.samples if key in notes}) for each in shards)
        sizes = plan.num_images(numbers)
        written = run_jobs(copy_shard, jobs, sizes, workers, f"writing {split}", "img")
    return [
        *(each._replace(images=0, bytes_written=0) for each in read),
        *(each._replace(bytes_read=0) for each in written),
    ]


def pack_row_group(plan: ShardPlan) -> PackStats:
    """Pack the images of a row group into its shard of the spill folder."""

    def iter_packed() -> Iterator[tuple[Sample, tuple[Packed | str, int]]]:
        samples = {image.offset: (key, image) for key, image in plan.samples}
        for row, raw in read_row_group(Path(plan.samples[0][1].file), min(samples)) if samples else ():
            if row in samples:
                yield samples[row], pack_sample(samples[row], plan.options, raw)

    return write_packed(plan, iter_packed())


def read_row_group(path: Path, row: int) -> Iterator[tuple[int, bytes]]:
    """Yield the rows of the row group that holds `row`, and their images, empty for a row without bytes. Raises
    `UserError`."""
    try:
        source = import_pyarrow().ParquetFile(path, buffer_size=2**20)
        ends = np.cumsum([source.metadata.row_group(k).num_rows for k in range(source.num_row_groups)])
        group = int(np.searchsorted(ends, row, side="right"))
        batches = source.iter_batches(batch_size=32, row_groups=[group], columns=["image.bytes"])
        images = (image for batch in batches for image in batch.column("image").field("bytes"))
        for number, image in enumerate(images, int(ends[group - 1]) if group else 0):
            yield number, image.as_py() or b""
    except OSError as error:  # pyarrow's decoders raise it, too
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: damaged near row {row} ({reason}); download it again") from None


def list_packed(spill: Plan) -> tuple[Listing, Notes]:
    """List the packed images in the shards of the spill folder, in the rows of the raw images, and the notes on them by
    key: what was found and done, or a reason to skip the image."""
    packed, notes = copy(spill.listing), Notes()
    packed.files = [os.path.relpath(spill.path(number), packed.root) for number in range(spill.num_shards)]
    packed.offset, packed.size = array("q", bytes(8 * len(packed))), array("q", bytes(8 * len(packed)))
    for number, note in read_sidecars(spill).items():
        notes |= {row["key"]: (row["found"], row["done"]) for row in note["repairs"]}
        notes |= {row["key"]: row["reason"] for row in note["skipped"]}
        samples = iter(read_index(spill.path(number).with_suffix(".idx")))
        for row in range(spill.starts[number], spill.starts[number + 1]):
            if not isinstance(notes.get(spill.key(row)), str):
                (_, packed.offset[row], packed.size[row], _), _ = next(samples)
    return packed, notes


def copy_shard(work: tuple[ShardPlan, Notes]) -> PackStats:
    """Write a shard of packed images."""
    plan, notes = work

    def copy_sample(sample: Sample) -> tuple[Packed | str, int]:
        key, image = sample
        note = notes.get(key, ("", ""))
        return (note if isinstance(note, str) else Packed(image.read(), *note)), image.size

    return write_shard(plan, copy_sample)
