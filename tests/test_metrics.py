"""Rows survive kills, resumes and full disks without a gap or a repeat."""

import json
import resource
import sys
import threading
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.metrics import MetricsLog, read_metrics


def test_rows_of_a_lost_future_are_cut(tmp_path: Path) -> None:
    """Going on from step 20, before that epoch's evaluation, drops later rows, that evaluation, and a half-written
    line."""
    log = MetricsLog(tmp_path, 0, 0)
    for step in (10, 20):
        log.write("train", step, epoch=0, loss=1.23456789)
    log.write("eval", 20, epoch=1, centre_top1_error=50.0)
    log.write("train", 30, epoch=1, loss=1.0)
    log.close()
    with log.path.open("a") as file:
        file.write('[1]\n{"kind": "tra')
    MetricsLog(tmp_path, 20, 0).close()
    rows = read_metrics(log.path)
    assert [(row["kind"], row["step"]) for row in rows] == [("train", 10), ("train", 20)]
    assert rows[0]["loss"] == 1.23457
    MetricsLog(tmp_path, 20, 1).close()
    assert all(json.loads(line) for line in log.path.read_text().splitlines())
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_damaged_line_costs_no_other(tmp_path: Path) -> None:
    """Rows behind a line that a disk damaged are still there, also after going on."""
    log = MetricsLog(tmp_path, 0, 0)
    for step in (1, 2, 3):
        log.write("train", step, epoch=0, loss=float(step))
    log.close()
    lines = log.path.read_bytes().splitlines(keepends=True)
    odd = b'{"kind": "train", "step": null, "epoch": 0}\n' + b"[" * 100_000 + b"\n{}\n"
    log.path.write_bytes(lines[0] + b"\xff" + lines[1][1:] + odd + lines[2])
    for _ in range(2):
        assert [row["step"] for row in read_metrics(log.path)] == [1, 3]
        MetricsLog(tmp_path, 3, 0).close()


def test_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows that cannot be written are told of once, wait, and come in their order when there is room; closing says what
    would be lost."""
    log = MetricsLog(tmp_path, 0, 0)
    log.write("train", 1, epoch=0, loss=1.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (log.path.stat().st_size + 10, limits[1])
        )  # half a row fits
        for step in (2, 3):
            log.write("train", step, epoch=0, loss=1.0)
        told = capsys.readouterr().out
        assert told.count("its rows are kept in memory") == told.count("no more TensorBoard curves") == 1, (
            told
        )
        assert str(log.path) in told
        assert [row["step"] for row in read_metrics(log.path)] == [1]
        with pytest.raises(OSError, match=r"File too large: '.*/metrics\.jsonl'"):
            log.sync()
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        log.write("train", 4, epoch=0, loss=1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.close()
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2, 3, 4]


def test_tensorboard_reads_the_curves(tmp_path: Path) -> None:
    """Its own reader finds each scalar with step and value; what a run that goes on does again, it tells once."""
    for steps in ((1, 2, 3), (3, 4)):
        log = MetricsLog(tmp_path, steps[0] - 1, 0)
        for step in steps:
            log.write("train", step, epoch=0, loss=step / 2 + len(steps))
        log.close()
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert curves.Tags()["scalars"] == ["train/epoch", "train/loss"]
    assert [(point.step, point.value) for point in curves.Scalars("train/loss")] == [
        (1, 3.5),
        (2, 4),
        (3, 3.5),
        (4, 4),
    ]


def test_rows_and_syncs_from_two_threads(tmp_path: Path) -> None:
    """However they fall together, each row is written once and in its order."""
    log, done = MetricsLog(tmp_path, 0, 0), threading.Event()

    def sync() -> None:
        while not done.is_set():
            log.sync()

    thread = threading.Thread(target=sync)
    thread.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for step in range(1, 1001):
            log.write("train", step, epoch=0, loss=1.0)
    finally:
        sys.setswitchinterval(interval)
        done.set()
        thread.join()
    log.close()
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == list(range(1, 1001))
