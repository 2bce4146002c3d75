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
from tools.packing.tars import IMAGE_NAME

HEADERS = ("label", "labels", "class", "class_id", "wnid", "synset", "category", "target", "predictionstring")
"""Names of a table's column of classes, in lower case."""


class Labels(NamedTuple):
    """A table of labels."""

    path: Path
    """Its file."""
    wnid_of: dict[str, str]
    """Class by path or name of the image, without extension."""
    of_all: bool = False
    """True if it labels all images (`--labels`), False if only those outside of class folders."""


def read_labels(path: Path, of_all: bool = False) -> Labels:
    """Read a table of image and class: columns with commas or tabs between them, or the class after white space; a line
    with the names of the columns may come first.

    Of Kaggle's column PredictionString the first word is the class. Raises `UserError`.
    """
    try:
        lines = [line for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
        comma = next((mark for mark in "\t," if mark in lines[0]), None)
        if comma:
            rows = list(csv.reader(lines, delimiter=comma, skipinitialspace=True))
        else:
            rows = [line.rsplit(None, 1) for line in lines]
        header = [name.strip().lower() for name in rows[0]]
        columns = [n for n, name in enumerate(header) if n and name in HEADERS]
        if columns:
            rows = [[row[0], row[columns[0]]] for row in rows[1:]]
        elif of_all and max(map(len, rows)) > 2:
            raise UserError(f"{path}: expected two columns, or the name label over one of more; correct it")
        if header[-1] == "predictionstring":
            rows = [[image, wnid.split()[0]] for image, wnid in rows]
        pairs = [(os.path.normpath(row[0].strip()), row[1].strip()) for row in rows]
    except (UnicodeDecodeError, csv.Error, IndexError):
        raise UserError(f"{path}: expected an image and its class in each line, UTF-8; correct it") from None
    pairs = [(compose(strip_extension(image)), compose(wnid)) for image, wnid in pairs]
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice or not pairs or not all(wnid for _, wnid in pairs):
        got = f"{twice[0]} twice" if twice else "a line without one"
        raise UserError(f"{path}: expected each image once, with a class, got {got}; correct it")
    return Labels(path, dict(pairs), of_all)


def compose(name: str) -> str:
    """Return a name in Unicode's composed form (NFC), as disks of Apple decompose accents."""
    return unicodedata.normalize("NFC", name)


def strip_extension(path: str) -> str:
    """Strip the extension of an image."""
    return path.rpartition(".")[0] if IMAGE_NAME.fullmatch(path) else path


def read_class_file(path: Path) -> list[ClassName]:
    """Read a classes.json, or lines of a class and, after a tab, its words; after a WordNet id a space is enough.
    Raises `UserError`."""
    if path.name == "classes.json":
        return list(read_classes(path.parent))
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        lines = []
    pairs = [
        re.split(r"\t|(?<=\d)\s" if re.match(r"n\d", line) else r"\t", line, maxsplit=1) for line in lines
    ]
    names = [ClassName(compose(pair[0].strip()), pair[-1].strip()) for pair in pairs]
    if not names or len(names) != len({name.wnid for name in names}):
        raise UserError(f"{path}: expected lines of a class, each once, and words; correct it")
    return names


def choose_classes(data: RawImageNet, file: Path | None) -> RawImageNet:
    """Keep the images of the classes in a file, by default of all.

    Raises `UserError` for a class without training images, unless there are none of any.
    """
    found = [name.wnid for name in data.classes]
    names = sorted(read_class_file(file), key=lambda name: name.wnid) if file else list(data.classes)
    place = {name.wnid: label for label, name in enumerate(names)}
    numbers = {int(each) for each in found if each.isdecimal()}
    layout = data.layout
    if not place.keys() & set(found) and len(numbers) == len(found) and max(numbers) < len(names):
        place = {each: int(each) for each in found}  # as ImageNet-V2 has them
        layout += f" that are numbers of classes in {file and file.name}"
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
            remedy = (
                "correct it"
                if file
                else "add some, move its folder away, or list the other classes for --classes"
            )
            missing = names[int(np.argmin(counts))].wnid
            raise UserError(f"{file or 'classes'}: expected training images of {missing}, got none; {remedy}")
    words = {name.wnid: name.words for name in data.classes}
    classes = [n if n.words != n.wnid else replace(n, words=words.get(n.wnid, n.wnid)) for n in names]
    return replace(data, layout=layout, classes=tuple(classes), splits=splits)


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
