"""The meter separates waiting from computing; rows survive kills, resumes and full disks; two warnings come in time."""

import itertools
import json
import math
import resource
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.config import ParallelConfig
from train.distributed import Distributed
from train.metrics import MetricsLog, StepMeter, Warnings, read_metrics


@pytest.fixture
def meter() -> StepMeter:
    """Of a single process on a CPU."""
    return StepMeter(torch.device("cpu"), Distributed(ParallelConfig()))


def test_waits_and_steps(meter: StepMeter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits and steps that are slept out are read back, time in a gap is neither, a wall clock that jumps changes
    nothing; steps while a checkpoint is written have a figure of their own; loss and error are means."""
    jumps = itertools.cycle([0.0, 86400.0, -86400.0])
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    for step in range(4):
        if step == 2:
            meter.mark_gap()
            time.sleep(1)
        else:
            time.sleep(0.03)
        meter.start_step()
        time.sleep(0.01)
        meter.end_step(torch.tensor(0.5 * step), torch.tensor(2), saving=step == 2)
    values = meter.read(batch_size=8)
    assert 29 < values["wait_ms_p50"] <= values["wait_ms_p99"] < 900
    assert 10 < values["wait_percent"] < 90
    assert values["loss"] == 0.75 and values["top1_error"] == 75
    assert 29 < values["data_time_ms_p50"] < 900 and 10 < values["step_ms_p50"] < 900
    assert 9 < values["saving_step_ms_p50"] < 900  # after a gap: without a wait
    assert 4 * 8 / 1 < values["images_per_s"] < 4 * 8 / 0.09


def test_two_steps_ahead(meter: StepMeter) -> None:
    """On a GPU the host waits for the end of step k - 2 after step k, and frees its batch only then."""
    waited: list[int] = []

    class Event:
        def __init__(self, number: int) -> None:
            self.number = number

        def synchronize(self) -> None:
            waited.append(self.number)

    meter._on_gpu = True
    batches = [torch.zeros(1) for _ in range(6)]
    held = [weakref.ref(batch) for batch in batches]
    for step in range(6):
        meter._now = lambda step=step: Event(step)  # type: ignore[method-assign,misc]
        meter.start_step()
        meter.end_step(torch.tensor(1.0), torch.tensor(0), batches[step])
        batches[step] = None  # type: ignore[call-overload]
        assert waited == list(range(step - 1))
        alive = [each() is not None for each in held[: step + 1]]
        assert alive == [False] * (step - 1) + [True] * min(2, step + 1)


def steps_of(path: Path) -> list[int]:
    """The step of each line, all of which have to be whole."""
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_rows_after_the_resumed_step_are_cut(tmp_path: Path) -> None:
    """Resuming from step 20, before that epoch's evaluation, drops later rows, that evaluation, and damaged lines, but
    no other; TensorBoard, too, shows what is done a second time once."""
    log = MetricsLog(tmp_path, 0, 0)
    for step in (10, 15, 20):
        log.write("train", step, epoch=0, loss=1.23456789)
    log.write("eval", 20, epoch=1, centre_top1_error=50.0)
    log.write("train", 30, epoch=1, loss=1.0)
    log.close()
    lines = log.path.read_bytes().splitlines(keepends=True)
    odd = b'{"kind": "train", "step": null, "epoch": 0}\n' + b"[" * 100_000 + b"\n{}\n[1]\n"
    log.path.write_bytes(b"".join([lines[0], b"\xff", lines[1][1:], odd, *lines[2:], b'{"kind": "tra']))
    assert [row["step"] for row in read_metrics(log.path)] == [10, 20, 20, 30]
    time.sleep(
        1
    )  # TensorBoard orders files by the second, then by a process's count of them as text: 10 before 9.
    log = MetricsLog(tmp_path, 20, 0)
    assert steps_of(log.path) == [10, 20] and read_metrics(log.path)[0]["loss"] == 1.23457
    log.write("train", 30, epoch=1, loss=2.0)
    log.close()
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    points = [(point.step, pytest.approx(point.value)) for point in curves.Scalars("train/loss")]
    assert points == [(10, 1.23456789), (15, 1.23456789), (20, 1.23456789), (30, 2)]


def test_two_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    """Waiting is logged over 500 steps, once an epoch, a little waiting not; a loss of ln(classes) once, after some
    thousand steps, and no other loss."""

    def check(warnings: Warnings, wait: float, loss: float = 1.0, epoch: int = 0) -> None:
        for k in range(1, 11):  # ten rows of 100 steps
            warnings.check(1000 * epoch + 100 * k, epoch, 100, {"loss": loss, "wait_percent": wait})

    warnings = Warnings(10)
    for epoch, wait in enumerate((38.0, 38.0, 10.0)):
        check(warnings, wait, epoch=epoch)
    output = capsys.readouterr().out
    assert output.count("input-bound: waited 38 % of 500 steps") == len(output.splitlines()) == 2
    for factor, count in ((1, 1), (1.005, 1), (0.9, 0), (1.1, 0)):
        warnings = Warnings(100)
        for epoch in range(2 * Warnings.PATIENCE // 1000 + 2):
            check(warnings, 0, factor * math.log(100), epoch)
            assert epoch or not capsys.readouterr().out
        assert capsys.readouterr().out.count("guessing, 4.61,") == count


def test_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows that cannot be written are logged once, wait in memory, and come in their order when there is room; `sync`
    raises meanwhile."""
    log = MetricsLog(tmp_path, 0, 0)
    log.write("train", 1, epoch=0, loss=1.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        size = log.path.stat().st_size + 10  # half a row fits
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        for step in (2, 3):
            log.write("train", step, epoch=0, loss=1.0)
        output = capsys.readouterr().out
        assert output.count("its rows are kept in memory") == 1 and str(log.path) in output
        assert [row["step"] for row in read_metrics(log.path)] == [1]
        with pytest.raises(OSError, match=r"File too large: '.*/metrics\.jsonl'"):
            log.sync()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.write("train", 4, epoch=0, loss=1.0)
    log.close()
    assert steps_of(log.path) == [1, 2, 3, 4]


def test_rows_and_syncs_from_two_threads(tmp_path: Path) -> None:
    """However they interleave, each row is written once and in its order."""
    log, done = MetricsLog(tmp_path, 0, 0), threading.Event()

    def sync() -> None:
        while not done.is_set():
            log.sync()

    thread, interval = threading.Thread(target=sync), sys.getswitchinterval()
    thread.start()
    sys.setswitchinterval(1e-6)
    try:
        for step in range(1, 1001):
            log.write("train", step, epoch=0, loss=1.0)
    finally:
        sys.setswitchinterval(interval)
        done.set()
        thread.join()
    log.close()
    assert steps_of(log.path) == list(range(1, 1001))
