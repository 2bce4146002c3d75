"""What `verify` does to one shard, in a process of its own: read it once, and report all that is wrong with it."""

import io
from array import array
from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import simplejpeg
from PIL import Image

from pipeline.shards import read_index
from tools.packing.images import SIDE, check_size, header
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
    """What the split keeps: "crop256" (256x256 JPEGs that we encoded), "original" (files that were decoded when they
    were packed), and "adopted" or "unverified" (that were not)."""
    warned: frozenset[str]
    """Keys of which the manifest says that libjpeg warns."""
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
            for number, (key, members) in enumerate(read_samples(hashed)):
                report.keys.append(int.from_bytes(blake2b(key.encode(errors="replace"), digest_size=8).digest()))
                try:
                    entries, image, label = sample_entries(key, members)
                except ValueError as error:
                    report.problem("sample", str(error))
                    continue
                place = f"{plain(image.name)} at byte {image.offset}"
                if index is not None and number < len(index) and sorted(index[number]) != sorted(entries):
                    report.problem("index", f"line {number + 2} of its .idx does not fit {place}")
                report.repeats += label == previous
                previous = label
                if label < job.num_classes:
                    report.labels[label] += 1
                else:
                    report.problem("label", f"{place} has label {label}, there are {job.num_classes} classes")
                try:
                    if note := check_image(image.data, job.store, key in job.warned):
                        report.notes.append(f"{place}: {note}")
                except ValueError as error:
                    report.problem("image", f"{place}: {error}")
        except ValueError as error:
            report.problem("tar", str(error))
        if len(report.keys) != int(job.row["samples"]):
            report.problem("tar", f"holds {len(report.keys)} readable samples, the manifest says {job.row['samples']}")
        if hashed.finish() != job.row.get("sha256"):
            report.problem("checksum", "its bytes are not those that were written (SHA-256)")


def check_image(content: bytes, store: str, warned: bool) -> str:
    """Decode an image; returns what is odd but bearable. Raises `ValueError` when it is not what the split keeps.

    What we encoded has to be flawless. Files that are kept as they came may be what ImageNet's own are: JPEGs that
    libjpeg warns of, listed in the manifest if the packer decoded them, and other formats under a JPEG's name.
    """
    height, width, _ = header(content)
    check_size(width, height)
    try:
        height, width, _ = simplejpeg.decode_jpeg(content, "RGB", fastdct=True, fastupsample=True, strict=True).shape
    except ValueError as error:
        warning = str(error)
    else:
        if store == "crop256" and (width, height) != (SIDE, SIDE):
            raise ValueError(f"is {width}x{height}, not {SIDE}x{SIDE}")
        return ""
    if store != "crop256":
        try:
            simplejpeg.decode_jpeg(content, "RGB", strict=False)
        except ValueError:  # other formats, CMYK, and what is no image
            try:
                with Image.open(io.BytesIO(content)) as image:
                    image.load()
                    return f"{image.mode} {image.format} file"
            except Exception:  # Pillow's decoders raise about everything
                pass
        else:
            if warned or store != "original":
                return "" if warned else f"libjpeg warns: {warning}"
    raise ValueError(f"does not decode cleanly ({warning})")
