"""Raw images in tars: one per class, as ImageNet-21k comes, or class folders in one tar or in one for each split.

A folder in a tar is a class where there are several; where it is not clear what is one, nothing is packed.
"""

from collections.abc import Collection
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


class Tree(NamedTuple):
    """What a tar holds, without what systems leave behind."""

    tar: Path
    images: list[File]
    """Files that are images by their names."""
    others: list[File]

    def passed_over(self) -> list[Path]:
        """The other files, for the output."""
        return [self.tar / file.name for file in sorted(self.others)]


def read_tars(raw: Path, tars: list[Path]) -> RawImageNet:
    """List a folder of tars, sorted by class. Raises `ValueError` for tars without images, and where it is not clear
    which classes their images have."""
    named = {path.stem: path for path in tars}
    only_splits = all(name in ("train", *OTHER_SPLITS) or name.startswith(TEST_ARCHIVE) for name in named)
    if only_splits and "train" not in named:
        raise ValueError(f"{raw} holds {tars[0].name}, but no images to learn from; add {raw / 'train.tar'} or train/")
    if "train" in named and (only_splits or len(classes_in(strip_wrappers(read_tree(named["train"])))) > 1):
        val_tar = next((named[name] for name in VAL_NAMES if name in named), None)
        splits = {"train": named["train"]} | ({"val": val_tar} if val_tar else {})
        trees = {split: strip_wrappers(read_tree(path)) for split, path in splits.items()}
        return read_trees(raw, trees, [path for path in tars if path not in splits.values()])
    if len(tars) == 1:
        tree = strip_wrappers(read_tree(tars[0]), but=("train", *OTHER_SPLITS))
        folders = set(classes_in(tree))
        if "train" in folders:
            val = next((name for name in VAL_NAMES if name in folders), None)
            names = {"train": "train"} | ({"val": val} if val else {})
            trees = {split: strip_wrappers(inside(tree, name)) for split, name in names.items()}
            rest = sorted(folders - set(names.values()))
            return read_trees(raw, trees, [*(tars[0] / name for name in rest)])
        if others := sorted(folders & set(OTHER_SPLITS)):
            raise ValueError(f"{tars[0]} holds {others[0]}/, but no train/<class>/ to learn from; add it")
        if len(folders) > 1:
            return read_trees(raw, {"train": tree}, [])
    return read_class_tars(raw, tars)


def read_tree(tar: Path) -> Tree:
    """Read the headers of a tar. Raises `ValueError`."""
    tree = Tree(tar, [], [])
    for name, offset, size in members(tar):
        *folders, base = [part for part in name.split("/") if part not in ("", ".", "..")] or [name]
        if not any(map(is_hidden, (*folders, base))):
            files = tree.images if IMAGE_NAME.fullmatch(base) else tree.others
            files.append(File(tuple(folders), name, offset, size))
    check_no_shard(tree)
    return tree


def check_no_shard(tree: Tree) -> None:
    """Raise `ValueError` for a shard of WebDataset, in which files of one name make a sample, its label among them."""
    images = {sample_key(file)[0] for file in tree.images}
    beside = [extension for key, extension in map(sample_key, tree.others) if key in images]
    if "cls" in beside:
        raise ValueError(f"{tree.tar} is a WebDataset shard; take it over with make_shards.py adopt")
    if beside:
        raise ValueError(
            f"{tree.tar} is a WebDataset shard (.{min(beside)} beside each image) without labels (.cls); put the "
            "images of each class into a folder of its own"
        )


def sample_key(file: File) -> tuple[tuple[str, ...], str]:
    """Folders and name up to its first dot, and what follows: WebDataset's key and extension."""
    name, _, extension = file.name.rpartition("/")[2].partition(".")
    return (*file.folders, name), extension


def strip_wrappers(tree: Tree, but: Collection[str] = ()) -> Tree:
    """The same without folders that hold all images, each of them in a folder of its own, unless called as in `but`."""
    while tree.images and (top := tree.images[0].folders[:1]) and top[0] not in but:
        if not all(len(file.folders) > 1 and file.folders[:1] == top for file in tree.images):
            break
        tree = inside(tree, top[0])
    return tree


def inside(tree: Tree, folder: str) -> Tree:
    """The images in a folder of a tree, seen from there."""
    found = [file for file in tree.images if file.folders[:1] == (folder,)]
    return tree._replace(images=[file._replace(folders=file.folders[1:]) for file in found])


def classes_in(tree: Tree) -> list[str]:
    """The folders that hold images, sorted."""
    return sorted({file.folders[0] for file in tree.images if file.folders})


def read_trees(raw: Path, trees: dict[str, Tree], passed_over: list[Path]) -> RawImageNet:
    """List class folders in tars, by split. Raises `ValueError` for images outside of them, and for a class that only
    the validation images have."""
    wnids = classes_in(trees["train"])
    index = {wnid: label for label, wnid in enumerate(wnids)}
    splits = {}
    for split, tree in trees.items():
        listing = splits[split] = Listing(raw)
        archive = listing.add_file(tree.tar)
        for file in sorted(tree.images):
            if not file.folders:
                raise ValueError(f"{tree.tar} holds {file.name!r} outside of its class folders; move or remove it")
            if file.folders[0] not in index:
                raise ValueError(
                    f"{tree.tar} holds {file.name!r}, whose class has no training images; add or remove it"
                )
            listing.append(archive, file.name, file.offset, file.size, index[file.folders[0]])
        if not listing:
            raise ValueError(f"{tree.tar} holds no class folders; put the images of each class into one, or unpack it")
    others = {path for tree in trees.values() for path in tree.passed_over()}
    classes = tuple(ClassName(wnid, wnid) for wnid in wnids)
    return RawImageNet("class folders in tars", classes, splits, passed_over=[*sorted(others), *passed_over])


def read_class_tars(raw: Path, tars: list[Path]) -> RawImageNet:
    """List per-class tars, `<wnid>.tar`, no validation images. Raises as `read_tars`."""
    listing, passed_over = Listing(raw), list[Path]()
    for label, path in enumerate(tqdm(tars, "listing", unit="class", disable=None)):
        tree = read_tree(path)
        if not (files := tree.images or tree.others):
            raise ValueError(f"{path} holds no image; fetch it again or remove it")
        if len(folders := sorted({file.folders for file in files})) > 1:
            raise ValueError(
                f"{path} holds several folders, such as {'/'.join(folders[-1])!r}: it is not clear what is a class; "
                "call it train.tar if they are, or unpack it"
            )
        archive = listing.add_file(path)
        for file in sorted(files, key=lambda file: file.name):
            listing.append(archive, file.name, file.offset, file.size, label)
        passed_over += tree.passed_over() if tree.images else []
    classes = tuple(ClassName(path.stem, path.stem) for path in tars)
    return RawImageNet("per-class tars", classes, {"train": listing}, passed_over=passed_over)
