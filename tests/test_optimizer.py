"""The update is the paper's formula under any schedule of rates, in half precision too; so are schedules theirs."""

import math

import numpy as np
import pytest
import torch
import torch._dynamo.utils
from torch import nn

from train.config import OptimizerConfig, RateChange
from train.device import can_compile
from train.optimizer import AlexNetSGD, LossScale, LRSchedule, update_at_tensor_lr

RATES = [0.01, 0.01, 0.001, 0.001, 0.0, 0.0, 0.001, 0.01]


def set_lr(optimizer: AlexNetSGD, **rates: float) -> None:
    """Set the rate of each group by its name."""
    for group in optimizer.param_groups:
        group["lr"] = rates[group["name"]]


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_formula_over_a_schedule(fused: bool) -> None:
    """v <- .9 v - decay lr w - lr g, w <- w + v, with numpy in float64; weights, biases and a layer of its own have
    their rates, biases their decay; a rate of 0 changes neither v nor w. The compiled update does the same."""
    if fused and not can_compile(torch.device("cpu")):
        pytest.skip("torch cannot compile here")
    rng = np.random.default_rng(0)
    shapes = {"conv1.weight": (3, 4), "fc8.weight": (6,), "conv1.bias": (5,)}
    group_of = {"conv1.weight": "conv1", "fc8.weight": "weights", "conv1.bias": "biases"}
    weights = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    velocity = {name: np.zeros(shape) for name, shape in shapes.items()}
    parameters = {name: nn.Parameter(torch.tensor(values)) for name, values in weights.items()}
    change = (RateChange(1, 0.1, "conv1"),)
    config = OptimizerConfig(bias_weight_decay=0.0, schedule="manual", changes=change)
    optimizer = AlexNetSGD(parameters.items(), config)
    if fused:
        optimizer.compile()
    for rate in RATES:
        rates = {"conv1": rate, "weights": 0.004, "biases": 2 * rate}
        set_lr(optimizer, **rates)
        for name, parameter in parameters.items():
            gradient, lr = rng.standard_normal(shapes[name]), rates[group_of[name]]
            parameter.grad = torch.tensor(gradient)
            decay = 0.0 if name == "conv1.bias" else 5e-4
            if lr:
                velocity[name] = 0.9 * velocity[name] - decay * lr * weights[name] - lr * gradient
                weights[name] = weights[name] + velocity[name]
        optimizer.step()
        for name, parameter in parameters.items():
            np.testing.assert_allclose(parameter.detach(), weights[name], rtol=0, atol=1e-15)
            np.testing.assert_allclose(optimizer.velocities[name], velocity[name], rtol=0, atol=1e-15)
            assert parameter.grad is None


