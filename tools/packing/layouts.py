"""Layouts of raw ImageNet: recognized by looking, listed in place; nothing is extracted.

| layout | classes |
|---|---|
| ILSVRC-2012's archives: a tar of tars, a tar, a devkit | the devkit's wnids |
| Kaggle's ILSVRC/Data/CLS-LOC | folders of train/; LOC_val_solution.csv labels val/ |
| train/<class> and val/<class>, or <class> alone, in folders, in one tar or in a tar for each split | folders |
| one <class>.tar for each class, as ImageNet-21k comes | tars |
| Hugging Face's parquet files (parquet.py) | labels |

A class is a folder (or a tar) that holds images. Where it is not clear what is one, nothing is packed.
"""

import csv
import functools
import hashlib
import json
import os
import re
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from pipeline.shards import ClassName
from tools.packing.listing import Listing, RawImageNet, load_listing, stamp_archives
from tools.packing.parquet import find_parquet, read_parquet
from tools.packing.plan import hash_key, stem
from tools.packing.tars import Member, list_members

LAYOUTS = (
    "the archives of ILSVRC-2012, Kaggle's ILSVRC/Data/CLS-LOC, class folders train/<class> or <class>, one "
    "<class>.tar per class, tars of class folders or parquet files called train-*"
)
TRAIN_ARCHIVE = "ILSVRC2012_img_train.tar"
VAL_ARCHIVE = "ILSVRC2012_img_val.tar"
DEVKIT_ARCHIVE = "ILSVRC2012_devkit_t12.tar.gz"
ARCHIVES = {  # with the MD5 sums that are published with them
    TRAIN_ARCHIVE: "1d675b47d978889d74fa0da5fadfb00e",
    VAL_ARCHIVE: "29b22e2961454d5413ddabcf34fc5622",
    DEVKIT_ARCHIVE: "fa75699e90414af021442c21a62c3abf",
}
MAX_DEVKIT_BYTES = 2**26
"""Of a file in the devkit at most: a gzip file can hold a thousand times what it seems."""
IMAGE_NAME = re.compile(r".+\.(jpe?g?|jfif|png|bmp|gif|webp|tiff?|p[gp]m|avif)", re.IGNORECASE | re.DOTALL)
VAL_NAMES = ("val", "validation", "valid")
"""What a folder or a tar of validation images may be called."""
SPLIT_NAME = re.compile(
    r"(ilsvrc2012_img_)?(train|training|val|valid|validation|test|testing)([-_]?(set|sets|data|images?|split|v?\d+))*",
    re.IGNORECASE,
)
"""What people call a split; a class of such a name has to get another."""
VAL_SOLUTION = "LOC_val_solution.csv"
SYNSET_WORDS = "LOC_synset_mapping.txt"


def open_raw(raw: Path, cache: Path) -> tuple[RawImageNet, list[list[Any]] | None]:
    """List a raw data set, or take the listing from `cache` if its archives are as they were.

    Returns the listing, and what `save_listing` needs to cache it (None: it came from the cache, or lists folders,
    which are as quick to list as a cache is to read). Raises `FileNotFoundError` or `ValueError` with a remedy.
    """
    sources, read = find_layout(raw)
    if not sources:
        return read(), None
    validity = stamp_archives(raw, sources)
    if cached := load_listing(cache, raw, validity):
        return cached, None
    return read(), validity


def find_layout(raw: Path) -> tuple[list[Path], Callable[[], RawImageNet]]:
    """Recognize a layout: its archives (none: it is not cached), and the function that lists it.

    Raises `FileNotFoundError` or `ValueError` where it is none that we know.
    """
    if not raw.is_dir():
        raise FileNotFoundError(f"{raw}: not a folder; expected one with {LAYOUTS}")
    if (raw / TRAIN_ARCHIVE).exists() or (raw / VAL_ARCHIVE).exists():
        return [raw / name for name in ARCHIVES if (raw / name).is_file()], lambda: read_archives(raw)
    if tree := kaggle_tree(raw):
        return [], lambda: read_kaggle(raw, tree)
    if any((files := find_parquet(raw)).values()):
        return [*files["train"], *files["val"]], lambda: read_parquet(raw, files)
    folder = DiskFolder(raw)
    tars = [folder.path_of(name) for name in folder.names() if folder.is_tar(name)]
    if tars and all(folder.is_tar(name) for name in folder.names()):
        return tars, lambda: read_tree(raw, unwrap(folder, keep_splits=True))
    if not (raw / "train").is_dir():
        if next(image_files(raw, []), None) is None:
            raise FileNotFoundError(f"{raw} holds nothing that can be packed; expected {LAYOUTS}")
        if (inner := unwrap(folder, keep_splits=True)) != folder:
            return find_layout(inner.path)
        if tars:
            raise ValueError(f"{raw} holds {tars[0].name} and folders; move away what is not to be packed")
    return [], lambda: read_tree(raw, folder)


