"""Read tar headers, with stricter checks than `tarfile`, and group members into WebDataset samples.

`tarfile` takes a damaged header, a hole, or a truncation between two members for the end of the archive, and silently
skips the rest. Nothing is extracted: data are read by offset.
"""

import json
import os
import re
import shlex
import tarfile
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pipeline.errors import UserError
from pipeline.shards import MAX_LABEL_DIGITS

IMAGE_EXTENSIONS = ("jpg", "jpeg")
OTHER_EXTENSIONS = ("jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "avif")
RAW_EXTENSIONS = (*IMAGE_EXTENSIONS, *OTHER_EXTENSIONS)
"""Of images that `pack` and `adopt --convert` take."""
IMAGE_NAME = re.compile(rf".+\.({'|'.join(RAW_EXTENSIONS)})", re.IGNORECASE | re.DOTALL)
LABEL_FIELDS = ("label", "cls")
"""Of a `.json`, the first that is there."""
MAX_LABEL_BYTES = 64
READ_BYTES = 2**20


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    """Its path in the tar; bytes that are not UTF-8 become surrogates."""
    offset: int
    """First byte of its data in the tar file."""
    size: int
    """Length in bytes."""


def read_members(file: BinaryIO, start: int = 0, length: int | None = None) -> Iterator[Member]:
    """Yield the files of a tar, or of a tar of `length` bytes inside a tar at `start`; folders are skipped.

    Raises `UserError` (without the tar's name) for a tar that is damaged or truncated, or holds a link, a device or a
    sparse file, whose data would be lost.
    """
    total = os.fstat(file.fileno()).st_size
    end = total if length is None else start + length
    if end > total:
        raise UserError(f"truncated: an inner tar ends at byte {end}, the file at {total}")
    file.seek(start)
    try:
        tar = tarfile.TarFile(fileobj=file)
    except Exception as error:  # tarfile raises many kinds for damaged headers
        raise UserError(f"not a tar archive at byte {start} ({error})") from None
    while member := next_member(tar):
        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
        if member.offset >= end:
            raise UserError(f"no end mark at byte {end} of an inner tar")
        if member.isdir() or (member.name.endswith("/") and not member.size):  # some programs mark folders so
            continue
        place = f"{member.name!r} at byte {member.offset}"
        if not member.isreg() or member.issparse():
            raise UserError(f"{place}: expected a regular file, got a link, a device or a sparse file")
        if member.size < 0:
            raise UserError(f"{place}: negative size {member.size}")
        if member.offset_data + member.size > end:
            raise UserError(f"truncated inside {place}")
        yield Member(member.name, member.offset_data, member.size)
    if tar.offset + tarfile.BLOCKSIZE > end:
        raise UserError(f"truncated: no end mark at byte {tar.offset}")
    for offset in range(tar.offset, end, READ_BYTES):
        if os.pread(file.fileno(), min(READ_BYTES, end - offset), offset).strip(b"\0"):
            raise UserError(f"damaged header or hole at byte {tar.offset}")


def next_member(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    """Read the next member; None at what tarfile takes for the end of the archive. Raises `UserError`."""
    try:
        return tar.next()
    except Exception as error:  # tarfile raises many kinds for damaged headers
        raise UserError(f"damaged at byte {tar.offset} ({error})") from None


def list_members(path: Path, start: int = 0, length: int | None = None) -> Iterator[Member]:
    """Yield the files of a tar by its path, as `read_members`. Raises `UserError` with path and remedy."""
    with path.open("rb") as file:
        try:
            yield from read_members(file, start, length)
        except ValueError as error:
            if os.pread(file.fileno(), 2, 0) == b"\x1f\x8b":
                name = shlex.quote(str(path))
                command = f"mv {name} {name}.gz && gunzip {name}.gz"
                raise UserError(
                    f"{path}: expected a tar, got one compressed by gzip; run {command}"
                ) from None
            raise UserError(f"{path}: {error}; download it again, or make it of regular files") from None


def is_system_file(path: str) -> bool:
    """Return True for files of an operating system, and what is in its folders: .DS_Store, ._photo.jpg, __MACOSX,
    Thumbs.db."""
    parts = (part for part in path.split("/") if part not in ("", ".", ".."))
    return any(
        part.startswith(".") or part in ("__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir") for part in parts
    )


def read_samples(file: BinaryIO) -> Iterator[tuple[str, list[Member]]]:
    """Yield (key, members) of each sample of a shard, by the webdataset library's rule: consecutive files with
    the same path up to the first dot of the base name; __NAME__ files, files without a dot and those of an operating
    system are skipped.

    Raises as `read_members`.
    """
    current: str | None = None
    members: list[Member] = []
    for member in read_members(file):
        match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", member.name)
        if match is None or re.match(r"__[^/]*__($|/)", member.name) or is_system_file(member.name):
            continue
        if match[1] != current:
            if current is not None:
                yield current, members
            current, members = match[1], []
        members.append(member)
    if current is not None:
        yield current, members


def get_extension(member: Member) -> str:
    """Return what follows the first dot of the base name, in lower case."""
    return member.name.rpartition("/")[2].partition(".")[2].lower()


def index_sample(
    file: BinaryIO,
    key: str,
    members: list[Member],
    extensions: tuple[str, ...] = IMAGE_EXTENSIONS,
    classes: Mapping[str, int] | None = None,
) -> tuple[list[tuple[str, int, int, str]], Member, int]:
    """Return index entries, image and class index of one sample.

    DALI picks components by the index's extension, so `.JPEG` becomes `jpg`; it reads as many bytes as the index says,
    so white space after a label is left out; it ignores the names, but splits lines at spaces.

    With `classes` (index by name), for a conversion: labels may be in a `.json`, or names. A JPEG goes before another
    image, a `.cls` before a `.json`.

    Raises `UserError` (without the tar's name) unless there is one image with one of `extensions`, and one label.
    """
    place = f"sample {sanitize_name(key)} at byte {members[0].offset}"
    names = ", ".join(sanitize_name(member.name) for member in members)
    images = [member for member in members if get_extension(member) in extensions[:2]]
    images = images or [member for member in members if get_extension(member) in extensions[2:]]
    labels = [member for member in members if get_extension(member) == "cls"]
    if classes is not None:
        labels = labels or [member for member in members if get_extension(member) == "json"]
    if len(images) != 1 or images[0].size == 0:
        raise UserError(
            f"{place}: expected one .{' or .'.join(extensions)}, got {names}{' (empty)' if images else ''}"
        )
    if len(labels) != 1:
        expected = ".cls" if classes is None else ".cls or .json with the label"
        raise UserError(f"{place}: expected one {expected}, got {names}")
    (image,), (label,) = images, labels
    try:
        digits = read_label(file, label) if classes is None else read_class(file, label, classes)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    entries = [
        (extensions[0], image.offset, image.size, sanitize_name(image.name)),
        ("cls", label.offset, len(digits), sanitize_name(label.name)),
    ]
    return entries, image, int(digits)


def read_label(file: BinaryIO, label: Member) -> bytes:
    """Read the digits of a class index. Raises `UserError` (without tar and sample) for anything else."""
    text = os.pread(file.fileno(), min(label.size, MAX_LABEL_BYTES), label.offset)
    digits = text.rstrip()  # only at the end: DALI expects data to start at a block
    if label.size > MAX_LABEL_BYTES or not re.fullmatch(rb"[0-9]{1,%d}" % MAX_LABEL_DIGITS, digits):
        expected = f"a class index of at most {MAX_LABEL_DIGITS} digits in {sanitize_name(label.name)}"
        raise UserError(f"expected {expected}, got {text[:16]!r}")
    return digits


def read_class(file: BinaryIO, label: Member, classes: Mapping[str, int]) -> bytes:
    """Read a class index, or a name in `classes`, from a `.cls`, or from a field of a `.json`; returns the digits.

    Raises `UserError` (without tar and sample) for anything else.
    """
    text = os.pread(file.fileno(), min(label.size, READ_BYTES), label.offset).strip()
    value: Any = text.decode(errors="replace")
    place = sanitize_name(label.name)
    if get_extension(label) == "json":
        try:
            fields = dict(json.loads(text))
        except (ValueError, TypeError, RecursionError):
            raise UserError(f"expected a JSON object in {place}, got {text[:16]!r}") from None
        if not (found := [fields[name] for name in LABEL_FIELDS if name in fields]):
            expected = f"{' or '.join(LABEL_FIELDS)} in {place}, got {', '.join(fields)[:200] or 'no field'}"
            raise UserError(f"WebDataset shards without labels: expected {expected}")
        value = found[0]
    is_digits = isinstance(value, str) and value.isdecimal()  # an index; in a .json perhaps a name
    named = (
        str(classes.get(unicodedata.normalize("NFC", value), value)) if isinstance(value, str) else str(value)
    )
    if is_digits and get_extension(label) == "json" and named != str(int(value)):
        raise UserError(f"expected a number or a name in {place}, got {value!r}, which may be both")
    number = value if is_digits else named
    if not re.fullmatch(rf"[0-9]{{1,{MAX_LABEL_DIGITS}}}", number):
        expected = "a class index, or with --convert a name that --classes FILE lists,"
        raise UserError(f"expected {expected} in {place}, got {str(value)[:40]!r}")
    return number.encode()


def sanitize_name(name: str) -> str:
    """Replace white space, control and non-ASCII characters, which break DALI's index or a terminal."""
    return re.sub(r"[^\x21-\x7e]", "_", name)
