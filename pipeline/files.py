"""Atomic writes: a file is either complete or does not exist.

Every file that other programs may read (shards, indexes, manifests, `pca.json`, checkpoints, pictures) is written under
a temporary name, flushed to the disk and renamed. Whenever our process is killed, a reader sees the old file or the new
one.
"""

import errno
import fcntl
import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import UserError

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
"""Of a network file system without locks."""
WRITE_BYTES = 4 << 20
"""Bytes per write: Linux caches a file in pieces of the size in which it was written, and reads large ones faster."""


@contextmanager
def atomic_writer(path: Path, wait: bool = True) -> Iterator[BinaryIO]:
    """Open `path` for writing in binary; it appears under its name only when the block ends without an exception.

    The temporary name is always the same, so a killed process leaves at most one `.tmp`, which the next one overwrites.
    A lock on it, released when its process ends, keeps two programs from writing the same file at a time: the second
    waits, or with `wait=False` raises `BlockingIOError`. Every `OSError` names the file.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open_locked(temporary, wait) as file:
            try:
                file.truncate()
                yield file
                file.flush()
                os.fsync(file.fileno())
                temporary.replace(path)
            except BaseException:  # the lock still keeps others from the name
                temporary.unlink(missing_ok=True)
                raise
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # without this the rename itself may be lost with the power
        finally:
            os.close(directory)
    except OSError as error:
        if error.filename is None and error.errno:  # raised by a write: a full disk, a file size limit
            error.filename = str(path)
        raise


def check_writable(path: Path) -> None:
    """Raise `OSError` if `atomic_writer` could not open `path`; for use before a long computation. Makes the folder,
    but leaves no file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open_locked(temporary, wait=True):
        temporary.unlink()


def open_locked(path: Path, wait: bool) -> BinaryIO:
    """Open or create `path` and lock it; opens it again if its owner renamed it while we waited. Raises `OSError`."""
    while True:
        try:
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", WRITE_BYTES)
        except io.UnsupportedOperation:  # a pipe, a device
            raise FileExistsError(errno.EEXIST, "not a regular file", str(path)) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        except FileNotFoundError:  # its owner has just renamed it
            pass
        except OSError as error:
            if error.errno in NO_LOCKS:
                return file
            file.close()
            if error.errno == errno.EWOULDBLOCK:
                raise BlockingIOError(error.errno, "another process is writing it", str(path)) from None
            raise
        file.close()


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically."""
    with atomic_writer(path) as file:
        file.write(content)


def write_json(path: Path, content: Any) -> None:
    """Write `content` to `path` as JSON with a stable layout: equal content gives equal bytes."""
    write_bytes(path, json_text(content).encode())


def json_text(content: Any) -> str:
    """Format JSON as `write_json` writes it."""
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises `UserError` that names the file when it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # a number may be too long, an array too deep
        raise UserError(f"{path} is not valid JSON ({error}); restore it or make it again") from None


def hash_file(path: Path) -> str:
    """Hash a file by SHA-256, in hexadecimal, a piece at a time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256(content: bytes) -> str:
    """Hash `content` by SHA-256, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
