"""tools/doctor.py's checks of the machine: cores, memory and limits, also those of a container or a batch job."""

import os
import re
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline.machine import OTHER_FILES, num_cores
from tools.checks.finding import Finding, nothing, ok, problem, warning

SMALL_SHM = 1e9
"""Bytes of /dev/shm below which NCCL may find too little between several GPUs (Docker gives 64 MiB by itself)."""


def cgroup_folders(membership: str, root: Path, controller: str) -> Iterator[Path]:
    """The folders of the cgroups that this process is in, and of those around them, whose limits hold as well.

    Args:
        membership: Text of /proc/self/cgroup: "0::/a/b" (version 2) and "4:memory:/a/b" (version 1).
        root: Where they are mounted, /sys/fs/cgroup.
        controller: "cpu" or "memory"; has a folder of its own in version 1.

    In a container the path may be that of the host, and not be there; its own limits then stand at the root.
    """
    for line in membership.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            base = root
        elif controller in controllers.split(","):
            base = root / controller
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for length in range(len(parts), -1, -1):
            yield base.joinpath(*parts[:length])


def cgroup_cpus(text: str) -> float | None:
    """Cores from "quota period" in microseconds: cpu.max ("max 100000", "250000 100000"), or version 1's two files in
    this order, where -1 is no quota. None: not limited, or no such text."""
    numbers = re.fullmatch(r"\s*(\d+)\s+(\d+)\s*", text)
    return int(numbers[1]) / int(numbers[2]) if numbers and int(numbers[1]) and int(numbers[2]) else None


def cgroup_bytes(text: str) -> int | None:
    """Bytes from memory.max or version 1's memory.limit_in_bytes, where about 2^63 is no limit. None as above."""
    digits = text.strip()
    return int(digits) if digits.isascii() and digits.isdecimal() and int(digits) < 2**60 else None


def read(path: Path) -> str:
    """The text of a small file; empty where it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def cpu_quota(membership: str, root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores that the cgroups allow."""
    folders = list(cgroup_folders(membership, root, "cpu"))
    texts = [read(folder / "cpu.max") for folder in folders]
    texts += [
        f"{read(folder / 'cpu.cfs_quota_us')} {read(folder / 'cpu.cfs_period_us')}" for folder in folders
    ]
    return min(filter(None, map(cgroup_cpus, texts)), default=None)


def memory_limit(membership: str, root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that the cgroups allow."""
    folders = list(cgroup_folders(membership, root, "memory"))
    texts = [read(folder / name) for folder in folders for name in ("memory.max", "memory.limit_in_bytes")]
    return min((size for size in map(cgroup_bytes, texts) if size is not None), default=None)


def meminfo(text: str, name: str) -> int | None:
    """Bytes of a line of /proc/meminfo; None where it is not there."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def free_bytes(info: str, limit: int | None) -> int | None:
    """Memory for programs and the page cache: what is available, within the cgroups' limit."""
    available = meminfo(info, "MemAvailable")
    return available if available is None or limit is None else min(available, limit)


def check_cores(affinity: int, machine: int | None, quota: float | None) -> Finding:
    """How many cores may this process use?"""
    text = f"{affinity} of {machine or 'unknown'}"
    if quota is None or quota >= affinity:
        return ok(text)
    threads = max(1, round(quota)) + 1
    return warning(
        f"{text}, but a cgroup allows the time of {quota:.3g} alone",
        f"DALI would start {affinity + 1} threads: set --data.speed.threads {threads}, or ask for more cores",
    )


def check_memory(info: str, limit: int | None) -> Finding:
    """How much memory is there?"""
    total, free = meminfo(info, "MemTotal"), free_bytes(info, limit)
    if total is None or free is None:
        return nothing("unknown")
    text = f"{free / 1e9:.1f} GB free of {total / 1e9:.1f}"
    text += f", a cgroup allows {limit / 1e9:.1f}" if limit is not None and limit < total else ""
    if free < 2e9:  # a process of the quickstart takes about one
        return warning(text, "end other programs, or ask for more memory")
    return ok(text)


def check_page_cache(free: int | None, data: int | None) -> Finding:
    """Does the data set stay in memory after it was read once?"""
    if free is None or data is None:
        return nothing("unknown" if data else "no training shards")
    text = f"{data / 1e9:.2f} GB of training shards, {free / 1e9:.1f} GB free"
    if data < 0.9 * free:
        return ok(f"{text}: read from the disk once")
    return warning(
        f"{text}: every epoch reads the disk again", "see the disk's rate; docs/storage.md tells of caches"
    )


def check_open_files(shards: int | None, hard: int) -> Finding:
    """May every shard stay open? The loader raises the soft limit up to the hard one."""
    text = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    if shards is None:
        return ok(f"at most {text}")
    needed = shards + OTHER_FILES
    if hard == resource.RLIM_INFINITY or hard >= needed:
        return ok(f"at most {text}; {shards} shards need {needed}")
    return problem(
        f"at most {hard}; {shards} shards need {needed}",
        f"ulimit -n {needed}, as root or by /etc/security/limits.conf; or pack into fewer shards",
    )


def check_locked_memory(soft: int, infiniband: bool) -> Finding:
    """May NCCL lock memory for InfiniBand?"""
    unlimited = soft == resource.RLIM_INFINITY
    text = "unlimited" if unlimited else f"{soft / 2**20:.0f} MiB"
    if infiniband and not unlimited:
        return warning(f"{text}, beside InfiniBand", "ulimit -l unlimited: NCCL locks what it sends")
    return ok(text)


def check_shared_memory(path: Path, gpus: int) -> Finding:
    """Is /dev/shm large enough for NCCL?"""
    if not path.is_dir():
        return (
            warning(f"no {path}", "in a container, give it --shm-size 1g")
            if gpus > 1
            else nothing(f"no {path}")
        )
    size = shutil.disk_usage(path).total
    if gpus > 1 and size < SMALL_SHM:
        return warning(
            f"{size / 1e9:.2f} GB", "NCCL may need more for several GPUs: in a container, --shm-size 1g"
        )
    return ok(f"{size / 1e9:.1f} GB")


def cores() -> tuple[int, int | None, float | None]:
    """Arguments of `check_cores` here."""
    return num_cores(), os.cpu_count(), cpu_quota(read(Path("/proc/self/cgroup")))
