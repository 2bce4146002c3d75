"""What the machine gives a process."""

import os

import pytest

from pipeline.machine import share_of_cores
from pipeline.settings import Speed


@pytest.mark.parametrize(
    ("processes", "on_node", "share"),
    [
        ("1", "0", 16),
        ("8", "0", 2),  # torchrun: each process sees all of them
        ("32", "0", 1),
        ("8", "128", 16),  # srun has bound each task to its own
        ("8", "16", 2),  # torchrun in a batch script, or no binding
        ("odd", "odd", 16),
    ],
)
def test_processes_share_cores(
    processes: str, on_node: str, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 16 that each may use. DALI's default threads are one more than a process's share."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", on_node)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    assert share_of_cores() == share
    assert Speed().num_threads == share + 1 and Speed(threads=5).num_threads == 5
