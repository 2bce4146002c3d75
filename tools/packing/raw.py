"""Raw ImageNet in any of the layouts that people have it in: found out by looking, listed in place."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tools.packing.cache import load_listing, stamp
from tools.packing.folders import find_class_folders, kaggle_tree, read_folders, read_kaggle
from tools.packing.ilsvrc import ARCHIVES, TRAIN_ARCHIVE, VAL_ARCHIVE, read_archives
from tools.packing.listing import RawImageNet
from tools.packing.parquet import find_parquet, read_parquet
from tools.packing.plan import place, stem
from tools.packing.tar_layouts import read_tars

LAYOUTS = (
    "the archives of ILSVRC-2012, Kaggle's ILSVRC/Data/CLS-LOC, class folders train/<class> or <class>, one "
    "<class>.tar per class, tars of class folders or parquet files called train-*"
)


class Layout(NamedTuple):
    """A layout that was recognized."""

    sources: list[Path]
    """Archives whose size and time tell whether a cached listing still holds; empty: it is not cached."""
    read: Callable[[], RawImageNet]
    """Lists it."""


def find_layout(raw: Path) -> Layout:
    """Recognize what a folder holds. Raises `FileNotFoundError` or `ValueError` when it is nothing that we know."""
    if not raw.is_dir():
        raise FileNotFoundError(f"{raw} is no folder; it has to hold {LAYOUTS}")
    if (raw / TRAIN_ARCHIVE).exists() or (raw / VAL_ARCHIVE).exists():
        return Layout([raw / name for name in ARCHIVES if (raw / name).is_file()], lambda: read_archives(raw))
    if tree := kaggle_tree(raw):
        return Layout([], lambda: read_kaggle(raw, tree))
    if any((files := find_parquet(raw)).values()):
        return Layout([*files["train"], *files["val"]], lambda: read_parquet(raw, files))
    if (raw / "train").is_dir():
        return Layout([], lambda: read_folders(raw, raw / "train"))
    if tars := sorted((path for path in raw.glob("*.tar") if path.name[0] != "."), key=lambda path: path.stem):
        if find_class_folders(raw):
            raise ValueError(f"{raw} holds {tars[0].name} and folders of images; move away what is not to be packed")
        return Layout(tars, lambda: read_tars(raw, tars))
    if folder := find_class_folders(raw):
        return Layout([], lambda: read_folders(raw, raw)) if folder == raw else find_layout(folder)
    raise FileNotFoundError(f"{raw} holds nothing that can be packed; it has to hold {LAYOUTS}")


def open_raw(raw: Path, cache: Path) -> tuple[RawImageNet, list[list[Any]] | None]:
    """List a raw data set, or take the listing from `cache` if its archives are as they were.

    Returns the listing, and what `save_listing` needs to cache it (None: it came from the cache, or lists folders,
    which are as quick to list as a cache is to read). Raises `FileNotFoundError` or `ValueError` with a remedy.
    """
    layout = find_layout(raw)
    if not layout.sources:
        return layout.read(), None
    validity = stamp(raw, layout.sources)
    if cached := load_listing(cache, raw, validity):
        return cached, None
    return layout.read(), validity


def cut_validation(data: RawImageNet, fraction: float, seed: int) -> RawImageNet:
    """Move `fraction` of each class, rounded, from train to a validation split that the source lacks: at least one
    image, and not the last one; the first by a hash of seed and name, so that the layout makes no difference.

    Raises `ValueError` when it has one, or no class has two images.
    """
    if "val" in data.splits:
        raise ValueError(f"--val-fraction is for data without validation images, but {data.layout} has them; drop it")
    train = data.splits["train"]
    labels = np.frombuffer(train.label, np.int32)
    hashes = b"".join(place(seed, f"val:{stem(train.name(row))}")[:8] for row in range(len(train)))
    order = np.lexsort((np.frombuffer(hashes, ">u8"), labels))
    bounds = np.searchsorted(labels[order], np.arange(len(data.classes) + 1))
    in_val = np.zeros(len(train), bool)
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        number = max(0, min(end - start - 1, max(1, round((end - start) * fraction))))
        in_val[order[start : start + number]] = True
    if not in_val.any():
        raise ValueError("no class has two images, one of them for validation; use --val-fraction 0")
    splits = {"train": train.take(np.flatnonzero(~in_val)), "val": train.take(np.flatnonzero(in_val))}
    return replace(data, splits=splits)
