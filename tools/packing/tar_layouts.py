"""Raw images in tars: one per class, as ImageNet-21k comes, or class folders in one tar or in one for each split.

A folder in a tar is a class where there are several; where it is not clear what is one, nothing is packed.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from pipeline.shards import ClassName
from tools.packing.folders import IMAGE_NAME, OTHER_SPLITS, VAL_NAMES, is_hidden
from tools.packing.ilsvrc import members
from tools.packing.listing import Listing, RawImageNet

TEST_ARCHIVE = "ILSVRC2012_img_test"


class File(NamedTuple):
    """A file in a tar."""

    folders: tuple[str, ...]
    name: str
    """As the tar gives it."""
    offset: int
    size: int


def read_tars(raw: Path, tars: list[Path]) -> RawImageNet:
    """List a folder of tars, sorted by class. Raises `ValueError` for tars without images, and where it is not clear
    which classes their images have."""
    named = {path.stem: path for path in tars}
    only_splits = all(name in ("train", *OTHER_SPLITS) or name.startswith(TEST_ARCHIVE) for name in named)
    if only_splits and "train" not in named:
        raise ValueError(f"{raw} holds {tars[0].name}, but no images to learn from; add {raw / 'train.tar'} or train/")
    if "train" in named and (only_splits or classes_in(strip_wrappers(read_files(named["train"])))):
        val = next((named[name] for name in VAL_NAMES if name in named), None)
        splits = {"train": named["train"]} | ({"val": val} if val else {})
        trees = {split: (path, strip_wrappers(read_files(path))) for split, path in splits.items()}
        passed_over = [path for path in tars if path not in splits.values()]
        return read_trees(raw, trees, passed_over)
    if len(tars) == 1:
        files = strip_wrappers(read_files(tars[0]), but="train")
        folders = {file.folders[0] for file in files if file.folders}
        if "train" in folders:
            val_name = next((name for name in VAL_NAMES if name in folders), "")
            inside = {
                split: [file._replace(folders=file.folders[1:]) for file in files if file.folders[:1] == (name,)]
                for split, name in (("train", "train"), ("val", val_name))
            }
            trees = {split: (tars[0], strip_wrappers(found)) for split, found in inside.items() if found}
            return read_trees(raw, trees, [tars[0] / name for name in sorted(folders - {"train", val_name})])
        if others := sorted(folders & set(OTHER_SPLITS)):
            raise ValueError(f"{tars[0]} holds {others[0]}/, but no train/<class>/ to learn from; add it")
        if len(folders) > 1:
            return read_trees(raw, {"train": (tars[0], files)}, [])
    return read_class_tars(raw, tars)


def read_files(tar: Path) -> list[File]:
    """The files of a tar, without those that systems leave behind. Raises `ValueError`."""
    files = []
    for name, offset, size in members(tar):
        *folders, base = [part for part in name.split("/") if part not in ("", ".", "..")] or [name]
        if not any(map(is_hidden, (*folders, base))):
            files.append(File(tuple(folders), name, offset, size))
    check_no_shard(tar, files)
    return files


def check_no_shard(tar: Path, files: Iterable[File]) -> None:
    """Raise `ValueError` for a shard of WebDataset, in which files of one name make a sample, its label among them."""
    images: set[str] = set()
    others: dict[str, str] = {}
    for file in files:
        folder, _, base = file.name.rpartition("/")
        key, _, extension = f"{folder}/{base.partition('.')[0]}", *base.partition(".")[1:]
        if IMAGE_NAME.fullmatch(base):
            images.add(key)
        else:
            others[key] = extension
    if not (extensions := {extension for key, extension in others.items() if key in images}):
        return
    if "cls" in extensions:
        raise ValueError(f"{tar} is a WebDataset shard; take it over with make_shards.py adopt")
    raise ValueError(
        f"{tar} is a WebDataset shard (.{min(extensions)} beside each image) without labels (.cls); put the images of "
        "each class into a folder of its own"
    )


def strip_wrappers(files: list[File], but: str = "") -> list[File]:
    """The same without folders that hold everything, at least two deep, unless called `but`."""
    while files and (top := files[0].folders[:1]) and top[0] != but:
        if not all(len(file.folders) > 1 and file.folders[:1] == top for file in files):
            break
        files = [file._replace(folders=file.folders[1:]) for file in files]
    return files


def classes_in(files: list[File]) -> list[str]:
    """The folders that hold images, sorted."""
    return sorted({file.folders[0] for file in files if file.folders and IMAGE_NAME.fullmatch(file.name)})


def read_trees(raw: Path, trees: dict[str, tuple[Path, list[File]]], passed_over: list[Path]) -> RawImageNet:
    """List class folders in tars, by split: the tar, and its files. Raises `ValueError` for images in none, and for a
    class that only the validation images have."""
    wnids = classes_in(trees["train"][1])
    index = {wnid: label for label, wnid in enumerate(wnids)}
    splits = {}
    for split, (tar, files) in trees.items():
        listing = splits[split] = Listing(raw)
        archive = listing.add_file(tar)
        for file in sorted(files):
            if not IMAGE_NAME.fullmatch(file.name):
                passed_over.append(tar / file.name)
            elif not file.folders:
                raise ValueError(f"{tar} holds {file.name!r} outside of its class folders; move or remove it")
            elif file.folders[0] not in index:
                raise ValueError(f"{tar} holds {file.name!r}, whose class has no training images; add or remove it")
            else:
                listing.append(archive, file.name, file.offset, file.size, index[file.folders[0]])
        if not listing:
            raise ValueError(f"{tar} holds no images in class folders; put those of each class into one, or unpack it")
    classes = tuple(ClassName(wnid, wnid) for wnid in wnids)
    return RawImageNet("class folders in tars", classes, splits, passed_over=passed_over)


def read_class_tars(raw: Path, tars: list[Path]) -> RawImageNet:
    """List per-class tars, `<wnid>.tar`, no validation images. Raises as `read_tars`."""
    listing, passed_over = Listing(raw), list[Path]()
    for label, path in enumerate(tqdm(tars, "listing", unit="class", disable=None)):
        found = read_files(path)
        files = [file for file in found if IMAGE_NAME.fullmatch(file.name)] or found
        passed_over += [path / file.name for file in sorted(set(found) - set(files))]
        if not files:
            raise ValueError(f"{path} holds no image; fetch it again or remove it")
        if len(folders := sorted({file.folders for file in files})) > 1:
            raise ValueError(
                f"{path} holds several folders, such as {'/'.join(folders[-1])!r}: it is not clear what is a class; "
                "call it train.tar if they are, or unpack it"
            )
        archive = listing.add_file(path)
        for file in sorted(files, key=lambda file: file.name):
            listing.append(archive, file.name, file.offset, file.size, label)
    classes = tuple(ClassName(path.stem, path.stem) for path in tars)
    return RawImageNet("per-class tars", classes, {"train": listing}, passed_over=passed_over)
