"""Recognize the layout of a raw data set and list its images in place; nothing is extracted.

docs/data.md lists the layouts. A split is a folder of class folders, or a flat folder with a table of labels; tars are
folders, too. A class is a folder that holds images. What is ambiguous is refused.
"""

import functools
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.errors import UserError
from pipeline.shards import ClassName
from tools.packing.labels import Labels, compose, read_class_file, read_labels, strip_extension
from tools.packing.listing import Listing, RawImageNet, load_listing, stamp_archives
from tools.packing.parquet import find_parquet, read_parquet
from tools.packing.tars import IMAGE_NAME, Member, is_system_file, list_members

LAYOUTS = "images (.jpg, .png and the like) in class folders, tars or another layout of docs/data.md"
TRAIN_ARCHIVE = "ILSVRC2012_img_train.tar"
VAL_ARCHIVE = "ILSVRC2012_img_val.tar"
DEVKIT_ARCHIVE = "ILSVRC2012_devkit_t12.tar.gz"
ARCHIVES = {  # and their published MD5 sums
    TRAIN_ARCHIVE: "1d675b47d978889d74fa0da5fadfb00e",
    VAL_ARCHIVE: "29b22e2961454d5413ddabcf34fc5622",
    DEVKIT_ARCHIVE: "fa75699e90414af021442c21a62c3abf",
}
VAL_NAMES = ("val", "validation", "valid")
"""Names of a folder or a tar of validation images."""
SPLIT_NAME = re.compile(
    r"(ilsvrc2012_img_)?(train|training|val|valid|validation|dev|test|testing)"
    r"([-_]?(set|sets|data|images?|split|blurred|v?\d+))*",
    re.IGNORECASE,
)
"""Names that mean a split, so that a class cannot have one."""
TABLES = ("LOC_val_solution.csv", "val_annotations.txt")
"""Labels of the validation images in Kaggle's download and in tiny-imagenet."""
WORDS = ("LOC_synset_mapping.txt", "words.txt")
"""Lines of wnid and words in the same."""
UNPACK = {
    "gz": "gunzip",
    "bz": "bunzip2",
    "xz": "unxz",
    "zst": "unzstd",
    "zip": "unzip",
    "7z": "7z x",
    "rar": "unrar x",
}
"""Programs by a part of the extension of archives; a tar is then read as it is."""


def open_raw(
    raw: Path, cache: Path, labels: Path | None = None
) -> tuple[RawImageNet, list[list[Any]] | None]:
    """List a raw data set, or load the listing from `cache` if the archives are unchanged. `labels`: a list of path and
    class, for images that are not in class folders.

    Returns the listing, and the stamps that `save_listing` needs (None: it came from the cache, or from folders, which
    are as fast to list). Raises `FileNotFoundError` or `ValueError`.
    """
    if not raw.is_dir():
        raise FileNotFoundError(f"{raw}: not a folder; expected one with {LAYOUTS}")
    if labels:
        return read_labelled(raw, read_labels(labels, of_all=True)), None
    sources, read = find_layout(raw)
    if not sources:
        return read(), None
    validity = stamp_archives(raw, sources)
    if cached := load_listing(cache, raw, validity):
        return cached, None
    return read(), validity


def find_layout(raw: Path) -> tuple[list[Path], Callable[[], RawImageNet]]:
    """Recognize a layout. Returns its archives (empty: not cached) and the function that lists it.

    Raises `FileNotFoundError` or `ValueError` for an unknown layout.
    """
    if (raw / TRAIN_ARCHIVE).exists() or (raw / VAL_ARCHIVE).exists():
        return [raw / name for name in ARCHIVES if (raw / name).is_file()], lambda: read_archives(raw)
    if any((files := find_parquet(raw)).values()):
        return [*files["train"], *files["val"]], lambda: read_parquet(raw, files)
    tree = unwrap(read_folder(find_kaggle_tree(raw) or raw), keep_splits=True, keep_tars=True)
    in_folders = any(
        holds_images(read(), or_tars=True) for name, read in tree.folders.items() if name not in tree.tars
    )
    if not (in_folders or tree.tars or tree.images):
        others = collect_images(tree)[1]
        refuse_compressed(others)
        got = f"{len(others)} other files, such as {others[0]}" if others else "none"
        raise FileNotFoundError(f"{raw}: no images found; expected {LAYOUTS}, got {got}")
    tables = [path for path in tree.others if path.name in (*TABLES, *WORDS)]
    tars = [tree.locate(name) for name in tree.folders if name in tree.tars]
    return [] if in_folders else tars + tables * bool(tars), lambda: read_tree(raw, tree)


