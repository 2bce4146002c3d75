"""What `verify` does to one shard, in a process of its own: read it once, and report all that is wrong with it."""

from array import array
from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.shards import read_index
from tools.packing.images import SIDE, find_fault
from tools.packing.jpeg import read_jpeg
from tools.packing.pool import name_work
from tools.packing.tars import HashedFile, plain, read_samples, sample_entries

MAX_TOLD = 20
"""Problems of one kind in one shard that are told; the rest are counted."""


class Job(NamedTuple):
    """One shard to be checked."""

    path: Path
    row: dict[str, Any]
    """Its row in the manifest."""
    num_classes: int
    store: str
    """What the split keeps: "crop256" (256x256 JPEGs), else JPEGs of any size."""
    skipped: frozenset[tuple[str, int]]
    """Shard and offset of the images that adoption left out of the index."""
    fast: bool


@dataclass
class Report:
    """What was found in one shard, or in a split as a whole."""

    place: str
    problems: dict[str, list[str]] = field(default_factory=dict)
    """By kind."""
    notes: list[str] = field(default_factory=list)
    """What is odd but bearable."""
    keys: "array[int]" = field(default_factory=lambda: array("Q"))
    """A 64-bit hash of every sample's key, in the tar's order."""
    labels: Counter[int] = field(default_factory=Counter)
    """Images by class."""
    repeats: int = 0
    """Images that have the class of the one before."""

    def problem(self, kind: str, sentence: str) -> None:
        """Note something wrong."""
        self.problems.setdefault(kind, []).append(sentence)

    def lines(self) -> list[str]:
        """What is told, with long lists cut."""
        told = []
        for found in (*self.problems.values(), [f"note: {note}" for note in self.notes]):
            told += found[:MAX_TOLD] + ([f"... and {len(found) - MAX_TOLD} more"] if len(found) > MAX_TOLD else [])
        return [f"{self.place}: {line}" for line in told]


def check_shard(job: Job) -> Report:
    """Check one shard and its index; raises nothing for what is wrong with them."""
    report = Report(f"{job.path.parent.name}/{job.path.name}")
    index = None
    try:
        index = read_index(job.path.with_suffix(".idx"))
        if len(index) != int(job.row["samples"]):
            report.problem("index", f"its .idx lists {len(index)} samples, the manifest {job.row['samples']}")
    except ValueError:
        report.problem("index", "its .idx is damaged or no DALI index")
    except OSError as error:
        report.problem("index", f"its .idx cannot be read ({error.strerror})")
    try:
        size = job.path.stat().st_size
        if size != int(job.row["bytes"]):
            report.problem("size", f"has {size} bytes, the manifest says {job.row['bytes']}")
        for number, entries in enumerate(index or (), start=2):
            if any(at % 512 or at < 512 or length < 1 or at + length > size for _, at, length, _ in entries):
                report.problem("index", f"line {number} of its .idx points at no data of the tar")
        if not job.fast:
            read_through(job, index, report)
    except OSError as error:
        report.problem("size", f"cannot be read ({error.strerror})")
    return report


def read_through(job: Job, index: list[list[tuple[str, int, int, str]]] | None, report: Report) -> None:
    """Read a tar once: checksum, members, index, labels and images; adds to `report`."""
    with job.path.open("rb") as file:
        hashed = HashedFile(file)
        try:
            previous = -1
            for key, members in read_samples(hashed):
                number, hashed_key = len(report.keys), blake2b(key.encode(errors="replace"), digest_size=8).digest()
                report.keys.append(int.from_bytes(hashed_key))
                try:
                    entries, image, label = sample_entries(key, members)
                except ValueError as error:
                    report.problem("sample", str(error))
                    continue
                if (job.path.name, image.offset) in job.skipped:
                    report.keys.pop()
                    continue
                place = f"{plain(image.name)} at byte {image.offset}"
                name_work(f"{place} of {job.path}")
                if index is not None and number < len(index) and sorted(index[number]) != sorted(entries):
                    report.problem("index", f"line {number + 2} of its .idx does not fit {place}")
                report.repeats += label == previous
                previous = label
                if label < job.num_classes:
                    report.labels[label] += 1
                else:
                    report.problem("label", f"{place} has label {label}, there are {job.num_classes} classes")
                try:
                    check_image(image.data, job.store)
                except ValueError as error:
                    report.problem("image", f"{place}: {error}")
        except ValueError as error:
            report.problem("tar", str(error))
        if len(report.keys) != int(job.row["samples"]):
            report.problem("tar", f"holds {len(report.keys)} readable samples, the manifest says {job.row['samples']}")
        if hashed.finish() != job.row.get("sha256"):
            report.problem("checksum", "its bytes are not those that were written (SHA-256)")


def check_image(content: bytes, store: str) -> None:
    """Raise `ValueError` when an image is not what the split keeps."""
    if fault := find_fault(content):
        raise ValueError(fault)
    jpeg = read_jpeg(content)
    if store == "crop256" and (jpeg.width, jpeg.height) != (SIDE, SIDE):
        raise ValueError(f"is {jpeg.width}x{jpeg.height}, not {SIDE}x{SIDE}")
