"""Shards on disk: `tools/make_shards.py` writes them, training and the tools open them.

    shards/
      train/train-000000.tar, train-000000.idx, ...   WebDataset shards with DALI indexes (wds2idx format v1.2)
      val/val-000000.tar, ...
      train/manifest.json, val/manifest.json          what a split consists of
      classes.json                                    index -> wnid -> words, in the order of the sorted wnids

One sample is `<key>.jpg` and `<key>.cls`, the class index in ASCII decimal. A directory without a manifest, with a
shard missing or of another size is refused, as it was written or copied incompletely, and training would silently miss
some of the data.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import read_json, sha256

FORMAT_VERSION = 1
IMAGE_SIDE = 256
"""Side of a packed image, and of the square that is cropped from other images (paper, section 2)."""
MAX_LABEL_DIGITS = 6
KEY = re.compile(r"[A-Za-z0-9_-]{1,79}")


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

    split: str
    """"train" or "val"."""
    tars: tuple[str, ...]
    """Paths of the shards, in the manifest's order."""
    indexes: tuple[str, ...]
    """Paths of their DALI indexes."""
    samples: tuple[int, ...]
    """Number of samples of each shard."""
    classes: tuple[ClassName, ...]
    """All classes; labels are indexes of this."""
    manifest_sha256: str
    """SHA-256 of the manifest's bytes. It identifies the data, as the manifest has the checksums of all shards."""
    store: str
    """"crop256" (256x256 images), "original" (of any size), "adopted" (shards of other programs) or "unknown"."""

    @property
    def num_samples(self) -> int:
        """Number of samples in all shards."""
        return sum(self.samples)

    def only(self, numbers: Sequence[int]) -> "ShardSet":
        """Return a split of only the shards with these numbers, in this order."""
        return replace(
            self,
            tars=tuple(self.tars[k] for k in numbers),
            indexes=tuple(self.indexes[k] for k in numbers),
            samples=tuple(self.samples[k] for k in numbers),
        )

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
        if split == "val" and (Path(shards) / "train" / "manifest.json").is_file():
            raise FileNotFoundError(
                f"{directory} holds no manifest.json: there are no validation shards; finish packing, or pack into "
                "another folder without --val-fraction 0"
            )
        raise FileNotFoundError(
            f"{directory} holds no manifest.json, so no finished shards; run tools/make_shards.py pack RAW SHARDS, or "
            "give the folder that has them"
        )
    content = path.read_bytes()
    manifest = read_json(path)
    check_manifest(manifest, path)
    if manifest["split"] != split:
        raise UserError(
            f"{path} describes the {manifest['split']} split, not {split}; copy it again or pack again"
        )
    tars, indexes = [], []
    for shard in manifest["shards"]:
        tar = directory / shard["name"]
        index = tar.with_suffix(".idx")
        for file in (tar, index):
            if not file.is_file():
                raise FileNotFoundError(
                    f"{file} is listed in {path} but missing; copy it again or pack again"
                )
        if tar.stat().st_size != shard["bytes"]:
            raise UserError(
                f"{tar} has {tar.stat().st_size} bytes, {path} says {shard['bytes']}; copy it again or pack again"
            )
        tars.append(str(tar))
        indexes.append(str(index))
    classes = read_classes(Path(shards))
    if len(classes) != manifest["num_classes"]:
        raise UserError(
            f"{shards}/classes.json lists {len(classes)} classes, {path} {manifest['num_classes']}; pack again"
        )
    options = manifest.get("options")
    store = str(options.get("store", "unknown")) if isinstance(options, dict) else "unknown"
    samples = tuple(shard["samples"] for shard in manifest["shards"])
    return ShardSet(split, tuple(tars), tuple(indexes), samples, classes, sha256(content), store)


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


def index_text(samples: list[list[tuple[str, int, int, str]]]) -> str:
    """Format a DALI webdataset index (format v1.2, as `wds2idx` of DALI 2.4 writes it).

    Args:
        samples: For each sample its members as (extension, offset of the data in bytes, size in bytes, member name).
    """
    lines = [
        " ".join(f"{ext} {offset} {size} {name}" for ext, offset, size, name in members)
        for members in samples
    ]
    return "\n".join([f"v1.2 {len(samples)}", *lines]) + "\n"


def read_index(path: Path) -> list[list[tuple[str, int, int, str]]]:
    """Parse what `index_text` wrote. Raises `UserError` when the file is not such an index."""
    try:
        header, *lines = path.read_bytes().decode().splitlines()
        rows = [line.split(" ") for line in lines]
        samples = [
            [
                (ext, int(offset), int(size), name)
                for ext, offset, size, name in zip(*[iter(row)] * 4, strict=True)
            ]
            for row in rows
        ]
        if any(not 0 <= number < 2**62 for row in samples for _, *numbers, _ in row for number in numbers):
            raise ValueError
    except ValueError:
        header, samples = "", []
    if header.split() != ["v1.2", str(len(samples))]:
        raise UserError(f"{path} is damaged or not a DALI index of format v1.2; copy it again or pack again")
    return samples