def refuse_compressed(files: list[Path]) -> None:
    """Raise `UserError` if there is a compressed archive among files."""
    for path in files:
        program = next((name for part, name in UNPACK.items() if part in path.suffix.lower()), None)
        if program and path.is_file():
            command = f"cd {shlex.quote(str(path.parent))} && {program} {shlex.quote(path.name)}"
            raise UserError(
                f"{path}: expected a tar or a folder, got a compressed file; move it away, or run {command}"
            )
        if program or path.suffix.lower() == ".tar" != path.suffix:  # in a tar, or .TAR
            raise UserError(f"{path}: expected NAME.tar or a folder; unpack it, rename it, or move it away")


# ---- ILSVRC-2012's archives


def read_archives(raw: Path) -> RawImageNet:
    """List the archives of ILSVRC-2012, or without the training images the other two.

    Class index = position among the sorted wnids; the devkit's validation labels are ILSVRC2012_IDs, another order,
    mapped by its `meta.mat`. Raises `FileNotFoundError` for a missing archive, `ValueError` for an unexpected one.
    """
    train = raw / TRAIN_ARCHIVE
    for name in ARCHIVES:
        if not (raw / name).is_file() and not (raw / name == train and (raw / DEVKIT_ARCHIVE).is_file()):
            raise FileNotFoundError(f"{raw / name}: not found; keep the archives' original names")
    by_id, ground_truth = read_devkit(raw / DEVKIT_ARCHIVE)
    # Line n of the ground truth belongs to ILSVRC2012_val_<n>.JPEG.
    wnid_of = {f"ILSVRC2012_val_{n:08}": by_id[label].wnid for n, label in enumerate(ground_truth, 1)}
    words = {name.wnid: name.words for name in by_id.values()}
    trees = {"train": read_tar(train)} if train.is_file() else {}
    if unknown := sorted({name for tree in trees.values() for name in tree.folders} - words.keys()):
        raise UserError(
            f"{train}: expected classes of {DEVKIT_ARCHIVE}, got {unknown[0]}; download both again"
        )
    trees["val"] = read_tar(raw / VAL_ARCHIVE)
    labels = Labels(raw / DEVKIT_ARCHIVE, wnid_of)
    return read_splits(raw, trees, [], labels, words, "ILSVRC-2012 archives")


def verify_md5(raw: Path, layout: str) -> None:
    """Compare the archives with the published MD5 sums. Raises `UserError` for a difference, and for other layouts."""
    if "archives" not in layout:
        raise UserError(f"--check-md5: expected the archives of ILSVRC-2012, got {layout}; leave it out")
    for name, published in ARCHIVES.items():
        if name == TRAIN_ARCHIVE and not (raw / name).is_file():
            continue
        with (raw / name).open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        print(f"{raw / name}: MD5 {found}", flush=True)
        if found != published:
            raise UserError(f"{raw / name}: expected MD5 {published}, got {found}; download it again")


