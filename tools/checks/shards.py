"""tools/doctor.py's checks of a shard folder, and of the disk that it lies on."""

import mmap
import os
import re
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

from pipeline.shards import ShardSet
from tools.checks.finding import Finding, nothing, ok, problem, warning

AT_MOST_BYTES, AT_MOST_S, CHUNK = 256 * 2**20, 2.0, 4 * 2**20
"""How much of the shards is read to measure the disk, for how long, and how much at a time."""
NETWORK = re.compile(
    r"nfs\d?|cifs|smb3?|smbfs|lustre|gpfs|beegfs|ceph|glusterfs|afs|9p|virtiofs|wekafs|orangefs|pvfs2|panfs|fuse\..+"
)
"""File systems that bring bytes over a network, or, as most of FUSE's, may."""
MEMORY = ("tmpfs", "ramfs")
NEEDED = {"gpu": 10_000, "cpu": 500}
"""Images/s below which a disk is called slow: about what a GPU takes (docs/storage.md), and a CPU."""


class Rate(NamedTuple):
    """How fast shards were read."""

    bytes_per_s: float
    direct: bool
    """Whether past the page cache (O_DIRECT); else it was asked to drop the files first, which it need not do."""


def split_message(error: BaseException) -> tuple[str, str]:
    """What is wrong and what to do, of an error of ours, which says both in one sentence."""
    what, _, remedy = str(error).rpartition("; ")
    return (what, remedy) if what else (remedy or type(error).__name__, "copy or pack the shards again")


def check_split(shards: Path, split: str, opened: ShardSet | BaseException) -> Finding:
    """Does it open? `opened` is what `open_shards` gave or raised."""
    if isinstance(opened, ShardSet):
        return ok(
            f"{opened.num_samples:,} images in {len(opened.tars)} shards, {len(opened.classes)} classes"
        )
    if isinstance(opened, TimeoutError):
        return problem(f"{shards}: {opened}", "the disk or its server hangs; see dmesg and mount")
    if not shards.is_dir():
        what = "is a file" if shards.exists() else "does not exist"
        return problem(f"{shards} {what}", "give the folder that tools/make_shards.py pack wrote")
    if isinstance(opened, PermissionError):
        return problem(f"{opened.filename} may not be read", "set its permissions (chmod a+rX)")
    return problem(*split_message(opened))


def check_eigenbasis(shards: Path, train: ShardSet | None) -> Finding:
    """Is pca.json there, and of these shards?"""
    if train is None:
        return nothing("the training shards do not open")
    from pipeline.eigenbasis import read_eigenbasis  # numpy

    try:
        content = read_eigenbasis(shards / "pca.json", train.manifest_sha256)
    except FileNotFoundError:
        return problem(f"no {shards / 'pca.json'}", f"python tools/compute_pca.py {shards}")
    except ValueError as error:
        return problem(*split_message(error))
    return ok(f"pca.json, of {content['num_images']:,} images")


def check_mean_image(shards: Path, train: ShardSet | None) -> Finding:
    """Is mean_image.npy, where it is there, sound and of these images?"""
    file = shards / "mean_image.npy"
    if train is None or not file.exists():
        return nothing("none (only --data.augmentation.mean image needs it)" if train else "no shards")
    from pipeline.eigenbasis import Eigenbasis

    try:
        Eigenbasis.load(shards / "pca.json", train.manifest_sha256, with_mean_image=True)
    except (OSError, ValueError) as error:
        return warning(*split_message(error))
    return ok("mean_image.npy")


def file_system(path: Path, mounts: str) -> tuple[str, str]:
    """Type and place of the file system that a path lies on, from the text of /proc/mounts, where a space is \\040;
    of several mounted on one place the last counts. ("unknown", "/") where it is not there."""
    best = ("unknown", "/")
    for line in mounts.splitlines():
        fields = [
            re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), field) for field in line.split(" ")
        ]
        if len(fields) >= 3 and path.is_relative_to(fields[1]) and len(fields[1]) >= len(best[1]):
            best = fields[2], fields[1]
    return best


def check_file_system(kind: str, place: str) -> Finding:
    """Are the shards on a network disk?"""
    if NETWORK.fullmatch(kind):
        return warning(
            f"{kind} at {place}: over a network", "copy the shards to a local disk (docs/storage.md)"
        )
    return ok(f"{kind} at {place}")


def read_rate(
    files: Sequence[str], at_most_bytes: int = AT_MOST_BYTES, at_most_s: float = AT_MOST_S
) -> Rate | None:
    """Read up to eight of the files, evenly spread, from their beginnings; None where they hold nothing.

    Past the page cache, so that it is the disk that is measured, and nobody's cache is spoilt.
    """
    chosen = [files[k * len(files) // min(8, len(files))] for k in range(min(8, len(files)))]
    each, total, direct = at_most_bytes // max(1, len(chosen)), 0, True
    buffer = mmap.mmap(-1, CHUNK)  # O_DIRECT wants aligned memory
    started = perf_counter()
    for name in chosen:
        try:
            file = os.open(name, os.O_RDONLY | os.O_DIRECT)
        except OSError:  # this file system has no such thing
            file, direct = os.open(name, os.O_RDONLY), False
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            offset = 0
            while offset < each and perf_counter() - started < at_most_s:
                count = os.preadv(file, [buffer], offset)
                offset += count
                if count < CHUNK:  # the end; going on from here would not be aligned
                    break
        finally:
            os.close(file)
        total += offset
    return Rate(total / max(perf_counter() - started, 1e-9), direct) if total else None


def check_disk(train: ShardSet | None, kind: str, gpus: int) -> Finding:
    """How fast does the disk give shards, and how many images is that?"""
    if train is None:
        return nothing("no shards")
    if kind in MEMORY:
        return nothing(f"{kind}: the shards lie in memory")
    rate = read_rate(train.tars)
    if rate is None:
        return nothing("the shards are empty")
    images_per_s = rate.bytes_per_s * train.num_samples / shard_bytes(train)
    text = f"{rate.bytes_per_s / 1e6:,.0f} MB/s, {images_per_s:,.0f} images/s from one reader"
    text += "" if rate.direct else ", perhaps out of the page cache"
    needed = NEEDED["gpu"] * gpus if gpus else NEEDED["cpu"]
    if images_per_s >= needed:
        return ok(text)
    return warning(
        f"{text}; {gpus or 'no'} GPUs may ask for {needed:,}", "use a faster disk (docs/storage.md)"
    )


def shard_bytes(train: ShardSet) -> int:
    """Bytes of all shards together."""
    return sum(Path(tar).stat().st_size for tar in train.tars)
