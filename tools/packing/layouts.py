"""Recognize the layout of a raw data set and list its images in place; nothing is extracted.

| layout | classes |
|---|---|
| ILSVRC-2012's archives: a tar of tars, a tar, a devkit | the devkit's wnids |
| Kaggle's ILSVRC/Data/CLS-LOC | folders of train/; LOC_val_solution.csv labels val/ |
| train/<class> and val/<class>, or <class> alone, in folders, in one tar or in a tar for each split | folders |
| one <class>.tar for each class, as ImageNet-21k comes | tars |
| Hugging Face's parquet files (parquet.py) | labels |

A class is a folder (or a tar) that holds images. An ambiguous tree is refused.
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
from dataclasses import dataclass, replace
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
ARCHIVES = {  # and their published MD5 sums
    TRAIN_ARCHIVE: "1d675b47d978889d74fa0da5fadfb00e",
    VAL_ARCHIVE: "29b22e2961454d5413ddabcf34fc5622",
    DEVKIT_ARCHIVE: "fa75699e90414af021442c21a62c3abf",
}
MAX_DEVKIT_BYTES = 2**26
"""Limit for one file of the devkit: gzip can expand a thousandfold."""
IMAGE_NAME = re.compile(r".+\.(jpe?g?|jfif|png|bmp|gif|webp|tiff?|p[gp]m|avif)", re.IGNORECASE | re.DOTALL)
VAL_NAMES = ("val", "validation", "valid")
"""Names of a folder or a tar of validation images."""
SPLIT_NAME = re.compile(
    r"(ilsvrc2012_img_)?(train|training|val|valid|validation|test|testing)([-_]?(set|sets|data|images?|split|v?\d+))*",
    re.IGNORECASE,
)
"""Names that mean a split, so that a class cannot have one."""
VAL_SOLUTION = "LOC_val_solution.csv"
SYNSET_WORDS = "LOC_synset_mapping.txt"


def open_raw(raw: Path, cache: Path) -> tuple[RawImageNet, list[list[Any]] | None]:
    """List a raw data set, or load the listing from `cache` if the archives are unchanged.

    Returns the listing, and the stamps that `save_listing` needs (None: it came from the cache, or from folders, which
    are as fast to list). Raises `FileNotFoundError` or `ValueError`.
    """
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
    if not raw.is_dir():
        raise FileNotFoundError(f"{raw}: not a folder; expected one with {LAYOUTS}")
    if (raw / TRAIN_ARCHIVE).exists() or (raw / VAL_ARCHIVE).exists():
        return [raw / name for name in ARCHIVES if (raw / name).is_file()], lambda: read_archives(raw)
    if tree := find_kaggle_tree(raw):
        return [], lambda: read_kaggle(raw, tree)
    if any((files := find_parquet(raw)).values()):
        return [*files["train"], *files["val"]], lambda: read_parquet(raw, files)
    folder = DiskFolder(raw)
    tars = [folder.get_path(name) for name in folder.names() if folder.is_tar(name)]
    others = [name for name in folder.names() if not folder.is_tar(name)]
    if tars and "train" not in others and not any(next(find_images(raw / name, []), None) for name in others):
        return tars, lambda: read_tree(raw, unwrap(DiskFolder(raw, tuple(others)), keep_splits=True))
    if not (raw / "train").is_dir():
        if next(find_images(raw, []), None) is None:
            raise FileNotFoundError(f"{raw}: no images found; expected {LAYOUTS}")
        if (inner := unwrap(folder, keep_splits=True)) != folder:
            return find_layout(inner.path)
        if tars:
            raise ValueError(
                f"{raw}: expected tars or folders, got folders and {tars[0].name}; move one kind away"
            )
    return [], lambda: read_tree(raw, folder)


def split_off_validation(data: RawImageNet, fraction: float, seed: int) -> RawImageNet:
    """Split a validation set off train: `fraction` of each class, rounded, at least one image but never the last.

    Images are chosen by a hash of seed and name, so the layout makes no difference. Raises `ValueError` when there is
    a validation split, or no class has two images.
    """
    if "val" in data.splits:
        raise ValueError(
            f"--val-fraction: expected data without validation images, got {data.layout}; leave it out"
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
        raise ValueError("--val-fraction: expected a class with two images, got none; use 0")
    splits = {"train": train.take(np.flatnonzero(~in_val)), "val": train.take(np.flatnonzero(in_val))}
    return replace(data, splits=splits)


def is_system_file(name: str) -> bool:
    """Return True for files and folders of an operating system: .DS_Store, ._photo.jpg, __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


# ---- ILSVRC-2012's archives


