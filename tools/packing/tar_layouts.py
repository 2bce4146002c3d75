"""Raw images in tars: one per class, as ImageNet-21k comes, or class folders in one tar or in one for each split.

A folder in a tar is a class where there are several; where it is not clear what is one, nothing is packed.
"""

from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from pipeline.shards import ClassName
from tools.packing.folders import IMAGE_NAME, SPLIT_NAME, VAL_NAMES, is_hidden
from tools.packing.ilsvrc import members
from tools.packing.listing import Listing, RawImageNet


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
    splits = [path for path in tars if SPLIT_NAME.fullmatch(path.stem)]
    tests = [path for path in splits if "test" in path.stem.lower()]
    if "train" in named and (splits == tars or len(classes_in(strip_wrappers(read_tree(named["train"])))) > 1):
        val = next((named[name] for name in VAL_NAMES if name in named), None)
        chosen = {"train": named["train"]} | ({"val": val} if val else {})
        trees = {split: strip_wrappers(read_tree(path)) for split, path in chosen.items()}
        return read_trees(raw, trees, [path for path in tars if path not in chosen.values()])
    if splits == tars:
        raise ValueError(f"{raw} holds {tars[0].name}, but no train.tar or train/ to learn from; add it")
    classes = [path for path in tars if path not in tests]
    if unclear := [path for path in splits if path in classes and path.stem != "train"]:
        raise ValueError(f"{unclear[0]} seems to be a split, not a class; move it away, or rename it and train.tar")
    if len(classes) > 1:
        return read_class_tars(raw, classes, tests)
    return read_one_tar(raw, classes[0], tests)


def read_one_tar(raw: Path, tar: Path, passed_over: list[Path]) -> RawImageNet:
    """List a tar of train/<class> and val/<class>, of class folders, or of one class. Raises as `read_tars`."""
    tree = strip_wrappers(read_tree(tar), but_splits=True)
    tops = set(classes_in(tree))
    if "train" in tops:
        val = next((name for name in VAL_NAMES if name in tops), None)
        names = {"train": "train"} | ({"val": val} if val else {})
        trees = {split: strip_wrappers(inside(tree, name)) for split, name in names.items()}
        rest = {tar / file.name for file in tree.images if not file.folders}
        rest |= {tar / name for name in tops - set(names.values())}
        return read_trees(raw, trees, [*passed_over, *sorted(rest)])
    for name in sorted({folder for file in tree.images for folder in file.folders[:2]}):
        if SPLIT_NAME.fullmatch(name):
            raise ValueError(f"{tar} holds {name}/, which seems to be a split, not a class; call them train and val")
    if len(tops) > 1:
        return read_trees(raw, {"train": tree}, passed_over)
    return read_class_tars(raw, [tar], passed_over)


def read_tree(tar: Path) -> Tree:
    """Read the headers of a tar. Raises `ValueError`."""
    tree = Tree(tar, [], [])
    for name, offset, size in members(tar):
        *folders, base = [part for part in name.split("/") if part not in ("", ".", "..")] or [name]
        if not any(map(is_hidden, (*folders, base))):
            files = tree.images if IMAGE_NAME.fullmatch(base) else tree.others
            files.append(File(tuple(folders), name, offset, size))
    if len(tree.images) != len({file.name for file in tree.images}):
        raise ValueError(f"{tar} holds a file twice; unpack it, which leaves the last one, and pack the folders")
    check_no_shard(tree)
    return tree


def check_no_shard(tree: Tree) -> None:
    """Raise `ValueError` for a shard of WebDataset, in which files of one name make a sample, its label among them."""
    if len({file.folders for file in tree.images}) > 1:  # class folders, in which other files may lie beside images
        return
    images = {sample_key(file)[0] for file in tree.images}
    sidecars = [extension for key, extension in map(sample_key, tree.others) if key in images]
    if "cls" in sidecars:
        raise ValueError(f"{tree.tar} is a WebDataset shard; take it over with make_shards.py adopt")
    if sidecars:
        raise ValueError(
            f"{tree.tar} is a WebDataset shard (.{min(sidecars)} beside each image) without labels (.cls); put the "
            "images of each class into a folder of its own"
        )


def sample_key(file: File) -> tuple[tuple[str, ...], str]:
    """Folders and name up to its first dot, and what follows: WebDataset's key and extension."""
    name, _, extension = file.name.rpartition("/")[2].partition(".")
    return (*file.folders, name), extension


def strip_wrappers(tree: Tree, but_splits: bool = False) -> Tree:
    """The same without folders that hold all images, each of them in a folder of its own; `but_splits`: those that are
    called like splits stay."""
    while tree.images and (top := tree.images[0].folders[:1]) and not (but_splits and SPLIT_NAME.fullmatch(top[0])):
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


def read_class_tars(raw: Path, tars: list[Path], passed_over: list[Path]) -> RawImageNet:
    """List per-class tars, `<wnid>.tar`, no validation images. Raises as `read_tars`."""
    listing, passed_over = Listing(raw), [*passed_over]
    for label, path in enumerate(tqdm(tars, "listing", unit="class", disable=None)):
        tree = read_tree(path)
        if not (files := tree.images or [file for file in tree.others if "." not in Path(file.name).name]):
            raise ValueError(f"{path} holds no image; fetch it again or remove it")
        if len(folders := sorted({file.folders for file in files})) > 1:
            raise ValueError(
                f"{path} holds several folders, such as {'/'.join(folders[-1])!r}: it is not clear what is a class; "
                "unpack it into train/, a folder for each class"
            )
        archive = listing.add_file(path)
        for file in sorted(files, key=lambda file: file.name):
            listing.append(archive, file.name, file.offset, file.size, label)
        passed_over += tree.passed_over() if tree.images else []
    classes = tuple(ClassName(path.stem, path.stem) for path in tars)
    return RawImageNet("per-class tars", classes, {"train": listing}, passed_over=passed_over)
