"""The images that all contenders of `bench peers` work on: as shards, and the same bytes as files in class folders."""

import importlib.metadata
import itertools
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.eigenbasis import Eigenbasis
from pipeline.files import write_bytes
from pipeline.shards import ShardSet
from tools.make_demo import write_tar
from tools.packing.adopt import read_shard
from tools.packing.tars import HashedFile, read_samples, sample_entries

CHECKED = 128
"""Images over which contenders are checked."""
CHECK_SHARDS = 4


Batches = Generator[tuple[Any, Any], None, None]
"""Images, float32 (N, 3, 224, 224) or (N, 224, 224, 3), and labels (N,); from another process, None and None."""


class PeerData(NamedTuple):
    """What a contender gets."""

    shards: ShardSet
    """WebDataset shards of 256x256 JPEGs."""
    files: list[tuple[str, int]]
    """(path, class index) of the same JPEGs in the same order: FOLDER/<class index>/<key>.jpg."""
    basis: Eigenbasis
    """Mean and axes."""
    batch_size: int
    """Images per batch."""
    workers: int
    """Processes, or threads where a contender has those."""
    scratch: Path
    """Where it may write, which is thrown away afterwards."""
    ffcv_python: Path | None = None
    """The interpreter of FFCV's environment."""
    show: bool = False
    """Whether batches are looked at: a contender in another process then hands them over."""


def read_images(shards: ShardSet) -> Iterator[tuple[str, bytes, int]]:
    """Yield key, JPEG and class index of every sample, in stored order."""
    for tar in shards.tars:
        with Path(tar).open("rb") as file:
            for key, members in read_samples(HashedFile(file)):
                _, image, label = sample_entries(key, members)
                yield Path(key).name, image.data, label


def extract(shards: ShardSet, folder: Path) -> list[tuple[str, int]]:
    """Write every JPEG of some shards as a file; returns the paths, and class indexes."""
    files = []
    for key, jpeg, label in read_images(shards):
        path = folder / f"{label:06}" / f"{key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg)
        files.append((str(path), label))
    return files


def whole_shards(shards: ShardSet, images: int) -> ShardSet:
    """The first shards that together hold so many images, or all."""
    before = [0, *itertools.accumulate(shards.samples)]
    return shards.only([k for k in range(len(shards.tars)) if before[k] < images])


def numbered(shards: ShardSet, folder: Path) -> ShardSet:
    """The first images in shards of their own, the image's number as its class index: whoever hands out all of these
    once has read every image once."""
    first = [jpeg for _, jpeg, _ in itertools.islice(read_images(shards), CHECKED)]
    folder.mkdir(parents=True)
    tars, share = [], CHECKED // CHECK_SHARDS
    for start in range(0, CHECKED, share):
        tars.append(folder / f"{start:06}.tar")
        pairs = [
            ((f"{n:06}.jpg", first[n]), (f"{n:06}.cls", str(n).encode())) for n in range(start, start + share)
        ]
        with tars[-1].open("wb") as file:
            write_tar(file, itertools.chain.from_iterable(pairs))
        write_bytes(tars[-1].with_suffix(".idx"), read_shard(tars[-1]).index_text)
    return replace(
        shards,
        tars=tuple(map(str, tars)),
        indexes=tuple(str(tar.with_suffix(".idx")) for tar in tars),
        samples=(share,) * CHECK_SHARDS,
    )


class Permutations:
    """The numbers below `count` in random order, then in another one, without end."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from np.random.default_rng().permutation(self.count).tolist()


def version_of(*packages: str) -> dict[str, str]:
    """Versions of installed packages."""
    return {package: importlib.metadata.version(package) for package in packages}