def cut_validation(data: RawImageNet, fraction: float, seed: int) -> RawImageNet:
    """Move `fraction` of each class, rounded, from train to a validation split that the source lacks: at least one
    image, and not the last one; the first by a hash of seed and name, so that the layout makes no difference.

    Raises `ValueError` when it has one, or no class has two images.
    """
    if "val" in data.splits:
        raise ValueError(
            f"--val-fraction is for data without validation images, but {data.layout} has them; drop it"
        )
    train = data.splits["train"]
    labels = np.frombuffer(train.label, np.int32)
    hashes = b"".join(hash_key(seed, f"val:{stem(train.name(row))}")[:8] for row in range(len(train)))
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


def is_system_file(name: str) -> bool:
    """A file or folder of an operating system: .DS_Store, ._photo.jpg, __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


# ---- ILSVRC-2012's archives


def read_archives(raw: Path) -> RawImageNet:
    """List the three archives of ILSVRC-2012.

    Class index = position among the sorted wnids; the devkit's validation labels count in ILSVRC2012_ID, another
    order, and go through its `meta.mat`.
    Raises `FileNotFoundError` for a missing archive and `ValueError` for one that is not what its name says.
    """
    for name in ARCHIVES:
        if not (raw / name).is_file():
            raise FileNotFoundError(f"{raw / name} is missing; the archives keep their own names")
    by_id, ground_truth = read_devkit(raw / DEVKIT_ARCHIVE)
    tars = sorted(
        (Path(member.name).stem, member.offset, member.size) for member in list_members(raw / TRAIN_ARCHIVE)
    )
    wnids = [wnid for wnid, _, _ in tars]
    known = {name.wnid: name for name in by_id.values()}
    if unknown := sorted(set(wnids) - set(known)):
        raise ValueError(
            f"{raw / DEVKIT_ARCHIVE} does not know class {unknown[0]!r} of {TRAIN_ARCHIVE}; fetch the devkit again"
        )
    if absent := sorted(set(known) - set(wnids)):
        raise ValueError(f"{raw / TRAIN_ARCHIVE} lacks class {absent[0]} of the devkit; fetch it again")
    if len(set(wnids)) != len(wnids):
        raise ValueError(f"{raw / TRAIN_ARCHIVE} holds a class twice; fetch it again")

    train, val = Listing(raw), Listing(raw)
    for label, (wnid, start, length) in enumerate(tqdm(tars, "listing", unit="class", disable=None)):
        if not append_tar(
            train, raw / TRAIN_ARCHIVE, label, list_members(raw / TRAIN_ARCHIVE, start, length)
        ):
            raise ValueError(f"{raw / TRAIN_ARCHIVE} holds no image of class {wnid}; fetch it again")
    index = {wnid: position for position, wnid in enumerate(wnids)}
    for member in sorted(list_members(raw / VAL_ARCHIVE)):
        # Line n of the ground truth belongs to ILSVRC2012_val_<n>.JPEG.
        match = re.fullmatch(r"(?:.*/)?ILSVRC2012_val_(\d{8})\.JPEG", member.name)
        if not match or not 1 <= int(match[1]) <= len(ground_truth):
            raise ValueError(
                f"{raw / VAL_ARCHIVE} holds {member.name!r}, which the devkit does not label; fetch it again"
            )
        label = index[by_id[ground_truth[int(match[1]) - 1]].wnid]
        append_tar(val, raw / VAL_ARCHIVE, label, [member])
    if len(val) != len(ground_truth) or len({stem(image.name) for image in val}) != len(val):
        raise ValueError(
            f"{raw / VAL_ARCHIVE} holds {len(val)} images, perhaps one of them twice, and the devkit labels "
            f"{len(ground_truth)}; fetch it again"
        )
    if not train or not val:
        raise ValueError(
            f"{raw} holds no {'train' if not train else 'validation'} image; fetch the archives again"
        )
    return RawImageNet(
        "ILSVRC-2012 archives", tuple(known[wnid] for wnid in wnids), {"train": train, "val": val}
    )


def append_tar(listing: Listing, tar: Path, label: int, members: "Iterator[Member] | list[Member]") -> int:
    """Add images of a tar, sorted by name; returns their number."""
    shown = os.path.relpath(tar, listing.root)
    archive = listing.files.index(shown) if shown in listing.files[-1:] else listing.add_file(tar)
    images = sorted(members)
    for member in images:
        listing.append(archive, member.name, member.offset, member.size, label)
    return len(images)


def check_md5(raw: Path) -> None:
    """Compare the archives with the published MD5 sums. Raises `ValueError` for one that differs."""
    for name, published in ARCHIVES.items():
        digest = hashlib.md5(usedforsecurity=False)
        size = (raw / name).stat().st_size
        progress = tqdm(total=size, desc=f"md5 of {name}", unit="B", unit_scale=True, disable=None)
        with (raw / name).open("rb") as file, progress:
            while block := file.read(2**22):
                digest.update(block)
                progress.update(len(block))
        if digest.hexdigest() != published:
            raise ValueError(
                f"{raw / name}: expected MD5 {published}, got {digest.hexdigest()}; fetch it again"
            )


def read_devkit(path: Path) -> tuple[dict[int, ClassName], list[int]]:
    """Read classes by ILSVRC2012_ID (leaves of the hierarchy alone) and the validation labels, which count in that ID.

    Raises `ValueError` when the devkit is damaged or labels a class that it does not describe.
    """
    folder = "ILSVRC2012_devkit_t12/data"
    try:
        with tarfile.open(path, "r:gz") as tar:
            files = {}
            for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt"):
                file = tar.extractfile(f"{folder}/{name}")
                files[name] = file.read(MAX_DEVKIT_BYTES) if file else b""
        by_id = {
            identifier: ClassName(wnid, words)
            for identifier, wnid, words, children in read_synsets(files["meta.mat"])
            if not children
        }
        ground_truth = [int(line) for line in files["ILSVRC2012_validation_ground_truth.txt"].split()]
    except Exception as error:  # tarfile and zlib each have their own for damaged input
        raise ValueError(
            f"{path} is not the devkit of ILSVRC-2012 or is damaged ({error}); fetch it again"
        ) from None
    if unknown := sorted(set(ground_truth) - set(by_id)):
        raise ValueError(
            f"{path} labels images as class {unknown[0]}, which its meta.mat does not describe; fetch it again"
        )
    return by_id, ground_truth


READ_SYNSETS = """
import io, json, resource, sys
from scipy.io import loadmat
# Room for libraries and a table of some ten thousand rows, none for what damage makes of one.
resource.setrlimit(resource.RLIMIT_DATA, (2**29, 2**29))
synsets = loadmat(io.BytesIO(sys.stdin.buffer.read()), squeeze_me=True)["synsets"]
names = {"ILSVRC2012_ID": int, "WNID": str, "words": str, "num_children": int}
json.dump([[kind(row[name]) for name, kind in names.items()] for row in synsets], sys.stdout)
"""
"""A process of its own: scipy's reader is compiled code, which damaged bytes make end the process that it is in (one
wrong byte in four does), or ask for all of the memory."""


def read_synsets(mat: bytes) -> list[tuple[int, str, str, int]]:
    """(ILSVRC2012_ID, wnid, words, number of children) of each synset of `meta.mat`. Raises `ValueError`."""
    done = subprocess.run([sys.executable, "-c", READ_SYNSETS], input=mat, capture_output=True, check=False)
    if done.returncode:
        last = done.stderr.decode(errors="replace").splitlines()[-1:] if done.returncode > 0 else []
        raise ValueError(f"its meta.mat cannot be read{''.join(f': {line}' for line in last)}")
    return [tuple(row) for row in json.loads(done.stdout)]


# ---- folders, on disk and in tars


class DiskFolder(NamedTuple):
    """A folder on disk; tars in it count as folders, too, called by their stems."""

    path: Path

    def names(self) -> list[str]:
        """Of the folders in it, sorted."""
        found = [entry for entry in os.scandir(self.path) if not is_system_file(entry.name)]
        return sorted(
            {entry.name.removesuffix(".tar") for entry in found if entry.is_dir() or is_tar_file(entry)}
        )

    def path_of(self, name: str) -> Path:
        """Where a folder or a tar lies."""
        return self.path / name if (self.path / name).is_dir() else self.path / f"{name}.tar"

    def is_tar(self, name: str) -> bool:
        """Whether one of its folders is a tar."""
        return not (self.path / name).is_dir()

    def show(self, name: str) -> str:
        """One of its folders, for messages."""
        return str(self.path_of(name))

    def open(self, name: str) -> "Tree":
        """One of its folders."""
        return read_tar(self.path_of(name)) if self.is_tar(name) else DiskFolder(self.path / name)

    def holds_images(self) -> bool:
        """Whether images lie in it, outside of folders."""
        return any(IMAGE_NAME.fullmatch(entry.name) and entry.is_file() for entry in os.scandir(self.path))

    def loose_files(self) -> list[Path]:
        """Files outside of folders."""
        found = [entry for entry in os.scandir(self.path) if entry.is_file() and not is_tar_file(entry)]
        return sorted(Path(entry.path) for entry in found if not is_system_file(entry.name))

    def append_to(self, listing: Listing, label: int, ignored: list[Path]) -> int:
        """Add all images under it to a listing; returns their number."""
        number = len(listing)
        for path in image_files(self.path, ignored):
            append_file(listing, path, label)
        return len(listing) - number


class TarFolder(NamedTuple):
    """A folder in a tar, or the tar itself, without system files."""

    path: Path
    """Of the tar, and in it."""
    tar: Path
    images: list[tuple[tuple[str, ...], Member]]
    """(folders, file) of the files that are images by their names."""
    others: list[Path]
    """Other files."""

    def names(self) -> list[str]:
        """Of the folders that hold images, sorted."""
        return sorted({folders[0] for folders, _ in self.images if folders})

    def path_of(self, name: str) -> Path:
        """Of one of its folders."""
        return self.path / name

    def is_tar(self, name: str) -> bool:
        """None of its folders is one."""
        return False

    def show(self, name: str) -> str:
        """One of its folders, for messages."""
        return f"{self.path / name}/"

    def open(self, name: str) -> "Tree":
        """One of its folders."""
        inside = [(folders[1:], member) for folders, member in self.images if folders[:1] == (name,)]
        return TarFolder(self.path / name, self.tar, inside, [])

    def holds_images(self) -> bool:
        """Whether images lie in it, outside of folders."""
        return any(not folders for folders, _ in self.images)

    def loose_files(self) -> list[Path]:
        """The other files, and images outside of folders."""
        return sorted(
            [*self.others, *(self.tar / member.name for folders, member in self.images if not folders)]
        )

    def append_to(self, listing: Listing, label: int, ignored: list[Path]) -> int:
        """Add all images under it to a listing; returns their number."""
        ignored += self.others
        return append_tar(listing, self.tar, label, [member for _, member in self.images])


Tree = DiskFolder | TarFolder


def is_tar_file(entry: "os.DirEntry[str]") -> bool:
    """Whether a file is a tar by its name."""
    return entry.name.endswith(".tar") and not entry.is_dir()


@functools.lru_cache(maxsize=2)
def read_tar(tar: Path) -> TarFolder:
    """Read the headers of a tar. Raises `ValueError`, also for a shard of WebDataset, in which files of one name make a
    sample, its label among them."""
    tree = TarFolder(tar, tar, [], [])
    others: list[tuple[tuple[str, ...], Member]] = []
    for member in list_members(tar):
        *folders, base = [part for part in member.name.split("/") if part not in ("", ".", "..")] or [
            member.name
        ]
        if not any(map(is_system_file, (*folders, base))):
            (tree.images if IMAGE_NAME.fullmatch(base) else others).append((tuple(folders), member))
    if not tree.images:  # as ImageNet-21k has them
        tree.images.extend(file for file in others if "." not in Path(file[1].name).name)
        others = [file for file in others if file not in tree.images]
    tree.others.extend(sorted(tar / member.name for _, member in others))
    if len(tree.images) != len({member.name for _, member in tree.images}):
        raise ValueError(
            f"{tar} holds a file twice; unpack it, which leaves the last one, and pack the folders"
        )
    if (
        len({folders for folders, _ in tree.images}) > 1
    ):  # class folders, in which other files may lie beside images
        return tree
    images = {sample_key(*file)[0] for file in tree.images}
    sidecars = [extension for key, extension in (sample_key(*file) for file in others) if key in images]
    if "cls" in sidecars:
        raise ValueError(f"{tar} is a WebDataset shard; take it over with make_shards.py adopt")
    if sidecars:
        raise ValueError(
            f"{tar} is a WebDataset shard (.{min(sidecars)} with each image) without labels (.cls); put the images "
            "of each class into a folder of its own"
        )
    return tree


def sample_key(folders: tuple[str, ...], member: Member) -> tuple[tuple[str, ...], str]:
    """Folders and name up to its first dot, and what follows: WebDataset's key and extension."""
    name, _, extension = member.name.rpartition("/")[2].partition(".")
    return (*folders, name), extension