def read_archives(raw: Path) -> RawImageNet:
    """List the three archives of ILSVRC-2012.

    Class index = position among the sorted wnids; the devkit's validation labels are ILSVRC2012_IDs, another order,
    mapped by its `meta.mat`. Raises `FileNotFoundError` for a missing archive, `ValueError` for an unexpected one.
    """
    for name in ARCHIVES:
        if not (raw / name).is_file():
            raise FileNotFoundError(f"{raw / name}: not found; keep the archives' original names")
    by_id, ground_truth = read_devkit(raw / DEVKIT_ARCHIVE)
    tars = sorted(
        (Path(member.name).stem, member.offset, member.size) for member in list_members(raw / TRAIN_ARCHIVE)
    )
    wnids = [wnid for wnid, _, _ in tars]
    by_wnid = {name.wnid: name for name in by_id.values()}
    if unknown := sorted(set(wnids) - set(by_wnid)):
        raise ValueError(
            f"{raw / DEVKIT_ARCHIVE}: lacks class {unknown[0]!r} of {TRAIN_ARCHIVE}; download it again"
        )
    if missing := sorted(set(by_wnid) - set(wnids)):
        raise ValueError(f"{raw / TRAIN_ARCHIVE}: lacks class {missing[0]} of the devkit; download it again")
    if len(set(wnids)) != len(wnids):
        raise ValueError(f"{raw / TRAIN_ARCHIVE}: holds a class twice; download it again")

    train, val = Listing(raw), Listing(raw)
    for label, (wnid, start, length) in enumerate(tqdm(tars, "listing", unit="class", disable=None)):
        if not append_tar(
            train, raw / TRAIN_ARCHIVE, label, list_members(raw / TRAIN_ARCHIVE, start, length)
        ):
            raise ValueError(f"{raw / TRAIN_ARCHIVE}: no images of class {wnid}; download it again")
    index = {wnid: position for position, wnid in enumerate(wnids)}
    for member in sorted(list_members(raw / VAL_ARCHIVE)):
        # Line n of the ground truth belongs to ILSVRC2012_val_<n>.JPEG.
        match = re.fullmatch(r"(?:.*/)?ILSVRC2012_val_(\d{8})\.JPEG", member.name)
        if not match or not 1 <= int(match[1]) <= len(ground_truth):
            raise ValueError(
                f"{raw / VAL_ARCHIVE}: the devkit has no label for {member.name!r}; download it again"
            )
        label = index[by_id[ground_truth[int(match[1]) - 1]].wnid]
        append_tar(val, raw / VAL_ARCHIVE, label, [member])
    distinct = len({stem(image.name) for image in val})
    if not len(val) == distinct == len(ground_truth):
        raise ValueError(
            f"{raw / VAL_ARCHIVE}: expected {len(ground_truth)} images, as the devkit has labels, got {len(val)}, "
            f"{distinct} distinct; download it again"
        )
    if not train or not val:
        raise ValueError(
            f"{raw}: no {'train' if not train else 'validation'} images; download the archives again"
        )
    return RawImageNet(
        "ILSVRC-2012 archives", tuple(by_wnid[wnid] for wnid in wnids), {"train": train, "val": val}
    )


def append_tar(listing: Listing, tar: Path, label: int, members: "Iterator[Member] | list[Member]") -> int:
    """Add the images of a tar, sorted by name. Returns their number."""
    is_last = listing.files[-1:] == [os.path.relpath(tar, listing.root)]
    archive = len(listing.files) - 1 if is_last else listing.add_file(tar)
    images = sorted(members)
    for member in images:
        listing.append(archive, member.name, member.offset, member.size, label)
    return len(images)


def verify_md5(raw: Path, layout: str) -> None:
    """Compare the archives with the published MD5 sums. Raises `ValueError` for a difference, and for other layouts."""
    if "archives" not in layout:
        raise ValueError(f"--check-md5: expected the archives of ILSVRC-2012, got {layout}; leave it out")
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
                f"{raw / name}: expected MD5 {published}, got {digest.hexdigest()}; download it again"
            )


