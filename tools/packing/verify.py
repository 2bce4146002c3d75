"""Check shards against their manifest, sample by sample, and print statistics of them.

    python tools/make_shards.py verify SHARDS [--fast]
    python tools/make_shards.py stats SHARDS

All problems are printed, one per line. A checksum shows that a file was damaged; the checks on samples show where, and
find shards that were written wrong.
"""

import hashlib
import os
import random
import re
import time
from array import array
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from pipeline.errors import DataError
from pipeline.files import read_json
from pipeline.shards import check_manifest, open_shards, read_classes, read_index
from tools.packing.images import SIDE, find_fault
from tools.packing.jpeg import read_jpeg
from tools.packing.pool import check_workers, map_shards, set_current_item
from tools.packing.tars import index_sample, read_samples, sanitize_name
from tools.packing.writer import is_top_file
from train.cli import sanitize_message

SPLITS = ("train", "val")
MAX_PROBLEMS = 20
"""Problems printed per kind and shard; the rest are counted."""
SAMPLED_IMAGES = 500
"""Images of which `stats` reads the size."""
READERS = 16
"""Threads of `stats`: small reads wait for the disk."""


class Job(NamedTuple):
    """One shard to be checked."""

    path: Path
    row: dict[str, Any]
    """Its row in the manifest."""
    num_classes: int
    store: str
    """The manifest's: "crop256" (256x256 JPEGs), else JPEGs of any size."""
    skipped: frozenset[tuple[str, int]]
    """Shard and offset of the images that adopt left out of the index."""
    fast: bool


@dataclass
class Report:
    """EvalStats of one shard, or of a whole split."""

    place: str
    problems: dict[str, list[str]] = field(default_factory=dict)
    """By kind."""
    notes: list[str] = field(default_factory=list)
    """Harmless anomalies."""
    keys: "array[int]" = field(default_factory=lambda: array("Q"))
    """A 64-bit hash of every sample's key, in the tar's order."""
    labels: Counter[int] = field(default_factory=Counter)
    """Images by class."""

    def add(self, kind: str, problem: str) -> None:
        """Add a problem."""
        self.problems.setdefault(kind, []).append(problem)

    def format_lines(self) -> list[str]:
        """Format the lines to print, with long lists truncated."""
        lines = []
        for found in (*self.problems.values(), [f"note: {note}" for note in self.notes]):
            more = len(found) - MAX_PROBLEMS
            lines += found[:MAX_PROBLEMS] + ([f"... and {more} more"] if more > 0 else [])
        return [f"{self.place}: {line}" for line in lines]


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
    present = find_splits(shards)
    for split in SPLITS:
        if split not in present and (shards / split).is_dir():
            reports.append(Report(split, {"manifest": ["no manifest.json: its pack is unfinished"]}))
    for split in present:
        path = shards / split / "manifest.json"
        try:
            manifest = read_json(path)
            check_manifest(manifest, path)
        except ValueError as error:
            reports.append(Report(split, {"manifest": [str(error)]}))
            continue
        jobs = list_jobs(path.parent, manifest, fast)
        sizes = [int(job.row["bytes"]) for job in jobs]
        shard_reports = map_shards(check_shard, jobs, sizes, 1 if fast else processes, f"checking {split}")
        reports += [*shard_reports, check_split(path.parent, manifest, jobs, shard_reports)]
        images, tars = images + manifest["num_samples"], tars + len(jobs)
    others = sorted({path.name for path in shards.iterdir()} - set(SPLITS))
    notes = [f"{name} is not part of the shards" for name in others if not is_top_file(name)]
    reports.append(Report(str(shards), notes=notes))

    for line in (line for report in reports for line in report.format_lines()):
        print(sanitize_message(line))
    if num_problems := sum(len(problems) for report in reports for problems in report.problems.values()):
        damaged = [report.place for report in reports if report.problems and report.place.endswith(".tar")]
        raise DataError(f"{shards}: {num_problems} problem(s), see above; {suggest_remedy(damaged)}")
    rate = "images not read" if fast else f"{images / (time.perf_counter() - started):.0f} images/s"
    print(f"{shards}: {images} images in {tars} shards, all valid ({rate})")


def suggest_remedy(damaged: list[str]) -> str:
    """Suggest what to do about the shards with problems."""
    if not damaged:
        return "pack or adopt again"
    more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
    return (
        f"remove {', '.join(damaged[:3])}{more} and run pack again, which writes those only; restore "
        "adopted shards at their source, remove the split and adopt it again"
    )


def find_splits(shards: Path) -> list[str]:
    """Find the splits with a manifest. Raises `FileNotFoundError` or `ValueError`."""
    if not shards.is_dir():
        raise FileNotFoundError(f"{shards}: not a directory; give the folder that pack or adopt wrote")
    splits = [split for split in SPLITS if (shards / split / "manifest.json").is_file()]
    if not splits:
        raise ValueError(
            f"{shards}: expected train/manifest.json or val/manifest.json, got neither; pack or adopt first"
        )
    return splits