def unwrap(tree: Tree, keep_splits: bool = False) -> Tree:
    """The innermost folder that holds the class folders: wrappers hold nothing but one folder of folders.

    `keep_splits`: folders that are called like splits are not wrappers."""
    while len(names := tree.names()) == 1 and not (keep_splits and SPLIT_NAME.fullmatch(names[0])):
        if tree.holds_images() or (inner := tree.open(names[0])).holds_images() or not inner.names():
            break
        tree = inner
    return tree


def read_tree(raw: Path, tree: Tree) -> RawImageNet:
    """List a folder of class folders or of splits. Raises `ValueError` where it is not clear what is a class."""
    names = tree.names()
    splits = [name for name in names if SPLIT_NAME.fullmatch(name)]
    if "train" in names and (splits == names or is_split(tree)):
        val = next((name for name in VAL_NAMES if name in names), None)
        trees = {"train": unwrap(tree.open("train"))} | ({"val": unwrap(tree.open(val))} if val else {})
        ignored = [tree.path_of(name) for name in names if name not in ("train", val)]
        return read_splits(raw, trees, [*ignored, *tree.loose_files()])
    # The archive of ILSVRC-2012's test images often lies among class tars.
    tests = [name for name in splits if "test" in name.lower() and tree.is_tar(name)]
    inner = [(each, name) for each in opened_folders(tree) for name in each.names()]
    for parent, name in [(tree, name) for name in names if name not in tests] + inner:
        if SPLIT_NAME.fullmatch(name) and not (parent == tree and name == "train"):
            raise ValueError(
                f"{parent.show(name)} seems to be a split, not a class; expected folders or tars called train and val"
            )
    if names == tests:
        raise ValueError(f"{tree.path} holds {tree.path_of(tests[0]).name} alone, test images; add train.tar")
    return read_splits(raw, {"train": tree}, [tree.path_of(name) for name in tests], tests)


