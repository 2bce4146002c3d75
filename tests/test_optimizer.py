"""The update is the paper's formula over any schedule of rates, in half precision too."""

import numpy as np
import pytest
import torch

from train.config import OptimizerConfig
from train.device import can_compile
from train.optimizer import LossScale, PaperSGD, update, update_at_tensor_rate

RATES = [0.01, 0.01, 0.001, 0.001, 0.0, 0.0, 0.001, 0.01]


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_formula_over_a_schedule(fused: bool) -> None:
    """v <- .9 v - decay rate w - rate g, w <- w + v, with numpy in float64, rates and decay of weights and biases
    apart; a rate of 0 changes neither v nor w. The compiled update does the same."""
    if fused and not can_compile(torch.device("cpu")):
        pytest.skip("torch cannot compile here")
    rng = np.random.default_rng(0)
    start = {
        "a.weight": rng.standard_normal((3, 4)),
        "b.weight": rng.standard_normal(6),
        "a.bias": np.ones(5),
    }
    decay = {"a.weight": 5e-4, "b.weight": 5e-4, "a.bias": 0.0}
    parameters = {name: torch.nn.Parameter(torch.tensor(values)) for name, values in start.items()}
    config = OptimizerConfig(momentum=0.9, weight_decay=5e-4, bias_weight_decay=0.0)
    optimizer = PaperSGD(parameters.items(), config)
    if fused:
        optimizer.compile()
    weights = {name: values.copy() for name, values in start.items()}
    velocity = {name: np.zeros_like(values) for name, values in start.items()}
    for rate in RATES:
        rates = {"a.weight": rate, "b.weight": 0.004, "a.bias": 2 * rate}
        for name, parameter in parameters.items():
            gradient = rng.standard_normal(parameter.shape)
            parameter.grad = torch.tensor(gradient)
            if own := rates[name]:
                velocity[name] = 0.9 * velocity[name] - decay[name] * own * weights[name] - own * gradient
                weights[name] = weights[name] + velocity[name]
        optimizer.step(rates)
        for name, parameter in parameters.items():
            np.testing.assert_allclose(parameter.detach().numpy(), weights[name], rtol=0, atol=1e-15)
            np.testing.assert_allclose(
                optimizer.state_dict()[name].numpy(), velocity[name], rtol=0, atol=1e-15
            )
            assert parameter.grad is None


def test_a_rate_that_changes_is_compiled_once() -> None:
    """At a rate of another value in every step the compiled update keeps its one graph; at Python numbers torch.compile
    makes more and more, and gives up after eight."""
    from torch._dynamo.utils import counters

    graphs = []
    for function in (update_at_tensor_rate, update):
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(function, dynamic=False, backend="eager")
        for step in range(1, 6):
            lists = [[torch.ones(3), torch.ones(2, 2)] for _ in range(3)]
            if function is update:
                compiled(*lists, 0.1 * step, 0.9, 5e-4)
            else:
                compiled(*lists, torch.tensor(0.1 * step), torch.tensor(5e-5 * step), 0.9)
        graphs.append(counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert graphs[0] == 1 < graphs[1]


def test_differs_from_torch_sgd_where_the_rate_changes() -> None:
    """torch keeps the rate out of its buffer: equal while the rate is constant, another path after a drop."""
    ours, torchs = (torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    optimizer, reference = (
        PaperSGD([("w", ours)], OptimizerConfig()),
        torch.optim.SGD([torchs], 0.01, 0.9, weight_decay=5e-4),
    )
    for step in range(8):
        rate = 0.01 if step < 4 else 0.001
        reference.param_groups[0]["lr"] = rate
        ours.grad, torchs.grad = (torch.full((3,), 0.5, dtype=torch.float64) for _ in range(2))
        optimizer.step({"w": rate})
        reference.step()
        assert (abs(ours - torchs).max() < 1e-15) == (step < 4)


def test_scaled_loss() -> None:
    """Gradients of a scaled loss come back; an overflow changes nothing and halves the factor, good steps double it;
    a restored scale goes on alike."""
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer, scale = (
        PaperSGD([("w", weight)], OptimizerConfig(weight_decay=0.0)),
        LossScale(torch.device("cpu"), True),
    )
    scale.GOOD_STEPS = 3  # type: ignore[misc]
    factors = []
    for gradient in ([1.0, -1], [float("inf"), 0], [1, 1], [0, float("nan")], [1, 1], [1, 1], [1, 1], [1, 1]):
        before, velocity = weight.detach().clone(), optimizer.state_dict()["w"].clone()
        weight.grad = torch.tensor(gradient) * scale.factor
        overflow = scale.unscale(optimizer.gradients, lambda flag: flag)
        assert torch.equal(weight.grad, torch.tensor(gradient)) or not np.isfinite(gradient).all()
        optimizer.step({"w": 0.1}, overflow)
        finite = bool(np.isfinite(gradient).all())
        assert bool(overflow) != finite and weight.isfinite().all()
        assert (
            torch.equal(weight, before) != finite
            and torch.equal(optimizer.state_dict()["w"], velocity) != finite
        )
        factors.append(float(scale.factor))
        restored = LossScale(torch.device("cpu"), True)
        restored.load_state_dict(scale.state_dict())
        assert restored.factor == scale.factor
    assert factors == [2.0**k for k in (16, 15, 15, 14, 14, 14, 15, 15)]
    off = LossScale(torch.device("cpu"), False)
    assert off.factor == 1 and off.unscale([torch.tensor(1.0)], lambda flag: flag) is None
