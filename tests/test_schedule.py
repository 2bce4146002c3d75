"""Rates follow the validation error, given epochs, a hand or a cosine, at every step and after every resume."""

import math

import numpy as np
import pytest

from train.config import OptimizerConfig, RateChange, RateSchedule

BY_HAND = (
    RateChange(25, 0.001),
    RateChange(51, 0.0001),
    RateChange(67, 0.00001, "conv1"),
    RateChange(72, 0.0, "conv1"),
    RateChange(79, 0.00001),
)
"""The 2012 run (layers-145 of computerhistory/AlexNet-Source-Code)."""


def test_plateau() -> None:
    """Patience 2, least change .1: the rate falls after two stale epochs, three times, and the fourth plateau ends."""
    schedule = RateSchedule(OptimizerConfig(lr=0.01, patience=2, min_improvement=0.1, drops=3), 90)
    rates = []
    for error in [50, 40, 39.95, 39.92, 30, 30, 30, 30, 30, 30, 30]:
        assert not schedule.finished
        rates.append(schedule.lr())
        schedule.end_epoch(error)
    np.testing.assert_allclose(rates, [0.01] * 4 + [1e-3] * 3 + [1e-4] * 2 + [1e-5] * 2)
    assert schedule.finished


def test_steps_and_state() -> None:
    """Rates fall at the given epochs, those of biases with them; a restored schedule goes on alike."""
    config = OptimizerConfig(lr=1.0, bias_lr=2.0, schedule="steps", steps=(2, 3))
    schedule = RateSchedule(config, 5)
    rates = []
    for _ in range(5):
        rates.append(schedule.lr())
        assert schedule.rates(["fc6.bias"])["fc6.bias"] == pytest.approx(2 * schedule.lr())
        restored = RateSchedule(config, 5)
        restored.load_state_dict(schedule.state_dict())
        assert restored.lr() == schedule.lr()
        schedule.end_epoch(10)
    assert rates == pytest.approx([1, 1, 0.1, 0.01, 0.01]) and not schedule.finished


def test_by_hand() -> None:
    """The 2012 table: a layer that was given a rate of its own keeps it, biases stay where they are."""
    schedule = RateSchedule(OptimizerConfig(lr=0.01, bias_lr=0.02, schedule="hand", changes=BY_HAND), 91)
    names = ["conv1.weight", "conv1.bias", "fc8.weight"]
    seen = {}
    for epoch in range(91):
        seen[epoch] = tuple(schedule.rates(names).values())
        schedule.end_epoch(50)
    assert seen[0] == seen[24] == (0.01, 0.02, 0.01) and seen[25] == seen[50] == (0.001, 0.02, 0.001)
    assert seen[51] == seen[66] == (1e-4, 0.02, 1e-4) and seen[67] == seen[71] == (1e-5, 0.02, 1e-4)
    assert seen[72] == seen[78] == (0, 0.02, 1e-4) and seen[79] == seen[90] == (0, 0.02, 1e-5)
    later = RateSchedule(OptimizerConfig(schedule="hand", changes=(RateChange(1, 0.002, "biases"),)), 2)
    later.end_epoch(50)
    assert later.rates(["conv1.bias", "conv1.weight"]) == {"conv1.bias": 0.002, "conv1.weight": 0.01}


def test_cosine_with_warm_up() -> None:
    """Up in a straight line for two epochs, then half a cosine to zero; within an epoch too."""
    schedule = RateSchedule(OptimizerConfig(lr=0.8, schedule="cosine", warmup_epochs=2), 10)
    for epoch in range(10):
        for progress in (0.125, 0.375, 0.875):
            passed = epoch + progress
            expected = passed / 2 if passed < 2 else (1 + math.cos(math.pi * (passed - 2) / 8)) / 2
            assert schedule.lr(progress) == pytest.approx(0.8 * expected)
        schedule.end_epoch(50)
    warm = RateSchedule(OptimizerConfig(lr=1, warmup_epochs=1), 3)
    assert warm.lr(0.25) == 0.25
    warm.end_epoch(50)
    assert warm.lr(0.25) == 1


@pytest.mark.parametrize(
    "bad",
    [
        {"lr": -1},
        {"lr": float("nan")},
        {"bias_lr": -0.1},
        {"momentum": 1},
        {"weight_decay": -1},
        {"warmup_epochs": -1},
        {"patience": 0},
        {"steps": (3, 2), "schedule": "steps"},
        {"steps": (0,), "schedule": "steps"},
        {"steps": (3,)},
        {"changes": (RateChange(1, 0.1),)},
        {"changes": (RateChange(1, 0.1), RateChange(1, 0.2)), "schedule": "hand"},
    ],
)
def test_bad_values(bad: dict[str, object]) -> None:
    """Refused with the field's name."""
    with pytest.raises(ValueError, match=next(iter(bad))):
        OptimizerConfig(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [(0, 0.1), (1, -0.1), (1, 0.1, "conv9")])
def test_bad_changes(bad: tuple[object, ...]) -> None:
    """Refused with what may stand there."""
    with pytest.raises(ValueError, match="a change of rate is"):
        RateChange(*bad)  # type: ignore[arg-type]