def read_devkit(path: Path) -> tuple[dict[int, ClassName], list[int]]:
    """Read the classes (leaves of the hierarchy) by ILSVRC2012_ID, and the validation labels, which are such IDs.

    Raises `ValueError` when the devkit is damaged or a label has no class.
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
    except Exception as error:  # tarfile and zlib raise many kinds for damaged input
        raise ValueError(
            f"{path}: not the devkit of ILSVRC-2012, or damaged ({error}); download it again"
        ) from None
    if unknown := sorted(set(ground_truth) - set(by_id)):
        raise ValueError(f"{path}: label {unknown[0]} is not in its meta.mat; download it again")
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
    """Read (ILSVRC2012_ID, wnid, words, number of children) of each synset in `meta.mat`. Raises `ValueError`."""
    process = subprocess.run(
        [sys.executable, "-c", READ_SYNSETS], input=mat, capture_output=True, check=False
    )
    if process.returncode:
        last = process.stderr.decode(errors="replace").splitlines()[-1:] if process.returncode > 0 else []
        raise ValueError(f"unreadable meta.mat{''.join(f': {line}' for line in last)}")
    return [tuple(row) for row in json.loads(process.stdout)]


# ---- folders, on disk and in tars


class DiskFolder(NamedTuple):
    """A folder on disk; tars in it count as folders, named by their stems."""

    path: Path
    without_images: tuple[str, ...] = ()
    """Names of folders that count as other files."""

    def names(self) -> list[str]:
        """Return the names of its folders, sorted."""
        found = [entry for entry in os.scandir(self.path) if not is_system_file(entry.name)]
        kept = [entry.name for entry in found if entry.is_dir() or entry.name.endswith(".tar")]
        return sorted({name.removesuffix(".tar") for name in kept} - set(self.without_images))

    def get_path(self, name: str) -> Path:
        """Return the path of one of its folders or tars."""
        return self.path / name if (self.path / name).is_dir() else self.path / f"{name}.tar"

    def is_tar(self, name: str) -> bool:
        """Return True if one of its folders is a tar."""
        return not (self.path / name).is_dir()

    def open(self, name: str) -> "Tree":
        """Open one of its folders."""
        return read_tar(self.get_path(name)) if self.is_tar(name) else DiskFolder(self.path / name)

    def holds_images(self) -> bool:
        """Return True if it holds images outside of folders."""
        return any(IMAGE_NAME.fullmatch(entry.name) and entry.is_file() for entry in os.scandir(self.path))

    def loose_files(self) -> list[Path]:
        """List its files outside of folders."""
        found = [Path(entry.path) for entry in os.scandir(self.path) if entry.is_file()]
        # A tar next to the folder that was extracted from it is not read.
        files = [path for path in found if path.suffix != ".tar" or path.with_suffix("").is_dir()]
        folders = [self.path / name for name in self.without_images]
        return sorted(path for path in [*files, *folders] if not is_system_file(path.name))

    def append_to(self, listing: Listing, label: int, ignored: list[Path]) -> int:
        """Add all images under it to a listing. Returns their number."""
        before = len(listing)
        for path in find_images(self.path, ignored):
            append_file(listing, path, label)
        return len(listing) - before


@dataclass(frozen=True)
class TarFolder:
    """A folder in a tar, or the tar itself, without system files."""

    path: Path
    """The tar's, then the folder's inside it."""
    tar: Path
    images: list[tuple[tuple[str, ...], Member]]
    """(folders, file) of the files with an image extension."""
    others: list[Path]
    """Other files."""

    @functools.cached_property
    def inside(self) -> dict[str, list[tuple[tuple[str, ...], Member]]]:
        """Images by folder, grouped once: there may be millions in thousands."""
        groups: dict[str, list[tuple[tuple[str, ...], Member]]] = {}
        for folders, member in self.images:
            if folders:
                groups.setdefault(folders[0], []).append((folders[1:], member))
        return groups

    def names(self) -> list[str]:
        """Return the names of its folders that hold images, sorted."""
        return sorted(self.inside)

    def get_path(self, name: str) -> Path:
        """Return the path of one of its folders."""
        return self.path / name

    def is_tar(self, name: str) -> bool:
        """Return False: tars inside tars are not opened."""
        return False

    def open(self, name: str) -> "Tree":
        """Open one of its folders."""
        return TarFolder(self.path / name, self.tar, self.inside.get(name, []), [])

    def holds_images(self) -> bool:
        """Return True if it holds images outside of folders."""
        return any(not folders for folders, _ in self.images)

    def loose_files(self) -> list[Path]:
        """List its other files, and images outside of folders."""
        return sorted(
            [*self.others, *(self.tar / member.name for folders, member in self.images if not folders)]
        )

    def append_to(self, listing: Listing, label: int, ignored: list[Path]) -> int:
        """Add all images under it to a listing. Returns their number."""
        ignored += self.others
        return append_tar(listing, self.tar, label, [member for _, member in self.images])


Tree = DiskFolder | TarFolder


@functools.lru_cache(maxsize=2)
def read_tar(tar: Path) -> TarFolder:
    """Read the headers of a tar. Raises `ValueError`, also for a WebDataset shard."""
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
        others = [file for file in others if "." in Path(file[1].name).name]
    tree.others.extend(sorted(tar / member.name for _, member in others))
    if len(tree.images) != len({member.name for _, member in tree.images}):
        raise ValueError(
            f"{tar}: holds a file twice; extract it, which keeps the last one, and pack the folders"
        )
    if len({folders for folders, _ in tree.images}) > 1:  # class folders, which may hold other files, too
        return tree
    images = {sample_key(*file)[0] for file in tree.images}
    sidecars = [extension for key, extension in (sample_key(*file) for file in others) if key in images]
    if "cls" in sidecars:
        raise ValueError(f"{tar}: expected raw images, got a WebDataset shard; use make_shards.py adopt")
    if sidecars:
        raise ValueError(
            f"{tar}: expected raw images, got a WebDataset shard (.{min(sidecars)} with each image) without labels "
            "(.cls); put the images of each class into its own folder"
        )
    return tree


def sample_key(folders: tuple[str, ...], member: Member) -> tuple[tuple[str, ...], str]:
    """Split a path at the first dot of its base name: WebDataset's key and extension."""
    name, _, extension = member.name.rpartition("/")[2].partition(".")
    return (*folders, name), extension


