"""Shards on disk: `tools/make_shards.py` writes them, training and the tools open them.

    shards/
      train/train-000000.tar, train-000000.idx, ...   WebDataset shards with DALI indexes (wds2idx format v1.2)
      val/val-000000.tar, ...
      train/manifest.json, val/manifest.json          what a split consists of
      train/samples.npy, val/samples.npy              one row a sample, in stored order
      classes.json                                    index -> wnid -> words, in the order of the sorted wnids

One sample is `<key>.jpg` and `<key>.cls`, the class index in ASCII decimal. A directory without a manifest, with a
shard missing or of another size is refused, as it was written or copied incompletely, and training would silently miss
some of the data.
"""

import os
import re
import tarfile
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import Any, BinaryIO

import numpy as np

from pipeline.errors import UserError
from pipeline.files import hash_file, json_text, read_json, sha256

FORMAT_VERSION = 1
IMAGE_SIDE = 256
"""Side of a packed image, and of the square that is cropped from other images (paper, section 2)."""
NPY_HEADER = 128
"""Bytes before the pixels in a `.npy` file of a pixel store (numpy's format 1.0)."""
MAX_LABEL_DIGITS = 6
KEY = re.compile(r"[A-Za-z0-9_-]{1,79}")
SAMPLE = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("label", "<u4")])
"""A row of `samples.npy`, 20 bytes: number of the shard, from 0; where its image's data lie in the tar; class index."""
SAMPLES = "samples.npy"
SAMPLES_SHA256 = "samples_sha256"
"""Field of the manifest with the table's checksum."""


@dataclass(frozen=True)
class ClassName:
    """One class; its index is its position in `classes.json`."""

    wnid: str
    """WordNet id, as in ILSVRC-2012 ("n01440764"), or a folder's name."""
    words: str
    """Its common names ("tench, Tinca tinca")."""


@dataclass(frozen=True)
class ShardSet:
    """One split, checked: every shard of the manifest is there and has its size."""

    tars: tuple[str, ...]
    """Paths of the shards, in the manifest's order."""
    samples: np.ndarray = field(compare=False)
    """`SAMPLE` (samples,), in stored order, shard by shard; read-only."""
    classes: tuple[ClassName, ...]
    """All classes; labels are indexes of this."""
    manifest_sha256: str
    """`hash_manifest` of the manifest. It identifies the data, as the manifest has the checksums of all shards."""
    store: str
    """"crop256" (256x256 images), "original" (of any size), "adopted" (shards of other programs), "pixels" (256x256,
    decoded) or "unknown"."""

    @property
    def num_samples(self) -> int:
        """Number of samples in all shards."""
        return len(self.samples)

    def find_starts(self) -> np.ndarray:
        """Find the first sample of each shard, and the end, int64 (shards + 1,); by bisection, as the table may be
        large."""
        shards = self.samples["shard"]
        return np.array([bisect_left(shards, number) for number in range(len(self.tars) + 1)])

    def only(self, numbers: Sequence[int]) -> "ShardSet":
        """Return a split of only the shards with these numbers, in this order."""
        starts = self.find_starts()
        parts = [self.samples[starts[number] : starts[number + 1]] for number in numbers]
        samples = np.concatenate(parts)
        samples["shard"] = np.repeat(np.arange(len(parts)), list(map(len, parts)))
        samples.flags.writeable = False
        return replace(self, tars=tuple(self.tars[k] for k in numbers), samples=samples)

    def read_key(self, row: int) -> str:
        """Read a sample's key, without folders, from the tar; empty where the header is damaged."""
        shard, offset, *_ = self.samples[row].tolist()
        try:
            with Path(self.tars[shard]).open("rb") as file:
                return read_header(file, offset).name.rpartition("/")[2].partition(".")[0]
        except (OSError, ValueError, tarfile.TarError):
            return ""

    @property
    def is_decoded(self) -> bool:
        """True for a pixel store: samples are `.npy` files of uint8 (256, 256, 3)."""
        return self.store == "pixels"

    @property
    def any_size(self) -> bool:
        """True if images are of any size, and the pipeline has to resize them to 256x256."""
        return self.store in ("original", "adopted")


