"""Tar headers: what a tar holds and where, checked beyond what `tarfile` does; and WebDataset's samples in it.

`tarfile` takes a damaged header, a hole, and a file that was cut between two members for the end of the archive, and
would lose what follows. Nothing is extracted: data are read by offset.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pipeline.shards import MAX_LABEL_DIGITS

IMAGE_EXTENSIONS = ("jpg", "jpeg")
MAX_LABEL_BYTES = 64
READ_BYTES = 2**20


class Member(NamedTuple):
    """A plain file in a tar."""

    name: str
    """Its path there; bytes that are not UTF-8 stand as surrogates."""
    offset: int
    """First byte of its data in the tar file."""
    size: int
    """Length in bytes."""


def read_members(file: BinaryIO, start: int = 0, length: int | None = None) -> Iterator[Member]:
    """Yield the files of a tar, or of a tar of `length` bytes inside a tar at `start`; folders are left out.

    Raises `ValueError` (without the tar's name) where it is not a tar, damaged or cut short, or holds a link, a device
    or a sparse file: that stands for data that we would lose.
    """
    total = os.fstat(file.fileno()).st_size
    end = total if length is None else start + length
    if end > total:
        raise ValueError(f"cut short: an inner tar ends at byte {end}, the file at {total}")
    file.seek(start)
    try:
        tar = tarfile.TarFile(fileobj=file)
    except Exception as error:  # as in `next_member`
        raise ValueError(f"not a tar archive at byte {start} ({error})") from None
    while member := next_member(tar):
        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
        if member.offset >= end:
            raise ValueError(f"no end mark at byte {end} of an inner tar")
        if member.isdir():
            continue
        place = f"{member.name!r} at byte {member.offset}"
        if not member.isreg() or member.issparse():
            raise ValueError(f"{place} is a link, a device or a sparse file, not a plain file")
        if member.size < 0:
            raise ValueError(f"{place} has a negative size")
        if member.offset_data + member.size > end:
            raise ValueError(f"cut short inside {place}")
        yield Member(member.name, member.offset_data, member.size)
    if tar.offset + tarfile.BLOCKSIZE > end:
        raise ValueError(f"cut short: no end mark at byte {tar.offset}")
    for offset in range(tar.offset, end, READ_BYTES):
        if os.pread(file.fileno(), min(READ_BYTES, end - offset), offset).strip(b"\0"):
            raise ValueError(f"damaged header at byte {tar.offset}, or a hole there")


def next_member(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    """The next member; None at the end of the archive, or what tarfile takes for it. Raises `ValueError`."""
    try:
        return tar.next()
    except Exception as error:  # headers can be damaged in many ways, for which tarfile raises all sorts
        raise ValueError(f"damaged at byte {tar.offset} ({error})") from None


def list_members(path: Path, start: int = 0, length: int | None = None) -> Iterator[Member]:
    """As `read_members`, of a file by its path. Raises `ValueError` with its name and a remedy."""
    with path.open("rb") as file:
        try:
            yield from read_members(file, start, length)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; fetch it again, or pack plain files into it") from None


def read_samples(file: BinaryIO) -> Iterator[tuple[str, list[Member]]]:
    """Yield (key, members) of each sample of a shard, by the webdataset library's rule: consecutive files that
    share the path up to the first dot of the base name; its own notes and files without a dot are not samples.

    Raises as `read_members`.
    """
    current: str | None = None
    members: list[Member] = []
    for member in read_members(file):
        match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", member.name)
        if match is None or re.match(r"__[^/]*__($|/)", member.name):
            continue
        if match[1] != current:
            if current is not None:
                yield current, members
            current, members = match[1], []
        members.append(member)
    if current is not None:
        yield current, members


def extension(member: Member) -> str:
    """What follows the first dot of the base name, in lower case."""
    return member.name.rpartition("/")[2].partition(".")[2].lower()


def index_sample(
    file: BinaryIO, key: str, members: list[Member]
) -> tuple[list[tuple[str, int, int, str]], Member, int]:
    """Index entries, image and class index of one sample.

    DALI picks components by the index's extension, so `.JPEG` is listed as `jpg`; it reads as many bytes as the index
    says, so white space after a label is left out; it never uses the names, but cuts lines at spaces.

    Raises `ValueError` (without the tar's name) unless it has one JPEG and one label that the loader reads rightly.
    """
    place = f"sample {printable(key)} at byte {members[0].offset}"
    held = ", ".join(printable(member.name) for member in members)
    images = [member for member in members if extension(member) in IMAGE_EXTENSIONS]
    labels = [member for member in members if extension(member) == "cls"]
    if len(images) != 1 or images[0].size == 0:
        raise ValueError(f"{place}: expected one .jpg or .jpeg, got {held}{' (empty)' if images else ''}")
    if len(labels) != 1:
        raise ValueError(f"{place}: expected one .cls, got {held}")
    (image,), (label,) = images, labels
    text = os.pread(file.fileno(), min(label.size, MAX_LABEL_BYTES), label.offset)
    digits = text.rstrip()  # not from the left: DALI wants data to start where a block does
    if label.size > MAX_LABEL_BYTES or not re.fullmatch(rb"[0-9]{1,%d}" % MAX_LABEL_DIGITS, digits):
        raise ValueError(
            f"{place}: expected a class index of at most {MAX_LABEL_DIGITS} digits in {printable(label.name)}, "
            f"got {text[:16]!r}"
        )
    entries = [
        ("jpg", image.offset, image.size, printable(image.name)),
        ("cls", label.offset, len(digits), printable(label.name)),
    ]
    return entries, image, int(digits)


def printable(name: str) -> str:
    """A name without white space and without what a terminal or DALI would trip over."""
    return re.sub(r"[^\x21-\x7e]", "_", name)
