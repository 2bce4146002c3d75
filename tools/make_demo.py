"""Write a miniature raw ImageNet: real images in the layout of the ILSVRC-2012 archives.

The images are the 1,797 handwritten digits of scikit-learn (8x8, 16 grey levels; E. Alpaydin and C. Kaynak, UCI 1998),
enlarged and drawn in a light colour on a dark one, with the anomalies of the real archives: varied sizes, grey, CMYK
and progressive files, EXIF orientation tags on upright pixels, a PNG named .JPEG. 80 % train, 20 % val, stratified.

    RAW/ILSVRC2012_img_train.tar       a tar of one <wnid>.tar per class
    RAW/ILSVRC2012_img_val.tar         ILSVRC2012_val_00000001.JPEG ...
    RAW/ILSVRC2012_devkit_t12.tar.gz   meta.mat and the validation labels, counted in ILSVRC2012_ID

As in ImageNet, neither the digits' order nor ILSVRC2012_ID is the order of the sorted wnids, the class indexes: a
reader that confuses them trains on wrong labels. The archives have the same bytes every time.

    python tools/make_demo.py RAW --photos N

writes N photograph-like images instead (`tools/photos.py`), to measure speed without ImageNet.
"""

import functools
import gzip
import io
import signal
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from pipeline.errors import UserError
from pipeline.files import atomic_writer, read_json, write_json
from pipeline.machine import num_cores
from tools.photos import encode, make_photo
from train.cli import run_program

Member = tuple[str, bytes]
"""Name and content of a file in a tar."""
TRAIN_ARCHIVE, VAL_ARCHIVE = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT_ARCHIVE = "ILSVRC2012_devkit_t12.tar.gz"
ARCHIVES = {TRAIN_ARCHIVE, VAL_ARCHIVE, DEVKIT_ARCHIVE}
STAMP = "demo.json"
MIN_PHOTOS = 20
"""Enough for a training image in every class."""
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OFFSETS = (418, 731, 127, 992, 388, 602, 854, 51, 517, 256)
DIGIT_TO_WNID = {digit: f"n90000{offset:03d}" for digit, offset in enumerate(OFFSETS)}
"""Invented WordNet offsets (real ones start with n0 or n1): their sorted order is 7, 2, 9, 4, 0, 8, 5, 1, 6, 3."""
SEED = 2012
"""Of sizes, colours and encodings."""
DIGIT_TO_ID = {digit: number for number, digit in enumerate((3, 8, 0, 5, 9, 1, 7, 4, 2, 6), start=1)}
"""ILSVRC2012_ID counts from 1, in a third order; IDs above the number of classes are inner nodes of the hierarchy."""


def make_demo(raw: Path, photos: int | None = None) -> None:
    """Write the demo's raw archives (1,797 images, about 30 MB) into a folder.

    Args:
        raw: Folder to write into; new, empty, or written by the same command.
        photos: Number of photograph-like images (110 kB on average) to write instead of the digits, to measure speed.
    """
    if photos is not None and photos < MIN_PHOTOS:
        raise UserError(f"--photos: expected at least {MIN_PHOTOS}, got {photos}; write more")
    stamp = {"format_version": 1, "seed": SEED} | ({"photos": photos} if photos else {})
    is_complete = all((raw / name).is_file() for name in (*ARCHIVES, STAMP))
    if is_complete and read_json(raw / STAMP) == stamp:
        print(f"{raw} holds the demo images already; nothing to do")
        return
    # An interrupted run leaves archives without a stamp, or temporary files.
    names = {path.name.removesuffix(".tmp") for path in raw.iterdir()} if raw.is_dir() else set()
    if (raw.exists() and not raw.is_dir()) or is_complete or names - {*ARCHIVES, STAMP}:
        raise UserError(f"{raw}: expected a new or empty folder, got other files; give another")
    raw.mkdir(parents=True, exist_ok=True)
    if photos:
        write_photos(raw, photos, SEED)
    else:
        write_digits(raw)
    write_json(raw / STAMP, stamp)


def write_digits(raw: Path) -> None:
    """Write the archives of the digits."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    rng = np.random.default_rng(SEED)
    is_val = choose_stratified(digits.target, fraction=0.2, rng=rng)
    train: dict[str, list[Member]] = {wnid: [] for wnid in DIGIT_TO_WNID.values()}
    val: list[Member] = []
    ground_truth: list[int] = []
    samples = list(zip(digits.images, digits.target, is_val, strict=True))
    png = int(np.flatnonzero(~is_val)[100])  # a PNG named .JPEG, as n02105855_2933 of ImageNet is
    for position, (ink, digit, in_val) in enumerate(tqdm(samples, "demo images", unit="img", disable=None)):
        encoded = encode(render_digit(ink / 16, rng), rng, "png" if position == png else None)
        if in_val:
            val.append((f"ILSVRC2012_val_{len(val) + 1:08d}.JPEG", encoded))
            ground_truth.append(DIGIT_TO_ID[int(digit)])
        else:
            wnid = DIGIT_TO_WNID[int(digit)]
            train[wnid].append((f"{wnid}_{position}.JPEG", encoded))
    write_archives(raw, train, val, ground_truth)


def choose_stratified(labels: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Choose `fraction` of each class. Returns a bool array, shape of `labels`."""
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        chosen[rng.permutation(members)[: round(len(members) * fraction)]] = True
    return chosen


