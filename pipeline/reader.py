"""Read samples by offset into buffers that are reused.

Linux's io_submit reads many samples in one system call, without Python's lock, so that a trainer's kernel launches keep
their pace beside it (`tools/bench.py loader`). Of buffered files it returns when all is read. What it does not deliver
(another processor, a container that forbids it, no context left) is read by preadv, one sample at a time. There is no
memory map: a truncated shard is an error, not a SIGBUS.
"""

import ctypes
import errno
import itertools
import os
import platform
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import ClassVar, NamedTuple

import numpy as np

from pipeline.errors import DataError
from pipeline.machine import raise_open_file_limit
from pipeline.shards import ShardSet

SYSCALLS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}.get(platform.machine())
"""Numbers of io_setup, io_destroy, io_getevents and io_submit (Linux, asm/unistd.h)."""
EVENTS = 128
"""Samples per system call; the kernel grants 65,536 to all processes together (fs.aio-max-nr)."""
IOCB = np.dtype(
    {
        "names": ["data", "fd", "buffer", "bytes", "offset"],
        "formats": ["<u8", "<u4", "<u8", "<u8", "<i8"],
        "offsets": [0, 20, 24, 32, 40],
        "itemsize": 64,
    }
)
"""struct iocb of linux/aio_abi.h; opcode 0 is a pread."""
EVENT = np.dtype([("data", "<u8"), ("iocb", "<u8"), ("bytes", "<i8"), ("unused", "<i8")])
SEQUENTIAL_BYTES = 4 << 20
"""Bytes per read of a whole shard."""


class Encoded(NamedTuple):
    """The files of some samples."""

    buffer: np.ndarray
    """Their bytes, uint8, one after another."""
    ends: np.ndarray
    """Their ends in `buffer`, (N,)."""

    @property
    def images(self) -> list[np.ndarray]:
        """The bytes of each, a part of `buffer`."""
        return [self.buffer[start:end] for start, end in itertools.pairwise([0, *self.ends.tolist()])]


