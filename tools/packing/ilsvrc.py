"""ILSVRC-2012 as it is published: a tar of tars, a tar, and a devkit.

Tars are uncompressed, so headers alone tell every image's offset and the bytes are fetched with `pread`; nothing is
extracted. Class index = position among the sorted wnids; the devkit's validation labels count in ILSVRC2012_ID, another
order, and go through its `meta.mat`.
"""

import hashlib
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from pipeline.shards import ClassName
from tools.packing.listing import Listing, RawImageNet

TRAIN_ARCHIVE = "ILSVRC2012_img_train.tar"
VAL_ARCHIVE = "ILSVRC2012_img_val.tar"
DEVKIT_ARCHIVE = "ILSVRC2012_devkit_t12.tar.gz"
ARCHIVES = (TRAIN_ARCHIVE, VAL_ARCHIVE, DEVKIT_ARCHIVE)
MD5 = {  # as published with the archives
    TRAIN_ARCHIVE: "1d675b47d978889d74fa0da5fadfb00e",
    VAL_ARCHIVE: "29b22e2961454d5413ddabcf34fc5622",
    DEVKIT_ARCHIVE: "fa75699e90414af021442c21a62c3abf",
}

MAX_DEVKIT_BYTES = 2**26
"""Of a file in the devkit at most: a gzip file can hold a thousand times what it seems."""


def read_archives(raw: Path) -> RawImageNet:
    """List the three archives of ILSVRC-2012.

    Raises `FileNotFoundError` for a missing archive and `ValueError` for one that is not what its name says.
    """
    for name in ARCHIVES:
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
            f"{raw / DEVKIT_ARCHIVE} does not know class {unknown[0]!r} of {TRAIN_ARCHIVE}; fetch the devkit again"
        )
    if absent := sorted(set(known) - set(wnids)):
        raise ValueError(f"{raw / TRAIN_ARCHIVE} lacks class {absent[0]} of the devkit; fetch it again")
    if len(set(wnids)) != len(wnids):
        raise ValueError(f"{raw / TRAIN_ARCHIVE} holds a class twice; fetch it again")

    train, val = Listing(raw), Listing(raw)
    archive = train.add_file(raw / TRAIN_ARCHIVE)
    for label, (wnid, start, length) in enumerate(tqdm(sorted(tars), "listing", unit="class", disable=None)):
        images = sorted(members(raw / TRAIN_ARCHIVE, start, length))
        if not images:
            raise ValueError(f"{raw / TRAIN_ARCHIVE} holds no image of class {wnid}; fetch it again")
        for name, offset, size in images:
            train.append(archive, name, offset, size, label)
    archive = val.add_file(raw / VAL_ARCHIVE)
    index = {wnid: position for position, wnid in enumerate(wnids)}
    for name, offset, size in sorted(members(raw / VAL_ARCHIVE)):
        val.append(archive, name, offset, size, index[by_id[val_id(name, ground_truth, raw)].wnid])
    if len(val) != len(ground_truth) or len({image.name.rsplit("/", 1)[-1] for image in val}) != len(val):
        raise ValueError(
            f"{raw / VAL_ARCHIVE} holds {len(val)} images, perhaps one of them twice, and the devkit labels "
            f"{len(ground_truth)}; fetch it again"
        )
    if not train or not val:
        raise ValueError(f"{raw} holds no {'train' if not train else 'validation'} image; fetch the archives again")
    return RawImageNet("ILSVRC-2012 archives", tuple(known[wnid] for wnid in wnids), {"train": train, "val": val})


def check_md5(raw: Path) -> None:
    """Compare the archives with the published MD5 sums. Raises `ValueError` for one that differs."""
    for name in ARCHIVES:
        digest = hashlib.md5(usedforsecurity=False)
        size = (raw / name).stat().st_size
        progress = tqdm(total=size, desc=f"md5 of {name}", unit="B", unit_scale=True, disable=None)
        with (raw / name).open("rb") as file, progress:
            while block := file.read(2**22):
                digest.update(block)
                progress.update(len(block))
        if digest.hexdigest() != MD5[name]:
            raise ValueError(
                f"{raw / name} has md5 {digest.hexdigest()}, the published archive {MD5[name]}; fetch it again"
            )


def members(archive: Path, start: int = 0, length: int | None = None) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, size) of the files of a tar, or of a tar that lies inside a tar at `start`.

    Folders are passed over. Raises `ValueError` when it is no tar, is cut short, or holds what is no plain file: a link
    or a device stands for an image that we would lose.
    """
    total = archive.stat().st_size
    end = total if length is None else start + length
    if end > total:
        raise ValueError(f"{archive} is cut short; fetch it again")
    with archive.open("rb") as file:
        file.seek(start)
        try:
            tar = tarfile.TarFile(fileobj=file)
        except Exception as error:  # as in `next_member`
            raise ValueError(f"{archive} is not a tar archive at byte {start} ({error}); fetch it again") from None
        while member := next_member(tar, archive):
            if member.offset >= end:
                raise ValueError(f"{archive} has no end mark at byte {end} of an inner tar; fetch it again")
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                raise ValueError(
                    f"{archive} holds {member.name!r}, a link, a device or a sparse file where an image is "
                    "expected; pack the images themselves into it"
                )
            if member.size < 0:
                raise ValueError(f"{archive} gives {member.name!r} a negative size; fetch it again")
            if member.offset_data + member.size > end:
                raise ValueError(f"{archive} is cut short inside {member.name!r}; fetch it again")
            yield member.name, member.offset_data, member.size
        check_end(file, tar.offset, end, archive)


def next_member(tar: tarfile.TarFile, archive: Path) -> tarfile.TarInfo | None:
    """The next member; None at the end of the archive, or what tarfile takes for it. Raises `ValueError`."""
    try:
        return tar.next()
    except Exception as error:  # headers can be damaged in many ways, for which tarfile raises all sorts
        raise ValueError(f"{archive} is damaged at byte {tar.offset} ({error}); fetch it again") from None


def check_end(file: BinaryIO, offset: int, end: int, archive: Path) -> None:
    """Raise `ValueError` unless a tar ends at `offset` with zeros up to `end`.

    tarfile takes a damaged header, a hole and a file that was cut between two members for the end of the archive.
    """
    file.seek(offset)
    if offset >= end:
        raise ValueError(f"{archive} lacks an end mark at byte {offset}: it is cut short, fetch it again")
    while offset < end:
        block = file.read(min(2**20, end - offset))
        if block.strip(b"\0"):
            raise ValueError(f"{archive} has a damaged header at byte {offset}; fetch it again")
        offset += len(block)


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
        raise ValueError(f"{path} is not the devkit of ILSVRC-2012 or is damaged ({error}); fetch it again") from None
    if unknown := sorted(set(ground_truth) - set(by_id)):
        raise ValueError(
            f"{path} labels images as class {unknown[0]}, which its meta.mat does not describe; fetch it again"
        )
    return by_id, ground_truth


def read_synsets(mat: bytes) -> list[tuple[int, str, str, int]]:
    """(ILSVRC2012_ID, wnid, words, number of children) of each synset of `meta.mat`. Raises `ValueError`."""
    script = Path(__file__).with_name("synsets.py")
    done = subprocess.run([sys.executable, script], input=mat, capture_output=True, check=False)
    if done.returncode:
        last = done.stderr.decode(errors="replace").splitlines()[-1:] if done.returncode > 0 else []
        raise ValueError(f"its meta.mat cannot be read{''.join(f': {line}' for line in last)}")
    return [tuple(row) for row in json.loads(done.stdout)]