def read_devkit(path: Path) -> tuple[dict[int, ClassName], list[int]]:
    """Read the classes (leaves of the hierarchy) by ILSVRC2012_ID, and the validation labels, which are such IDs.

    Raises `UserError` when the devkit is damaged or a label has no class.
    """
    folder = "ILSVRC2012_devkit_t12/data"
    try:
        with tarfile.open(path, "r:gz") as tar:
            files = {}
            for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt"):
                file = tar.extractfile(f"{folder}/{name}")
                files[name] = file.read() if file else b""
        by_id = {
            identifier: ClassName(wnid, words)
            for identifier, wnid, words, children in read_synsets(files["meta.mat"])
            if not children
        }
        ground_truth = [int(line) for line in files["ILSVRC2012_validation_ground_truth.txt"].split()]
    except Exception as error:  # tarfile and zlib raise many kinds for damaged input
        raise UserError(
            f"{path}: not the devkit of ILSVRC-2012, or damaged ({error}); download it again"
        ) from None
    if unknown := sorted(set(ground_truth) - set(by_id)):
        raise UserError(f"{path}: label {unknown[0]} is not in its meta.mat; download it again")
    return by_id, ground_truth


READ_SYNSETS = """
import io, json, resource, sys
from scipy.io import loadmat
# Enough for the libraries and ten thousand rows; a damaged size is refused.
resource.setrlimit(resource.RLIMIT_DATA, (2**29, 2**29))
synsets = loadmat(io.BytesIO(sys.stdin.buffer.read()), squeeze_me=True)["synsets"]
names = {"ILSVRC2012_ID": int, "WNID": str, "words": str, "num_children": int}
json.dump([[kind(row[name]) for name, kind in names.items()] for row in synsets], sys.stdout)
"""
"""Runs in a subprocess: scipy's reader is compiled code, which one wrong byte in four crashes or makes allocate all of
the memory."""


def read_synsets(mat: bytes) -> list[tuple[int, str, str, int]]:
    """Read (ILSVRC2012_ID, wnid, words, number of children) of each synset in `meta.mat`. Raises `UserError`."""
    process = subprocess.run(
        [sys.executable, "-c", READ_SYNSETS], input=mat, capture_output=True, check=False
    )
    if process.returncode:
        last = process.stderr.decode(errors="replace").splitlines()[-1:] if process.returncode > 0 else []
        raise UserError(f"unreadable meta.mat{''.join(f': {line}' for line in last)}")
    return [tuple(row) for row in json.loads(process.stdout)]


# ---- folders, on disk and in tars


@dataclass(frozen=True)
class Folder:
    """A folder on disk or in a tar, or a tar. System files are left out."""

    path: Path
    """Its path, through the tar if it is in one."""
    folders: "dict[str, Callable[[], Folder]]" = field(default_factory=dict)
    """Functions that read the folders and tars in it, by name (of a tar, without extension), sorted."""
    images: list[Member] = field(default_factory=list)
    """Images in it outside of folders; those on disk are named by their paths."""
    others: list[Path] = field(default_factory=list)
    """Other files in it (in a tar, in all of the tar)."""
    tars: frozenset[str] = frozenset()
    """Which of the folders are tars on disk."""
    tar: Path | None = None
    """The tar that it is in."""

    def locate(self, name: str) -> Path:
        """Return the path of one of its folders."""
        return self.path / (f"{name}.tar" if name in self.tars else name)

    def loose_files(self) -> list[Path]:
        """List its files outside of folders."""
        return sorted([*self.others, *(Path(self.tar or "", image.name) for image in self.images)])


def read_folder(path: Path, parents: tuple[tuple[int, int], ...] = ()) -> Folder:
    """Read a folder on disk, following links; `parents`: device and inode of the folders above.

    Raises `UserError` for links that form a loop, and for what is called an image but is not a file.
    """
    status = path.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in parents:
        raise UserError(f"{path}: the link forms a loop; remove it")
    entries = [entry for entry in os.scandir(path) if not is_system_file(entry.name)]
    inside = (*parents, identity)
    readers = {each.name: partial(read_folder, Path(each.path), inside) for each in entries if each.is_dir()}
    images, others, tars = list[Member](), list[Path](), dict[str, Callable[[], Folder]]()
    for entry in sorted(entries, key=lambda entry: entry.name):
        name = entry.name.removesuffix(".tar")
        if entry.name in readers:
            continue
        if IMAGE_NAME.fullmatch(entry.name):
            if not entry.is_file():
                raise UserError(
                    f"{entry.path}: expected an image, got a broken link or not a regular file; remove it"
                )
            images.append(Member(entry.path, 0, entry.stat().st_size))
        elif name != entry.name and not (name in readers and holds_images(readers[name]())):
            tars[name] = partial(read_tar, Path(entry.path))  # unless it was extracted next to it
        else:
            others.append(Path(entry.path))
    return Folder(path, dict(sorted((readers | tars).items())), images, others, frozenset(tars))


