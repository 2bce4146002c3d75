"""The update is the paper's formula over any schedule of rates; the schedule follows the validation error."""

import numpy as np
import pytest
import torch

from train.optimizer import OptimizerConfig, PaperSGD, RateSchedule

RATES = [0.01, 0.01, 0.001, 0.001, 0.0, 0.0, 0.001, 0.01]


def test_formula_over_a_schedule() -> None:
    """v <- .9 v - 5e-4 rate w - rate g, w <- w + v, with numpy in float64; a rate of 0 changes neither v nor w."""
    rng = np.random.default_rng(0)
    start = [rng.standard_normal((3, 4)), rng.standard_normal(5)]
    parameters = [torch.nn.Parameter(torch.tensor(values)) for values in start]
    optimizer = PaperSGD([("a", parameters[0]), ("b", parameters[1])], 0.9, 5e-4)
    weights, velocity = [values.copy() for values in start], [np.zeros_like(values) for values in start]
    for rate in RATES:
        for k, parameter in enumerate(parameters):
            gradient = rng.standard_normal(parameter.shape)
            parameter.grad = torch.tensor(gradient)
            if rate:
                velocity[k] = 0.9 * velocity[k] - 5e-4 * rate * weights[k] - rate * gradient
                weights[k] = weights[k] + velocity[k]
        optimizer.step(rate)
        for k, name in enumerate("ab"):
            np.testing.assert_allclose(parameters[k].detach().numpy(), weights[k], rtol=0, atol=1e-15)
            np.testing.assert_allclose(optimizer.state_dict()[name].numpy(), velocity[k], rtol=0, atol=1e-15)
            assert parameters[k].grad is None


def test_differs_from_torch_sgd_where_the_rate_changes() -> None:
    """torch keeps the rate out of its buffer: equal while the rate is constant, another path after a drop."""
    ours, torchs = (torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    optimizer, reference = PaperSGD([("w", ours)], 0.9, 5e-4), torch.optim.SGD([torchs], 0.01, 0.9, weight_decay=5e-4)
    for step in range(8):
        rate = 0.01 if step < 4 else 0.001
        reference.param_groups[0]["lr"] = rate
        ours.grad, torchs.grad = (torch.full((3,), 0.5, dtype=torch.float64) for _ in range(2))
        optimizer.step(rate)
        reference.step()
        assert (abs(ours - torchs).max() < 1e-15) == (step < 4)


def test_plateau() -> None:
    """Patience 2, least change .1: the rate falls after two stale epochs, three times, and the fourth plateau ends."""
    schedule = RateSchedule(OptimizerConfig(lr=0.01, patience=2, min_improvement=0.1, drops=3))
    rates = []
    for error in [50, 40, 39.95, 39.92, 30, 30, 30, 30, 30, 30, 30]:
        assert not schedule.finished
        rates.append(schedule.lr)
        schedule.end_epoch(error)
    np.testing.assert_allclose(rates, [0.01] * 4 + [1e-3] * 3 + [1e-4] * 2 + [1e-5] * 2)
    assert schedule.finished


def test_steps_and_state() -> None:
    """Rates fall at the given epochs; a restored schedule goes on alike."""
    config = OptimizerConfig(lr=1.0, schedule="steps", steps=(2, 3))
    schedule = RateSchedule(config)
    rates = []
    for _ in range(5):
        rates.append(schedule.lr)
        restored = RateSchedule(config)
        restored.load_state_dict(schedule.state_dict())
        assert restored.lr == schedule.lr
        schedule.end_epoch(10)
    assert rates == pytest.approx([1, 1, 0.1, 0.01, 0.01]) and not schedule.finished


@pytest.mark.parametrize(
    "bad",
    [
        {"lr": -1},
        {"lr": float("nan")},
        {"momentum": 1},
        {"weight_decay": -1},
        {"patience": 0},
        {"steps": (3, 2)},
        {"steps": (0,)},
    ],
)
def test_bad_values(bad: dict[str, object]) -> None:
    """Refused with the field's name."""
    with pytest.raises(ValueError, match=next(iter(bad))):
        OptimizerConfig(**bad)  # type: ignore[arg-type]