def test_a_rate_that_changes_is_compiled_once() -> None:
    """At a rate of another value in every step the compiled update keeps its one graph."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(update_at_tensor_lr, dynamic=False, backend="eager")
    for step in range(1, 4):
        lists = [[torch.ones(3), torch.ones(2, 2)] for _ in range(3)]
        compiled(*lists, torch.tensor(0.1 * step), torch.tensor(5e-5 * step), 0.9)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_differs_from_torch_sgd_where_the_rate_changes() -> None:
    """torch keeps the rate out of its buffer: equal while the rate is constant, another path after a drop."""
    ours, theirs = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    optimizer = AlexNetSGD([("w", ours)], OptimizerConfig())
    reference = torch.optim.SGD([theirs], 0.01, 0.9, weight_decay=5e-4)
    for step in range(8):
        rate = 0.01 if step < 4 else 0.001
        reference.param_groups[0]["lr"] = rate
        set_lr(optimizer, weights=rate)
        ours.grad, theirs.grad = (torch.full((3,), 0.5, dtype=torch.float64) for _ in range(2))
        optimizer.step()
        reference.step()
        assert (abs(ours - theirs).max() < 1e-15) == (step < 4)


def test_loss_scale() -> None:
    """Gradients of a scaled loss are divided again; an overflow changes nothing and halves the factor, good steps
    double it; a restored scale has the same factor and count."""
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = AlexNetSGD([("w", weight)], OptimizerConfig(weight_decay=0.0))
    set_lr(optimizer, weights=0.1)
    scale, factors = LossScale(torch.device("cpu"), True), []
    for gradient in ([1.0, -1], [float("inf"), 0], [1, 1], [0, float("nan")], [1, 1], [1, 1], [1, 1], [1, 1]):
        restored = LossScale(torch.device("cpu"), True)
        restored.load_state_dict(scale.state_dict())
        scale, scale.GOOD_STEPS = restored, 3  # type: ignore[misc]
        before, velocity = weight.detach().clone(), optimizer.velocities["w"].clone()
        weight.grad = torch.tensor(gradient) * scale.factor
        overflow = scale.unscale(optimizer.gradients, lambda flag: flag)
        finite = bool(np.isfinite(gradient).all())
        assert torch.equal(weight.grad, torch.tensor(gradient)) or not finite
        optimizer.step(skip=overflow)
        assert bool(overflow) != finite and weight.isfinite().all()
        assert torch.equal(weight, before) == torch.equal(optimizer.velocities["w"], velocity) != finite
        factors.append(float(scale.factor))
    assert factors == [2.0**k for k in (16, 15, 15, 14, 14, 14, 15, 15)]
    off = LossScale(torch.device("cpu"), False)
    assert off.factor == 1 and off.unscale([torch.tensor(1.0)], lambda flag: flag) is None


def test_plateau() -> None:
    """Patience 2, least change .1: the rate falls after two stale epochs, three times, and the fourth plateau ends; a
    restored schedule continues alike."""
    config = OptimizerConfig(lr=0.01, patience=2, min_delta=0.1, max_drops=3)
    schedule, rates = LRSchedule(config, 90), []
    for error in [50, 40, 39.95, 39.92, 30, 30, 30, 30, 30, 30, 30]:
        restored = LRSchedule(config, 90)
        restored.load_state_dict(schedule.state_dict())
        schedule = restored
        assert not schedule.finished
        rates.append(schedule.lr())
        schedule.end_epoch(error)
    np.testing.assert_allclose(rates, [0.01] * 4 + [1e-3] * 3 + [1e-4] * 2 + [1e-5] * 2)
    assert schedule.finished


def test_steps_and_changes() -> None:
    """Rates fall at the given epochs, those of biases with them, and are set in all groups; under `manual` biases stay
    but for changes of their own (the table of 2012 is in test_config.py)."""
    steps = LRSchedule(OptimizerConfig(lr=1.0, bias_lr=2.0, schedule="steps", steps=(2, 3)), 5)
    optimizer = AlexNetSGD([(name, nn.Parameter(torch.ones(1))) for name in ("w", "bias")], OptimizerConfig())
    for expected in (1, 1, 0.1, 0.01, 0.01):
        steps.set_lrs(optimizer, 0.5)
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates == pytest.approx({"weights": expected, "biases": 2 * expected})
        steps.end_epoch(10)
    assert not steps.finished
    changes = (RateChange(1, 0.002, "biases"), RateChange(2, 0.003))
    manual = LRSchedule(OptimizerConfig(schedule="manual", changes=changes), 3)
    for expected_rates in ((0.01, 0.01), (0.01, 0.002), (0.003, 0.002)):
        assert (manual.lr(), manual.lr("biases")) == expected_rates
        manual.end_epoch(50)


def test_cosine_with_warm_up() -> None:
    """Up in a straight line for two epochs, then half a cosine to zero; within an epoch too; without a cosine it stays
    up."""
    cosine = LRSchedule(OptimizerConfig(lr=0.8, schedule="cosine", warmup_epochs=2), 10)
    plateau = LRSchedule(OptimizerConfig(lr=0.8, warmup_epochs=2, patience=99), 10)
    for epoch in range(10):
        for progress in (0.125, 0.375, 0.875):
            passed = epoch + progress
            expected = passed / 2 if passed < 2 else (1 + math.cos(math.pi * (passed - 2) / 8)) / 2
            assert cosine.lr(progress=progress) == pytest.approx(0.8 * expected)
            assert plateau.lr(progress=progress) == pytest.approx(0.8 * min(passed / 2, 1))
        cosine.end_epoch(50), plateau.end_epoch(50)


@pytest.mark.parametrize(
    "bad",
    [
        {"lr": float("nan")},
        {"momentum": 1},
        {"warmup_epochs": -1},
        {"patience": 0},
        {"steps": (3, 2), "schedule": "steps"},
        {"steps": (3,)},
        {"changes": (RateChange(1, 0.1),)},
        {"changes": (RateChange(1, 0.1), RateChange(1, 0.2)), "schedule": "manual"},
    ],
)
def test_bad_values(bad: dict[str, object]) -> None:
    """Refused with the field's name."""
    with pytest.raises(ValueError, match=f"optimizer.{next(iter(bad))}"):
        OptimizerConfig(**bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"optimizer\.changes: expected"):
        RateChange(1, 0.1, "conv9")
