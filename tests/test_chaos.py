"""Runs that are killed again and again, and started again by the same command, end where an undisturbed one ends."""

import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import (
    TORCHRUN,
    TRAIN,
    final,
    rows_of,
    rows_without_times,
    run_ok,
    run_python,
    same_weights,
    shared_run,
    signal_worker,
    start_python,
    wait_for,
)

EPOCHS, STEPS, KILLS = 12, 11, 30
MORE = f"--run.log_every 1 --run.save_minutes 0 --train.epochs {EPOCHS} --run.deterministic true".split()


def start(shards: Path, directory: Path, *launcher: str) -> subprocess.Popen[str]:
    """Two processes, replicas of one network."""
    command = [*TORCHRUN, *launcher, *TRAIN, *shared_run(shards, directory, *MORE)]
    return start_python(*command, stderr=subprocess.STDOUT)


def last_step(directory: Path) -> int:
    """Of the rows written so far."""
    return max((row["step"] for row in rows_of(directory)), default=0)


def wrote(directory: Path, step: int, since: float) -> bool:
    """Whether a row of this step or a later one is there, and one was written since then."""
    rows = directory / "metrics.jsonl"
    return rows.exists() and rows.stat().st_mtime > since and last_step(directory) >= step


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run from start to end in one go."""
    directory = tmp_path_factory.mktemp("undisturbed")
    run_ok(*TORCHRUN, *TRAIN, *shared_run(shards, directory, *MORE), run=run_python)
    return directory


@pytest.mark.slow
def test_thirty_kills(shards: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Thirty times -9 or TERM to one of two processes, at its start or between any two instants of its steps: final
    weights are bitwise those of the undisturbed run, rows without a gap or a repeat."""
    rng, saved = np.random.default_rng(7), 0
    for kills in range(KILLS):
        launcher = start(shards, tmp_path)
        rank, number = int(rng.integers(2)), signal.SIGKILL if rng.random() < 0.5 else signal.SIGTERM
        target = last_step(tmp_path) - 4 + int(rng.integers(1, 9)) if rng.random() < 0.9 else -1
        began = time.time()
        wait_for(lambda: launcher.poll() is not None or signal_worker(launcher, rank))  # noqa: B023
        wait_for(lambda: launcher.poll() is not None or target < 0 or wrote(tmp_path, target, began))  # noqa: B023
        assert launcher.poll() is None, f"over after {kills} kills: {launcher.communicate()[0]}"
        time.sleep(float(rng.random()) * (0.2 if target >= 0 else 3))
        signal_worker(launcher, rank, number)
        output, _ = launcher.communicate(timeout=120)
        trace = 'Traceback (most recent call last):\n  File "/'
        assert trace not in output or "torch/distributed" in output, output
        signalled = number == signal.SIGKILL or target < 0 or "Signals.SIGTERM" in output
        assert launcher.returncode == 0 or signalled, output
        saved += "stopped and saved" in output
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
    assert signal_worker(launcher, 1, signal.SIGKILL)
    output, _ = launcher.communicate(timeout=240)
    assert launcher.returncode == 0 and output.count("resuming from") == 1, output
    assert same_weights(final(tmp_path), final(undisturbed))
    assert rows_without_times(tmp_path) == rows_without_times(undisturbed)