class SampleReader:
    """Reads samples of a split; safe to use by several threads."""

    open_files: ClassVar[int] = 0
    """Files that the readers of this process may have open."""

    def __init__(
        self, shards: ShardSet, random: bool, keeps_all_open: bool = True, pinned: bool = False
    ) -> None:
        """Raises `UserError` if the process may not open so many files.

        `random`: samples are read in random order, so the kernel should not read ahead. `keeps_all_open`: False if
        `read_ahead` is called. `pinned`: buffers are page-locked, as a GPU copies from them.
        """
        self._num_files = len(shards.tars) if keeps_all_open else 0
        raise_open_file_limit(SampleReader.open_files + self._num_files)
        SampleReader.open_files += self._num_files
        self._shards, self._random, self._pinned, self._lock = shards, random, pinned, Lock()
        self._files = np.full(len(shards.tars), -1, np.int64)
        self._buffers: list[np.ndarray] = []
        self._contexts: list[int] = []
        self._ahead = ThreadPoolExecutor(1, "shard reader")
        self._reading: dict[int, Future[None]] = {}

    def read(self, rows: np.ndarray, skip: np.ndarray | int = 0, size: int | None = None) -> Encoded:
        """Read the samples of these rows, or of each `size` bytes after the first `skip`; `release` what is returned
        when nothing reads it any more.

        Raises `DataError` that names a shard which cannot be read or is too short.
        """
        samples = self._shards.samples[rows]
        sizes = samples["size"].astype(np.int64) if size is None else np.full(len(rows), size)
        requests, ends = np.zeros(len(rows), IOCB), np.cumsum(sizes)
        requests["fd"], requests["bytes"] = self._open(samples["shard"]), sizes
        requests["offset"] = samples["offset"].astype(np.int64) + skip
        buffer, starts = self._take_buffer(int(sizes.sum())), ends - sizes
        requests["buffer"] = buffer.ctypes.data + starts
        for first in range(0, len(rows), EVENTS):
            part = slice(first, first + EVENTS)
            for n in first + np.flatnonzero(self._submit(requests[part]) != sizes[part]):
                view = memoryview(buffer[starts[n] : ends[n]].data)
                self._read_one(int(samples["shard"][n]), requests[n], view)
        return Encoded(buffer, ends)

    def release(self, encoded: Encoded) -> None:
        """Let other samples use the memory of these."""
        self._buffers.append(encoded.buffer)

    def read_through(self, shard: int) -> None:
        """Read a whole shard in sequence, into the kernel's page cache. Raises `DataError`."""
        (file,), offset = self._open(np.array([shard])), 0
        buffer = self._take_buffer(SEQUENTIAL_BYTES)
        try:
            while count := os.preadv(file, [buffer[:SEQUENTIAL_BYTES].data], offset):
                offset += count
        except OSError as error:
            raise DataError(f"{self._shards.tars[shard]}: {error.strerror}; copy it again") from None
        self._buffers.append(buffer)

    def read_ahead(self, shards: np.ndarray, rows: np.ndarray) -> None:
        """Start to read these shards in sequence, in their order, and wait for those of the samples `rows`. All others
        are closed: no read of their samples may be running. Raises `DataError`."""
        for shard in self._reading.keys() - set(shards.tolist()):
            self._reading.pop(shard).result()
        self._keep_open(shards)
        for shard in shards.tolist():
            if shard not in self._reading:
                self._reading[shard] = self._ahead.submit(self.read_through, shard)
        for shard in set(self._shards.samples["shard"][rows].tolist()):
            self._reading[shard].result()

    def _keep_open(self, shards: np.ndarray) -> None:
        """Close all other shards. No read of those may be running."""
        for shard in np.setdiff1d(np.flatnonzero(self._files >= 0), shards):
            os.close(int(self._files[shard]))
            self._files[shard] = -1

    def close(self) -> None:
        """Close files and contexts. No read may be running."""
        self._ahead.shutdown(cancel_futures=True)
        SampleReader.open_files -= self._num_files
        self._num_files = 0
        self._keep_open(np.empty(0))
        while self._contexts:
            call(1, self._contexts.pop())

    def _open(self, shards: np.ndarray) -> np.ndarray:
        """Open shards, or find their open files. Raises `DataError`."""
        if (self._files[shards] < 0).any():
            with self._lock:
                for shard in np.unique(shards[self._files[shards] < 0]):
                    tar = self._shards.tars[shard]
                    try:
                        file = os.open(tar, os.O_RDONLY | os.O_CLOEXEC)
                    except OSError as error:
                        remedy = "ulimit -n N" if error.errno == errno.EMFILE else "copy it again"
                        raise DataError(f"{tar}: {error.strerror}; {remedy}") from None
                    if self._random:  # else a disk reads half as much again as is asked
                        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
                    self._files[shard] = file
        return self._files[shards]

    def _take_buffer(self, size: int) -> np.ndarray:
        """Return a released buffer, or a new one if that is too small."""
        try:
            buffer = self._buffers.pop()
        except IndexError:
            buffer = np.empty(0, np.uint8)
        if len(buffer) >= size:
            return buffer
        if self._pinned:
            import torch

            return torch.empty(size * 5 // 4, dtype=torch.uint8, pin_memory=True).numpy()
        return np.empty(size * 5 // 4, np.uint8)

    def _submit(self, requests: np.ndarray) -> np.ndarray:
        """Read up to `EVENTS` samples by one system call; returns the number of bytes read of each, 0 if it failed.
        `requests`: `IOCB` (samples,), without `data`."""
        count, done = len(requests), np.zeros(len(requests), np.int64)
        context = self._take_context()
        if not context:
            return done
        requests["data"], events = np.arange(count), np.zeros(count, EVENT)
        pointers = requests.ctypes.data + IOCB.itemsize * np.arange(count, dtype=np.uint64)
        left = submitted = max(call(3, context, count, pointers.ctypes.data), 0)
        while left:
            count = call(2, context, left, left, events[submitted - left :].ctypes.data, 0)
            if count < 0 and ctypes.get_errno() != errno.EINTR:  # a signal may interrupt the wait
                raise OSError(ctypes.get_errno(), "io_getevents")
            left -= max(count, 0)
        self._contexts.append(context)
        done[events["data"][:submitted]] = events["bytes"][:submitted]
        return done

    def _take_context(self) -> int:
        """Return a context of the kernel's asynchronous I/O; 0 where there is none."""
        try:
            return self._contexts.pop()
        except IndexError:
            context = ctypes.c_ulong(0)
            return context.value if call(0, EVENTS, ctypes.addressof(context)) == 0 else 0

    def _read_one(self, shard: int, request: np.void, view: memoryview) -> None:
        """Fill `view` as an `IOCB` of an open shard asks, by preadv. Raises `DataError`."""
        tar, file, offset, done = self._shards.tars[shard], int(request["fd"]), int(request["offset"]), 0
        try:
            while done < len(view):
                count = os.preadv(file, [view[done:]], offset + done)
                if not count:
                    size = os.fstat(file).st_size
                    raise DataError(
                        f"{tar}: expected a sample of {len(view)} bytes at {offset}, got a file of {size} bytes; copy "
                        "it again"
                    )
                done += count
        except OSError as error:
            raise DataError(f"{tar}: {error.strerror}; copy it again") from None


def call(function: int, *arguments: int) -> int:
    """Call one of `SYSCALLS`; -1 if it fails or there is none."""
    if SYSCALLS is None:
        return -1
    return int(LIBC.syscall(ctypes.c_long(SYSCALLS[function]), *map(ctypes.c_ulong, arguments)))


LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long
