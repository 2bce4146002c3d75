"""Zip archives, as `torch.save` writes them, that carry the SHA-256 of all bytes before it as their comment."""

import hashlib
import struct
import zipfile
from typing import Any, BinaryIO

MARK, DIGEST_BYTES = b"sha256 ", 64
"""How the comment begins, and the hexadecimal digits behind that."""


class SignedWriter:
    """What `torch.save` writes a zip archive to, front to back: appends the archive's checksum as its comment.

    torch turns errors of the disk into others; the true one is kept.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._sha, self._last = file, hashlib.sha256(), b""
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """All of `data`, but for the last two bytes so far. Raises `OSError`."""
        view = memoryview(data).cast("B")
        if len(view) >= 2:
            self._put(self._last, view[:-2])
            self._last = bytes(view[-2:])
        else:
            whole = self._last + bytes(view)
            self._put(whole[:-2])
            self._last = whole[-2:]
        return len(view)

    def flush(self) -> None:
        """Nothing: whoever opened the file does."""

    def sign(self) -> None:
        """Finish the archive: what one without a comment ends with is the length of that."""
        assert self._last == b"\0\0"
        self._put(struct.pack("<H", len(MARK) + DIGEST_BYTES))
        self._file.write(MARK + self._sha.hexdigest().encode())

    def _put(self, *parts: "bytes | memoryview") -> None:
        try:
            for part in parts:
                self._file.write(part)
                self._sha.update(part)
        except OSError as error:
            self.error = error
            raise


def is_sound(file: BinaryIO) -> bool:
    """Whether the bytes are those that were written; leaves the file at its start."""
    end = file.seek(-len(MARK) - DIGEST_BYTES, 2)
    comment = file.read()
    file.seek(0)
    if not comment.startswith(
        MARK
    ):  # from before there was one: the archive's own sums, which leave its headers out
        with zipfile.ZipFile(file) as archive:
            sound = not archive.comment and archive.testzip() is None
    else:
        sha, left = hashlib.sha256(), end
        while left and (block := file.read(min(left, 2**20))):
            sha.update(block)
            left -= len(block)
        sound = comment[len(MARK) :] == sha.hexdigest().encode()
    file.seek(0)
    return sound
