"""The meter tells waiting from computing, and both from pauses."""

import itertools
import time
import weakref

import pytest
import torch
from train.placement import ParallelConfig, Placement

from train.metrics import StepMeter


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
    assert 29 < figures["next_ms_p50"] < 900 and 10 < figures["step_ms_p50"] < 900
    assert "saving_step_ms_p50" not in figures
    assert 4 * 8 / 1 < figures["images_per_s"] < 4 * 8 / 0.09


def test_steps_beside_a_checkpoint() -> None:
    """Steps during which a checkpoint was written are told apart."""
    meter = StepMeter(torch.device("cpu"), Placement(ParallelConfig(), torch.device("cpu")))
    for step in range(5):
        meter.start_step()
        time.sleep(0.05 if step in (2, 3) else 0.005)
        meter.end_step(torch.tensor(1.0), torch.tensor(0), saving=step in (2, 3))
    figures = meter.read(batch_size=1)
    assert figures["step_ms_p50"] < 45 < figures["saving_step_ms_p50"]


def test_two_steps_ahead() -> None:
    """On a GPU the host waits for the end of step k - 2 behind step k, and lets go of its batch only then."""
    waited: list[int] = []

    class Event:
        def __init__(self, number: int) -> None:
            self.number = number

        def synchronize(self) -> None:
            waited.append(self.number)

    meter = StepMeter(torch.device("cpu"), Placement(ParallelConfig(), torch.device("cpu")))
    meter._on_gpu = True
    batches = [torch.zeros(1) for _ in range(6)]
    kept = [weakref.ref(batch) for batch in batches]
    for step in range(6):
        meter._now = lambda step=step: Event(step)  # type: ignore[method-assign,misc]
        meter.start_step()
        meter.end_step(torch.tensor(1.0), torch.tensor(0), batches[step])
        batches[step] = None  # type: ignore[call-overload]
        assert waited == list(range(step - 1))
        assert [each() is not None for each in kept[: step + 1]] == [False] * (step - 1) + [True] * min(
            2, step + 1
        )


def test_clock_jumps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wall clock that is set back or ahead by a day changes no figure."""
    meter = StepMeter(torch.device("cpu"), Placement(ParallelConfig(), torch.device("cpu")))
    jumps = itertools.cycle([0.0, 86400.0, -86400.0])
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    for _ in range(6):
        meter.start_step()
        time.sleep(0.01)
        meter.end_step(torch.tensor(1.0), torch.tensor(0))
        time.sleep(0.01)
    figures = meter.read(batch_size=8)
    assert (
        9 < figures["wait_ms_p50"] < 500 and 19 < figures["step_ms_p50"] < 500 and figures["images_per_s"] > 0
    )
