"""Writing shards: many processes, perhaps on many machines, that share nothing but the output folder.

The unit of work is the shard. It is written under a lock that dies with its process and appears under its name only
when it is whole; then its index, then `NAME.json`, which vouches for both. So a killed pack goes on where it stopped,
and two packers on the same output share the work.
"""

import hashlib
import itertools
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

from tqdm import tqdm

from pipeline.files import atomic_writer, write_bytes, write_json
from pipeline.shards import index_text
from tools.packing.images import Packed, pack_image
from tools.packing.manifest import is_whole, read_note
from tools.packing.plan import Options, Sample, ShardPlan
from tools.packing.pool import as_they_finish, name_work

READ_AHEAD = 16
"""Images that the system fetches while one is worked on: a disk is never asked for one thing at a time."""
LOG_EVERY_S = 60.0
"""Seconds between lines of progress where there is no terminal to draw a bar on."""


class Done(NamedTuple):
    """What came of one unit of work."""

    images: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    busy: bool = False
    """Another process is at this shard; nothing was done here."""


def run_units(
    work: Callable[[Any], Done], units: Iterable[Any], total: int, workers: int, what: str = "packing"
) -> list[Done]:
    """Do `work` on each unit in `workers` processes, with a progress bar over `total` images; raises as they do."""
    started = logged = time.perf_counter()
    results: list[Done] = []
    with tqdm(total=total, desc=what, unit="img", disable=None) as progress:
        for _, done in as_they_finish(work, units, workers):
            results.append(done)
            progress.update(done.images)
            now, images = time.perf_counter(), sum(done.images for done in results)
            rate, read = images / (now - started), sum(done.bytes_read for done in results) / (now - started)
            progress.set_postfix_str(f"{read / 1e6:.0f} MB/s read")
            if now - logged > LOG_EVERY_S and not sys.stderr.isatty():
                left = (total - images) / rate / 60 if rate else float("inf")
                print(f"{images} of {total} images, {rate:.0f} images/s, {left:.0f} min left", flush=True)
                logged = now
    return results


def write_shard(plan: ShardPlan) -> Done:
    """Read, pack and write the images of one shard."""

    def packed() -> Iterator[tuple[Sample, tuple[Packed | str, int]]]:
        for _, image in plan.samples[:READ_AHEAD]:
            image.ask_for()
        for sample, ahead in itertools.zip_longest(plan.samples, plan.samples[READ_AHEAD:]):
            if ahead:
                ahead[1].ask_for()
            yield sample, pack_sample(sample, plan.options)

    return write_packed(plan, packed())


def pack_sample(sample: Sample, options: Options, raw: bytes | None = None) -> tuple[Packed | str, int]:
    """Pack one image, whose file is fetched unless given: the image, or why it is skipped; and the file's size.

    Raises `ValueError` with archive, name and key for an image that does not decode and is not to be skipped.
    """
    key, image = sample
    name_work(f"{image.shown_name} in {image.file}")
    try:
        raw = image.read() if raw is None else raw
        return pack_image(raw, options.form()), len(raw)
    except ValueError as error:
        if options.on_bad == "fail":
            raise ValueError(
                f"{image.shown_name} in {image.file} (key {key}): {error}; --on-bad skip leaves such images out"
            ) from None
        return str(error), image.size


def write_packed(plan: ShardPlan, packed: Iterable[tuple[Sample, tuple[Packed | str, int]]]) -> Done:
    """Write one shard: the tar, then its index, then `NAME.json` with its checksum and what was odd about its images.

    Leaves it to another process that is writing it just now, or has written it since this one began.
    """
    try:
        with atomic_writer(plan.path, wait=False) as file:
            note = read_note(plan.path, plan, len(plan.samples))
            if note and is_whole(plan.path, note["shard"]):
                raise PackedElsewhereError
            tar, index, bytes_read = TarWriter(file), [], 0
            repairs: list[dict[str, str]] = []
            skipped: list[dict[str, str]] = []
            for (key, image), (result, size) in packed:
                bytes_read += size
                if isinstance(result, str):
                    skipped.append({"key": key, "name": image.shown_name, "reason": result})
                    continue
                if result.found:
                    repairs.append({"key": key, "found": result.found, "done": result.done})
                members = ((f"{key}.jpg", result.jpeg), (f"{key}.cls", str(image.label).encode()))
                index.append([tar.add(name, data) for name, data in members])
            tar.close()
    except BlockingIOError:
        return Done(busy=True)
    except PackedElsewhereError:
        return Done()
    index_bytes = index_text(index).encode()
    write_bytes(plan.path.with_suffix(".idx"), index_bytes)
    shard = {
        "name": plan.path.name,
        "samples": len(index),
        "bytes": tar.offset,
        "sha256": tar.digest.hexdigest(),
        "index_bytes": len(index_bytes),
    }
    note = {"plan": plan.digest, "shard": shard, "repairs": repairs, "skipped": skipped}
    write_json(plan.path.with_suffix(".json"), note)
    return Done(len(plan.samples), bytes_read, tar.offset)


class PackedElsewhereError(Exception):
    """Another packer has written the shard meanwhile."""


class TarWriter:
    """Plain USTAR members (mtime, uid and gid 0), hashed as they are written."""

    def __init__(self, file: BinaryIO) -> None:
        """Write to `file` from its beginning."""
        self.file, self.offset, self.digest = file, 0, hashlib.sha256()

    def add(self, name: str, data: bytes) -> tuple[str, int, int, str]:
        """Append a member; returns its entry in the index."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self.write(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self.offset
        self.write(data)
        self.write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return name.rsplit(".", 1)[1], offset, len(data), name

    def close(self) -> None:
        """Write the end mark."""
        end = 2 * tarfile.BLOCKSIZE
        self.write(bytes(end + -(self.offset + end) % tarfile.RECORDSIZE))

    def write(self, data: bytes) -> None:
        """Append bytes."""
        self.file.write(data)
        self.digest.update(data)
        self.offset += len(data)
