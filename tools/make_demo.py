"""Write a miniature raw ImageNet: real images in the exact layout of the ILSVRC-2012 archives.

The images are the 1,797 handwritten digits of scikit-learn (8x8, 16 grey levels; E. Alpaydin and C. Kaynak, UCI 1998),
enlarged and printed in light ink on dark paper, with the oddities that the real archives have: varied sizes, grey, CMYK
and progressive files, EXIF orientation tags on upright pixels, a PNG named .JPEG. 80 % train, 20 % val, stratified.

    RAW/ILSVRC2012_img_train.tar       a tar of one <wnid>.tar per class
    RAW/ILSVRC2012_img_val.tar         ILSVRC2012_val_00000001.JPEG ...
    RAW/ILSVRC2012_devkit_t12.tar.gz   meta.mat and the validation labels, counted in ILSVRC2012_ID

As in ImageNet, neither the digits' own order nor ILSVRC2012_ID is the order of the sorted wnids that class indexes
follow: a reader that mixes them up trains on wrong labels and shows it. The same seed gives the same bytes.

    python tools/make_demo.py RAW --photos N

writes N photograph-like images instead (`tools/photos.py`), for measuring speed without ImageNet.
"""

import functools
import gzip
import io
import multiprocessing
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

from pipeline.files import atomic_writer, read_json, write_json
from pipeline.machine import num_cores
from tools.packing.ilsvrc import DEVKIT_ARCHIVE, TRAIN_ARCHIVE, VAL_ARCHIVE
from tools.photos import encode, photo
from train.program import run_program

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Made-up WordNet offsets (real ones start with n0 or n1): their sorted order is 7, 2, 9, 4, 0, 8, 5, 1, 6, 3.
DIGIT_TO_WNID = dict(
    enumerate(
        [
            "n90000418",
            "n90000731",
            "n90000127",
            "n90000992",
            "n90000388",
            "n90000602",
            "n90000854",
            "n90000051",
            "n90000517",
            "n90000256",
        ]
    )
)
# ILSVRC2012_ID counts from 1, in a third order; IDs above the number of classes are inner nodes of the hierarchy.
DIGIT_TO_ID = {digit: identifier for identifier, digit in enumerate((3, 8, 0, 5, 9, 1, 7, 4, 2, 6), start=1)}
MARKER = "demo.json"

MIN_PHOTOS = 20  # every class then has an image to train on


def make_demo(raw: Path, seed: int = 2012, photos: int | None = None) -> None:
    """Write the demo's raw archives (1,797 images, about 30 MB) into a folder.

    Args:
        raw: Folder to write into; new, empty, or written by the same command.
        seed: Seed of sizes, colours and oddities.
        photos: Write this many photograph-like images (110 kB each in the mean) instead of the digits, for measuring
            speed. Every core helps.
    """
    if seed < 0:
        raise ValueError(f"--seed must not be negative, but is {seed}")
    if photos is not None and photos < MIN_PHOTOS:
        raise ValueError(f"--photos must be at least {MIN_PHOTOS}, but is {photos}")
    marker, stamp = raw / MARKER, {"format_version": 1, "seed": seed} | ({"photos": photos} if photos else {})
    archives = [raw / name for name in (TRAIN_ARCHIVE, VAL_ARCHIVE, DEVKIT_ARCHIVE)]
    whole = all(path.is_file() for path in archives)
    if marker.is_file() and read_json(marker) == stamp and whole:
        print(f"{raw} holds the demo images already; nothing to do")
        return
    ours = {TRAIN_ARCHIVE, VAL_ARCHIVE, DEVKIT_ARCHIVE}  # without a marker: of a run that was interrupted
    names = {path.name.removesuffix(".tmp") for path in raw.iterdir()} if raw.is_dir() else set()
    names -= {MARKER} if not whole else set()
    if (raw.exists() and not raw.is_dir()) or names - ours:
        raise ValueError(f"{raw} holds something else; give a folder that is new or empty")
    raw.mkdir(parents=True, exist_ok=True)
    if photos:
        write_photos(raw, photos, seed)
    else:
        write_digits(raw, seed)
    write_json(marker, stamp)


