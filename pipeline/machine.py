"""Resources of this process on its machine: cores and open files."""

import os
import resource

from pipeline.errors import UserError

OTHER_FILES = 256
"""Allowance for open files of a process in addition to its shards: libraries, pipes, logs."""


def num_cores() -> int:
    """Count the cores that this process may use (its affinity, which `taskset`, Slurm and containers restrict)."""
    return len(os.sched_getaffinity(0))


def share_of_cores() -> int:
    """Compute the number of cores for this process. torchrun lets every process use all cores, so they are divided by
    LOCAL_WORLD_SIZE. Slurm may bind a task to fewer cores than the job has on this machine; these belong to this task
    alone."""
    sharing, of_job = (os.environ.get(name, "") for name in ("LOCAL_WORLD_SIZE", "SLURM_CPUS_ON_NODE"))
    bound = of_job.isdecimal() and num_cores() < int(of_job)
    processes = int(sharing) if sharing.isdecimal() and not bound else 1
    return max(1, num_cores() // max(1, processes))


def raise_open_file_limit(num_shards: int) -> None:
    """Raise the limit of open files if needed, as the reader keeps every shard open. Raises `UserError`."""
    needed = num_shards + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"{num_shards} shards need {needed} open files, the limit is {hard}; raise it with ulimit -n, or take "
            "--data.shuffle blocks"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
