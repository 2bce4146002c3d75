"""The archives of ILSVRC-2012 in miniature, as tools/make_demo.py writes them: tars, a devkit, classes, their ids."""

import gzip
import io
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from pipeline.files import atomic_writer
from tools.packing.ilsvrc import DEVKIT_ARCHIVE, TRAIN_ARCHIVE, VAL_ARCHIVE

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
