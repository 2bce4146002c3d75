"""A run directory belongs to one run at a time, and is not made before it is needed."""

import fcntl
import os
import signal
import time
from pathlib import Path

import pytest

from tests.helpers import shipped
from train.checkpoint import RunDirectory


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


def test_lock_is_no_file(tmp_path: Path) -> None:
    """A pipe of that name is an error that names it."""
    os.mkfifo(tmp_path / "lock")
    with pytest.raises(FileExistsError, match=r"not a regular file: '.*/lock'"):
        RunDirectory(tmp_path).claim()


@pytest.mark.parametrize("name", ["notes.txt", "metrics.jsonl", "checkpoints", "config.yaml"])
def test_somebody_elses(tmp_path: Path, name: str) -> None:
    """A file of another kind, and one of ours without a run's configuration: refused by name, nothing is added."""
    (tmp_path / name).write_text("data: 1\nmodel: 2\noptimizer: 3\n")
    with pytest.raises(ValueError, match=rf"holds something else \({name}\)"):
        RunDirectory(tmp_path).claim()
    assert [each.name for each in tmp_path.iterdir()] == [name]


def test_ones_own(tmp_path: Path) -> None:
    """A run that was begun stays one: with a log or an evaluation beside it, with a configuration that was lost, or
    killed while that was being written."""
    for name in ("lock", "config.yaml.tmp"):
        (tmp_path / name).write_text("")
    RunDirectory(tmp_path).claim()
    RunDirectory(tmp_path).prepare(shipped("quickstart"))
    (tmp_path / "train.log").write_text("")
    RunDirectory(tmp_path).claim()
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ValueError, match="holds something else"):
        RunDirectory(tmp_path).claim()
    (tmp_path / "checkpoints" / "step-00000007.pt").write_text("")
    RunDirectory(tmp_path).claim()


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "checkpoints", "tensorboard"])
def test_of_the_wrong_kind(tmp_path: Path, name: str, link: bool) -> None:
    """A folder in place of a file, the reverse, and a link to a disk that is not mounted are refused by name, and
    nothing is changed."""
    RunDirectory(tmp_path).prepare(shipped("quickstart"))
    (tmp_path / "checkpoints" / "step-00000007.pt").write_text("")
    path = tmp_path / name
    if path.exists():
        path.rename(tmp_path / "aside")
    if link:
        path.symlink_to(tmp_path / "not mounted")
    elif "." in name:
        path.mkdir()
    else:
        path.write_text("")
    before = {each: each.lstat().st_mtime_ns for each in tmp_path.iterdir()}
    with pytest.raises(
        ValueError, match=rf"{path} is no (file|folder)" + " but a link to .*not mounted;" * link
    ):
        RunDirectory(tmp_path).claim()
    assert {each: each.lstat().st_mtime_ns for each in tmp_path.iterdir()} == before


def test_lost_checkpoints(tmp_path: Path) -> None:
    """Where rows tell of checkpoints and there is none, or no folder of them, the run is refused and keeps its rows;
    killed before its first checkpoint, it begins again."""
    RunDirectory(tmp_path).prepare(shipped("quickstart"))
    metrics, row = tmp_path / "metrics.jsonl", '{"kind": "train", "step": %d, "epoch": 0}\n'
    metrics.write_text(row % 4 + row % 8)
    RunDirectory(tmp_path).claim()
    lost = rf"{metrics} tells of 8 steps, but {tmp_path}/checkpoints holds none .* remove {metrics} to begin anew"
    (tmp_path / "checkpoints").rmdir()
    with pytest.raises(ValueError, match=lost):
        RunDirectory(tmp_path).claim()
    (tmp_path / "checkpoints").mkdir()
    metrics.write_text(row % 4 + (row % 8).replace("}", ', "saved_step": 6}'))
    with pytest.raises(ValueError, match=lost):
        RunDirectory(tmp_path).claim()
    (tmp_path / "checkpoints" / "step-00000006.pt").write_text("")
    RunDirectory(tmp_path).claim()


def test_unwritable_checkpoints(tmp_path: Path) -> None:
    """A folder of checkpoints in which nothing can be made is an error that names it, before training."""
    RunDirectory(tmp_path).prepare(shipped("quickstart"))
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "checkpoints").symlink_to("/proc")
    with pytest.raises(OSError) as raised:
        RunDirectory(tmp_path).claim()
    assert str(raised.value.filename).startswith(f"{tmp_path}/checkpoints")


def test_unwritable() -> None:
    """A place where nothing can be written is an error that names it."""
    with pytest.raises(OSError) as raised:
        RunDirectory(Path("/proc/run")).prepare(shipped("quickstart"))
    assert raised.value.filename is not None and "/proc/run" in str(raised.value.filename)
