"""Resources of this process on the machine: cores, memory, open files, and how many others of ours are on it."""

import os
import resource
from pathlib import Path

from pipeline.errors import UserError

OTHER_FILES = 256
"""Open files of a process other than its shards: libraries, pipes, logs."""


def num_cores() -> int:
    """Cores that this process may use (its affinity: `taskset`, Slurm and containers narrow it)."""
    return len(os.sched_getaffinity(0))


def processes_here() -> int:
    """Processes that one launch started on this machine, ours among them: torchrun's LOCAL_WORLD_SIZE, or 1."""
    sharing = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(sharing)) if sharing.isdecimal() else 1


def share_of_cores() -> int:
    """Cores for each of `processes_here`. torchrun leaves all of them to every process; what Slurm has bound to one of
    its tasks, fewer than the job has on this machine, is that task's own."""
    of_job = os.environ.get("SLURM_CPUS_ON_NODE", "0")
    bound = of_job.isdecimal() and num_cores() < int(of_job)
    return num_cores() if bound else max(1, num_cores() // processes_here())


def resident_bytes() -> int:
    """Memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def available_bytes() -> int:
    """Memory that the kernel thinks programs could still take."""
    return 1024 * int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0])


def raise_open_file_limit(num_shards: int) -> None:
    """Make sure that every shard can stay open (DALI holds one handle a shard without mmap). Raises `UserError`."""
    needed = num_shards + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"{num_shards} shards need {needed} open files, the limit is {hard}; raise it with ulimit -n"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
