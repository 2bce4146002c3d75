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
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pipeline.errors import UserError
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
    folder = read_folder(raw)
    tars = {name: read for name, read in folder.folders.items() if name in folder.tars}
    others = sorted(folder.folders.keys() - tars)
    if tars and "train" not in others and not any(holds_images(folder.folders[name]()) for name in others):
        ignored = [*folder.others, *(raw / name for name in others)]
        of_tars = replace(folder, folders=tars, others=ignored)
        return [raw / f"{name}.tar" for name in tars], lambda: read_tree(
            raw, unwrap(of_tars, keep_splits=True)
        )
    if "train" not in others:
        if not holds_images(folder):
            raise FileNotFoundError(f"{raw}: no images found; expected {LAYOUTS}")
        if (inner := unwrap(folder, keep_splits=True)) is not folder:
            return find_layout(inner.path)
        if tars:
            raise UserError(
                f"{raw}: expected tars or folders, got both, such as {min(tars)}.tar; move one kind away"
            )
    return [], lambda: read_tree(raw, folder)


def split_off_validation(data: RawImageNet, fraction: float, seed: int) -> RawImageNet:
    """Split a validation set off train: `fraction` of each class, rounded, at least one image but never the last.

    Images are chosen by a hash of seed and name, so the layout makes no difference. Raises `UserError` when there is
    a validation split, or no class has two images.
    """
    if "val" in data.splits:
        raise UserError(
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
        raise UserError("--val-fraction: expected a class with two images, got none; use 0")
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
    tars = sorted((Path(tar.name).stem, tar.offset, tar.size) for tar in list_members(raw / TRAIN_ARCHIVE))
    wnids, by_wnid = [wnid for wnid, *_ in tars], {name.wnid: name for name in by_id.values()}
    if wnids != sorted(by_wnid):
        odd = sorted(set(wnids) ^ set(by_wnid)) or [wnid for wnid in wnids if wnids.count(wnid) > 1]
        raise UserError(
            f"{raw / TRAIN_ARCHIVE}: expected each of the {len(by_wnid)} classes of {DEVKIT_ARCHIVE} once, got "
            f"{len(wnids)} tars; they differ in {odd[0]}; download both again"
        )
    train, val = Listing(raw), Listing(raw)
    archives = train.add_file(raw / TRAIN_ARCHIVE), val.add_file(raw / VAL_ARCHIVE)
    for label, (wnid, start, length) in enumerate(tqdm(tars, "listing", unit="class", disable=None)):
        images = sorted(list_members(raw / TRAIN_ARCHIVE, start, length))
        if not images:
            raise UserError(f"{raw / TRAIN_ARCHIVE}: no images of class {wnid}; download it again")
        for member in images:
            train.append(archives[0], *member, label)
    index = {wnid: position for position, wnid in enumerate(wnids)}
    for member in sorted(list_members(raw / VAL_ARCHIVE)):
        # Line n of the ground truth belongs to ILSVRC2012_val_<n>.JPEG.
        match = re.fullmatch(r"(?:.*/)?ILSVRC2012_val_(\d{8})\.JPEG", member.name)
        if not match or not 1 <= int(match[1]) <= len(ground_truth):
            raise UserError(
                f"{raw / VAL_ARCHIVE}: the devkit has no label for {member.name!r}; download it again"
            )
        label = index[by_id[ground_truth[int(match[1]) - 1]].wnid]
        val.append(archives[1], *member, label)
    distinct = len({stem(image.name) for image in val})
    if not len(val) == distinct == len(ground_truth):
        raise UserError(
            f"{raw / VAL_ARCHIVE}: expected {len(ground_truth)} images, as the devkit has labels, got {len(val)}, "
            f"{distinct} distinct; download it again"
        )
    return RawImageNet(
        "ILSVRC-2012 archives", tuple(by_wnid[wnid] for wnid in wnids), {"train": train, "val": val}
    )


def verify_md5(raw: Path, layout: str) -> None:
    """Compare the archives with the published MD5 sums. Raises `UserError` for a difference, and for other layouts."""
    if "archives" not in layout:
        raise UserError(f"--check-md5: expected the archives of ILSVRC-2012, got {layout}; leave it out")
    for name, published in ARCHIVES.items():
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
        elif name != entry.name and name not in readers:  # a tar that was extracted next to it is not read
            tars[name] = partial(read_tar, Path(entry.path))
        else:
            others.append(Path(entry.path))
    return Folder(path, dict(sorted((readers | tars).items())), images, others, frozenset(tars))


@functools.lru_cache(maxsize=2)
def read_tar(tar: Path) -> Folder:
    """Read the headers of a tar. Raises `UserError`, also for a WebDataset shard."""
    images, others = list[tuple[tuple[str, ...], Member]](), list[tuple[tuple[str, ...], Member]]()
    for member in list_members(tar):
        parts = [part for part in member.name.split("/") if part not in ("", ".", "..")] or [member.name]
        if not any(map(is_system_file, parts)):
            (images if IMAGE_NAME.fullmatch(parts[-1]) else others).append((tuple(parts[:-1]), member))
    if not images:  # as ImageNet-21k has them
        images = [file for file in others if "." not in Path(file[1].name).name]
        others = [file for file in others if "." in Path(file[1].name).name]
    if len(images) != len({member.name for _, member in images}):
        raise UserError(
            f"{tar}: holds a file twice; extract it, which keeps the last one, and pack the folders"
        )
    if len({folders for folders, _ in images}) == 1:  # class folders may hold other files, too
        keys = {split_key(member)[0] for _, member in images}
        if extensions := [split_key(member)[1] for _, member in others if split_key(member)[0] in keys]:
            raise UserError(
                f"{tar}: expected raw images, got a WebDataset shard (.{min(extensions)} with each image); use "
                "make_shards.py adopt if it has labels (.cls), else put the images of each class into its own folder"
            )
    return nest_images(tar, tar, images, sorted(tar / member.name for _, member in others))


def split_key(member: Member) -> tuple[str, str]:
    """Split a path at the first dot of its base name: WebDataset's key and extension."""
    folder, _, base = member.name.rpartition("/")
    name, _, extension = base.partition(".")
    return f"{folder}/{name}", extension


def nest_images(
    tar: Path, path: Path, images: list[tuple[tuple[str, ...], Member]], others: list[Path]
) -> Folder:
    """Make the folder at `path` in a tar of its images (folders below it, file) and other files."""
    groups: dict[str, list[tuple[tuple[str, ...], Member]]] = {}
    for folders, member in images:
        if folders:
            groups.setdefault(folders[0], []).append((folders[1:], member))
    inside = {name: partial(nest_images, tar, path / name, groups[name], []) for name in sorted(groups)}
    return Folder(path, dict(inside), [member for folders, member in images if not folders], others, tar=tar)


def holds_images(folder: Folder) -> bool:
    """Return True if there are images in a folder or those below it; tars are not opened."""
    below = (read() for name, read in folder.folders.items() if name not in folder.tars)
    return bool(folder.images) or any(map(holds_images, below))


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


def unwrap(tree: Folder, keep_splits: bool = False) -> Folder:
    """Descend through wrappers, folders that hold one folder of folders and nothing else.

    `keep_splits`: do not descend into folders named like splits."""
    while len(tree.folders) == 1 and not (keep_splits and SPLIT_NAME.fullmatch(min(tree.folders))):
        if tree.images or (inner := tree.folders[min(tree.folders)]()).images or not inner.folders:
            break
        tree = inner
    return tree


def read_tree(raw: Path, tree: Folder) -> RawImageNet:
    """List a folder of class folders or of splits. Raises `UserError` where that is ambiguous."""
    names = list(tree.folders)
    splits = [name for name in names if SPLIT_NAME.fullmatch(name)]
    # A tar called train may be a split or a class.
    if "train" in names and (
        splits == names or "train" not in tree.tars or len(unwrap(tree.folders["train"]()).folders) > 1
    ):
        val = next((name for name in VAL_NAMES if name in names), None)
        trees = {"train": unwrap(tree.folders["train"]())} | (
            {"val": unwrap(tree.folders[val]())} if val else {}
        )
        return read_splits(
            raw,
            trees,
            [tree.locate(name) for name in names if name not in ("train", val)] + tree.loose_files(),
        )
    # ILSVRC-2012's test archive is often stored with the class tars.
    tests = [name for name in splits if "test" in name.lower() and name in tree.tars]
    classes = {name: read for name, read in tree.folders.items() if name not in tests}
    if not classes:
        raise UserError(f"{tree.locate(tests[0])}: expected training images, got test images; add train.tar")
    wrappers = [read() for name, read in classes.items() if name not in tree.tars]
    inner = [(each, name) for each in wrappers if not each.images for name in each.folders]
    for parent, name in [*((tree, name) for name in classes if name != "train"), *inner]:
        if SPLIT_NAME.fullmatch(name):
            raise UserError(
                f"{parent.locate(name)}: expected a class, got the name of a split; name the splits train and val"
            )
    return read_splits(raw, {"train": replace(tree, folders=classes)}, [tree.locate(name) for name in tests])


def read_splits(raw: Path, trees: dict[str, Folder], ignored: list[Path]) -> RawImageNet:
    """List the class folders of every split. Raises `UserError` for a class without training images."""
    index = {wnid: label for label, wnid in enumerate(trees["train"].folders)}
    splits = {}
    for split, tree in trees.items():
        listing = splits[split] = Listing(raw)
        ignored = [*ignored, *tree.loose_files()]
        for wnid, read in tqdm(tree.folders.items(), f"listing {split}", unit="class", disable=None):
            if wnid not in index:
                raise UserError(
                    f"{tree.locate(wnid)}: a class without training images; add some or remove it"
                )
            folder = leaf = read()
            while wnid in tree.tars and not leaf.images and len(leaf.folders) == 1:
                leaf = leaf.folders[min(leaf.folders)]()
            if wnid in tree.tars and leaf.folders:
                raise UserError(
                    f"{tree.locate(wnid)}: expected one class, got several folders, such as {max(leaf.folders)!r}; "
                    "extract it into train/, a folder for each class"
                )
            images, others = collect_images(folder)
            if not images and split == "train":
                raise UserError(f"{tree.locate(wnid)}: no images found; download it again or remove it")
            append_images(listing, images, folder.tar, index[wnid])
            ignored += others
        if not listing:
            raise UserError(
                f"{tree.path}: no class folders found; put the images of each class into its own folder"
            )
    train = trees["train"]
    layout = "class folders in tars" if train.tar else "per-class tars" if train.tars else "class folders"
    return RawImageNet(layout, tuple(ClassName(wnid, wnid) for wnid in index), splits, ignored)


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
    solution = next(
        (each / VAL_SOLUTION for each in folders if (each / VAL_SOLUTION).is_file()), raw / VAL_SOLUTION
    )
    try:
        with solution.open(newline="", encoding="utf-8") as file:
            wnid_of = {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
    except (OSError, LookupError, AttributeError, ValueError, csv.Error):
        raise UserError(
            f"{solution}: expected Kaggle's columns ImageId, PredictionString, which label the validation images; "
            "download it again"
        ) from None
    words = solution.with_name(SYNSET_WORDS)
    lines = words.read_text("utf-8", errors="replace").splitlines() if words.is_file() else []
    words_by_wnid = dict(line.split(" ", 1) for line in lines if " " in line)
    data = read_splits(raw, {"train": read_folder(tree / "train")}, [])
    index = {name.wnid: position for position, name in enumerate(data.classes)}
    val = Listing(raw)
    images, others = collect_images(read_folder(tree / "val"))
    for image in images:
        wnid = wnid_of.get(Path(image.name).stem, "")
        if wnid not in index:
            raise UserError(
                f"{solution}: expected a class of {tree / 'train'} for {image.name}, got {wnid!r}; download it again"
            )
        append_images(val, [image], None, index[wnid])
    distinct = len({stem(image.name) for image in val})
    if not val or not len(val) == distinct == len(wnid_of):
        raise UserError(
            f"{tree / 'val'}: expected {len(wnid_of)} images, as in {solution.name}, got {len(val)}, {distinct} "
            "distinct; download them again"
        )
    classes = tuple(ClassName(name.wnid, words_by_wnid.get(name.wnid, name.wnid)) for name in data.classes)
    splits = data.splits | {"val": val}
    return RawImageNet("Kaggle's ILSVRC tree", classes, splits, [*data.ignored, *others])