def render_digit(ink: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Draw one digit in random tints, light on dark, centred on a page with sides of 260 to 520 pixels.

    Args:
        ink: float, shape (8, 8), 0 (paper) to 1 (ink).
        rng: Source of size and colours.
    """
    width, height = (int(side) for side in rng.integers(260, 521, 2))
    side = min(width, height)
    page = Image.new("F", (width, height), 0.0)
    digit = Image.fromarray(ink.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
    page.paste(digit, ((width - side) // 2, (height - side) // 2))
    coverage = np.rint(np.clip(np.asarray(page), 0, 1) * 255).astype(np.uint8)
    # This contrast can be learned; with ink and paper drawn from 0..1 training stayed at chance.
    ink_rgb, paper_rgb = rng.uniform(0.6, 1.0, 3), rng.uniform(0.0, 0.3, 3)
    tints = paper_rgb + (ink_rgb - paper_rgb) * np.linspace(0, 1, 256)[:, None]
    return Image.fromarray(np.rint(tints * 255).astype(np.uint8)[coverage])


def write_photos(raw: Path, count: int, seed: int) -> None:
    """Write the archives of `count` photograph-like images, one class after the other; a fifth is for validation."""
    val = [number for number in range(count) if (number // len(WORDS) + number) % 5 == 0]
    make = functools.partial(make_photo, seed=seed)
    ignore_interrupt = functools.partial(
        signal.signal, signal.SIGINT, signal.SIG_IGN
    )  # the parent ends the pool
    with (
        ProcessPoolExecutor(num_cores(), initializer=ignore_interrupt) as pool,
        tqdm(total=count, desc="photos", unit="img", disable=None) as progress,
    ):

        def render(names: list[str], numbers: list[int]) -> Iterator[Member]:
            for member in zip(names, pool.map(make, numbers, chunksize=16), strict=True):
                progress.update()
                yield member

        train: dict[str, Iterator[Member]] = {}
        for digit, wnid in DIGIT_TO_WNID.items():
            numbers = [number for number in range(digit, count, len(WORDS)) if number not in val]
            train[wnid] = render([f"{wnid}_{number}.JPEG" for number in numbers], numbers)
        names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, len(val) + 1)]
        ground_truth = [DIGIT_TO_ID[number % len(WORDS)] for number in val]
        write_archives(raw, train, render(names, val), ground_truth)


def write_archives(
    raw: Path, train: Mapping[str, Iterable[Member]], val: Iterable[Member], ground_truth: list[int]
) -> None:
    """Write the three archives.

    Args:
        raw: Folder to write into.
        train: Training images by wnid, read in the order of the sorted wnids.
        val: Validation images, read after them.
        ground_truth: ILSVRC2012_ID of each validation image.
    """
    counts = {}
    with (
        atomic_writer(raw / TRAIN_ARCHIVE) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as outer,
    ):
        for wnid, images in sorted(train.items()):
            with tempfile.TemporaryFile(dir=raw) as inner:  # the outer tar's header needs its length
                counts[wnid] = write_tar(inner, images)
                info = tarfile.TarInfo(f"{wnid}.tar")
                info.size = inner.tell()
                inner.seek(0)
                outer.addfile(info, inner)
    with atomic_writer(raw / VAL_ARCHIVE) as file:
        num_val = write_tar(file, val)
    with atomic_writer(raw / DEVKIT_ARCHIVE) as file:
        file.write(gzip.compress(make_devkit(counts, ground_truth), mtime=0))
    print(f"{raw}: {sum(counts.values())} train and {num_val} val images of {len(WORDS)} classes")


def make_devkit(train_counts: dict[str, int], ground_truth: list[int]) -> bytes:
    """Make the devkit's tar: `meta.mat` (struct array `synsets`), and the validation labels, an ILSVRC2012_ID per
    line."""
    from scipy.io import savemat

    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss"]
    fields += ["num_children", "children", "wordnet_height", "num_train_images"]
    rows: list[tuple[Any, ...]] = []
    for digit, wnid in DIGIT_TO_WNID.items():
        words = (f"{WORDS[digit]}, {digit}", f"the digit {digit}")
        rows.append((DIGIT_TO_ID[digit], wnid, *words, 0, [], 0, train_counts[wnid]))
    leaves, root = [row[0] for row in rows], ("n90000001", "digit, figure", "one of the ten numerals")
    rows.append((len(rows) + 1, *root, len(leaves), leaves, 1, 0))
    synsets = np.array(sorted(rows, key=lambda row: row[0]), dtype=[(name, object) for name in fields])
    mat = io.BytesIO()
    savemat(mat, {"synsets": synsets[:, None]})
    # savemat writes the time into the first 116 bytes, free text; equal seeds must give equal bytes.
    content = b"MATLAB 5.0 MAT-file, demo devkit".ljust(116) + mat.getvalue()[116:]
    labels, out = "".join(f"{number}\n" for number in ground_truth).encode(), io.BytesIO()
    files = {"meta.mat": content, "ILSVRC2012_validation_ground_truth.txt": labels}
    write_tar(out, [(f"ILSVRC2012_devkit_t12/data/{name}", file) for name, file in files.items()])
    return out.getvalue()


def write_tar(file: IO[bytes], members: Iterable[Member]) -> int:
    """Write a USTAR archive, the same bytes for the same input. Returns the number of members."""
    count = 0
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
            count += 1
    return count


if __name__ == "__main__":
    run_program(make_demo)
