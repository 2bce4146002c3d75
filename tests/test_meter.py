"""The meter tells waiting from computing, and both from pauses."""

import time

import torch

from train.meter import StepMeter
from train.placement import ParallelConfig, Placement


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