Placed = tuple[tuple[str, ...], Member]
"""A file of a tar and the folders that it is in."""


@functools.lru_cache(maxsize=2)
def read_tar(tar: Path, inside: str = "", start: int = 0, length: int | None = None) -> Folder:
    """Read the headers of a tar, or of the tar called `inside` at an offset of it. Raises `UserError`, also for a
    WebDataset shard."""
    path, files, others = tar / inside, list[Placed](), list[Placed]()
    for member in list_members(tar, start, length):
        parts = [part for part in member.name.split("/") if part not in ("", ".", "..")] or [member.name]
        if not is_system_file(member.name):
            is_read = IMAGE_NAME.fullmatch(parts[-1]) or parts[-1].endswith(".tar")
            (files if is_read else others).append((tuple(parts[:-1]), member))
    if not files:  # as ImageNet-21k has them
        files = [file for file in others if "." not in Path(file[1].name).name]
        others = [file for file in others if "." in Path(file[1].name).name]
    if len(files) != len({member.name for _, member in files}):
        raise UserError(
            f"{path}: holds a file twice; extract it, which keeps the last one, and pack the folders"
        )
    if len({folders for folders, _ in files}) == 1:  # class folders may hold other files, too
        keys = {split_key(member)[0] for _, member in files}
        if extensions := [split_key(member)[1] for _, member in others if split_key(member)[0] in keys]:
            raise UserError(
                f"{path}: expected raw images, got a WebDataset shard (.{min(extensions)} with each image); use "
                "make_shards.py adopt if it has labels (.cls, .json), else put each class into its own folder"
            )
    return nest_files(tar, path, files, sorted(path / member.name for _, member in others))


def split_key(member: Member) -> tuple[str, str]:
    """Split a path at the first dot of its base name: WebDataset's key and extension."""
    folder, _, base = member.name.rpartition("/")
    name, _, extension = base.partition(".")
    return f"{folder}/{name}", extension


def nest_files(tar: Path, path: Path, files: list[Placed], others: list[Path]) -> Folder:
    """Make the folder at `path` in a tar of its images and tars, and of other files."""
    groups, readers, images = dict[str, list[Placed]](), dict[str, Callable[[], Folder]](), list[Member]()
    for folders, member in files:
        if folders:
            groups.setdefault(folders[0], []).append((folders[1:], member))
        elif member.name.endswith(".tar"):
            readers[Path(member.name).stem] = partial(read_tar, tar, *member)
        else:
            images.append(member)
    if both := sorted(groups.keys() & readers.keys()):
        raise UserError(f"{path / both[0]}: expected a folder or a tar of this name, got both; extract {tar}")
    inside = {name: partial(nest_files, tar, path / name, groups[name], []) for name in groups}
    return Folder(path, dict(sorted((inside | readers).items())), images, others, frozenset(readers), tar)


def holds_images(folder: Folder, or_tars: bool = False) -> bool:
    """Return True if there are images, or perhaps tars, in a folder or those below it; tars are not opened."""
    below = (read() for name, read in folder.folders.items() if name not in folder.tars)
    return bool(folder.images or (or_tars and folder.tars)) or any(
        holds_images(each, or_tars) for each in below
    )


def collect_images(folder: Folder) -> tuple[list[Member], list[Path]]:
    """Collect all images under a folder, sorted by name, and its other files, to which tars belong."""
    images, others = list(folder.images), list(folder.others)
    for name, read in folder.folders.items():
        if name in folder.tars:
            others.append(folder.locate(name))
        else:
            inner, more = collect_images(read())
            images, others = images + inner, others + more
    return sorted(images), others


