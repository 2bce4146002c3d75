"""A listing of raw images, kept on disk: to list 155 GB of tars means one small read per image.

It lies beside the output as JSON lines, and is valid as long as every archive has the size and the time that it had.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.files import atomic_writer
from pipeline.shards import ClassName
from tools.packing.listing import Listing, RawImageNet

CACHE_VERSION = 2
BLOCK = 50_000
"""Images per line of the cache: bounds what is parsed at a time."""


def stamp(root: Path, sources: list[Path]) -> list[list[Any]]:
    """What a cached listing is valid for: path, bytes and time of every archive."""
    return [
        [os.path.relpath(path, root), status.st_size, status.st_mtime_ns]
        for path in sources
        for status in [path.stat()]
    ]


def save_listing(path: Path, data: RawImageNet, validity: list[list[Any]]) -> None:
    """Write a listing as JSON lines: a header, then blocks of columns."""
    header = {
        "format_version": CACHE_VERSION,
        "layout": data.layout,
        "sequential": data.sequential,
        "classes": [[name.wnid, name.words] for name in data.classes],
        "files": {split: [listing.files, listing.file_bytes] for split, listing in data.splits.items()},
        "archives": validity,
        "digests": {split: listing.digest() for split, listing in data.splits.items()},
    }
    with atomic_writer(path) as file:
        file.write(json.dumps(header).encode() + b"\n")
        for split, listing in data.splits.items():
            for start in range(0, len(listing), BLOCK):
                rows = range(start, min(start + BLOCK, len(listing)))
                block = slice(rows.start, rows.stop)
                columns = {
                    "split": split,
                    "names": [listing.name(row) for row in rows],
                    **{name: getattr(listing, name)[block].tolist() for name in ("file", "offset", "size", "label")},
                }
                file.write(json.dumps(columns).encode() + b"\n")


def load_listing(path: Path, root: Path, validity: list[list[Any]]) -> RawImageNet | None:
    """Read a cached listing; None where there is none, or it is damaged or of other archives."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.readline())
            if header["format_version"] != CACHE_VERSION or header["archives"] != validity:
                return None
            splits = {split: Listing(root) for split in header["digests"]}
            for split, files in header["files"].items():
                splits[split].files, splits[split].file_bytes = files
            for line in file:
                block = json.loads(line)
                listing = splits[block["split"]]
                for name in ("file", "offset", "size", "label"):
                    getattr(listing, name).extend(block[name])
                encoded = [os.fsencode(name) for name in block["names"]]
                ends = np.cumsum([len(name) for name in encoded], dtype=np.int64) + len(listing.names)
                listing.ends.frombytes(ends.tobytes())
                listing.names += b"".join(encoded)
            classes = tuple(ClassName(wnid, words) for wnid, words in header["classes"])
            if {split: listing.digest() for split, listing in splits.items()} != header["digests"]:
                return None
            return RawImageNet(header["layout"], classes, splits, header["sequential"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, AttributeError, RecursionError):
        return None
