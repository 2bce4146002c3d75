"""Runs that are killed again and again, and started again by the same command, end where an undisturbed one ends."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import (
    TRAIN,
    final,
    rows_of,
    rows_without_times,
    run_ok,
    run_python,
    same_weights,
    shared_run,
    start_python,
    wait_for,
)

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
EPOCHS, STEPS, KILLS = 12, 11, 30
MORE = f"--run.log_every 1 --run.save_minutes 0 --train.epochs {EPOCHS} --run.deterministic true".split()


def start(shards: Path, directory: Path, *launcher: str) -> subprocess.Popen[str]:
    """Two processes, replicas of one network."""
    command = [*TORCHRUN, *launcher, *TRAIN, *shared_run(shards, directory, *MORE)]
    return start_python(*command, stderr=subprocess.STDOUT)


def worker(launcher: subprocess.Popen[str], rank: int) -> int | None:
    """The process of a rank, if it has been started."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for pid in children:
        try:
            if f"\0RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                return int(pid)
        except OSError:  # it has just ended
            pass
    return None


def last_step(directory: Path) -> int:
    """Of the rows written so far."""
    return max((row["step"] for row in rows_of(directory)), default=0)


def runs_until(reached: Callable[[], Any], launcher: "subprocess.Popen[str]") -> bool:
    """Wait until `reached()` is true, or the run is over; returns which of the two."""
    wait_for(lambda: reached() or launcher.poll() is not None)
    return launcher.poll() is None


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run from start to end in one go."""
    directory = tmp_path_factory.mktemp("undisturbed")
    run_ok(*TORCHRUN, "-m", "train.run", *shared_run(shards, directory, *MORE), run=run_python)
    return directory


@pytest.mark.slow
def test_thirty_kills(shards: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Thirty times -9 or TERM to one of two processes, at its start or between any two instants of its steps: final
    weights are bitwise those of the undisturbed run, rows without a gap or a repeat."""
    rng, kills, saved = np.random.default_rng(7), 0, 0
    while kills < KILLS:
        launcher = start(shards, tmp_path)
        rank, number = int(rng.integers(2)), signal.SIGKILL if rng.random() < 0.5 else signal.SIGTERM
        target = last_step(tmp_path) - 4 + int(rng.integers(1, 9)) if rng.random() < 0.9 else -1
        began = time.time()  # rows of before are not this attempt's

        def due(target: int = target, began: float = began) -> bool:
            path = tmp_path / "metrics.jsonl"
            return target < 0 or (
                path.exists() and path.stat().st_mtime > began and last_step(tmp_path) >= target
            )

        if not (runs_until(lambda: worker(launcher, rank), launcher) and runs_until(due, launcher)):  # noqa: B023
            output, _ = launcher.communicate()
            raise AssertionError(f"ended by itself after {kills} kills: {output}")
        time.sleep(float(rng.random()) * (0.2 if target >= 0 else 3))
        pid = worker(launcher, rank)
        if pid is not None:
            os.kill(pid, number)
        output, _ = launcher.communicate(timeout=120)
        assert (
            'Traceback (most recent call last):\n  File "/' not in output or "torch/distributed" in output
        ), output
        kills, saved = kills + 1, saved + ("stopped and saved" in output)
        assert (
            launcher.returncode == 0 or number == signal.SIGKILL or target < 0 or "Signals.SIGTERM" in output
        ), output
    assert saved >= KILLS // 5
    before = last_step(tmp_path)
    output, _ = start(shards, tmp_path).communicate(timeout=240)
    assert "resuming from" in output and "ten-view top-1 accuracy" in output, output
    assert before < EPOCHS * STEPS == final(tmp_path)["step"]
    assert same_weights(final(tmp_path), final(undisturbed))
    assert rows_without_times(tmp_path) == rows_without_times(undisturbed)


@pytest.mark.slow
def test_torchrun_restarts_by_itself(shards: Path, undisturbed: Path, tmp_path: Path) -> None:
    """With --max-restarts a killed process costs a restart from LATEST, and nothing of the result."""
    launcher = start(shards, tmp_path, "--max-restarts", "2")
    wait_for(lambda: last_step(tmp_path) >= STEPS + 6, launcher)
    os.kill(worker(launcher, 1) or 0, signal.SIGKILL)
    output, _ = launcher.communicate(timeout=240)
    assert launcher.returncode == 0 and output.count("resuming from") == 1, output
    assert same_weights(final(tmp_path), final(undisturbed))
    assert rows_without_times(tmp_path) == rows_without_times(undisturbed)