def append_images(listing: Listing, images: Iterable[Member], tar: Path | None, label: int) -> None:
    """Add images in a tar, or on disk (None), to a listing."""
    archive = -1
    if tar:
        is_last = listing.files[-1:] == [os.path.relpath(tar, listing.root)]
        archive = len(listing.files) - 1 if is_last else listing.add_file(tar)
    for name, offset, size in images:
        listing.append(archive, name if tar else os.path.relpath(name, listing.root), offset, size, label)


def unwrap(tree: Folder, keep_splits: bool = False, keep_tars: bool = False) -> Folder:
    """Descend through wrappers, folders that hold one folder of folders and nothing else.

    `keep_splits`, `keep_tars`: do not descend into folders named like splits, or into tars."""
    while len(tree.folders) == 1 and not tree.images:
        name = min(tree.folders)
        if (keep_splits and SPLIT_NAME.fullmatch(name)) or (keep_tars and name in tree.tars):
            break
        if (inner := tree.folders[name]()).images or not inner.folders:
            break
        tree = inner
    return tree


def read_tree(raw: Path, tree: Folder) -> RawImageNet:
    """List a folder of class folders or of splits. Raises `UserError` where that is ambiguous."""
    tree = unwrap(tree, keep_splits=True)
    splits = [name for name in tree.folders if SPLIT_NAME.fullmatch(name)]
    tests = [name for name in splits if "test" in name.lower()]
    others = [name for name in tree.folders if name not in splits]
    vals = [name for name in VAL_NAMES if name in splits]
    # A tar called train may be a split or a class.
    has_train = "train" in splits and (
        not others or "train" not in tree.tars or len(unwrap(tree.folders["train"]()).folders) > 1
    )
    if has_train or (vals and not others):
        chosen = {"train": "train"} if has_train else {}
        chosen |= {"val": vals[0]} if vals else {}
        for name in [name for name in splits if name not in tests] + others:
            is_split = name in splits or (name not in tree.tars and holds_images(tree.folders[name]()))
            if is_split and name not in chosen.values():
                raise UserError(
                    f"{tree.locate(name)}: expected only train and val next to each other, got another folder; rename "
                    "it, or move it away"
                )
        for path in tree.others:  # val.tar.gz where there is no val
            stem = path.name.partition(".")[0].lower()
            if SPLIT_NAME.fullmatch(stem) and not (
                "test" in stem or (has_train if "train" in stem else vals)
            ):
                refuse_compressed([path])
        trees = {split: unwrap(tree.folders[name]()) for split, name in chosen.items()}
        ignored = [tree.locate(name) for name in tests + others] + tree.loose_files()
        return read_splits(raw, trees, ignored, *find_labels(tree.path, trees))
    # ILSVRC-2012's test archive is often stored with the class tars.
    tests = [name for name in tests if name in tree.tars]
    classes = {name: read for name, read in tree.folders.items() if name not in tests}
    if tests and not classes:
        raise UserError(f"{tree.locate(tests[0])}: expected training images, got test images; add train.tar")
    for name in splits:
        if name not in tests and name != "train":
            raise UserError(
                f"{tree.locate(name)}: expected a class, got the name of a split; name the splits train and val, or "
                "put all classes into train"
            )
    return read_splits(raw, {"train": replace(tree, folders=classes)}, [tree.locate(name) for name in tests])


