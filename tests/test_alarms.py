"""Alarms are told where there is something to tell, once, and not otherwise."""

import math

import pytest
from train.alarms import PATIENCE, Alarms

from train.accuracy import Accuracy


def rows(alarms: Alarms, wait: float, loss: float = 1.0, first: int = 0, epoch: int = 0) -> None:
    """Ten rows of 100 steps each."""
    for k in range(1, 11):
        alarms.train_row(first + 100 * k, epoch, 100, {"loss": loss, "wait_percent": wait})


def accuracy(top1: float) -> Accuracy:
    """Of a thousand images."""
    return Accuracy(1000, top1, top1, "", 0, 0)


def test_slow_input() -> None:
    """Told over 500 steps, once an epoch, with the share waited; a little waiting is none."""
    told: list[str] = []
    alarms = Alarms(10, told.append)
    rows(alarms, 38.0)
    assert told == ["input-bound: waited 38 % of the last 500 steps; see tools/tune_pipeline.py"]
    rows(alarms, 38.0, epoch=1)
    rows(alarms, 10.0, epoch=2)
    assert len(told) == 2


@pytest.mark.parametrize(
    ("loss", "expected"), [(math.log(100), 1), (1.005 * math.log(100), 1), (4.0, 0), (5.0, 0)]
)
def test_loss_at_chance(loss: float, expected: int) -> None:
    """Told once after some thousand steps, and neither before nor where the loss is another."""
    told: list[str] = []
    alarms = Alarms(100, told.append)
    rows(alarms, 0, loss)
    assert not told
    rows(alarms, 0, loss, PATIENCE)
    assert len(told) == expected and all("ln(100) = 4.61" in line for line in told)


def test_accuracy_at_chance() -> None:
    """Told where training learns and validation guesses; not where both guess, nor where both know."""
    told: list[str] = []
    alarms = Alarms(10, told.append)
    rows(alarms, 0, math.log(10))
    alarms.eval_row(1, accuracy(10.0))
    rows(alarms, 0, 1.0)
    alarms.eval_row(2, accuracy(13.0))
    assert not told
    alarms.eval_row(3, accuracy(12.0))
    alarms.eval_row(4, accuracy(12.0))
    assert len(told) == 1 and "after epoch 3 is 12.0 %" in told[0]