def is_split(tree: Tree) -> bool:
    """Whether its folder `train` holds classes, and is none."""
    return not tree.is_tar("train") or len(unwrap(tree.open("train")).names()) > 1


def opened_folders(tree: Tree) -> list[Tree]:
    """Its folders that hold nothing but folders. Tars are not read for it."""
    found = [tree.open(name) for name in tree.names() if not tree.is_tar(name)]
    return [each for each in found if not each.holds_images()]


def read_splits(
    raw: Path, trees: dict[str, Tree], ignored: list[Path], leave_out: Sequence[str] = ()
) -> RawImageNet:
    """List the class folders of every split but `leave_out`. Raises `ValueError` for a class without images in train,
    or one that only the validation images have."""
    wnids = [name for name in trees["train"].names() if name not in leave_out]
    index = {wnid: label for label, wnid in enumerate(wnids)}
    splits = {}
    for split, tree in trees.items():
        listing = splits[split] = Listing(raw)
        names = [name for name in tree.names() if name not in leave_out]
        if isinstance(tree, TarFolder) and tree.holds_images() and names:
            raise ValueError(
                f"{tree.path} holds {tree.loose_files()[0].name!r} outside of its class folders; move it"
            )
        ignored = [*ignored, *tree.loose_files()]
        for wnid in tqdm(names, f"listing {split}", unit="class", disable=None):
            if wnid not in index:
                raise ValueError(f"{tree.show(wnid)}: a class without training images; add them or remove it")
            folder, others = tree.open(wnid), list[Path]()
            if tree.is_tar(wnid) and isinstance(folder, TarFolder):
                check_class_tar(folder)
            if not folder.append_to(listing, index[wnid], others) and split == "train":
                raise ValueError(f"{tree.show(wnid)} holds no image; fill it, fetch it again or remove it")
            ignored += others
        if not listing:
            raise ValueError(f"{tree.path} holds no class folders; put the images of each class into one")
    kinds = {(type(tree), any(map(tree.is_tar, tree.names()))) for tree in trees.values()}
    on_disk = (DiskFolder, False) in kinds
    layout = (
        "class folders"
        if on_disk
        else "per-class tars"
        if (DiskFolder, True) in kinds
        else "class folders in tars"
    )
    classes = tuple(ClassName(wnid, wnid) for wnid in wnids)
    return RawImageNet(layout, classes, splits, in_folders=on_disk, ignored=ignored)


