"""Check shards against their manifest, sample by sample, and print statistics of them.

    python tools/make_shards.py verify SHARDS [--fast]
    python tools/make_shards.py stats SHARDS

All problems are printed, one per line. Checksums show which files are damaged; checks of samples show where, and find
shards that were packed wrongly.
"""

import hashlib
import os
import re
import time
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import simplejpeg

from pipeline.errors import DataError, UserError
from pipeline.files import read_json
from pipeline.shards import (
    NPY_HEADER,
    SAMPLE,
    SAMPLES,
    check_manifest,
    open_samples,
    open_shards,
    read_classes,
)
from tools.packing.decode import npy_bytes
from tools.packing.images import SIDE, find_fault
from tools.packing.index import SPLITS, Index, find_splits, read_index
from tools.packing.pool import check_workers, run_jobs, set_current_item
from tools.packing.tars import IMAGE_EXTENSIONS, index_sample, read_samples, sanitize_name
from tools.packing.writer import is_top_file
from train.cli import sanitize_message

MAX_PROBLEMS = 20
"""Problems printed per shard; the rest are counted."""
EMPTY_NPY = npy_bytes(np.zeros((SIDE, SIDE, 3), np.uint8))


@dataclass
class Report:
    """Findings of one shard, or of a whole split."""

    place: str
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Harmless anomalies."""
    keys: "array[int]" = field(default_factory=lambda: array("Q"))
    """A 64-bit hash of every sample's key, in the tar's order."""

    def format_lines(self) -> list[str]:
        """Format the lines to print, with a long list of problems truncated."""
        more = len(self.problems) - MAX_PROBLEMS
        lines = self.problems[:MAX_PROBLEMS] + [f"... and {more} more"] * (more > 0)
        return [f"{self.place}: {line}" for line in [*lines, *(f"note: {note}" for note in self.notes)]]


def verify(shards: Path, fast: bool = False, workers: int | None = None) -> None:
    """Check shards: files, checksums, indexes, labels, keys and every image.

    Args:
        shards: Folder written by pack or adopt.
        fast: Check manifests, sizes and indexes only, without reading the shards.
        workers: Processes; every core by default.
    """
    processes = check_workers(workers)
    started, images, tars = time.perf_counter(), 0, 0
    reports: list[Report] = []
    splits = find_splits(shards)
    for split in [name for name in SPLITS if (shards / name).is_dir()]:
        path = shards / split / "manifest.json"
        if split not in splits:
            reports.append(Report(split, ["no manifest.json: its pack is unfinished"]))
            continue
        try:
            manifest = read_json(path)
            check_manifest(manifest, path)
        except ValueError as error:
            reports.append(Report(split, [str(error)]))
            continue
        rows, whole = manifest["shards"], Report(split)
        try:
            samples = open_samples(path.parent, manifest)
        except (FileNotFoundError, UserError) as error:
            samples = np.zeros(0, SAMPLE)
            whole.problems.append(str(error))
        check = partial(
            check_shard, path.parent, manifest["num_classes"], get_store(manifest), list_skipped(manifest)
        )
        sizes = [row["bytes"] for row in rows]
        if fast:
            found = [check_files(path.parent, row)[0] for row in rows]
        else:
            tables = np.split(samples, np.cumsum([row["samples"] for row in rows])[:-1])
            jobs = zip(range(len(rows)), rows, tables, strict=True)
            found = run_jobs(check, jobs, sizes, processes, f"checking {split}")
        check_split(path.parent, manifest, found, whole)
        reports += [*found, whole]
        images, tars = images + manifest["num_samples"], tars + len(rows)
    others = sorted({path.name for path in shards.iterdir()} - set(SPLITS))
    notes = [f"{name} is not part of the shards" for name in others if not is_top_file(name)]
    reports.append(Report(str(shards), notes=notes))

    for line in (line for report in reports for line in report.format_lines()):
        print(sanitize_message(line))
    if num_problems := sum(len(report.problems) for report in reports):
        damaged = [report.place for report in reports if report.problems and report.place.endswith(".tar")]
        raise DataError(f"{shards}: {num_problems} problem(s), see above; {suggest_remedy(damaged)}")
    rate = "images not read" if fast else f"{images / (time.perf_counter() - started):.0f} images/s"
    print(f"{shards}: {images} images in {tars} shards, all valid ({rate})")


def suggest_remedy(damaged: list[str]) -> str:
    """Suggest what to do about the shards with problems."""
    if not damaged:
        return "do as they say, or pack or adopt again"
    more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
    return (
        f"remove {', '.join(damaged[:3])}{more} and run pack again, which writes those only; restore "
        "adopted shards at their source, remove the split and adopt it again; decode a pixel store again"
    )


def get_store(manifest: dict[str, Any]) -> str:
    """Return the store of a manifest: "crop256" (256x256 JPEGs), "pixels" (256x256 .npy), else JPEGs of any size."""
    return str(manifest.get("options", {}).get("store", ""))


def list_skipped(manifest: dict[str, Any]) -> set[tuple[Any, Any]]:
    """List shard and offset of the images that adopt left out of the indexes."""
    rows = [row for row in manifest.get("skipped", []) if isinstance(row, dict)]
    return {(str(row["shard"]), str(row["offset"])) for row in rows if {"shard", "offset"} <= row.keys()}


def check_split(directory: Path, manifest: dict[str, Any], reports: list[Report], split: Report) -> None:
    """Check a split as a whole: foreign files, classes, and duplicate keys; adds to its report `split`."""
    tars = [row["name"] for row in manifest["shards"]]
    expected = {"manifest.json", SAMPLES, *tars, *(str(Path(tar).with_suffix(".idx")) for tar in tars)}
    others = sorted({path.name for path in directory.iterdir()} - expected)
    split.notes += [f"{name} is not in the manifest" for name in others]
    if manifest["split"] != directory.name:
        split.problems.append(f"expected split {directory.name}, got {manifest['split']}")
    try:
        num_classes = len(read_classes(directory.parent))
        if num_classes != manifest["num_classes"]:
            split.problems.append(f"classes.json: expected {manifest['num_classes']}, got {num_classes}")
    except (FileNotFoundError, ValueError) as error:
        split.problems.append(str(error))
    keys = np.concatenate([np.array(report.keys, np.uint64) for report in reports])
    _, first = np.unique(keys, return_index=True)
    if repeats := len(keys) - len(first):
        position = np.setdiff1d(np.arange(len(keys)), first)[0]
        starts = np.cumsum([0, *(len(report.keys) for report in reports)])
        shard = int(np.searchsorted(starts, position, side="right")) - 1
        place = f"number {position - starts[shard] + 1} of {reports[shard].place}"
        # Other packers number samples from 0 in every shard; ours never does.
        findings = split.notes if get_store(manifest) == "adopted" else split.problems
        findings.append(f"{repeats} samples have a duplicate key, the first is {place}")


def check_files(directory: Path, row: dict[str, Any]) -> tuple[Report, Index]:
    """Check size and index of a shard, given its row of the manifest. Returns the report and the index."""
    path, index = directory / row["name"], Index()
    report = Report(f"{directory.name}/{path.name}")
    try:
        index = read_index(path.with_suffix(".idx"))
        if len(index) != row["samples"]:
            report.problems.append(f"expected {row['samples']} samples in its .idx, got {len(index)}")
    except ValueError:
        report.problems.append("expected a DALI index in its .idx; it is damaged")
    except OSError as error:
        report.problems.append(f"unreadable .idx ({error.strerror})")
    try:
        size = path.stat().st_size
    except OSError as error:
        report.problems.append(f"unreadable ({error.strerror})")
        return report, index
    if size != row["bytes"]:
        report.problems.append(f"expected {row['bytes']} bytes, got {size}")
    for number, entries in enumerate(index, start=2):
        if any(at % 512 or at < 512 or length < 1 or at + length > size for _, at, length, _ in entries):
            report.problems.append(f"line {number} of its .idx points outside of the data")
            break  # one is enough: the shard has to be made again
    return report, index


def check_shard(
    directory: Path,
    num_classes: int,
    store: str,
    skipped: set[tuple[str, str]],
    job: tuple[int, dict[str, Any], np.ndarray],
) -> Report:
    """Check a shard, given its number, its row of the manifest and its rows of `samples.npy`: also its checksum, and
    members, index, table, label and image of every sample."""
    shard, row, samples = job
    path = directory / row["name"]
    report, index = check_files(directory, row)
    if not path.is_file():
        return report
    problems, mismatches = report.problems, dict[str, str]()
    extensions = ("npy",) if store == "pixels" else IMAGE_EXTENSIONS
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != row.get("sha256"):
            problems.append("SHA-256 differs from the manifest's")
        try:
            for key, members in read_samples(file):
                number = len(report.keys)
                hashed = hashlib.blake2b(key.encode(errors="replace"), digest_size=8).digest()
                try:
                    entries, image, label = index_sample(file, key, members, extensions)
                except ValueError as error:
                    report.keys.append(int.from_bytes(hashed))
                    problems.append(str(error))
                    continue
                if (path.name, str(image.offset)) in skipped:
                    continue
                report.keys.append(int.from_bytes(hashed))
                place = f"{sanitize_name(image.name)} at byte {image.offset}"
                set_current_item(f"{place} of {path}")
                if number < len(index) and sorted(index[number]) != sorted(entries):
                    mismatches.setdefault("index", f"line {number + 2} of its .idx does not match {place}")
                if number < len(samples) and samples[number].tolist() != (shard, *image[1:], label):
                    where = f"row {number} of its part of {SAMPLES} does not match {place}"
                    mismatches.setdefault("table", f"{where}; remove that file and run make_shards.py index")
                if label >= num_classes:
                    problems.append(f"{place}: expected a label below {num_classes}, got {label}")
                if fault := find_image_fault(os.pread(file.fileno(), image.size, image.offset), store):
                    problems.append(f"{place}: {fault}")
        except ValueError as error:
            problems.append(str(error))
        problems += mismatches.values()
        if len(report.keys) != row["samples"]:
            problems.append(f"expected {row['samples']} samples, got {len(report.keys)} readable ones")
    return report


def find_image_fault(content: bytes, store: str) -> str:
    """Find the reason why an image does not fit the split's store; empty if it does."""
    if store == "pixels":
        fits = len(content) == len(EMPTY_NPY) and content.startswith(EMPTY_NPY[:NPY_HEADER])
        return "" if fits else "expected a .npy of uint8 (256, 256, 3)"
    if fault := find_fault(content):
        return fault
    height, width, *_ = simplejpeg.decode_jpeg_header(content)
    if store == "crop256" and (height, width) != (SIDE, SIDE):
        return f"expected {SIDE}x{SIDE}, got {width}x{height}"
    return ""