def read_splits(
    raw: Path,
    trees: dict[str, Folder],
    ignored: list[Path],
    labels: Labels | None = None,
    words: dict[str, str] | None = None,
    layout: str = "",
) -> RawImageNet:
    """List every split: class folders, or a flat folder with a table of labels.

    Images of a table are left out if there are class folders, but not of their class. Raises `UserError`.
    """
    of_all, wnids = (labels.of_all, set(labels.wnid_of.values())) if labels else (False, set[str]())
    groups = {split: {} if of_all else group_folders(tree) for split, tree in trees.items()}
    known = set(groups["train"]) if "train" in trees and not of_all else wnids
    flat = [
        split for split in trees if of_all or (labels and split == "val" and not known & groups[split].keys())
    ]
    in_folders = {wnid for split in trees if split not in flat for wnid in groups[split]}
    index = {wnid: label for label, wnid in enumerate(sorted(in_folders or known))}
    splits, found = {split: Listing(raw) for split in trees}, set[str]()
    for split, tree in trees.items():
        if labels and split in flat:
            ignored = ignored + append_labelled(splits[split], tree, labels, index, found)
        elif labels and split == "val" and (tree.images or groups["val"].keys() - known - wnids):
            raise UserError(
                f"{tree.path}: expected all images in class folders, or all as {labels.path.name} has them, got both; "
                "sort the others, too"
            )
        else:
            ignored = ignored + append_folders(splits[split], split, tree, groups[split], index)
    if not layout:
        tree = next(iter(trees.values()))
        layout = "per-class tars" if tree.tars else "class folders in tars" if tree.tar else "class folders"
        layout += f", val labelled by {labels.path.name}" if labels and flat else ""
    if labels and flat:
        lacking = sum(wnid not in index for wnid in labels.wnid_of.values())
        layout += f", {lacking} labels of classes that train lacks" * bool(lacking)
        lost = [key for key, wnid in labels.wnid_of.items() if wnid in index and key not in found]
        if lost:
            places = " and ".join(str(trees[split].path) for split in flat)
            raise UserError(
                f"{places}: expected the {len(found) + len(lost)} images that {labels.path.name} lists, got "
                f"{len(found)}, not {lost[0]}; download them again, or correct the list"
            )
    for split, tree in trees.items():
        if not splits[split]:
            raise UserError(
                f"{tree.path}: no class folders found; put the images of each class into its own folder, or list them "
                f"in a file for --labels{' (Kaggle has ' + TABLES[0] + ')' if split == 'val' else ''}"
            )
    classes = tuple(ClassName(wnid, (words or {}).get(wnid, wnid)) for wnid in index)
    return RawImageNet(layout, classes, splits, ignored)


def group_folders(tree: Folder) -> dict[str, list[str]]:
    """Group class folders, or class tars, by class: by their composed names. Raises `UserError` for both kinds, and for
    compressed ones."""
    groups: dict[str, list[str]] = {}
    for name, read in tree.folders.items():
        if not tree.tars or name in tree.tars:
            groups.setdefault(compose(name), []).append(name)
        elif holds_images(read()):
            raise UserError(
                f"{tree.path}: expected class folders or tars, got both, such as {name} and {min(tree.tars)}.tar; move "
                "one kind away"
            )
    if groups:
        refuse_compressed(tree.others)
    return dict(sorted(groups.items()))


def append_folders(
    listing: Listing, split: str, tree: Folder, groups: dict[str, list[str]], index: dict[str, int]
) -> list[Path]:
    """Add the images of class folders; returns the other files. Raises `UserError` for a class without training images
    and for a tar of several folders."""
    if groups and tree.images:
        raise UserError(
            f"{tree.loose_files()[0]}: expected no images next to class folders, got {len(tree.images)}; move them "
            "into a class folder, or away"
        )
    ignored = [
        tree.locate(name) for name in tree.folders if tree.tars and name not in tree.tars
    ] + tree.others
    for wnid, names in tqdm(groups.items(), f"listing {split}", unit="class", disable=None):
        before, others = len(listing), list[Path]()
        for name in names:
            folder = leaf = tree.folders[name]()
            while name in tree.tars and not leaf.images and len(leaf.folders) == 1:
                leaf = leaf.folders[min(leaf.folders)]()
            if name in tree.tars and leaf.folders:
                raise UserError(
                    f"{tree.locate(name)}: expected one class, got several folders, such as {max(leaf.folders)!r}; "
                    "extract it into train/, a folder for each class"
                )
            of_class = folder.images or name in tree.tars
            if split_name := not of_class and next(filter(SPLIT_NAME.fullmatch, folder.folders), None):
                raise UserError(
                    f"{folder.locate(split_name)}: expected a class, got the name of a split; name the splits "
                    "train and val, and give the folder that holds them"
                )
            images, more = collect_images(folder)
            append_images(listing, images, folder.tar, index[wnid])
            others += more
        if len(listing) == before and split == "train":
            got = f"{len(others)} files such as {others[0].name}" if others else "none"
            raise UserError(
                f"{tree.locate(names[0])}: expected images (.jpg, .png and the like), got {got}; rename or convert "
                "them, or remove the folder"
            )
        ignored += others
    return ignored


