"""Resources of this process on its machine: cores, memory, open files, and the number of processes of the same run."""

import os
import resource
from pathlib import Path

from pipeline.errors import UserError

OTHER_FILES = 256
"""Allowance for open files of a process in addition to its shards: libraries, pipes, logs."""


def num_cores() -> int:
    """Count the cores that this process may use (its affinity, which `taskset`, Slurm and containers restrict)."""
    return len(os.sched_getaffinity(0))


def processes_here() -> int:
    """Count the processes of this run on this machine, this one included: torchrun's LOCAL_WORLD_SIZE, or 1."""
    sharing = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(sharing)) if sharing.isdecimal() else 1


def share_of_cores() -> int:
    """Compute the number of cores for this process. torchrun lets every process use all cores, so they are divided.
    Slurm may bind a task to fewer cores than the job has on this machine; these belong to this task alone."""
    of_job = os.environ.get("SLURM_CPUS_ON_NODE", "0")
    bound = of_job.isdecimal() and num_cores() < int(of_job)
    return num_cores() if bound else max(1, num_cores() // processes_here())


def resident_bytes() -> int:
    """Read the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def available_bytes() -> int:
    """Read the memory that programs can still take, by the kernel's estimate (MemAvailable)."""
    return 1024 * int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0])


def raise_open_file_limit(num_shards: int) -> None:
    """Raise the limit of open files if needed, as DALI keeps every shard open without mmap. Raises `UserError`."""
    needed = num_shards + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"{num_shards} shards need {needed} open files, the limit is {hard}; raise it with ulimit -n"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
