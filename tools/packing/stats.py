"""Tell what is in a shard directory: images, classes, sizes, and how it was made.

    python tools/make_shards.py stats SHARDS

Labels come from the shards themselves, a few bytes each through the index; image sizes from a sample of JPEG headers.
"""

import io
import os
import random
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from pipeline.files import read_json
from pipeline.shards import DataError, open_shards, read_index
from tools.packing.verify import present_splits
from train.program import one_line

SAMPLED_IMAGES = 500
THREADS = 16
"""Small reads wait on the disk, not on the processor."""


def stats(shards: Path) -> None:
    """Print a table of what the shards hold.

    Args:
        shards: Folder written by pack or adopt.
    """
    for split in present_splits(shards):
        manifest = read_json(shards / split / "manifest.json")
        print(f"{shards / split}")
        for name, value in split_table(shards, split, manifest):
            print(one_line(f"  {name:<20}{value}"))


def split_table(shards: Path, split: str, manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value) rows of one split."""
    opened = open_shards(shards, split)
    with ThreadPoolExecutor(THREADS) as pool:
        reads = pool.map(read_labels, opened.tars, opened.indexes)
        found = list(tqdm(reads, total=len(opened.tars), desc=f"reading {split}", unit="shard", disable=None))
    labels = np.concatenate([labels for labels, _ in found])
    spans = [(tar, *span) for tar, (_, images) in zip(opened.tars, found, strict=True) for span in images.tolist()]
    if len(labels) != opened.num_samples or not 0 <= labels.min() <= labels.max() < len(opened.classes):
        raise DataError(f"{shards / split} does not hold what its manifest says; run make_shards.py verify {shards}")
    per_class = np.bincount(labels, minlength=len(opened.classes)).tolist()
    samples = [int(row["samples"]) for row in manifest["shards"]]
    sizes = [int(row["bytes"]) for row in manifest["shards"]]
    measured = image_sizes(random.Random(0).sample(spans, min(SAMPLED_IMAGES, len(spans))))
    noted = Counter(
        re.sub(r"\b\d+\b", "N", kind)
        for row in manifest.get("repairs", ())
        if isinstance(row, dict)
        for kind in str(row.get("found")).split("; ")
    )
    options = manifest.get("options", {})
    return [
        ("samples", f"{opened.num_samples:,}"),
        ("classes", f"{len(per_class)}, {per_class.count(0)} without an image"),
        ("images per class", spread(per_class)),
        ("shards", str(len(samples))),
        ("samples per shard", spread(samples)),
        ("bytes", f"{sum(sizes):,}"),
        ("bytes per shard", spread(sizes)),
        ("bytes per image", spread([size for _, _, size in spans])),
        ("width", f"{spread([width for width, _ in measured])}, of {len(measured)} images"),
        ("height", spread([height for _, height in measured])),
        ("repaired or noted", str(len(manifest.get("repairs", ())))),
        *((f"  {count}", kind) for kind, count in noted.most_common()),
        ("skipped", str(len(manifest.get("skipped", ())))),
        ("source", str(manifest.get("source", "unknown"))),
        ("options", ", ".join(f"{name} {value}" for name, value in options.items()) or "unknown"),
        ("versions", ", ".join(f"{name} {value}" for name, value in manifest.get("versions", {}).items()) or "unknown"),
    ]


def spread(values: Sequence[int]) -> str:
    """Minimum, median, mean and maximum."""
    if not values:
        return "none"
    return f"min {min(values):,}, median {median(values):,.0f}, mean {mean(values):,.0f}, max {max(values):,}"


def read_labels(tar: str, index: str) -> tuple[np.ndarray, np.ndarray]:
    """Of one shard: int64 (n,) labels, and int64 (n, 2) offset and size of the images. Raises `DataError`."""
    labels, images = [], []
    file = os.open(tar, os.O_RDONLY)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # reading ahead would read the whole shard
        end = os.fstat(file).st_size
        for sample in read_index(Path(index)):
            places = {extension: (offset, size) for extension, offset, size, _ in sample}
            offset, size = places["cls"]
            labels.append(int(os.pread(file, min(size, end), offset)))
            images.append(places["jpg"])
            if sum(places["jpg"]) > end:
                raise ValueError("an image that the tar does not hold")
    except (KeyError, ValueError):
        raise DataError(f"{tar} or its index is damaged; make_shards.py verify tells where") from None
    finally:
        os.close(file)
    return np.array(labels, np.int64), np.array(images, np.int64)


def image_sizes(spans: list[tuple[str, int, int]]) -> list[tuple[int, int]]:
    """(width, height) of the images at (tar, offset, size), from their headers. Raises `DataError`."""
    sizes = []
    for tar, offset, size in spans:
        with Path(tar).open("rb") as file:
            file.seek(offset)
            try:
                with Image.open(io.BytesIO(file.read(size))) as image:
                    sizes.append(image.size)
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
                raise DataError(f"{tar} holds no image at byte {offset}; make_shards.py verify tells more") from None
    return sizes
