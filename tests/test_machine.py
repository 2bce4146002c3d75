"""What the machine gives a process."""

import os

import pytest

from pipeline.machine import available_bytes, processes_here, resident_bytes, share_of_cores
from pipeline.settings import Speed
from tests.helpers import run_ok, run_python


@pytest.mark.parametrize(
    ("environment", "cores", "share"),
    [
        ({}, 16, 16),
        ({"LOCAL_WORLD_SIZE": "8"}, 16, 2),  # torchrun: each process sees all of them
        ({"LOCAL_WORLD_SIZE": "32"}, 16, 1),
        (
            {"LOCAL_WORLD_SIZE": "8", "SLURM_CPUS_ON_NODE": "128"},
            16,
            16,
        ),  # srun has bound each task to its own
        (
            {"LOCAL_WORLD_SIZE": "8", "SLURM_CPUS_ON_NODE": "16"},
            16,
            2,
        ),  # torchrun in a batch script, or no binding
        ({"LOCAL_WORLD_SIZE": "odd", "SLURM_CPUS_ON_NODE": "odd"}, 16, 16),
        ({"LOCAL_WORLD_SIZE": "0"}, 16, 16),
    ],
)
def test_processes_share_cores(
    environment: dict[str, str], cores: int, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DALI's default threads are one more than a process's share."""
    for name in ("LOCAL_WORLD_SIZE", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    assert (
        share_of_cores() == share and Speed().num_threads == share + 1 and Speed(threads=5).num_threads == 5
    )
    assert processes_here() >= 1


def test_memory() -> None:
    """A block that is touched counts, in a process that has none to spare; there is room for it."""
    code = "from pipeline.machine import resident_bytes as held\nbefore = held()\nblock = b'x' * 50_000_000\n"
    grown = int(run_ok("-c", code + "print(held() - before)", run=run_python))
    assert 40e6 < grown < 100e6 < available_bytes() and resident_bytes() > 10e6
