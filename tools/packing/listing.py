"""Lists of raw images as numpy columns, so that 14 million of them fit in memory, and their cache on disk.

A listing says of each image where its bytes lie: in an archive at an offset, in a file of its own, or in a row of a
parquet file. To list 155 GB of tars takes a small read per image, so a listing of archives is kept with the output;
it holds as long as every archive has the size and the time that it had.
"""

import functools
import hashlib
import io
import json
import os
import random
import time
import zipfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.files import write_bytes
from pipeline.shards import ClassName, DataError

MAX_FILE_BYTES = 256 * 2**20
"""Two thousand times the mean of ImageNet; a larger member is damage or an attack on our memory."""
CACHE_VERSION = 3
COLUMNS = ("file", "label", "offset", "size", "ends")


class RawImage(NamedTuple):
    """One image and where its bytes lie."""

    name: str
    """What its archive or folder calls it; bytes that are not UTF-8 stand as surrogates."""
    file: str
    """Path of the tar, the parquet file, or the image itself."""
    offset: int
    """First byte in a tar (row in a parquet file; 0 in a file of its own)."""
    size: int
    """Length in bytes (0 in a parquet file, where it is not known beforehand)."""
    label: int
    """Class index, position among the sorted wnids."""

    def read(self) -> bytes:
        """Fetch the image's bytes.

        Raises `ValueError` for a size that no image has, `DataError` when the file ends before them.
        """
        if self.size > MAX_FILE_BYTES:
            raise ValueError(f"not decodable: {self.size} bytes are more than an image has")
        content = os.pread(open_file(self.file).descriptor, self.size, self.offset)
        if len(content) != self.size:
            raise DataError(
                f"{self.file} ends inside {self.shown_name}; it is cut short or has changed, fetch it again"
            )
        return content

    def prefetch(self) -> None:
        """Let the system fetch the image in the background."""
        os.posix_fadvise(open_file(self.file).descriptor, self.offset, self.size, os.POSIX_FADV_WILLNEED)

    @property
    def shown_name(self) -> str:
        """The name as it can be printed and written as JSON."""
        return show(self.name)


def show(name: str) -> str:
    """A file's name as it can be printed and written as JSON."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


class OpenFile:
    """A file descriptor that is closed when nobody holds it any more."""

    def __init__(self, path: str) -> None:
        """Open for reading."""
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(
        self, close: Callable[[int], None] = os.close
    ) -> None:  # `os` may be gone when the process ends
        """Close."""
        if hasattr(self, "descriptor"):
            close(self.descriptor)


open_file = functools.lru_cache(maxsize=256)(OpenFile)
"""Open files by path; few enough for any limit, as ImageNet-21k has 21,841 archives."""


class Listing:
    """The images of one split, in the order of their classes and names (of rows, in parquet files)."""

    def __init__(self, root: Path) -> None:
        """An empty list of images under `root`."""
        self.root = str(root)
        self.files: list[str] = []
        """Archives, relative to `root`."""
        self.file_bytes: list[int] = []
        """Their sizes."""
        self.file, self.label = array("i"), array("i")
        """Per image: index into `files`, or -1 for an image that is a file of its own; class index."""
        self.offset, self.size, self.ends = array("q"), array("q"), array("q")
        """Per image: as in `RawImage`; end of its name in `names`."""
        self.names = bytearray()

    def __len__(self) -> int:
        """Number of images."""
        return len(self.file)

    def append(self, file: int, name: str, offset: int, size: int, label: int) -> None:
        """Add one image; `file` as in `Listing.file`."""
        self.names += os.fsencode(name)
        for column, value in zip(COLUMNS, (file, label, offset, size, len(self.names)), strict=True):
            getattr(self, column).append(value)

    def add_file(self, file: Path) -> int:
        """Register an archive; returns its index."""
        self.files.append(os.path.relpath(file, self.root))
        self.file_bytes.append(file.stat().st_size)
        return len(self.files) - 1

    def name(self, row: int) -> str:
        """Name of an image."""
        return os.fsdecode(bytes(self.names[self.ends[row - 1] if row else 0 : self.ends[row]]))

    def __getitem__(self, row: int) -> RawImage:
        """One image."""
        name, file = self.name(row), self.file[row]
        path = os.path.join(self.root, self.files[file] if file >= 0 else name)  # noqa: PTH118 (a Path normalizes)
        return RawImage(name, path, self.offset[row], self.size[row], self.label[row])

    def __iter__(self) -> Iterator[RawImage]:
        """All images."""
        return (self[row] for row in range(len(self)))

    def columns(self) -> dict[str, np.ndarray]:
        """The columns, and the names as bytes."""
        found = {name: np.frombuffer(getattr(self, name), getattr(self, name).typecode) for name in COLUMNS}
        return found | {"names": np.frombuffer(self.names, np.uint8)}

    def take(self, rows: np.ndarray) -> "Listing":
        """The listing of some of the images; rows: int64, in the order wanted."""
        taken, columns = Listing(Path(self.root)), self.columns()
        taken.files, taken.file_bytes = self.files, self.file_bytes
        starts = np.concatenate([[0], columns["ends"]])[rows]
        lengths = columns["ends"][rows] - starts
        columns["ends"] = np.zeros(len(self), np.int64)
        columns["ends"][rows] = np.cumsum(lengths)
        for name in COLUMNS:
            getattr(taken, name).frombytes(columns[name][rows].tobytes())
        spans = zip(starts.tolist(), (starts + lengths).tolist(), strict=True)
        taken.names += b"".join(self.names[start:end] for start, end in spans)
        return taken

    def digest(self) -> str:
        """SHA-256 over everything but `root`: the same data set at another place has the same digest."""
        digest = hashlib.sha256(json.dumps([self.files, self.file_bytes, len(self)]).encode())
        for column in (self.names, self.ends, self.file, self.offset, self.size, self.label):
            digest.update(memoryview(column))
        return digest.hexdigest()


@dataclass(frozen=True)
class RawImageNet:
    """A raw data set, found and listed."""

    layout: str
    """What was found, for the first line of output."""
    classes: tuple[ClassName, ...]
    """Sorted by wnid."""
    splits: dict[str, Listing]
    """"train" and, unless the source has none, "val"."""
    sequential: bool = False
    """Whether images can only be read in the order of the listing (parquet)."""
    in_folders: bool = False
    """Whether images are files of their own."""
    ignored: Sequence[Path] = ()
    """Files among the images that are not images by their names."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for class names that a JSON file cannot hold."""
        for name in self.classes:
            if name.wnid != show(name.wnid):
                raise ValueError(
                    f"the class name {show(name.wnid)} is not UTF-8; rename its folder or archive"
                )