def check_class_tar(tree: TarFolder) -> None:
    """Raise `ValueError` where a tar does not hold one class."""
    if not tree.images:
        raise ValueError(f"{tree.path} holds no image; fetch it again or remove it")
    if len(folders := sorted({folders for folders, _ in tree.images})) > 1:
        raise ValueError(
            f"{tree.path} holds several folders, such as {'/'.join(folders[-1])!r}: it is not clear what is a class; "
            "unpack it into train/, a folder for each class"
        )


def image_files(folder: Path, ignored: list[Path], above: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
    """The image files under a folder by their extensions, sorted, through links, without system files.

    Appends other files to `ignored`; `above` are the folders that we came through. Raises `ValueError` when links
    lead in a circle.
    """
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise ValueError(f"{folder} is a link that leads in a circle; remove it")
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if is_system_file(entry.name):
            continue
        if entry.is_dir():
            yield from image_files(Path(entry.path), ignored, (*above, here))
        elif IMAGE_NAME.fullmatch(entry.name):
            yield Path(entry.path)
        else:
            ignored.append(Path(entry.path))


def append_file(listing: Listing, path: Path, label: int) -> None:
    """Add one image file. Raises `FileNotFoundError` for a broken link, `ValueError` for what is not a plain file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is a link to nothing; restore or remove it") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is not a plain file; remove it")
    listing.append(-1, os.path.relpath(path, listing.root), 0, status.st_size, label)


def kaggle_tree(raw: Path) -> Path | None:
    """The folder CLS-LOC of Kaggle's download, if `raw` is or holds it."""
    candidates = [raw, *(raw / inner for inner in ("CLS-LOC", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC"))]
    return next(
        (path for path in candidates if path.resolve().name == "CLS-LOC" and (path / "train").is_dir()), None
    )


def read_kaggle(raw: Path, tree: Path) -> RawImageNet:
    """List Kaggle's tree: `train/<wnid>/*.JPEG`, and `val/*.JPEG` labelled by LOC_val_solution.csv.

    Raises `FileNotFoundError` or `ValueError` when the two do not fit.
    """
    homes = (raw, *[tree.resolve(), *tree.resolve().parents][:4])
    solution = next((home / VAL_SOLUTION for home in homes if (home / VAL_SOLUTION).is_file()), None)
    if solution is None:
        raise FileNotFoundError(
            f"{raw / VAL_SOLUTION} is missing; it labels the validation images, fetch it again"
        )
    with solution.open(newline="", encoding="utf-8") as file:
        try:
            wnid_of = {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
        except (KeyError, IndexError, AttributeError, UnicodeDecodeError, csv.Error):
            raise ValueError(
                f"{solution} is not Kaggle's list of validation labels; fetch it again"
            ) from None
    words = solution.with_name(SYNSET_WORDS)
    lines = words.read_text("utf-8", errors="replace").splitlines() if words.is_file() else []
    named = dict(line.split(" ", 1) for line in lines if " " in line)
    data = read_splits(raw, {"train": DiskFolder(tree / "train")}, [])
    index = {name.wnid: position for position, name in enumerate(data.classes)}
    val, ignored = Listing(raw), [*data.ignored]
    for path in image_files(tree / "val", ignored):
        wnid = wnid_of.get(path.stem, "")
        if wnid not in index:
            raise ValueError(
                f"{solution} gives {path.name} no class that {tree / 'train'} has; fetch it again"
            )
        append_file(val, path, index[wnid])
    if not val or len(val) != len(wnid_of) or len({stem(image.name) for image in val}) != len(val):
        raise ValueError(
            f"{tree / 'val'} holds {len(val)} images, or one twice; {solution} labels {len(wnid_of)}"
        )
    classes = tuple(ClassName(name.wnid, named.get(name.wnid, name.wnid)) for name in data.classes)
    splits = data.splits | {"val": val}
    return RawImageNet("Kaggle's ILSVRC tree", classes, splits, in_folders=True, ignored=ignored)
