"""Raw ImageNet, listed in place: where each image's bytes lie, and its class index.

Reads the archives of ILSVRC-2012 as they are published. Tars are uncompressed, so headers alone tell every image's
offset and the bytes are fetched with `pread`; nothing is extracted. Class index = position among the sorted wnids; the
devkit's validation labels count in ILSVRC2012_ID, another order, and go through its `meta.mat`.
"""

import functools
import io
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pipeline.shards import ClassName

TRAIN_ARCHIVE = "ILSVRC2012_img_train.tar"
VAL_ARCHIVE = "ILSVRC2012_img_val.tar"
DEVKIT_ARCHIVE = "ILSVRC2012_devkit_t12.tar.gz"


class RawImage(NamedTuple):
    """One image in an archive."""

    name: str
    """File name in the archive."""
    archive: str
    """Path of the tar."""
    offset: int
    """First byte in the tar."""
    size: int
    """Length in bytes."""
    label: int
    """Class index, position among the sorted wnids."""

    def read(self) -> bytes:
        """Fetch the image's bytes. Raises `ValueError` when the archive ends before them."""
        content = os.pread(open_archive(self.archive), self.size, self.offset)
        if len(content) != self.size:
            raise ValueError(f"{self.archive} ends inside {self.name}; it is cut short, fetch it again")
        return content


@functools.cache
def open_archive(path: str) -> int:
    """A file descriptor for `pread`, one per archive and process."""
    return os.open(path, os.O_RDONLY)


@dataclass(frozen=True)
class RawImageNet:
    """A raw data set, found and listed."""

    layout: str
    """What was found, for the first line of output."""
    classes: tuple[ClassName, ...]
    """Sorted by wnid."""
    splits: dict[str, list[RawImage]]
    """"train" and "val", each sorted by file name."""


def open_raw(raw: Path) -> RawImageNet:
    """List a folder that holds the three archives of ILSVRC-2012.

    Raises `FileNotFoundError` for a missing archive and `ValueError` for one that is not what its name says.
    """
    for name in (TRAIN_ARCHIVE, VAL_ARCHIVE, DEVKIT_ARCHIVE):
        if not (raw / name).is_file():
            raise FileNotFoundError(
                f"{raw / name} is missing; {raw} has to hold the archives of ILSVRC-2012 by their own names"
            )
    by_id, ground_truth = read_devkit(raw / DEVKIT_ARCHIVE)
    tars = [(Path(name).stem, offset, size) for name, offset, size in members(raw / TRAIN_ARCHIVE)]
    wnids = sorted(wnid for wnid, _, _ in tars)
    known = {name.wnid: name for name in by_id.values()}
    if unknown := sorted(set(wnids) - set(known)):
        raise ValueError(
            f"{raw / DEVKIT_ARCHIVE} does not know class {unknown[0]} of {TRAIN_ARCHIVE}; fetch the devkit again"
        )
    if absent := sorted(set(known) - set(wnids)):
        raise ValueError(f"{raw / TRAIN_ARCHIVE} lacks class {absent[0]} of the devkit; fetch it again")
    if len(set(wnids)) != len(wnids):
        raise ValueError(f"{raw / TRAIN_ARCHIVE} holds a class twice; fetch it again")
    index = {wnid: position for position, wnid in enumerate(wnids)}

    train = [
        RawImage(name, str(raw / TRAIN_ARCHIVE), offset, size, index[wnid])
        for wnid, start, length in tars
        for name, offset, size in members(raw / TRAIN_ARCHIVE, start, length)
    ]
    if empty := sorted(set(index.values()) - {image.label for image in train}):
        raise ValueError(f"{raw / TRAIN_ARCHIVE} holds no image of class {wnids[empty[0]]}; fetch it again")
    val = [
        RawImage(name, str(raw / VAL_ARCHIVE), offset, size, index[by_id[val_id(name, ground_truth, raw)].wnid])
        for name, offset, size in members(raw / VAL_ARCHIVE)
    ]
    if len(val) != len(ground_truth):
        raise ValueError(
            f"{raw / VAL_ARCHIVE} holds {len(val)} images, the devkit labels {len(ground_truth)}; fetch it again"
        )
    if not train or not val:
        raise ValueError(f"{raw} holds no {'train' if not train else 'validation'} image; fetch the archives again")
    splits = {"train": sorted(train), "val": sorted(val)}
    return RawImageNet("ILSVRC-2012 archives", tuple(known[wnid] for wnid in wnids), splits)


def members(archive: Path, start: int = 0, length: int | None = None) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, size) of the regular files of a tar, or of a tar that lies inside a tar at `start`.

    Raises `ValueError` when it is no tar or is cut short.
    """
    total = archive.stat().st_size
    end = total if length is None else start + length
    if end > total:
        raise ValueError(f"{archive} is cut short; fetch it again")
    with archive.open("rb") as file:
        file.seek(start)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.offset >= end:  # an inner tar without an end mark runs into its neighbour
                        break
                    if not member.isfile():
                        continue
                    if member.offset_data + member.size > end:
                        raise ValueError(f"{archive} is cut short inside {member.name}; fetch it again")
                    yield member.name, member.offset_data, member.size
                # tarfile takes a damaged header for the end of the archive; the end is zeros or the end of the file.
                file.seek(tar.offset)
                if tar.offset < end and file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                    raise ValueError(f"{archive} has a damaged header at byte {tar.offset}; fetch it again")
        except tarfile.TarError as error:
            raise ValueError(
                f"{archive} is not a tar archive or is damaged at byte {start} ({error}); fetch it again"
            ) from None


def val_id(name: str, ground_truth: list[int], raw: Path) -> int:
    """ILSVRC2012_ID of a validation image; line n of the ground truth belongs to `ILSVRC2012_val_<n>.JPEG`."""
    match = re.fullmatch(r"(?:.*/)?ILSVRC2012_val_(\d{8})\.JPEG", name)
    if not match or not 1 <= int(match[1]) <= len(ground_truth):
        raise ValueError(f"{raw / VAL_ARCHIVE} holds {name!r}, which the devkit does not label; fetch it again")
    return ground_truth[int(match[1]) - 1]


def read_devkit(path: Path) -> tuple[dict[int, ClassName], list[int]]:
    """Read classes by ILSVRC2012_ID (leaves of the hierarchy alone) and the validation labels, which count in that ID.

    Raises `ValueError` when the devkit is damaged or labels a class that it does not describe.
    """
    from scipy.io import loadmat

    folder = "ILSVRC2012_devkit_t12/data"
    try:
        with tarfile.open(path, "r:gz") as tar:
            files = {}
            for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt"):
                file = tar.extractfile(f"{folder}/{name}")
                files[name] = file.read() if file else b""
        synsets = loadmat(io.BytesIO(files["meta.mat"]), squeeze_me=True)["synsets"]
        by_id = {
            int(row["ILSVRC2012_ID"]): ClassName(str(row["WNID"]), str(row["words"]))
            for row in synsets
            if int(row["num_children"]) == 0
        }
        ground_truth = [int(line) for line in files["ILSVRC2012_validation_ground_truth.txt"].split()]
    except Exception as error:  # tarfile, zlib and scipy each have their own for damaged input
        raise ValueError(f"{path} is not the devkit of ILSVRC-2012 or is damaged ({error}); fetch it again") from None
    if unknown := sorted(set(ground_truth) - set(by_id)):
        raise ValueError(
            f"{path} labels images as class {unknown[0]}, which its meta.mat does not describe; fetch it again"
        )
    return by_id, ground_truth