def stamp_archives(root: Path, sources: list[Path]) -> list[list[Any]]:
    """What a cached listing is valid for: path, bytes and time of every archive."""
    found = [(path, path.stat()) for path in sources]
    return [[os.path.relpath(path, root), status.st_size, status.st_mtime_ns] for path, status in found]


def save_listing(path: Path, data: RawImageNet, validity: list[list[Any]]) -> None:
    """Write a listing as an .npz file: a header in JSON, and columns."""
    header = {
        "format_version": CACHE_VERSION,
        "layout": data.layout,
        "sequential": data.sequential,
        "classes": [[name.wnid, name.words] for name in data.classes],
        "files": {split: [listing.files, listing.file_bytes] for split, listing in data.splits.items()},
        "archives": validity,
    }
    columns = {"header": np.frombuffer(json.dumps(header).encode(), np.uint8)}
    for split, listing in data.splits.items():
        columns |= {f"{split}.{name}": column for name, column in listing.columns().items()}
    content = io.BytesIO()
    np.savez(content, **columns)  # type: ignore[arg-type]
    write_bytes(path, content.getvalue())


def load_listing(path: Path, root: Path, validity: list[list[Any]]) -> RawImageNet | None:
    """Read a cached listing; None where there is none, or it is damaged (by the CRCs of the zip) or of other
    archives."""
    try:
        with np.load(path, allow_pickle=False) as content:
            header = json.loads(content["header"].tobytes())
            if header["format_version"] != CACHE_VERSION or header["archives"] != validity:
                return None
            splits = {}
            for split, files in header["files"].items():
                listing = splits[split] = Listing(root)
                listing.files, listing.file_bytes = files
                listing.names += content[f"{split}.names"].tobytes()
                for name in COLUMNS:
                    getattr(listing, name).frombytes(content[f"{split}.{name}"].tobytes())
        classes = tuple(ClassName(wnid, words) for wnid, words in header["classes"])
        return RawImageNet(header["layout"], classes, splits, header["sequential"])
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        EOFError,
        RecursionError,
        zipfile.BadZipFile,
    ):
        return None


def random_read_rate(listing: Listing, readers: int, seconds: float = 1.0, most: int = 256) -> float:
    """Images per second that `readers` threads fetch at random places, past the system's cache where it lets us.

    Ends after `seconds` or `most` images.
    """
    rows = random.Random(0).sample(range(len(listing)), min(most, len(listing)))
    started = time.perf_counter()

    def fetch(row: int) -> bool:
        if time.perf_counter() - started > seconds:
            return False
        image = listing[row]
        with Path(image.file).open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), image.offset, image.size, os.POSIX_FADV_DONTNEED)
            os.pread(file.fileno(), min(image.size, MAX_FILE_BYTES), image.offset)
        return True

    with ThreadPoolExecutor(readers) as pool:
        fetched = sum(pool.map(fetch, rows))
    return fetched / (time.perf_counter() - started)
