"""Runs that are refused at once, or fail in their midst, say why in a sentence. What needs a run that has ended is in
tests/test_run.py, where there is one."""

import re
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from pipeline.shards import read_index
from tests.helpers import (
    STEPS,
    TRAIN,
    final,
    rows_of,
    run_here,
    run_ok,
    run_python,
    small_run,
    start_python,
    train_refuses,
    wait_for,
)
from train.checkpoint import find_checkpoint, load_checkpoint


@pytest.mark.slow
def test_disk_full_at_the_end(few: Path, tmp_path: Path) -> None:
    """Where the last checkpoint cannot be written, that is an error with code 2 which names it; the run goes on from
    the one before."""
    process = start_python(*TRAIN, *small_run(few, tmp_path), stderr=subprocess.STDOUT)
    wait_for(lambda: rows_of(tmp_path)[-1:] and rows_of(tmp_path)[-1]["step"] >= 8, process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert (
        process.returncode == 2 and "File too large; free some space" in output and "Traceback" not in output
    ), output
    assert load_checkpoint(find_checkpoint(tmp_path) or tmp_path)["step"] % 6 == 0


def test_foreign_directory_and_missing_basis(few: Path, tmp_path: Path) -> None:
    """A directory that holds something else, and shards without pca.json."""
    (tmp_path / "novel.txt").write_text("x")
    assert "holds something else" in train_refuses(*small_run(few, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["novel.txt"]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.yaml").write_text("theme: mine\n")
    assert "holds something else" in train_refuses(*small_run(few, foreign))
    assert (foreign / "config.yaml").read_text() == "theme: mine\n"
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("train", "val", "classes.json"):
        (bare / name).symlink_to(few / name)
    assert "compute_pca" in train_refuses(*small_run(bare, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_divergence(few: Path, tmp_path: Path) -> None:
    """A rate that is far too high, behind an epoch of a good one, ends with code 4, says between which steps, which
    checkpoint is the last good one and what to do; none of the ruin is kept."""
    jump = ["--optimizer.schedule", "hand", "--optimizer.changes", "[{epoch: 1, lr: 1e9}]"]
    done = run_here(*TRAIN, *small_run(few, tmp_path, *jump))
    assert done.returncode == 4 and "Traceback" not in done.stderr
    path = find_checkpoint(tmp_path)
    assert path == tmp_path / "checkpoints" / f"step-{STEPS:08d}.pt"
    first, last = (int(step) for step in re.findall(r"diverged in steps (\d+) to (\d+)", done.stderr)[0])
    assert STEPS < first <= last <= first + 3 and f"The last good checkpoint is {path};" in done.stderr
    assert all(tensor.isfinite().all() for tensor in load_checkpoint(path)["model"].values())


def test_damaged_data(few: Path, tmp_path: Path) -> None:
    """An image that was damaged after packing stops the run with code 3 and its name, saved where it stood."""
    copy, run = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(few, copy)
    tar = copy / "train" / "train-000001.tar"
    [(_, offset, size, name), _] = read_index(tar.with_suffix(".idx"))[100]
    sound = tar.read_bytes()
    tar.write_bytes(sound[:offset] + b"x" * size + sound[offset + size :])
    # The order of the shards alone is shuffled, so that the damage is not read at once.
    more = ["--data.shuffle_buffer", "1", "--run.save_every", "1000"]
    done = run_python(*TRAIN, *small_run(copy, run, *more))
    assert (
        done.returncode == 3 and "Traceback" not in done.stderr and "what was trained is saved" in done.stderr
    )
    assert f"{name} at offset {offset} of {tar}" in done.stderr
    assert 0 < final(run)["step"] < STEPS  # type: ignore[operator]


def test_damaged_validation_data(few: Path, tmp_path: Path) -> None:
    """An image of the validation split that was damaged costs nothing of the epoch before: it is saved, and going on
    begins with the evaluation."""
    copy, run = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(few, copy)
    tar = copy / "val" / "val-000000.tar"
    [(_, offset, size, name), _] = read_index(tar.with_suffix(".idx"))[7]
    sound = tar.read_bytes()
    # Cut short: over other damage DALI 2.4's decoder was seen to crash, in one try of ten.
    tar.write_bytes(sound[: offset + size // 2] + bytes(size - size // 2) + sound[offset + size :])
    more = ["--run.save_every", "1000", "--train.epochs", "1"]
    done = run_python(*TRAIN, *small_run(copy, run, *more))
    assert done.returncode == 3 and name in done.stderr and "what was trained is saved" in done.stderr
    assert final(run)["step"] == STEPS and final(run)["epoch"] == 0
    tar.write_bytes(sound)
    assert f"step {STEPS})" in run_ok(*TRAIN, *small_run(copy, run, *more))
    assert [row["kind"] for row in rows_of(run)] == ["train"] * (STEPS // 4) + ["eval"]