def unwrap(tree: Tree, keep_splits: bool = False) -> Tree:
    """Descend through wrappers, folders that hold one folder of folders and nothing else.

    `keep_splits`: do not descend into folders named like splits."""
    while len(names := tree.names()) == 1 and not (keep_splits and SPLIT_NAME.fullmatch(names[0])):
        if tree.holds_images() or (inner := tree.open(names[0])).holds_images() or not inner.names():
            break
        tree = inner
    return tree


def read_tree(raw: Path, tree: Tree) -> RawImageNet:
    """List a folder of class folders or of splits. Raises `ValueError` where that is ambiguous."""
    names = tree.names()
    splits = [name for name in names if SPLIT_NAME.fullmatch(name)]
    if "train" in names and (splits == names or holds_train_split(tree)):
        val = next((name for name in VAL_NAMES if name in names), None)
        trees = {"train": unwrap(tree.open("train"))} | ({"val": unwrap(tree.open(val))} if val else {})
        ignored = [tree.get_path(name) for name in names if name not in ("train", val)]
        return read_splits(raw, trees, [*ignored, *tree.loose_files()])
    # ILSVRC-2012's test archive is often stored with the class tars.
    tests = [name for name in splits if "test" in name.lower() and tree.is_tar(name)]
    inner = [(each, name) for each in open_wrappers(tree) for name in each.names()]
    for parent, name in [(tree, name) for name in names if name not in tests] + inner:
        if SPLIT_NAME.fullmatch(name) and not (parent is tree and name == "train"):
            raise ValueError(
                f"{parent.get_path(name)}: expected a class, got the name of a split; name the splits train and val"
            )
    if names == tests:
        raise ValueError(
            f"{tree.path}: expected training images, got {tree.get_path(tests[0]).name} only; add train.tar"
        )
    return read_splits(raw, {"train": tree}, [tree.get_path(name) for name in tests], tests)


def holds_train_split(tree: Tree) -> bool:
    """Return True if the folder `train` is a split, not a class."""
    return not tree.is_tar("train") or len(unwrap(tree.open("train")).names()) > 1


def open_wrappers(tree: Tree) -> list[Tree]:
    """Open the folders that hold only folders. Tars are not read."""
    found = [tree.open(name) for name in tree.names() if not tree.is_tar(name)]
    return [each for each in found if not each.holds_images()]


def read_splits(
    raw: Path, trees: dict[str, Tree], ignored: list[Path], excluded: Sequence[str] = ()
) -> RawImageNet:
    """List the class folders of every split except `excluded`. Raises `ValueError` for a class without training
    images."""
    wnids = [name for name in trees["train"].names() if name not in excluded]
    index = {wnid: label for label, wnid in enumerate(wnids)}
    splits = {}
    for split, tree in trees.items():
        listing = splits[split] = Listing(raw)
        names = [name for name in tree.names() if name not in excluded]
        if isinstance(tree, TarFolder) and tree.holds_images() and names:
            raise ValueError(
                f"{tree.path}: {tree.loose_files()[0].name!r} is outside of the class folders; move it"
            )
        ignored = [*ignored, *tree.loose_files()]
        for wnid in tqdm(names, f"listing {split}", unit="class", disable=None):
            if wnid not in index:
                raise ValueError(
                    f"{tree.get_path(wnid)}: a class without training images; add some or remove it"
                )
            folder, others = tree.open(wnid), list[Path]()
            if tree.is_tar(wnid) and isinstance(folder, TarFolder):
                check_class_tar(folder)
            if not folder.append_to(listing, index[wnid], others) and split == "train":
                raise ValueError(f"{tree.get_path(wnid)}: no images found; download it again or remove it")
            ignored += others
        if not listing:
            raise ValueError(
                f"{tree.path}: no class folders found; put the images of each class into its own folder"
            )
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
    """Raise `ValueError` unless a tar holds one class."""
    if not tree.images:
        raise ValueError(f"{tree.path}: no images found; download it again or remove it")
    if len(folders := sorted({folders for folders, _ in tree.images})) > 1:
        raise ValueError(
            f"{tree.path}: expected one class, got several folders, such as {'/'.join(folders[-1])!r}; extract it "
            "into train/, a folder for each class"
        )


