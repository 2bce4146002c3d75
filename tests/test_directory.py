"""A run directory belongs to one run at a time, and is not made before it is needed."""

import fcntl
import os
import signal
import time
from pathlib import Path

import pytest

from tests.test_config import shipped
from train.directory import RunDirectory


def test_second_run_is_refused(tmp_path: Path) -> None:
    """While a process holds it, another one is refused, at the claim and, where it did not exist then, when it is made;
    after kill -9 it is free."""
    path, config = tmp_path / "run", shipped("quickstart")
    late = RunDirectory(path)
    late.claim()
    assert not path.exists()
    child = os.fork()
    if child == 0:
        first = RunDirectory(path)
        first.claim()
        first.prepare(config)
        time.sleep(60)
        os._exit(0)
    try:
        deadline = time.monotonic() + 20
        while not (path / "config.yaml").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for refused in (RunDirectory(path).claim, lambda: late.prepare(config)):
            with pytest.raises(ValueError, match=r"another run is writing to .*run; wait until it has ended"):
                refused()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    RunDirectory(path).claim()
    late.prepare(config)


def test_lock_is_the_kernels(tmp_path: Path) -> None:
    """Held, the file is locked as any program can see; let go, it is not."""
    directory = RunDirectory(tmp_path)
    directory.claim()
    with (tmp_path / "lock").open("rb") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    del directory
    with (tmp_path / "lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("name", ["notes.txt", "metrics.jsonl", "checkpoints"])
def test_somebody_elses(tmp_path: Path, name: str) -> None:
    """A file of another kind, and one of ours without a configuration beside it: refused, nothing is added."""
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        RunDirectory(tmp_path).claim()
    assert [each.name for each in tmp_path.iterdir()] == [name]


def test_unwritable() -> None:
    """A place where nothing can be written is an error that names it."""
    with pytest.raises(OSError) as raised:
        RunDirectory(Path("/proc/run")).prepare(shipped("quickstart"))
    assert raised.value.filename is not None and "/proc/run" in str(raised.value.filename)
