"""Raw images as files in folders, one folder per class: anybody's, or Kaggle's tree of ILSVRC-2012."""

import csv
import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.shards import ClassName
from tools.listing import Listing, RawImageNet

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}
VAL_SOLUTION = "LOC_val_solution.csv"
SYNSET_WORDS = "LOC_synset_mapping.txt"


def image_files(folder: Path) -> Iterator[Path]:
    """The image files under a folder by their extensions, sorted, through links, without hidden files.

    Raises `ValueError` when links lead in a circle.
    """
    for directory, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if len(Path(directory).parts) - len(folder.parts) > 32:
            raise ValueError(f"{directory} is nested too deeply; a link leads in a circle, remove it")
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS:
                yield Path(directory) / name


def append_folder(listing: Listing, folder: Path, label: int) -> int:
    """Add the images of one class folder; returns their number. Raises `FileNotFoundError` for a broken link."""
    number = len(listing)
    for path in image_files(folder):
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} is a link to nothing; restore or remove it") from None
        listing.append(-1, os.path.relpath(path, listing.root), 0, size, label)
    return len(listing) - number


def class_folders(split: Path) -> list[str]:
    """The classes of a split: its folders, sorted. Raises `ValueError` when there is none."""
    wnids = sorted(entry.name for entry in os.scandir(split) if entry.is_dir() and not entry.name.startswith("."))
    if not wnids:
        raise ValueError(f"{split} holds no class folders; put the images of each class into {split}/<class>")
    return wnids


def read_folders(raw: Path) -> RawImageNet:
    """List `train/<class>/**/*.jpg` and, if it is there, `val/<class>/**/*.jpg` (also called `validation`).

    Raises `ValueError` for a class without images in train, or one that only the validation images have.
    """
    wnids = class_folders(raw / "train")
    index = {wnid: position for position, wnid in enumerate(wnids)}
    train, val = Listing(raw), Listing(raw)
    for wnid in wnids:
        if not append_folder(train, raw / "train" / wnid, index[wnid]):
            raise ValueError(f"{raw / 'train' / wnid} holds no image; remove the folder or fill it")
    splits = {"train": train}
    folder = next((raw / name for name in ("val", "validation") if (raw / name).is_dir()), None)
    if folder:
        for wnid in class_folders(folder):
            if wnid not in index:
                raise ValueError(f"{folder / wnid} has no counterpart in {raw / 'train'}; remove it or add the class")
            append_folder(val, folder / wnid, index[wnid])
        if not val:
            raise ValueError(f"{folder} holds no image in its class folders; fill or remove it")
        splits["val"] = val
    return RawImageNet("class folders", tuple(ClassName(wnid, wnid) for wnid in wnids), splits)


def kaggle_tree(raw: Path) -> Path | None:
    """The folder CLS-LOC of Kaggle's download, if `raw` is or holds it."""
    candidates = [raw, raw / "Data/CLS-LOC", raw / "ILSVRC/Data/CLS-LOC"]
    return next((path for path in candidates if path.name == "CLS-LOC" and (path / "train").is_dir()), None)


def read_kaggle(raw: Path, tree: Path) -> RawImageNet:
    """List Kaggle's tree: `train/<wnid>/*.JPEG`, and `val/*.JPEG` labelled by LOC_val_solution.csv.

    Raises `FileNotFoundError` or `ValueError` when the two do not fit.
    """
    homes = (raw, tree, *list(tree.absolute().parents)[:3])
    solution = next((home / VAL_SOLUTION for home in homes if (home / VAL_SOLUTION).is_file()), None)
    if solution is None:
        raise FileNotFoundError(f"{raw / VAL_SOLUTION} is missing; it labels the validation images, fetch it again")
    with solution.open(newline="") as file:
        rows = csv.DictReader(file)
        try:
            wnid_of = {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
        except (KeyError, IndexError, AttributeError, csv.Error):
            raise ValueError(f"{solution} is not Kaggle's list of validation labels; fetch it again") from None
    words = solution.with_name(SYNSET_WORDS)
    lines = words.read_text(errors="replace").splitlines() if words.is_file() else []
    named = dict(line.split(" ", 1) for line in lines if " " in line)
    wnids = class_folders(tree / "train")
    index = {wnid: position for position, wnid in enumerate(wnids)}
    train, val = Listing(raw), Listing(raw)
    for wnid in wnids:
        if not append_folder(train, tree / "train" / wnid, index[wnid]):
            raise ValueError(f"{tree / 'train' / wnid} holds no image; fetch it again or remove the folder")
    for path in image_files(tree / "val"):
        wnid = wnid_of.get(path.stem, "")
        if wnid not in index:
            raise ValueError(f"{solution} gives {path.name} no class that {tree / 'train'} has; fetch it again")
        val.append(-1, os.path.relpath(path, raw), 0, path.stat().st_size, index[wnid])
    if len(val) != len(wnid_of):
        raise ValueError(f"{tree / 'val'} holds {len(val)} images, {solution} labels {len(wnid_of)}; fetch them again")
    if not train or not val:
        raise ValueError(f"{tree} holds no {'train' if not train else 'validation'} image; fetch it again")
    classes = tuple(ClassName(wnid, named.get(wnid, wnid)) for wnid in wnids)
    return RawImageNet("Kaggle's ILSVRC tree", classes, {"train": train, "val": val})