def append_labelled(
    listing: Listing, tree: Folder, labels: Labels, index: dict[str, int], found: set[str]
) -> list[Path]:
    """Add the images that a table labels with a class of `index`, and their keys in the table to `found`; returns the
    files that are left out. Raises `UserError` for two images of one key and, unless the table is a list to choose by,
    for an image without a label."""
    images, ignored = collect_images(tree)
    for image in images:
        path = Path(tree.tar or "", image.name)
        _, *parts = path.absolute().parts
        suffixes = (["", *parts], *(parts[k:] for k in range(len(parts))))
        keys = (compose(strip_extension("/".join(each))) for each in suffixes)
        key = next((each for each in keys if each in labels.wnid_of), None)
        if key is None and not labels.of_all:
            raise UserError(f"{path}: expected a class in {labels.path}, got none; download both again")
        if key is None or labels.wnid_of[key] not in index:
            ignored.append(path)
        elif labels.of_all and any(
            map(SPLIT_NAME.fullmatch, os.path.relpath(path.parent, tree.path).split("/"))
        ):
            raise UserError(
                f"{path}: expected folders train and val as splits, got another; rename it, or give --labels a list "
                "without it"
            )
        elif key in found:
            raise UserError(
                f"{path}: expected one image {key}, as in {labels.path.name}, got another; remove one"
            )
        else:
            found.add(key)
            append_images(listing, [image], tree.tar, index[labels.wnid_of[key]])
    return ignored


# ---- images that a table labels


def read_labelled(raw: Path, labels: Labels) -> RawImageNet:
    """List the images that a table labels, in any folders, or in one tar; splits are folders called train and val."""
    tree = read_folder(raw)
    while len(tree.folders) == 1 and not tree.images and not SPLIT_NAME.fullmatch(min(tree.folders)):
        tree = tree.folders[min(tree.folders)]()
    val = next((name for name in VAL_NAMES if name in tree.folders), None)
    names = {split: name for split, name in (("train", "train"), ("val", val)) if name in tree.folders}
    trees = {split: tree.folders[name]() for split, name in names.items()} or {"train": tree}
    return read_splits(raw, trees, [], labels, layout=f"images labelled by {labels.path.name}")


def find_labels(folder: Path, trees: dict[str, Folder]) -> tuple[Labels | None, dict[str, str]]:
    """Find the table of validation labels and the words of the classes in a folder of splits, its val/, or, of Kaggle's
    tree, above it."""
    folder = folder.resolve()
    places = [each.path for each in trees.values()]
    places += [folder, *folder.parents][: 4 if folder.name == "CLS-LOC" else 1]
    tables, words = (
        [each / name for each in places for name in names if (each / name).is_file()]
        for names in (TABLES, WORDS)
    )
    named: dict[str, str] = {}
    with suppress(UserError):  # another words.txt
        named = {name.wnid: name.words for path in words[:1] for name in read_class_file(path)}
    return read_labels(tables[0]) if tables else None, named


def find_kaggle_tree(raw: Path) -> Path | None:
    """Find the folder CLS-LOC of Kaggle's download in `raw`; None if there is none."""
    places = [raw / inner for inner in ("", "CLS-LOC", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")]
    return next((path for path in places if path.resolve().name == "CLS-LOC" and path.is_dir()), None)
