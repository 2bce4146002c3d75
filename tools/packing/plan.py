"""Assign each image a key, a shard and a place in it, before the first image is read.

The plan depends only on the listing, the options and the seed, so any number of workers and machines write the same
shards. It is kept in numpy columns: 14 million images take about 2 GB and a minute.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import PIL.features

from pipeline.errors import UserError
from pipeline.files import sha256
from pipeline.shards import KEY, ClassName
from tools.packing.listing import Listing, RawImage
from train.launch import Task, find_task

Sample = tuple[str, RawImage]
"""Key and image."""


@dataclass(frozen=True)
class Options:
    """Options that the content of the shards depends on; recorded in the manifest."""

    store: Literal["crop256", "original"] = "crop256"
    quality: int = 90
    """JPEG quality, 1 to 100, of encoded images."""
    samples_per_shard: int = 1000
    seed: int = 2012
    val_fraction: float = 0.0
    on_bad: Literal["fail", "skip"] = "fail"
    """Not part of the digest: a pack that failed may be resumed with "skip"."""

    def __post_init__(self) -> None:
        """Raise `UserError` for values out of range."""
        if self.samples_per_shard < 1:
            raise UserError(f"--samples-per-shard: expected at least 1, got {self.samples_per_shard}")
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality: expected 1 to 100, got {self.quality}")
        if not 0 <= self.val_fraction <= 1:
            raise UserError(f"--val-fraction: expected 0 to 1, got {self.val_fraction}")


class ShardPlan(NamedTuple):
    """One shard to be written."""

    path: Path
    samples: list[Sample]
    options: Options
    digest: str
    """The plan's."""


@dataclass(frozen=True)
class Plan:
    """Plan of one split: each image's key, position in the shuffled order, and shard."""

    directory: Path
    """Folder of the shards, named after the split."""
    listing: Listing
    options: Options
    order: np.ndarray
    """int64 (images,): rows of the listing in the order of the shards."""
    starts: np.ndarray
    """int64 (shards + 1,): first position of each shard in that order, and the number of images."""
    renamed: np.ndarray
    """bool (images,), by row: the key is not the stem of the file's name."""
    digest: str
    """Equal digests mean equal bytes in all shards."""

    @property
    def num_shards(self) -> int:
        """Return the number of shards."""
        return len(self.starts) - 1

    def key(self, row: int) -> str:
        """Return an image's key: its stem, or <class>_<row> if that is not unique and safe."""
        return f"{self.listing.label[row]}_{row}" if self.renamed[row] else stem(self.listing.name(row))

    def num_images(self, numbers: Sequence[int]) -> list[int]:
        """Return the number of images in each of these shards."""
        return [int(self.starts[number + 1] - self.starts[number]) for number in numbers]

    def path(self, number: int) -> Path:
        """Return the path of a shard."""
        return self.directory / f"{self.directory.name}-{number:06d}.tar"

    def shard(self, number: int) -> ShardPlan:
        """Return all that a worker needs to write one shard."""
        rows = self.order[self.starts[number] : self.starts[number + 1]].tolist()
        samples = [(self.key(row), self.listing[row]) for row in rows]
        return ShardPlan(self.path(number), samples, self.options, self.digest)

    def renamed_keys(self) -> Iterator[tuple[str, str]]:
        """Yield (key, name) of the images with a generated key."""
        for row in self.order[self.renamed[self.order]].tolist():
            yield self.key(row), self.listing[row].escaped_name


def make_plan(directory: Path, listing: Listing, options: Options, classes: tuple[ClassName, ...]) -> Plan:
    """Plan one split.

    A stem is a key if it is unique in the split and safe; other images get <class>_<row>. The order sorts by a hash of
    seed and key, so it depends on no library's generator.
    """
    renamed, digests = np.zeros(len(listing), bool), bytearray()
    for row in range(len(listing)):
        name = stem(listing.name(row))
        renamed[row] = KEY.fullmatch(name) is None
        digests += hash_key(options.seed, name)
    hashes = np.frombuffer(digests, ">u8").reshape(-1, 2).astype(np.uint64)
    _, position, count = np.unique(hashes[:, 0], return_inverse=True, return_counts=True)
    renamed |= count[position] > 1
    # A generated key may be the stem of another file; then that file gets a generated key, too.
    while True:
        generated = {f"{listing.label[row]}_{row}" for row in np.flatnonzero(renamed).tolist()}
        others = np.flatnonzero(~renamed).tolist() if generated else ()
        clashes = [row for row in others if stem(listing.name(row)) in generated]
        if not clashes:
            break
        renamed[clashes] = True
    for row in np.flatnonzero(renamed).tolist():
        hashes[row] = np.frombuffer(hash_key(options.seed, f"{listing.label[row]}_{row}"), ">u8")
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    num_shards = -(-len(order) // options.samples_per_shard)
    starts = np.arange(num_shards + 1) * len(order) // num_shards
    content = asdict(options) | {"on_bad": None}
    wnids = [[name.wnid, name.words] for name in classes]
    identity = [listing.digest(), directory.name, content, library_versions(), wnids]
    digest = sha256(json.dumps(identity, sort_keys=True).encode())
    return Plan(directory, listing, options, order, starts, renamed, digest)


def stem(name: str) -> str:
    """Strip folders and extension from a file's name."""
    return name.rsplit("/", 1)[-1].rsplit(".", 1)[0]


def hash_key(seed: int, key: str) -> bytes:
    """Hash a key to the 16 bytes that the shuffled order sorts by."""
    return hashlib.blake2b(os.fsencode(f"{seed}:{key}"), digest_size=16).digest()


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that decode, resample and encode."""
    turbo = PIL.features.version("libjpeg_turbo") or "unknown"
    return {
        "pillow": PIL.__version__,
        "simplejpeg": version("simplejpeg"),
        "libjpeg_turbo": turbo,
        "torch": version("torch").split("+")[0],
    }


def find_part(part: str | None, environment: Mapping[str, str]) -> Task:
    """Parse the part of this process: i/n, else torchrun's or srun's variables, else everything.

    Parts may count from 0 or from 1: only i modulo n matters. Raises `UserError` for anything else.
    """
    if part is None:
        return find_task(environment)
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", part, re.ASCII)
    if not match or not 0 <= int(match[1]) <= int(match[2]) or int(match[2]) == 0:
        raise UserError(f"--part: expected i/n with i from 1 to n, such as 1/4, got {part}")
    return Task((int(match[1]) - 1) % int(match[2]), int(match[2]), "--part")
