"""The meter tells waiting from computing; rows survive kills, resumes and full disks; two warnings come when due."""

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
    """Resuming from step 20, before that epoch's evaluation, drops later rows, that evaluation, and a half-written
    line; TensorBoard, too, shows what is done a second time once."""
    log = MetricsLog(tmp_path, 0, 0)
    for step in (10, 20):
        log.write("train", step, epoch=0, loss=1.23456789)
    log.write("eval", 20, epoch=1, centre_top1_error=50.0)
    log.write("train", 30, epoch=1, loss=1.0)
    log.close()
    with log.path.open("a") as file:
        file.write('[1]\n{"kind": "tra')
    log = MetricsLog(tmp_path, 20, 0)
    assert steps_of(log.path) == [10, 20] and read_metrics(log.path)[0]["loss"] == 1.23457
    log.write("train", 30, epoch=1, loss=2.0)
    log.close()
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    points = [(point.step, point.value) for point in curves.Scalars("train/loss")]
    assert points == [(10, pytest.approx(1.23456789)), (20, pytest.approx(1.23456789)), (30, 2)]


def test_a_damaged_line_costs_no_other(tmp_path: Path) -> None:
    """Rows after a line that a disk damaged are still there, also after resuming."""
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
    assert steps_of(log.path) == [1, 3]


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


def check_ten(warnings: Warnings, wait: float, loss: float = 1.0, first: int = 0, epoch: int = 0) -> None:
    """Ten rows of 100 steps each."""
    for k in range(1, 11):
        warnings.check(first + 100 * k, epoch, 100, {"loss": loss, "wait_percent": wait})


def test_input_bound(capsys: pytest.CaptureFixture[str]) -> None:
    """Logged over 500 steps, once an epoch, with the share waited; a little waiting is not."""
    warnings = Warnings(10)
    for epoch, wait in ((0, 38.0), (1, 38.0), (2, 10.0)):
        check_ten(warnings, wait, epoch=epoch)
    output = capsys.readouterr().out
    assert output.count("input-bound: waited 38 % of 500 steps") == len(output.splitlines()) == 2


@pytest.mark.parametrize(("factor", "count"), [(1, 1), (1.005, 1), (0.9, 0), (1.1, 0)])
def test_loss_of_guessing(factor: float, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    """A loss of ln(classes) is logged once, after some thousand steps, neither before nor where the loss is another."""
    warnings = Warnings(100)
    for first in (0, Warnings.PATIENCE, 2 * Warnings.PATIENCE):
        check_ten(warnings, 0, factor * math.log(100), first)
        assert first or not capsys.readouterr().out
    assert capsys.readouterr().out.count("guessing, 4.61,") == count