def find_images(
    folder: Path, ignored: list[Path], parents: tuple[tuple[int, int], ...] = ()
) -> Iterator[Path]:
    """Find the image files under a folder by extension, sorted, following links, without system files.

    Appends other files to `ignored`; `parents`: device and inode of the folders above. Raises `ValueError` for a loop.
    """
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in parents:
        raise ValueError(f"{folder}: the link forms a loop; remove it")
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if is_system_file(entry.name):
            continue
        if entry.is_dir():
            yield from find_images(Path(entry.path), ignored, (*parents, identity))
        elif IMAGE_NAME.fullmatch(entry.name):
            yield Path(entry.path)
        else:
            ignored.append(Path(entry.path))


def append_file(listing: Listing, path: Path, label: int) -> None:
    """Add one image file. Raises `FileNotFoundError` for a broken link, `ValueError` for a device or socket."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: broken link; restore or remove it") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path}: not a regular file; remove it")
    listing.append(-1, os.path.relpath(path, listing.root), 0, status.st_size, label)


def find_kaggle_tree(raw: Path) -> Path | None:
    """Find the folder CLS-LOC of Kaggle's download in `raw`; None if there is none."""
    candidates = [raw, *(raw / inner for inner in ("CLS-LOC", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC"))]
    return next(
        (path for path in candidates if path.resolve().name == "CLS-LOC" and (path / "train").is_dir()), None
    )


def read_kaggle(raw: Path, tree: Path) -> RawImageNet:
    """List Kaggle's tree: `train/<wnid>/*.JPEG`, and `val/*.JPEG` labelled by LOC_val_solution.csv.

    Raises `FileNotFoundError` or `ValueError` when the two do not match.
    """
    folders = (raw, *[tree.resolve(), *tree.resolve().parents][:4])
    solution = next((each / VAL_SOLUTION for each in folders if (each / VAL_SOLUTION).is_file()), None)
    if solution is None:
        raise FileNotFoundError(
            f"{raw / VAL_SOLUTION}: not found; download it, it labels the validation images"
        )
    with solution.open(newline="", encoding="utf-8") as file:
        try:
            wnid_of = {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
        except (KeyError, IndexError, AttributeError, UnicodeDecodeError, csv.Error):
            raise ValueError(
                f"{solution}: expected Kaggle's columns ImageId, PredictionString; download it again"
            ) from None
    words = solution.with_name(SYNSET_WORDS)
    lines = words.read_text("utf-8", errors="replace").splitlines() if words.is_file() else []
    words_by_wnid = dict(line.split(" ", 1) for line in lines if " " in line)
    data = read_splits(raw, {"train": DiskFolder(tree / "train")}, [])
    index = {name.wnid: position for position, name in enumerate(data.classes)}
    val, ignored = Listing(raw), [*data.ignored]
    for path in find_images(tree / "val", ignored):
        wnid = wnid_of.get(path.stem, "")
        if wnid not in index:
            raise ValueError(
                f"{solution}: expected a class of {tree / 'train'} for {path.name}, got {wnid!r}; download it again"
            )
        append_file(val, path, index[wnid])
    distinct = len({stem(image.name) for image in val})
    if not val or not len(val) == distinct == len(wnid_of):
        raise ValueError(
            f"{tree / 'val'}: expected {len(wnid_of)} images, as in {solution.name}, got {len(val)}, {distinct} "
            "distinct; download them again"
        )
    classes = tuple(ClassName(name.wnid, words_by_wnid.get(name.wnid, name.wnid)) for name in data.classes)
    splits = data.splits | {"val": val}
    return RawImageNet("Kaggle's ILSVRC tree", classes, splits, in_folders=True, ignored=ignored)