def list_jobs(directory: Path, manifest: dict[str, Any], fast: bool) -> list[Job]:
    """List one job per shard. Tolerates a manifest without the fields that `check_manifest` does not require."""
    store = str(manifest.get("options", {}).get("store", ""))
    rows = [row for row in manifest.get("skipped", []) if isinstance(row, dict)]
    skipped = frozenset(
        (str(row.get("shard")), int(row["offset"])) for row in rows if type(row.get("offset")) is int
    )
    classes = manifest["num_classes"]
    return [Job(directory / row["name"], row, classes, store, skipped, fast) for row in manifest["shards"]]


def check_split(directory: Path, manifest: dict[str, Any], jobs: list[Job], reports: list[Report]) -> Report:
    """Check a split as a whole: foreign files, classes, and duplicate keys."""
    split = Report(directory.name)
    expected = {
        "manifest.json",
        *(path.name for job in jobs for path in (job.path, job.path.with_suffix(".idx"))),
    }
    others = sorted({path.name for path in directory.iterdir()} - expected)
    split.notes += [f"{name} is not in the manifest" for name in others]
    if manifest["split"] != directory.name:
        split.add("manifest", f"expected split {directory.name}, got {manifest['split']}")
    try:
        num_classes = len(read_classes(directory.parent))
        if num_classes != manifest["num_classes"]:
            split.add(
                "classes",
                f"classes.json: expected {manifest['num_classes']}, got {num_classes}",
            )
    except (FileNotFoundError, ValueError) as error:
        split.add("classes", str(error))
    if jobs[0].fast:
        return split
    for report in reports:
        split.labels.update(report.labels)
    if empty := [label for label in range(manifest["num_classes"]) if not split.labels[label]]:
        split.notes.append(
            f"{len(empty)} of {manifest['num_classes']} classes have no image, the first is {empty[0]}"
        )
    keys = np.concatenate([np.array(report.keys, np.uint64) for report in reports])
    order = np.argsort(keys, kind="stable")
    repeats = np.sort(order[1:][keys[order][1:] == keys[order][:-1]])
    if len(repeats):
        starts = np.cumsum([0, *(len(report.keys) for report in reports)])
        shard = int(np.searchsorted(starts, repeats[0], side="right")) - 1
        place = f"number {repeats[0] - starts[shard] + 1} of {reports[shard].place}"
        problem = f"{len(repeats)} samples have a duplicate key, the first is {place}"
        # Other packers number samples from 0 in every shard; ours never does.
        split.notes.append(problem) if jobs[0].store == "adopted" else split.add("keys", problem)
    return split


def check_shard(job: Job) -> Report:
    """Check one shard and its index. Problems are reported, not raised."""
    report = Report(f"{job.path.parent.name}/{job.path.name}")
    index = None
    try:
        index = read_index(job.path.with_suffix(".idx"))
        if len(index) != int(job.row["samples"]):
            report.add("index", f"expected {job.row['samples']} samples in its .idx, got {len(index)}")
    except ValueError:
        report.add("index", "expected a DALI index in its .idx; it is damaged")
    except OSError as error:
        report.add("index", f"unreadable .idx ({error.strerror})")
    try:
        size = job.path.stat().st_size
        if size != int(job.row["bytes"]):
            report.add("size", f"expected {job.row['bytes']} bytes, got {size}")
        for number, entries in enumerate(index or (), start=2):
            if any(at % 512 or at < 512 or length < 1 or at + length > size for _, at, length, _ in entries):
                report.add("index", f"line {number} of its .idx points outside of the data")
        if not job.fast:
            check_samples(job, index, report)
    except OSError as error:
        report.add("size", f"unreadable ({error.strerror})")
    return report


def check_samples(job: Job, index: list[list[tuple[str, int, int, str]]] | None, report: Report) -> None:
    """Check a tar's checksum, members, index, labels and images; adds to `report`."""
    with job.path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != job.row.get("sha256"):
            report.add("checksum", "SHA-256 differs from the manifest's")
        try:
            for key, members in read_samples(file):
                number = len(report.keys)
                hashed = hashlib.blake2b(key.encode(errors="replace"), digest_size=8).digest()
                report.keys.append(int.from_bytes(hashed))
                try:
                    entries, image, label = index_sample(file, key, members)
                except ValueError as error:
                    report.add("sample", str(error))
                    continue
                if (job.path.name, image.offset) in job.skipped:
                    report.keys.pop()
                    continue
                place = f"{sanitize_name(image.name)} at byte {image.offset}"
                set_current_item(f"{place} of {job.path}")
                if index is not None and number < len(index) and sorted(index[number]) != sorted(entries):
                    report.add("index", f"line {number + 2} of its .idx does not match {place}")
                if label < job.num_classes:
                    report.labels[label] += 1
                else:
                    report.add("label", f"{place}: expected a label below {job.num_classes}, got {label}")
                if fault := find_image_fault(os.pread(file.fileno(), image.size, image.offset), job.store):
                    report.add("image", f"{place}: {fault}")
        except ValueError as error:
            report.add("tar", str(error))
        if len(report.keys) != int(job.row["samples"]):
            report.add("tar", f"expected {job.row['samples']} samples, got {len(report.keys)} readable ones")


