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
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from pipeline.files import read_json, write_json
from pipeline.machine import num_cores
from tools.demo_archives import DIGIT_TO_ID, DIGIT_TO_WNID, WORDS, write_archives
from tools.packing.ilsvrc import DEVKIT_ARCHIVE, TRAIN_ARCHIVE, VAL_ARCHIVE
from tools.packing.pool import in_order
from tools.photos import encode, photo
from train.program import run_program

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

    numbers = [number for _, each in sorted(train.items()) for number in each] + val  # as they are asked for
    drawn = in_order(functools.partial(photo, seed=seed), numbers, num_cores())
    with tqdm(total=count, desc="photos", unit="img", disable=None) as progress:

        def named(names: list[str]) -> Iterator[tuple[str, bytes]]:
            for name in names:
                progress.update()
                yield name, next(drawn)

        write_archives(
            raw,
            {wnid: named([f"{wnid}_{n}.JPEG" for n in each]) for wnid, each in train.items()},
            named([f"ILSVRC2012_val_{n:08d}.JPEG" for n in range(1, len(val) + 1)]),
            [DIGIT_TO_ID[number_to_digit[number]] for number in val],
        )


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


if __name__ == "__main__":
    run_program(make_demo)
