"""Write a miniature raw ImageNet: real images in the exact layout of the ILSVRC-2012 archives.

The images are the 1,797 handwritten digits of scikit-learn (8x8, 16 grey levels; E. Alpaydin and C. Kaynak, UCI 1998),
enlarged and printed in light ink on dark paper, with the oddities that the real archives have: varied sizes, grey, CMYK
and progressive files, EXIF orientation tags on upright pixels, a PNG named .JPEG. 80 % train, 20 % val, stratified.

    RAW/ILSVRC2012_img_train.tar       a tar of one <wnid>.tar per class
    RAW/ILSVRC2012_img_val.tar         ILSVRC2012_val_00000001.JPEG ...
    RAW/ILSVRC2012_devkit_t12.tar.gz   meta.mat and the validation labels, counted in ILSVRC2012_ID

As in ImageNet, neither the digits' own order nor ILSVRC2012_ID is the order of the sorted wnids that class indexes
follow: a reader that mixes them up trains on wrong labels and shows it. The same seed gives the same bytes.
"""

import gzip
import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from pipeline.files import atomic_writer, read_json, write_json
from tools.raw import DEVKIT_ARCHIVE, TRAIN_ARCHIVE, VAL_ARCHIVE
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


def make_demo(raw: Path, seed: int = 2012) -> None:
    """Write the demo's raw archives (1,797 images, about 30 MB) into a folder.

    Args:
        raw: Folder to write into; new, empty, or written by the same command.
        seed: Seed of sizes, colours and oddities.
    """
    from sklearn.datasets import load_digits

    if seed < 0:
        raise ValueError(f"--seed must not be negative, but is {seed}")
    marker, stamp = raw / MARKER, {"format_version": 1, "seed": seed}
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

    with atomic_writer(raw / TRAIN_ARCHIVE) as file:
        file.write(tar_bytes([(f"{wnid}.tar", tar_bytes(images)) for wnid, images in sorted(train.items())]))
    with atomic_writer(raw / VAL_ARCHIVE) as file:
        file.write(tar_bytes(val))
    counts = {wnid: len(images) for wnid, images in train.items()}
    with atomic_writer(raw / DEVKIT_ARCHIVE) as file:
        file.write(gzip.compress(devkit(counts, ground_truth), mtime=0))
    write_json(marker, stamp)
    print(f"{raw}: {sum(counts.values())} train and {len(val)} val images of {len(WORDS)} classes")


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


def encode(image: Image.Image, rng: np.random.Generator, encoding: str | None = None) -> bytes:
    """Encode as one of the kinds of file that ImageNet holds.

    Args:
        image: RGB image.
        rng: Draws the kind where `encoding` is None, and the chroma subsampling.
        encoding: "rgb", "grey", "cmyk", "progressive", "exif" or "png".
    """
    subsampling = str(rng.choice(["4:2:0", "4:4:4"], p=[0.7, 0.3]))
    drawn = str(rng.choice(["rgb", "grey", "cmyk", "progressive", "exif"], p=[0.71, 0.06, 0.03, 0.1, 0.1]))
    encoding = encoding or drawn
    out = io.BytesIO()
    if encoding == "png":
        image.save(out, "PNG")
        return out.getvalue()
    options: dict[str, Any] = {"quality": 92, "subsampling": subsampling}
    if encoding == "grey":
        image, options = image.convert("L"), {"quality": 92}
    elif encoding == "cmyk":
        image = image.convert("CMYK")
    elif encoding == "progressive":
        options["progressive"] = True
    elif encoding == "exif":
        exif = Image.Exif()
        exif[0x0112] = 6  # "rotate by 90 degrees to show"; the pixels are upright, as in many files of ImageNet
        options["exif"] = exif
    image.save(out, "JPEG", **options)
    return out.getvalue()


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
    return tar_bytes([(f"{folder}/meta.mat", content), (f"{folder}/ILSVRC2012_validation_ground_truth.txt", labels)])


def tar_bytes(members: list[tuple[str, bytes]]) -> bytes:
    """A USTAR archive of (name, content) pairs, the same bytes for the same input."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


if __name__ == "__main__":
    run_program(make_demo)
