"""Raw images as files in folders, one folder per class: anybody's, or Kaggle's tree of ILSVRC-2012."""

import csv
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from pipeline.shards import ClassName
from tools.packing.listing import Listing, RawImageNet

IMAGE_NAME = re.compile(r".+\.(jpe?g?|jfif|png|bmp|gif|webp|tiff?|p[gp]m|avif)", re.IGNORECASE | re.DOTALL)
VAL_NAMES = ("val", "validation", "valid")
"""What a folder or a tar of validation images may be called."""
SPLIT_NAME = re.compile(
    r"(ilsvrc2012_img_)?(train|training|val|valid|validation|test|testing)([-_]?(set|sets|data|images?|split|v?\d+))*",
    re.IGNORECASE,
)
"""What people call a split; a class of such a name is told to be given another."""
VAL_SOLUTION = "LOC_val_solution.csv"
SYNSET_WORDS = "LOC_synset_mapping.txt"


def is_hidden(name: str) -> bool:
    """Whether a file or folder is one that systems leave behind: .DS_Store, ._photo.jpg, __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


def image_files(folder: Path, others: list[Path], above: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
    """The image files under a folder by their extensions, sorted, through links, without hidden files.

    Appends what is no image to `others`; `above` are the folders that we came through. Raises `ValueError` when links
    lead in a circle.
    """
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise ValueError(f"{folder} is a link that leads in a circle; remove it")
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if is_hidden(entry.name):
            continue
        if entry.is_dir():
            yield from image_files(Path(entry.path), others, (*above, here))
        elif IMAGE_NAME.fullmatch(entry.name):
            yield Path(entry.path)
        else:
            others.append(Path(entry.path))


def append_folder(listing: Listing, folder: Path, label: int, others: list[Path]) -> int:
    """Add the images of one class folder; returns their number.

    Raises `FileNotFoundError` for a broken link and `ValueError` for what is no plain file.
    """
    number = len(listing)
    for path in image_files(folder, others):
        listing.append(-1, os.path.relpath(path, listing.root), 0, file_size(path), label)
    return len(listing) - number


def file_size(path: Path) -> int:
    """Length in bytes; raises as `append_folder`."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is a link to nothing; restore or remove it") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is no plain file; remove it")
    return status.st_size


def class_folders(split: Path, others: list[Path]) -> list[str]:
    """The classes of a split: its folders, sorted; appends files to `others`. Raises `ValueError` for no class."""
    entries = [entry for entry in os.scandir(split) if not is_hidden(entry.name)]
    others += [Path(entry.path) for entry in entries if not entry.is_dir()]
    if not (wnids := sorted(entry.name for entry in entries if entry.is_dir())):
        raise ValueError(f"{split} holds no class folders; put the images of each class into {split}/<class>")
    return wnids


def list_train(raw: Path, folder: Path, others: list[Path]) -> tuple[list[str], Listing]:
    """The classes of a train folder and its images. Raises `ValueError` for a class without images."""
    wnids, train = class_folders(folder, others), Listing(raw)
    for label, wnid in enumerate(wnids):
        if not append_folder(train, folder / wnid, label, others):
            raise ValueError(f"{folder / wnid} holds no image; fill it, fetch it again or remove the folder")
    return wnids, train


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted."""
    return sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir() and not is_hidden(entry.name))


def unwrap_split(split: Path) -> Path:
    """A split's folder, or the one in it that holds its classes: archives of train/ unpack to train/train/ easily."""
    visible = [entry for entry in os.scandir(split) if not is_hidden(entry.name)]
    same = [entry for entry in visible if entry.is_dir() and entry.name == split.name]
    return split / split.name if len(visible) == len(same) == 1 else split


def find_class_folders(raw: Path) -> Path | None:
    """Where a folder without train/ holds class folders: it, or the only folder in it; None where there is no image.

    Raises `ValueError` where its folders, or those in them, are splits.
    """
    folders = subfolders(raw)
    if not any(next(image_files(folder, []), None) for folder in folders):
        return None
    loose = any(IMAGE_NAME.fullmatch(entry.name) for entry in os.scandir(raw))
    wraps = [folder for folder in folders if not holds_images(folder)]
    if len(folders) == len(wraps) == 1 and not loose and not SPLIT_NAME.fullmatch(folders[0].name):
        return folders[0]
    for folder in (*folders, *(inner for wrapper in wraps for inner in subfolders(wrapper))):
        if SPLIT_NAME.fullmatch(folder.name):
            raise ValueError(f"{folder} seems to be a split, not a class; give a folder with train/ and val/")
    return raw


