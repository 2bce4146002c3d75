"""Which image goes into which shard, under which key: decided before the first byte is read.

The plan depends on the listing, the options and the seed alone, so any number of workers and machines that make it come
to the same shards. It is kept in columns: 14 million images take about 2 GB and a minute.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import PIL.features

from pipeline.files import sha256
from pipeline.shards import KEY, ClassName
from tools.packing.listing import Listing, RawImage
from train.launch import Task, find_task

Sample = tuple[str, RawImage]
"""Key and image."""


@dataclass(frozen=True)
class Options:
    """What the shards depend on apart from the raw images; recorded in the manifest."""

    store: Literal["crop256", "original"] = "crop256"
    quality: int = 90
    """JPEG quality, 1 to 100, of what is encoded."""
    samples_per_shard: int = 1000
    seed: int = 2012
    val_fraction: float = 0.0
    on_bad: Literal["fail", "skip"] = "fail"
    """Decides whether a pack continues, not what a whole shard holds: "skip" may follow on "fail"."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for values that make no sense."""
        if self.samples_per_shard < 1 or not 1 <= self.quality <= 100:
            raise ValueError("--samples-per-shard must be at least 1, --quality 1 to 100")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"--val-fraction must be at least 0 and less than 1, but is {self.val_fraction}")


class ShardPlan(NamedTuple):
    """One shard to be written."""

    path: Path
    samples: list[Sample]
    options: Options
    digest: str
    """Of the plan that it belongs to."""


@dataclass(frozen=True)
class Plan:
    """One split: every image's key, its place in the one seeded order, and its shard."""

    directory: Path
    """Where the shards go; its name is the split's."""
    listing: Listing
    options: Options
    order: np.ndarray
    """int64 (images,): rows of the listing as they stand in the shards, one after the other."""
    renamed: np.ndarray
    """bool (images,), by row: the key is not the stem of the file's name."""
    digest: str
    """Names the content of all shards: equal digests mean equal bytes."""

    @property
    def num_shards(self) -> int:
        """Number of shards; their sizes differ by one at most."""
        return -(-len(self.order) // self.options.samples_per_shard)

    def key(self, row: int) -> str:
        """The key of an image: its stem, or <class>_<position in the listing>."""
        return f"{self.listing.label[row]}_{row}" if self.renamed[row] else stem(self.listing.name(row))

    def bounds(self, number: int) -> tuple[int, int]:
        """First place of a shard in the order, and the one after its last."""
        return number * len(self.order) // self.num_shards, (number + 1) * len(self.order) // self.num_shards

    def path(self, number: int) -> Path:
        """Where a shard goes."""
        return self.directory / f"{self.directory.name}-{number:06d}.tar"

    def shard(self, number: int) -> ShardPlan:
        """All that a worker needs to write one shard."""
        rows = self.order[slice(*self.bounds(number))].tolist()
        samples = [(self.key(row), self.listing[row]) for row in rows]
        return ShardPlan(self.path(number), samples, self.options, self.digest)

    def renamed_keys(self) -> Iterator[tuple[str, str]]:
        """(key, name) of the images whose key is not their stem."""
        for row in self.order[self.renamed[self.order]].tolist():
            yield self.key(row), self.listing[row].shown_name


def make_plan(directory: Path, listing: Listing, options: Options, classes: tuple[ClassName, ...]) -> Plan:
    """Plan one split.

    A stem is a key if it is unique in the split and safe; every other image gets <class>_<position>. The order sorts by
    a hash of seed and key: the same in every version of every library.
    """
    rows = len(listing)
    renamed, hashes = np.zeros(rows, bool), bytearray()
    for row in range(rows):
        name = stem(listing.name(row))
        renamed[row] = KEY.fullmatch(name) is None
        hashes += hash_key(options.seed, name)
    places = np.frombuffer(hashes, ">u8").reshape(rows, 2).astype(np.uint64)
    by_stem = np.argsort(places[:, 0], kind="stable")
    same = np.diff(places[by_stem, 0]) == 0
    renamed[by_stem[1:][same]] = True
    renamed[by_stem[:-1][same]] = True
    # A made-up key may be what another file is called; then that one gives way as well.
    while True:
        made_up = {f"{listing.label[row]}_{row}" for row in np.flatnonzero(renamed).tolist()}
        taken = [
            row
            for row in (np.flatnonzero(~renamed).tolist() if made_up else ())
            if stem(listing.name(row)) in made_up
        ]
        if not taken:
            break
        renamed[taken] = True
    for row in np.flatnonzero(renamed).tolist():
        places[row] = np.frombuffer(hash_key(options.seed, f"{listing.label[row]}_{row}"), ">u8")
    order = np.lexsort((places[:, 1], places[:, 0]))
    content = asdict(options) | {"on_bad": None}
    names = [[name.wnid, name.words] for name in classes]
    digest = sha256(
        json.dumps([listing.digest(), directory.name, content, versions(), names], sort_keys=True).encode()
    )
    return Plan(directory, listing, options, order, renamed, digest)


def stem(name: str) -> str:
    """File name without folders and extension."""
    return name.rsplit("/", 1)[-1].rsplit(".", 1)[0]


def hash_key(seed: int, key: str) -> bytes:
    """16 bytes by which a key is sorted into the global order."""
    return hashlib.blake2b(os.fsencode(f"{seed}:{key}"), digest_size=16).digest()


def versions() -> dict[str, str]:
    """The libraries that decide a shard's bytes: decoding, resampling, encoding."""
    turbo = PIL.features.version("libjpeg_turbo") or "unknown"
    return {
        "pillow": PIL.__version__,
        "simplejpeg": version("simplejpeg"),
        "libjpeg_turbo": turbo,
        "torch": version("torch").split("+")[0],
    }


def find_part(part: str | None, environment: Mapping[str, str]) -> Task:
    """The share of this process: from i/n, else from torchrun's or srun's environment, else everything.

    Counting from 1 or from 0 is the same: only i modulo n matters. Raises `ValueError` for anything else.
    """
    if part is None:
        return find_task(environment)
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", part, re.ASCII)
    if not match or not 0 <= int(match[1]) <= int(match[2]) or int(match[2]) == 0:
        raise ValueError(f"--part: expected i/n with i from 1 to n, such as 1/4, got {part}")
    return Task((int(match[1]) - 1) % int(match[2]), int(match[2]), "--part")