def open_shards(shards: Path, split: str) -> ShardSet:
    """Open one split of a shard directory.

    Raises `FileNotFoundError` or `UserError`, each with a remedy, if something is missing or does not fit.
    """
    directory = Path(shards) / split
    path = directory / "manifest.json"
    if not path.is_file():
        without = {
            "val": "no validation shards; finish packing, or pack into another folder without --val-fraction 0",
            "train": "only validation images; give shards with training images, or pass basis= to val_loader",
        }
        other = "train" if split == "val" else "val"
        if (Path(shards) / other / "manifest.json").is_file() and (split == "val" or not directory.exists()):
            raise FileNotFoundError(f"{directory} holds no manifest.json: there are {without[split]}")
        raise FileNotFoundError(
            f"{directory} holds no manifest.json, so no finished shards; run tools/make_shards.py pack RAW SHARDS, or "
            "give the folder that has them"
        )
    manifest = read_json(path)
    check_manifest(manifest, path)
    if manifest["split"] != split:
        raise UserError(
            f"{path} describes the {manifest['split']} split, not {split}; copy it again or pack again"
        )
    tars = []
    for shard in manifest["shards"]:
        tar = directory / shard["name"]
        if not tar.is_file():
            raise FileNotFoundError(f"{tar} is listed in {path} but missing; copy it again or pack again")
        if tar.stat().st_size != shard["bytes"]:
            raise UserError(
                f"{tar} has {tar.stat().st_size} bytes, {path} says {shard['bytes']}; copy it again or pack again"
            )
        tars.append(str(tar))
    classes = read_classes(Path(shards))
    if len(classes) != manifest["num_classes"]:
        raise UserError(
            f"{shards}/classes.json lists {len(classes)} classes, {path} {manifest['num_classes']}; pack again"
        )
    store = str(manifest.get("options", {}).get("store", "unknown"))
    samples = open_samples(directory, manifest)
    return ShardSet(tuple(tars), samples, classes, hash_manifest(manifest), store)


def open_samples(directory: Path, manifest: dict[str, Any]) -> np.ndarray:
    """Map the table of a split's samples, `SAMPLE` (samples,), read-only; nothing of it is held in memory.

    Its checksum stands for a check of every row. Raises `FileNotFoundError` or `UserError`.
    """
    path, expected = directory / SAMPLES, manifest.get(SAMPLES_SHA256)
    remedy = f"run tools/make_shards.py index {quote(str(directory.parent))} (--out DIR if it is read-only)"
    if expected is None:
        raise UserError(f"{directory / 'manifest.json'}: expected {SAMPLES_SHA256}, got none; {remedy}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; {remedy}")
    if (found := hash_file(path)) != expected:
        raise UserError(f"{path}: expected the SHA-256 of manifest.json, got {found}; {remedy}")
    try:
        samples = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError):
        samples = np.empty(0)
    if samples.dtype != SAMPLE or samples.shape != (manifest["num_samples"],):
        expected = f"shape ({manifest['num_samples']},) of {SAMPLE.itemsize} bytes each"
        raise UserError(f"{path}: expected {expected}, got {samples.shape} of {samples.itemsize}; {remedy}")
    return samples


def hash_manifest(manifest: dict[str, Any]) -> str:
    """Hash a manifest without the checksum of its samples, so that `make_shards.py index` changes no identity: the
    SHA-256 of the bytes that version 0.1 wrote."""
    content = {name: value for name, value in manifest.items() if name != SAMPLES_SHA256}
    return sha256(json_text(content).encode(errors="surrogatepass"))


def read_header(file: BinaryIO, offset: int) -> tarfile.TarInfo:
    """Read the tar header of the data at `offset`. Raises `OSError`, `ValueError` or `tarfile.TarError`."""
    block = os.pread(file.fileno(), tarfile.BLOCKSIZE, offset - tarfile.BLOCKSIZE)
    return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")


def check_manifest(manifest: Any, path: Path) -> None:
    """Raise `UserError` unless `manifest` has the form that this version reads."""
    try:
        version, shards = manifest["format_version"], manifest["shards"]
        counts = [int(shard["samples"]) for shard in shards]
        well_formed = (
            all(re.fullmatch(r"[\w.-]+\.tar", shard["name"]) and int(shard["bytes"]) > 0 for shard in shards)
            and sum(counts) == manifest["num_samples"] > 0
            and len({shard["name"] for shard in shards}) == len(shards)
            and isinstance(manifest["num_classes"], int)
            and isinstance(manifest["split"], str)
            and all(type(shard[name]) is int for shard in shards for name in ("bytes", "samples"))
            and all(isinstance(manifest.get(name, {}), dict) for name in ("options", "versions", "renamed"))
            and all(isinstance(manifest.get(name, []), list) for name in ("repairs", "skipped"))
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        version, well_formed = FORMAT_VERSION, False
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version}, this program reads {FORMAT_VERSION}; pack again"
        )
    if not well_formed:
        raise UserError(f"{path} is damaged or not a shard manifest; pack again")


def read_classes(shards: Path) -> tuple[ClassName, ...]:
    """Read `classes.json`. Raises `FileNotFoundError` or `ValueError`."""
    path = shards / "classes.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; copy it from where the shards were packed or pack again")
    try:
        rows = read_json(path)["classes"]
        classes = tuple(ClassName(str(row["wnid"]), str(row["words"])) for row in rows)
        in_order = [row["index"] for row in rows] == list(range(len(rows)))
    except (KeyError, TypeError):
        in_order, classes = False, ()
    wnids = [name.wnid for name in classes]
    if not in_order or wnids != sorted(set(wnids)):
        raise UserError(f"{path} is damaged or not a class list in the order of the wnids; pack again")
    return classes


def classes_json(classes: tuple[ClassName, ...]) -> dict[str, Any]:
    """Make the content of `classes.json`."""
    rows = [{"index": index, "wnid": name.wnid, "words": name.words} for index, name in enumerate(classes)]
    return {"format_version": FORMAT_VERSION, "classes": rows}
