"""Read tables of labels and lists of classes of raw images; choose classes; split off validation images."""

import csv
import os
import re
import unicodedata
from array import array
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.errors import UserError
from pipeline.shards import ClassName, read_classes
from tools.packing.listing import RawImageNet
from tools.packing.plan import hash_key, stem

IMAGE_NAME = re.compile(r".+\.(jpe?g?|jfif|png|bmp|gif|webp|tiff?|p[gp]m|avif)", re.IGNORECASE | re.DOTALL)
HEADERS = (
    "image",
    "imageid",
    "image_id",
    "image_path",
    "path",
    "file",
    "filename",
    "file_name",
    "name",
    "id",
)
"""Names of the first column of a table, in lower case."""


class Labels(NamedTuple):
    """A table of labels."""

    path: Path
    """Its file."""
    wnid_of: dict[str, str]
    """Class by path or name of the image, without extension."""
    of_all: bool = False
    """True if it labels all images (`--labels`), False if only those outside of class folders."""


def read_labels(path: Path, of_all: bool = False) -> Labels:
    """Read a table of image and class: columns with commas or tabs between them, or the class after white space.

    Of Kaggle's column PredictionString the first word is the class. Raises `UserError`.
    """
    try:
        lines = [line for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
        comma = next((mark for mark in "\t," if mark in lines[0]), None)
        rows = list(csv.reader(lines, delimiter=comma)) if comma else [line.rsplit(None, 1) for line in lines]
        if rows[0][0].strip().lower() in HEADERS and rows.pop(0)[1] == "PredictionString":
            rows = [[row[0], row[1].split()[0]] for row in rows]
        pairs = [(strip_extension(os.path.normpath(row[0].strip())), row[1].strip()) for row in rows]
    except (UnicodeDecodeError, csv.Error, IndexError):
        raise UserError(f"{path}: expected an image and its class in each line; correct it") from None
    wnid_of = {name: unicodedata.normalize("NFC", wnid) for name, wnid in pairs}
    [(name, count)] = Counter(name for name, _ in pairs).most_common(1) or [("", 0)]
    if count != 1 or not all(wnid_of.values()):
        raise UserError(
            f"{path}: expected each image once, with a class, got {name} {count} times; correct it"
        )
    return Labels(path, wnid_of, of_all)


def strip_extension(path: str) -> str:
    """Strip the extension of an image."""
    return path.rpartition(".")[0] if IMAGE_NAME.fullmatch(path) else path


def read_class_file(path: Path) -> list[ClassName]:
    """Read a classes.json, or lines of class and words. Raises `UserError`."""
    if path.name == "classes.json":
        return list(read_classes(path.parent))
    try:
        lines = [line.split(maxsplit=1) for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        lines = []
    wnids = [unicodedata.normalize("NFC", line[0]) for line in lines]
    if not wnids or len(wnids) != len(set(wnids)):
        raise UserError(f"{path}: expected lines of a class, each once, and words; correct it")
    return [ClassName(wnid, line[-1].strip()) for wnid, line in zip(wnids, lines, strict=True)]


def choose_classes(data: RawImageNet, file: Path | None) -> RawImageNet:
    """Keep the images of the classes in a file, by default of all.

    Raises `UserError` for a class without training images, unless there are none of any.
    """
    found = [name.wnid for name in data.classes]
    names = sorted(read_class_file(file), key=lambda name: name.wnid) if file else list(data.classes)
    place = {name.wnid: label for label, name in enumerate(names)}
    if not place.keys() & set(found) and all(each.isdecimal() and int(each) < len(names) for each in found):
        place = {each: int(each) for each in found}  # numbers of the classes, as ImageNet-V2 has them
    labels, splits = np.array([place.get(each, -1) for each in found], np.int32), dict(data.splits)
    for split, listing in data.splits.items() if file else ():
        kept = labels[np.frombuffer(listing.label, np.int32)]
        splits[split] = listing.take(np.flatnonzero(kept >= 0))
        splits[split].label = array("i", kept[kept >= 0].tobytes())
        if not splits[split]:
            raise UserError(f"{file}: expected classes of the {split} images, got none; correct it")
    if "train" in splits:
        counts = np.bincount(splits["train"].label, minlength=len(names))
        if not counts.all():
            raise UserError(
                f"class {names[int(np.argmin(counts))].wnid}: expected training images, got none; add some, remove its "
                "validation images, or give a file of the other classes by --classes"
            )
    words = {name.wnid: name.words for name in data.classes}
    classes = [n if n.words != n.wnid else replace(n, words=words.get(n.wnid, n.wnid)) for n in names]
    return replace(data, classes=tuple(classes), splits=splits)


def split_off_validation(data: RawImageNet, fraction: float, seed: int) -> RawImageNet:
    """Split a validation set off train: `fraction` of each class, rounded, at least one image but never the last; or
    make it all validation, if `fraction` is 1.

    Images are chosen by a hash of seed and name, so the layout makes no difference. Raises `UserError` when there is
    a validation split, or no class has two images.
    """
    if "val" in data.splits:
        raise UserError(
            f"--val-fraction: expected data without validation images, got {data.layout}; leave it out"
        )
    train = data.splits["train"]
    if fraction == 1:
        return replace(data, splits={"val": train})
    labels = np.frombuffer(train.label, np.int32)
    hashes = b"".join(hash_key(seed, f"val:{stem(train.name(row))}")[:8] for row in range(len(train)))
    order = np.lexsort((np.frombuffer(hashes, ">u8"), labels))
    bounds = np.searchsorted(labels[order], np.arange(len(data.classes) + 1))
    in_val = np.zeros(len(train), bool)
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        number = max(0, min(end - start - 1, max(1, round((end - start) * fraction))))
        in_val[order[start : start + number]] = True
    if not in_val.any():
        raise UserError("--val-fraction: expected a class with two images, got none; use 0")
    splits = {"train": train.take(np.flatnonzero(~in_val)), "val": train.take(np.flatnonzero(in_val))}
    return replace(data, splits=splits)