def holds_images(folder: Path) -> bool:
    """Whether images lie in a folder itself."""
    return any(IMAGE_NAME.fullmatch(entry.name) and entry.is_file() for entry in os.scandir(folder))


def read_folders(raw: Path, train_folder: Path) -> RawImageNet:
    """List `train/<class>/**/*.jpg` and, if it is there, `val/<class>/**/*.jpg` (also called `validation`), or the
    classes of another folder.

    Raises `ValueError` for a class without images in train, or one that only the validation images have.
    """
    others: list[Path] = []
    wnids, train = list_train(raw, unwrap_split(train_folder), others)
    index = {wnid: position for position, wnid in enumerate(wnids)}
    splits, val = {"train": train}, Listing(raw)
    folder = next((raw / name for name in VAL_NAMES if train_folder != raw and (raw / name).is_dir()), None)
    if train_folder != raw:
        others += [each for each in subfolders(raw) if each not in (train_folder, folder)]
    if folder:
        folder = unwrap_split(folder)
        for wnid in class_folders(folder, others):
            if wnid not in index:
                raise ValueError(f"{folder / wnid} has no counterpart in {train_folder}; remove it or add the class")
            append_folder(val, folder / wnid, index[wnid], others)
        if not val:
            raise ValueError(f"{folder} holds no image in its class folders; fill or remove it")
        splits["val"] = val
    return RawImageNet(
        "class folders", tuple(ClassName(wnid, wnid) for wnid in wnids), splits, in_folders=True, passed_over=others
    )


def kaggle_tree(raw: Path) -> Path | None:
    """The folder CLS-LOC of Kaggle's download, if `raw` is or holds it."""
    candidates = [raw, *(raw / inner for inner in ("CLS-LOC", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC"))]
    return next((path for path in candidates if path.resolve().name == "CLS-LOC" and (path / "train").is_dir()), None)


def read_kaggle(raw: Path, tree: Path) -> RawImageNet:
    """List Kaggle's tree: `train/<wnid>/*.JPEG`, and `val/*.JPEG` labelled by LOC_val_solution.csv.

    Raises `FileNotFoundError` or `ValueError` when the two do not fit.
    """
    homes = (raw, *[tree.resolve(), *tree.resolve().parents][:4])
    solution = next((home / VAL_SOLUTION for home in homes if (home / VAL_SOLUTION).is_file()), None)
    if solution is None:
        raise FileNotFoundError(f"{raw / VAL_SOLUTION} is missing; it labels the validation images, fetch it again")
    with solution.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        try:
            wnid_of = {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
        except (KeyError, IndexError, AttributeError, UnicodeDecodeError, csv.Error):
            raise ValueError(f"{solution} is not Kaggle's list of validation labels; fetch it again") from None
    words = solution.with_name(SYNSET_WORDS)
    lines = words.read_text("utf-8", errors="replace").splitlines() if words.is_file() else []
    named = dict(line.split(" ", 1) for line in lines if " " in line)
    others: list[Path] = []
    wnids, train = list_train(raw, tree / "train", others)
    index = {wnid: position for position, wnid in enumerate(wnids)}
    val = Listing(raw)
    for path in image_files(tree / "val", others):
        wnid = wnid_of.get(path.stem, "")
        if wnid not in index:
            raise ValueError(f"{solution} gives {path.name} no class that {tree / 'train'} has; fetch it again")
        val.append(-1, os.path.relpath(path, raw), 0, file_size(path), index[wnid])
    if len(val) != len(wnid_of) or len({Path(image.name).stem for image in val}) != len(val):
        raise ValueError(f"{tree / 'val'} holds {len(val)} images, or one twice; {solution} labels {len(wnid_of)}")
    if not val:
        raise ValueError(f"{tree / 'val'} holds no image; fetch it again")
    classes = tuple(ClassName(wnid, named.get(wnid, wnid)) for wnid in wnids)
    return RawImageNet(
        "Kaggle's ILSVRC tree", classes, {"train": train, "val": val}, in_folders=True, passed_over=others
    )