def find_image_fault(content: bytes, store: str) -> str:
    """Find the reason why an image does not fit the split's store; empty if it does."""
    if fault := find_fault(content):
        return fault
    jpeg = read_jpeg(content)
    if store == "crop256" and (jpeg.width, jpeg.height) != (SIDE, SIDE):
        return f"expected {SIDE}x{SIDE}, got {jpeg.width}x{jpeg.height}"
    return ""


def stats(shards: Path) -> None:
    """Print statistics of the shards. Labels are read from the shards, a few bytes each by the index.

    Args:
        shards: Folder written by pack or adopt.
    """
    for split in find_splits(shards):
        manifest = read_json(shards / split / "manifest.json")
        print(f"{shards / split}")
        for name, value in describe_split(shards, split, manifest):
            print(sanitize_message(f"  {name:<20}{value}"))


def describe_split(shards: Path, split: str, manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """Compute a split's statistics as (name, value). Raises `DataError` for a damaged shard or index."""
    shard_set = open_shards(shards, split)
    with ThreadPoolExecutor(READERS) as pool:
        pending = pool.map(read_labels, shard_set.tars, shard_set.indexes)
        columns = list(tqdm(pending, split, len(shard_set.tars), disable=None))
    labels = np.concatenate([label for label, _ in columns])
    spans = [
        (tar, *span)
        for tar, (_, images) in zip(shard_set.tars, columns, strict=True)
        for span in images.tolist()
    ]
    shapes = [read_shape(*span) for span in random.Random(0).sample(spans, min(SAMPLED_IMAGES, len(spans)))]
    per_class = np.bincount(labels, minlength=len(shard_set.classes)).tolist()
    anomalies = Counter(
        re.sub(r"\b\d+\b", "N", kind)
        for row in manifest.get("repairs", ())
        if isinstance(row, dict)
        for kind in str(row.get("found")).split("; ")
    )
    records = {name: manifest.get(name) or {} for name in ("options", "versions")}
    sizes = [Path(tar).stat().st_size for tar in shard_set.tars]
    return [
        ("samples", f"{shard_set.num_samples:,}"),
        ("classes", f"{len(per_class)}, {per_class.count(0)} without an image"),
        ("images per class", summarize(per_class)),
        ("shards", str(len(sizes))),
        ("samples per shard", summarize([len(label) for label, _ in columns])),
        ("bytes", f"{sum(sizes):,}"),
        ("bytes per shard", summarize(sizes)),
        ("bytes per image", summarize([size for _, _, size in spans])),
        ("width", f"{summarize([width for width, _ in shapes])}, of {len(shapes)} images"),
        ("height", summarize([height for _, height in shapes])),
        ("repaired or noted", str(len(manifest.get("repairs", ())))),
        *((f"  {count}", kind) for kind, count in anomalies.most_common()),
        ("skipped", str(len(manifest.get("skipped", ())))),
        ("source", str(manifest.get("source", "unknown"))),
        *(
            (name, ", ".join(f"{key} {value}" for key, value in values.items()) or "unknown")
            for name, values in records.items()
        ),
    ]


def summarize(values: Sequence[int]) -> str:
    """Format minimum, median, mean and maximum."""
    if not values:
        return "none"
    return f"min {min(values):,}, median {median(values):,.0f}, mean {mean(values):,.0f}, max {max(values):,}"


def read_shape(tar: str, offset: int, size: int) -> tuple[int, int]:
    """Read width and height of an image in a shard. Raises `DataError`."""
    with Path(tar).open("rb") as file:
        jpeg = read_jpeg(os.pread(file.fileno(), size, offset))
    if not jpeg.width:
        raise DataError(f"{tar}: no image at byte {offset}; run make_shards.py verify")
    return jpeg.width, jpeg.height


def read_labels(tar: str, index: str) -> tuple[np.ndarray, np.ndarray]:
    """Read a shard's labels, int64 (n,), and offsets and sizes of its images, int64 (n, 2). Raises `DataError`."""
    labels, images = [], []
    with Path(tar).open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no readahead of the whole shard
        end = os.fstat(file.fileno()).st_size
        try:
            for sample in read_index(Path(index)):
                places = {extension: (offset, size) for extension, offset, size, _ in sample}
                offset, size = places["cls"]
                labels.append(int(os.pread(file.fileno(), min(size, end), offset)))
                images.append(places["jpg"])
                if sum(places["jpg"]) > end:
                    raise ValueError("image past the end of the tar")
        except (KeyError, ValueError):
            raise DataError(f"{tar}: damaged, or its index is; run make_shards.py verify") from None
    return np.array(labels, np.int64), np.array(images, np.int64)