def write_digits(raw: Path, seed: int) -> None:
    """Write the archives of the digits."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    rng = np.random.default_rng(seed)
    is_val = stratified_split(digits.target, fraction=0.2, rng=rng)
    train: dict[str, list[tuple[str, bytes]]] = {wnid: [] for wnid in DIGIT_TO_WNID.values()}
    val: list[tuple[str, bytes]] = []
    ground_truth: list[int] = []
    samples = list(zip(digits.images, digits.target, is_val, strict=True))
    for position, (ink, digit, in_val) in enumerate(tqdm(samples, "demo images", unit="img", disable=None)):
        # One train image is a PNG named .JPEG, as n02105855_2933 of ImageNet is.
        encoding = "png" if position == int(np.flatnonzero(~is_val)[100]) else None
        encoded = encode(render(ink / 16, rng), rng, encoding)
        if in_val:
            val.append((f"ILSVRC2012_val_{len(val) + 1:08d}.JPEG", encoded))
            ground_truth.append(DIGIT_TO_ID[int(digit)])
        else:
            wnid = DIGIT_TO_WNID[int(digit)]
            train[wnid].append((f"{wnid}_{position}.JPEG", encoded))

    write_archives(raw, train, val, ground_truth)


def write_photos(raw: Path, count: int, seed: int) -> None:
    """Write the archives of `count` photograph-like images, a class at a time; every fifth is for validation."""
    number_to_digit = {number: number % len(WORDS) for number in range(count)}
    in_val = {number: (number // len(WORDS) + number) % 5 == 0 for number in range(count)}
    val = [number for number in range(count) if in_val[number]]
    train: dict[str, list[int]] = {wnid: [] for wnid in DIGIT_TO_WNID.values()}
    for number, digit in number_to_digit.items():
        if not in_val[number]:
            train[DIGIT_TO_WNID[digit]].append(number)

    cores, context = num_cores(), multiprocessing.get_context("spawn")
    ignore_interrupt = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to tell of
    with (
        ProcessPoolExecutor(cores, context, initializer=signal.signal, initargs=ignore_interrupt) as pool,
        tqdm(total=count, desc="photos", unit="img", disable=None) as progress,
    ):

        def draw(names: Iterable[str], numbers: list[int]) -> Iterator[tuple[str, bytes]]:
            drawn = pool.map(functools.partial(photo, seed=seed), numbers, chunksize=4)
            for name, encoded in zip(names, drawn, strict=True):
                progress.update()
                yield name, encoded

        write_archives(
            raw,
            {wnid: draw([f"{wnid}_{n}.JPEG" for n in numbers], numbers) for wnid, numbers in train.items()},
            draw([f"ILSVRC2012_val_{n:08d}.JPEG" for n in range(1, len(val) + 1)], val),
            [DIGIT_TO_ID[number_to_digit[number]] for number in val],
        )


def write_archives(
    raw: Path,
    train: Mapping[str, Iterable[tuple[str, bytes]]],
    val: Iterable[tuple[str, bytes]],
    ground_truth: list[int],
) -> None:
    """Write the three archives.

    Args:
        raw: Folder to write into.
        train: (name, content) of the training images by wnid; a class is asked for when its turn comes.
        val: (name, content) of the validation images.
        ground_truth: ILSVRC2012_ID of each validation image.
    """
    counts = {}
    with (
        atomic_writer(raw / TRAIN_ARCHIVE) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as outer,
    ):
        for wnid, images in sorted(train.items()):
            with tempfile.TemporaryFile(dir=raw) as inner:  # its length stands in the outer tar before it
                counts[wnid] = write_tar(inner, images)
                info = tarfile.TarInfo(f"{wnid}.tar")
                info.size = inner.tell()
                inner.seek(0)
                outer.addfile(info, inner)
    with atomic_writer(raw / VAL_ARCHIVE) as file:
        num_val = write_tar(file, val)
    with atomic_writer(raw / DEVKIT_ARCHIVE) as file:
        file.write(gzip.compress(devkit(counts, ground_truth), mtime=0))
    print(f"{raw}: {sum(counts.values())} train and {num_val} val images of {len(WORDS)} classes")


def stratified_split(labels: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Choose `fraction` of each class. Returns a bool array, shape of `labels`."""
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        chosen[rng.permutation(members)[: round(len(members) * fraction)]] = True
    return chosen


def render(ink: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Print one digit, light ink on dark paper in random tints, centred on a page with sides of 260 to 520 pixels.

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
    # The contrast is that of a recipe that was seen to learn; ink and paper drawn freely from 0..1 stayed at chance.
    ink_rgb, paper_rgb = rng.uniform(0.6, 1.0, 3), rng.uniform(0.0, 0.3, 3)
    tints = paper_rgb + (ink_rgb - paper_rgb) * np.linspace(0, 1, 256)[:, None]
    return Image.fromarray(np.rint(tints * 255).astype(np.uint8)[coverage])


def devkit(train_counts: dict[str, int], ground_truth: list[int]) -> bytes:
    """The devkit's tar: `meta.mat` (struct array `synsets`) and the validation labels in ILSVRC2012_ID, one a line."""
    from scipy.io import savemat

    fields = (
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    )
    rows: list[tuple[Any, ...]] = [
        (DIGIT_TO_ID[digit], wnid, f"{WORDS[digit]}, {digit}", f"the digit {digit}", 0, [], 0, train_counts[wnid])
        for digit, wnid in DIGIT_TO_WNID.items()
    ]
    leaves = [row[0] for row in rows]
    rows.append((len(rows) + 1, "n90000001", "digit, figure", "one of the ten numerals", len(leaves), leaves, 1, 0))
    rows.sort(key=lambda row: row[0])
    synsets = np.zeros((len(rows), 1), dtype=[(name, object) for name in fields])
    for position, row in enumerate(rows):
        synsets[position, 0] = row
    mat = io.BytesIO()
    savemat(mat, {"synsets": synsets})
    # savemat writes the time into the 116 bytes of free text that head the file; equal seeds are to give equal bytes.
    content = b"MATLAB 5.0 MAT-file, demo devkit".ljust(116) + mat.getvalue()[116:]
    labels = "".join(f"{identifier}\n" for identifier in ground_truth).encode()
    folder = "ILSVRC2012_devkit_t12/data"
    out = io.BytesIO()
    write_tar(out, [(f"{folder}/meta.mat", content), (f"{folder}/ILSVRC2012_validation_ground_truth.txt", labels)])
    return out.getvalue()


def write_tar(file: IO[bytes], members: Iterable[tuple[str, bytes]]) -> int:
    """Write a USTAR archive of (name, content) pairs, the same bytes for the same input. Returns their number."""
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
