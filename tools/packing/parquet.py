"""Read and pack Hugging Face parquet files (`imagenet-1k`): columns `image: {bytes, path}` and `label`.

Labels are read first. Then, as parquet files are fast to read only in their own order and shards are shuffled, every
row group is packed in its order into a shard of the spill folder, and the packed images are copied from there to their
shards. Meanwhile this takes twice the size of the shards on disk; finished row groups survive a kill. `pyarrow` is an
optional dependency.
"""

import json
import os
import re
import unicodedata
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
EMBED = "embed the images by datasets.table.embed_table_storage, or pack the folder that holds them"


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
    """Find the parquet files of each split: those called `train*`, and numbered ones in a folder called so, in `raw`,
    its only folder, `raw/data` or `raw/default`. Others, such as test files, which have no labels, are skipped. Raises
    `UserError` unless all parts of one upload are there."""
    paths, folders = list_folder(raw)
    places = [each for each in folders if len(folders) == 1 or each.name in ("data", "default")]
    for files, inner in map(list_folder, places):
        paths, folders = paths + files, folders + inner
    for folder in folders:
        if folder.name.startswith(("partial-train", "partial-val")):
            raise UserError(
                f"{folder}: expected all images, got Hugging Face's conversion of the first 5 GB; download the "
                f"original files into another folder, or rename this one {folder.name[8:]}"
            )
        paths += list_folder(folder)[0] if folder.name.startswith(("train", "val")) else []
    by_split = {}
    for split in ("train", "val"):
        name = re.compile(rf"(^|/){split}[^/]*(/\d[^/]*)?\.parquet\Z")
        by_split[split] = sorted({path for path in paths if name.search(str(path))})
        check_parts(split, by_split[split])
    return by_split


def list_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """List the parquet files and the folders in a folder, without hidden ones."""
    entries = [each for each in os.scandir(folder) if each.name[0] not in "._"]
    files = [Path(each.path) for each in entries if each.name.endswith(".parquet")]
    return files, [Path(each.path) for each in entries if each.is_dir()]


def check_parts(split: str, files: list[Path]) -> None:
    """Raise `UserError` unless files are all parts of one upload (push). A folder may also hold those of an earlier
    one, with another hash or another number of parts."""
    # What is before a number, the number, the number of parts.
    found = [re.findall(r"(?s)(.*?)(\d{1,6})?(?:-of-(\d{1,6})(?:-\w+)?)?\Z", path.stem)[0] for path in files]
    if not files or (len(files) == 1 and found[0][0] and not found[0][2]):
        return  # train_224.parquet is not part 224
    pushes = {(path.parent, name, total) for path, (name, _, total) in zip(files, found, strict=True)}
    numbers = {int(number or 0) for _, number, _ in found}
    if len(pushes) > 1 or len(numbers) < len(files):
        raise UserError(f"{files[0]}: expected one push, got also {files[-1]}; keep the files of one")
    if missing := set(range(int(found[0][2] or max(numbers) + 1))) - numbers:
        place = f"{files[0].parent}: part {min(missing)} of {split}"
        raise UserError(f"{place}: expected a file, got none; download it, or number the files from 0")


