"""Rows survive kills and resumes without a gap or a repeat; the meter tells waiting from computing."""

import json
import time
from pathlib import Path

import torch

from train.metrics import MetricsLog, StepMeter, read_metrics
from train.placement import ParallelConfig, Placement


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


def test_meter() -> None:
    """Waits and steps that are slept out are read back, time in a pause is neither; loss and error are means."""
    meter = StepMeter(torch.device("cpu"), Placement(ParallelConfig(), torch.device("cpu")))
    for step in range(4):
        if step == 2:
            meter.pause()
            time.sleep(1)
        else:
            time.sleep(0.03)
        meter.start_step()
        time.sleep(0.01)
        meter.end_step(torch.tensor(0.5 * step), torch.tensor(2))
    figures = meter.read(batch_size=8)
    assert 29 < figures["wait_ms_p50"] <= figures["wait_ms_p99"] < 900
    assert 10 < figures["wait_percent"] < 90
    assert figures["loss"] == 0.75 and figures["top1_error"] == 75
    assert 4 * 8 / 1 < figures["images_per_s"] < 4 * 8 / 0.09