def stats(shards: Path) -> None:
    """Print statistics of the shards.

    Args:
        shards: Folder written by pack or adopt.
    """
    for split in find_splits(shards):
        manifest = read_json(shards / split / "manifest.json")
        print(f"{shards / split}")
        for name, value in describe_split(shards, split, manifest):
            print(sanitize_message(f"  {name:<20}{value}"))


def describe_split(shards: Path, split: str, manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the table of one split. Raises `FileNotFoundError` or `UserError` for damaged shards."""
    shard_set = open_shards(shards, split)
    samples, tars = shard_set.samples, shard_set.tars
    per_shard = np.bincount(samples["shard"], minlength=len(tars))
    per_class = np.bincount(samples["label"], minlength=len(shard_set.classes)).tolist()
    repairs = [str(row.get("found")) for row in manifest.get("repairs", ()) if isinstance(row, dict)]
    anomalies = Counter(re.sub(r"\b\d+\b", "N", kind) for found in repairs for kind in found.split("; "))
    tar_bytes = [Path(tar).stat().st_size for tar in tars]
    return [
        ("samples", f"{shard_set.num_samples:,}"),
        ("classes", f"{len(per_class)}, {per_class.count(0)} without an image"),
        ("images per class", summarize(per_class)),
        ("shards", str(len(tar_bytes))),
        ("samples per shard", summarize(per_shard.tolist())),
        ("bytes", f"{sum(tar_bytes):,}"),
        ("bytes per shard", summarize(tar_bytes)),
        ("bytes per image", summarize(samples["size"].tolist())),
        ("repaired or noted", str(len(manifest.get("repairs", ())))),
        *((f"  {count}", kind) for kind, count in anomalies.most_common()),
        ("skipped", str(len(manifest.get("skipped", ())))),
        ("source", str(manifest.get("source", "unknown"))),
        *(
            (name, ", ".join(f"{key} {value}" for key, value in manifest.get(name, {}).items()) or "unknown")
            for name in ("options", "versions")
        ),
    ]


def summarize(values: Sequence[int]) -> str:
    """Format minimum, median, mean and maximum."""
    return f"min {min(values):,}, median {median(values):,.0f}, mean {mean(values):,.0f}, max {max(values):,}"
