"""List raw images in columns, so that 14 million fit in memory, and cache the list on disk.

A listing locates each image: at an offset of an archive, in its own file, or in a row of a parquet file. Listing 155 GB
of tars takes a small read per image, so the listing of archives is cached in the output folder; the cache is valid as
long as size and modification time of every archive are unchanged.
"""

import functools
import hashlib
import io
import json
import os
import random
import time
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import DataError, UserError
from pipeline.files import write_bytes
from pipeline.shards import ClassName

MAX_FILE_BYTES = 256 * 2**20
"""Two thousand times ImageNet's mean; a larger member is damaged or meant to exhaust memory."""
CACHE_VERSION = 4
COLUMNS = ("file", "label", "offset", "size", "ends")


class RawImage(NamedTuple):
    """One image and the location of its bytes."""

    name: str
    """Path in its archive or folder; bytes that are not UTF-8 become surrogates."""
    file: str
    """Path of the tar, the parquet file, or the image itself."""
    offset: int
    """First byte in a tar (row in a parquet file; 0 in a separate file)."""
    size: int
    """Length in bytes (0 in a parquet file, where it is unknown before reading)."""
    label: int
    """Class index, position among the sorted wnids."""

    def read(self) -> bytes:
        """Read the image's bytes. Raises `UserError` above MAX_FILE_BYTES, `DataError` for a truncated file."""
        if self.size > MAX_FILE_BYTES:
            raise UserError(f"too large: expected at most {MAX_FILE_BYTES} bytes, got {self.size}")
        content = os.pread(open_file(self.file).fileno(), self.size, self.offset)
        if len(content) != self.size:
            raise DataError(
                f"{self.file}: ends inside {self.escaped_name}, truncated or changed; download it again"
            )
        return content

    def prefetch(self) -> None:
        """Ask the kernel to read the image in the background."""
        os.posix_fadvise(open_file(self.file).fileno(), self.offset, self.size, os.POSIX_FADV_WILLNEED)

    @property
    def escaped_name(self) -> str:
        """Return the name as `escape_name` has it."""
        return escape_name(self.name)


def escape_name(name: str) -> str:
    """Escape bytes of a file name that are not UTF-8, to print it or write it as JSON."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


@functools.lru_cache(maxsize=256)
def open_file(path: str) -> io.FileIO:
    """Open a file, once; few of them for any limit, as ImageNet-21k has 21,841 archives."""
    return io.FileIO(path)


class Listing:
    """The images of one split, in the order of their classes and names (of rows, in parquet files)."""

    def __init__(self, root: Path) -> None:
        """Make an empty list of images under `root`."""
        self.root = str(root)
        self.files: list[str] = []
        """Archives, relative to `root`."""
        self.file_bytes: list[int] = []
        """Their sizes."""
        self.file, self.label = array("i"), array("i")
        """Per image: index into `files`, or -1 for an image in its own file; class index."""
        self.offset, self.size, self.ends = array("q"), array("q"), array("q")
        """Per image: as in `RawImage`; end of its name in `names`."""
        self.names = bytearray()

    def __len__(self) -> int:
        """Return the number of images."""
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
        """Return the name of an image."""
        return os.fsdecode(bytes(self.names[self.ends[row - 1] if row else 0 : self.ends[row]]))

    def __getitem__(self, row: int) -> RawImage:
        """Return one image."""
        name, file = self.name(row), self.file[row]
        path = os.path.join(self.root, self.files[file] if file >= 0 else name)  # noqa: PTH118 (a Path normalizes)
        return RawImage(name, path, self.offset[row], self.size[row], self.label[row])

    def __iter__(self) -> Iterator[RawImage]:
        """Yield all images."""
        return (self[row] for row in range(len(self)))

    def columns(self) -> dict[str, np.ndarray]:
        """Return the columns as numpy arrays, and the names as bytes."""
        columns = {name: np.frombuffer(getattr(self, name), getattr(self, name).typecode) for name in COLUMNS}
        return columns | {"names": np.frombuffer(self.names, np.uint8)}

    def take(self, rows: np.ndarray) -> "Listing":
        """Return a listing of the given rows (int64), in their order."""
        subset = Listing(Path(self.root))
        subset.files, subset.file_bytes = self.files, self.file_bytes
        for row in rows.tolist():
            subset.append(self.file[row], self.name(row), self.offset[row], self.size[row], self.label[row])
        return subset

    def digest(self) -> str:
        """Hash everything except `root` (SHA-256): a data set keeps its digest when it is moved."""
        digest = hashlib.sha256(json.dumps([self.files, self.file_bytes, len(self)]).encode())
        for column in (self.names, self.ends, self.file, self.offset, self.size, self.label):
            digest.update(memoryview(column))
        return digest.hexdigest()


@dataclass(frozen=True)
class RawImageNet:
    """A listed raw data set."""

    layout: str
    """Name of the layout, for the first line of output and the manifest."""
    classes: tuple[ClassName, ...]
    """Sorted by wnid."""
    splits: dict[str, Listing]
    """"train" and, unless the source has none, "val"."""
    ignored: Sequence[Path] = ()
    """Files without an image extension, or outside of classes."""
    sequential: bool = False
    """True if images can only be read in the order of the listing (parquet)."""

    @property
    def in_folders(self) -> bool:
        """Return True if images are files of their own."""
        return any(-1 in listing.file[:1] for listing in self.splits.values())

    def __post_init__(self) -> None:
        """Raise `UserError` for class names that are not UTF-8."""
        for name in self.classes:
            if name.wnid != escape_name(name.wnid):
                raise UserError(
                    f"class {escape_name(name.wnid)}: expected a UTF-8 name; rename its folder or archive"
                )


def stamp_archives(root: Path, sources: list[Path]) -> list[list[Any]]:
    """Return path, bytes and modification time of every archive, for which a cached listing is valid."""
    stats = [(path, path.stat()) for path in sources]
    return [[os.path.relpath(path, root), status.st_size, status.st_mtime_ns] for path, status in stats]


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
    """Load a cached listing; None if it is missing, damaged (by the zip's CRCs) or of other archives."""
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
        return RawImageNet(header["layout"], classes, splits, sequential=header["sequential"])
    except Exception:  # numpy and zipfile raise many kinds for damaged files
        return None


def measure_random_reads(listing: Listing, readers: int) -> float:
    """Measure random reads for a second: images per second with `readers` threads, dropped from the page cache first if
    possible."""
    rows = random.Random(0).sample(range(len(listing)), min(256, len(listing)))
    started = time.perf_counter()

    def read(row: int) -> bool:
        if time.perf_counter() - started > 1.0:
            return False
        image = listing[row]
        with Path(image.file).open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), image.offset, image.size, os.POSIX_FADV_DONTNEED)
            os.pread(file.fileno(), min(image.size, MAX_FILE_BYTES), image.offset)
        return True

    with ThreadPoolExecutor(readers) as pool:
        return sum(pool.map(read, rows)) / (time.perf_counter() - started)
