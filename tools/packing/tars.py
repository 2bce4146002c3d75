"""Reading WebDataset shards as they lie on disk: every tar once, front to back, one sample in memory.

Members make samples by the webdataset library's rule: consecutive files that share the path up to the first dot of the
base name. Checks go beyond what `tarfile` and the library see, for both take damage in the middle for the end.
"""

import hashlib
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple, TypeVar

from tqdm import tqdm

from pipeline.shards import MAX_LABEL_DIGITS
from tools.packing.pool import as_they_finish

IMAGE_EXTENSIONS = ("jpg", "jpeg")
MAX_LABEL_BYTES = 64
READ_BYTES = 2**20
Job = TypeVar("Job")
Result = TypeVar("Result")


class Member(NamedTuple):
    """One file in a tar."""

    name: str
    """Its path there."""
    extension: str
    """Behind the first dot of the base name, in lower case."""
    offset: int
    """First byte of its data in the tar."""
    size: int
    """Length in bytes."""
    data: bytes
    """Of a JPEG all bytes, of a label the first few, else none."""


class HashedFile:
    """A file whose SHA-256 grows as it is read from its start."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest = file, hashlib.sha256()
        self.num_bytes = os.fstat(file.fileno()).st_size

    def read(self, size: int = READ_BYTES) -> bytes:
        """The next bytes."""
        content = self._file.read(size)
        self._digest.update(content)
        return content

    def peek(self, offset: int, size: int) -> bytes:
        """Bytes anywhere, without moving."""
        return os.pread(self._file.fileno(), size, offset)

    def finish(self) -> str:
        """Read to the end; SHA-256 of the whole file, in hexadecimal."""
        while self.read():
            pass
        return self._digest.hexdigest()


def read_samples(file: HashedFile) -> Iterator[tuple[str, list[Member]]]:
    """Yield key and members of each sample of a tar, holding no more than that; a key is its members' path up to the
    first dot of the base name.

    Raises `ValueError` (without the tar's name) when it is damaged, cut short, or holds what a shard must not.
    """
    current: str | None = None
    members: list[Member] = []
    for key, member in read_members(file):
        if key != current:
            if current is not None:
                yield current, members
            current, members = key, []
        members.append(member)
    if current is not None:
        yield current, members


def read_members(file: HashedFile) -> Iterator[tuple[str, Member]]:
    """Yield (key, member) of a tar's files; raises as `read_samples`."""
    try:
        with tarfile.open(fileobj=file, mode="r|", bufsize=READ_BYTES) as tar:  # type: ignore[call-overload]
            while (info := tar.next()) is not None:
                tar.members = []  # tarfile would keep them all
                if not info.isdir() and (found := read_member(tar, info, file.num_bytes)) is not None:
                    yield found
            offset = tar.offset
    except (tarfile.TarError, OverflowError) as error:
        raise ValueError(f"the tar is damaged or is none ({error})") from None
    # tarfile takes a damaged header, a hole, and the end of a file that was cut, for the end of the archive.
    if offset + tarfile.BLOCKSIZE > file.num_bytes:
        raise ValueError(f"the tar lacks its end mark at byte {offset}: it is cut short")
    for start in range(offset, file.num_bytes, READ_BYTES):
        if file.peek(start, READ_BYTES).strip(b"\0"):
            raise ValueError(f"the tar has a damaged header at byte {offset}, or a hole there")


def read_member(tar: tarfile.TarFile, info: tarfile.TarInfo, end: int) -> tuple[str, Member] | None:
    """(key, member) of the file that the tar stands at; None for one that is no part of a sample; raises as
    `read_samples`."""
    place = f"{plain(info.name)} at byte {info.offset}"
    if not info.isreg() or info.issparse():
        raise ValueError(f"{place} is a link, a device or sparse, not a plain file")
    if info.size < 0 or info.offset_data + info.size > end:
        raise ValueError(f"the tar is cut short inside {place}")
    # Both patterns are the webdataset library's: its own notes, and files without a key, are no samples.
    match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", info.name)
    if match is None or re.match(r"__[^/]*__($|/)", info.name):
        return None
    extension, data = match[2].lower(), b""
    if extension == "cls" or extension in IMAGE_EXTENSIONS:
        content = tar.extractfile(info)
        assert content is not None, "a plain file has content"
        data = content.read(MAX_LABEL_BYTES if extension == "cls" else -1)
    return match[1], Member(info.name, extension, info.offset_data, info.size, data)


def sample_entries(key: str, members: list[Member]) -> tuple[list[tuple[str, int, int, str]], Member, int]:
    """One sample's entries in the index, its image, and its class index.

    Raises `ValueError` (without the tar's name) unless it has one JPEG and one label that the loader reads rightly.
    """
    place = f"sample {plain(key)} at byte {members[0].offset}"
    held = ", ".join(plain(member.name) for member in members)
    images = [member for member in members if member.extension in IMAGE_EXTENSIONS]
    labels = [member for member in members if member.extension == "cls"]
    if len(images) != 1 or images[0].size == 0:
        raise ValueError(f"{place} has to hold one .jpg or .jpeg, not {held}{' (empty)' if images else ''}")
    if len(labels) != 1:
        raise ValueError(f"{place} has to hold one .cls, not {held}")
    (image,), (label,) = images, labels
    digits = label.data.rstrip()  # not from the left: DALI wants data to start where a block does
    if label.size > MAX_LABEL_BYTES or not re.fullmatch(rb"[0-9]{1,%d}" % MAX_LABEL_DIGITS, digits):
        raise ValueError(
            f"{place}: {plain(label.name)} holds {label.data[:16]!r}, not a class index of at most {MAX_LABEL_DIGITS} "
            "digits"
        )
    entries = [
        ("jpg", image.offset, image.size, plain(image.name)),
        ("cls", label.offset, len(digits), plain(label.name)),
    ]
    return entries, image, int(digits)


def plain(name: str) -> str:
    """A name without white space and without what a terminal or DALI would trip over."""
    return re.sub(r"[^\x21-\x7e]", "_", name)


def over_shards(
    function: Callable[[Job], Result], jobs: list[Job], sizes: list[int], workers: int, what: str
) -> list[Result]:
    """Call `function` on every job in processes, with a progress bar over the jobs' bytes; results in the jobs' order.

    Raises what the first failing call raised, and `DataError` when a process dies.
    """
    results: dict[int, Result] = {}
    with tqdm(total=sum(sizes), desc=what, unit="B", unit_scale=True, disable=None) as progress:
        for number, result in as_they_finish(function, jobs, min(workers, len(jobs))):
            results[number] = result
            progress.update(sizes[number])
    return [results[number] for number in range(len(jobs))]