def read_parquet(raw: Path, files: dict[str, list[Path]]) -> RawImageNet:
    """List parquet files by names and labels alone; labels are class indexes or class names. Raises `UserError`."""
    splits: dict[str, Listing] = {}
    wnids: dict[int, set[str]] = {}
    words: list[str] = []
    content = {path: read_columns(path) for paths in files.values() for path in paths}
    columns = [table.column("label") for tables, _ in content.values() for table in tables]
    labels = {label for column in columns for label in column.to_pylist()}
    texts = {unicodedata.normalize("NFC", label) for label in labels if isinstance(label, str) and label}
    indexes = {text: index for index, text in enumerate(sorted(texts))}
    for split, paths in files.items():
        listing = splits[split] = Listing(raw)
        for path in paths:
            tables, metadata = content[path]
            words = read_class_words(metadata) or words
            row = 0
            for table in tables:
                archive = listing.add_file(path)  # one a row group
                names = table.column("image").combine_chunks().field("path").to_pylist()
                for name, label in zip(names, table.column("label").to_pylist(), strict=True):
                    index = None if indexes else label
                    if isinstance(label, str):
                        index = indexes.get(unicodedata.normalize("NFC", label))
                    if not isinstance(index, int) or not 0 <= index < 10**MAX_LABEL_DIGITS:
                        raise UserError(
                            f"row {row} of {path}: expected a class {'name' if indexes else 'index'}, got {label!r}; "
                            "label all rows by index or all by name"
                        )
                    listing.append(archive, name or f"{path.stem}_{row}", row, 0, index)
                    wnids.setdefault(index, set()).update(WNID.findall(name or ""))
                    row += 1
    splits = {split: listing for split, listing in splits.items() if files[split]}
    if empty := [split for split, listing in splits.items() if not listing]:
        raise UserError(f"{raw}: no images in parquet files called {empty[0]}*; download them again")
    classes = tuple(ClassName(text, text) for text in indexes) or infer_class_names(wnids, words)
    others = sorted({*raw.rglob("*.parquet")} - {path for paths in files.values() for path in paths})
    return RawImageNet("Hugging Face parquet files", classes, splits, others, sequential=True)


def read_columns(path: Path) -> tuple[list[Any], Any]:
    """Read names and labels of every row group, and Hugging Face's metadata. Raises `UserError`."""
    try:
        source = import_pyarrow().ParquetFile(path)
        schema, groups = source.schema_arrow, range(source.num_row_groups)
        columns = [source.schema.column(k).path for k in range(len(source.schema))]
        has_all = COLUMNS.issubset(columns)
        if not has_all or "binary" not in str(schema.field("image").type.field("bytes").type):
            got = ", ".join(f"{field.name}: {field.type}" for field in schema)
            raise UserError(
                f"{path}: expected image: struct<bytes: binary, path: string> and label, got {got}; rename or cast them"
            )
        tables = [source.read_row_group(group, columns=["image.path", "label"]) for group in groups]
        for table in tables:
            table.validate(full=True)
        chunks = [source.metadata.row_group(group).column(columns.index("image.bytes")) for group in groups]
        nulls = [chunk.statistics.null_count or 0 for chunk in chunks if chunk.statistics]
        has_none = 0 < sum(nulls) == source.metadata.num_rows
        if has_none and isinstance(found := next(read_row_group(path, 0))[1], str):
            raise UserError(f"row 0 of {path}: {found}; {EMBED}")
        return tables, json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    except UserError:
        raise
    except Exception as error:  # pyarrow raises several kinds over damaged bytes
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}: not a data set of images and labels ({reason}); download it again"
        ) from None


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
        rows = read_row_group(Path(plan.samples[0][1].file), min(samples)) if samples else ()
        for sample, raw in ((samples[row], raw) for row, raw in rows if row in samples):
            if isinstance(raw, bytes):
                yield sample, pack_sample(sample, plan.options, raw)
            elif plan.options.on_bad == "skip":
                yield sample, (raw, 0)
            else:
                row = f"row {sample[1].offset} of {sample[1].file}"
                raise UserError(f"{row}: {raw}; {EMBED}; --on-bad skip leaves such rows out")

    return write_packed(plan, iter_packed())


def read_row_group(path: Path, row: int) -> Iterator[tuple[int, bytes | str]]:
    """Yield the rows of the row group that holds `row`, and their images, or what is there in place of one. Raises
    `UserError`."""
    try:
        source = import_pyarrow().ParquetFile(path, buffer_size=2**20)
        ends = np.cumsum([source.metadata.row_group(k).num_rows for k in range(source.num_row_groups)])
        group = int(np.searchsorted(ends, row, side="right"))
        batches = source.iter_batches(batch_size=32, row_groups=[group], columns=["image"])
        images = (image.as_py() for batch in batches for image in batch.column("image"))
        for number, image in enumerate(images, int(ends[group - 1]) if group else 0):
            data, name = (image["bytes"], image["path"]) if image else (None, "")
            null = f"expected image bytes, got {f'only a path ({name})' if name else 'null'}"
            yield number, null if data is None else data
    except (OSError, ValueError) as error:  # pyarrow's decoders raise both
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
