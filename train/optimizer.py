"""The paper's update rule and the schedules of its rate.

    v <- momentum * v - weight_decay * rate * w - rate * gradient;   w <- w + v            (section 5)

The velocity holds the rate that each gradient came with. `torch.optim.SGD` keeps the rate outside of its buffer: the
two agree only while the rate is constant. A rate of 0 freezes the weights, velocity included, as it did in the 2012
program.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn


@dataclass(frozen=True)
class OptimizerConfig:
    """Update rule (section 5 of the paper) and how its rate falls."""

    lr: float = 0.01
    """Rate at the start."""
    momentum: float = 0.9
    """Share of the velocity that is kept."""
    weight_decay: float = 5e-4
    """Pull towards zero, times the rate, on every parameter."""
    schedule: Literal["plateau", "steps"] = "plateau"
    """plateau: divide the rate by 10 when the validation error stalls; steps: at the epochs in `steps`."""
    patience: int = 5
    """plateau: epochs without a better centre-crop top-1 error before the rate falls."""
    min_improvement: float = 0.1
    """plateau: how much lower an error must be, in points of a percent, to count as better."""
    drops: int = 3
    """plateau: how often the rate falls; the next plateau ends the training (the paper: three times)."""
    steps: tuple[int, ...] = ()
    """steps: epochs, counted from 0, at whose start the rate is divided by 10."""

    def __post_init__(self) -> None:
        if not (0 <= self.lr < math.inf and 0 <= self.momentum < 1 and 0 <= self.weight_decay < math.inf):
            raise ValueError(
                f"optimizer.lr ({self.lr}) and weight_decay ({self.weight_decay}) must be finite and not negative, "
                f"momentum ({self.momentum}) must lie in 0..1, 1 excluded"
            )
        if self.patience < 1 or self.drops < 0 or not 0 <= self.min_improvement < math.inf:
            raise ValueError("optimizer.patience must be at least 1, drops and min_improvement must not be negative")
        if list(self.steps) != sorted(set(self.steps)) or any(epoch < 1 for epoch in self.steps):
            raise ValueError(f"optimizer.steps must be rising epochs from 1 on, not {self.steps}")


class PaperSGD:
    """The update rule over named parameters. The rate is an argument of every step, not state."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], momentum: float, weight_decay: float) -> None:
        self._named = dict(parameters)
        self._velocity = {name: torch.zeros_like(parameter) for name, parameter in self._named.items()}
        self._momentum, self._weight_decay = momentum, weight_decay

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter from its `.grad` and clear it."""
        if lr > 0:
            weights: list[torch.Tensor] = list(self._named.values())
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            velocity = list(self._velocity.values())
            assert len(gradients) == len(weights), "step() comes after backward()"
            torch._foreach_mul_(velocity, self._momentum)
            torch._foreach_add_(velocity, weights, alpha=-self._weight_decay * lr)
            torch._foreach_add_(velocity, gradients, alpha=-lr)
            torch._foreach_add_(weights, velocity)
        for parameter in self._named.values():
            parameter.grad = None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Velocities by parameter name."""
        return dict(self._velocity)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Set the velocities."""
        for name, velocity in self._velocity.items():
            velocity.copy_(state[name])


class RateSchedule:
    """The rate of the next epoch, from the validation errors of those before."""

    def __init__(self, config: OptimizerConfig) -> None:
        self._config = config
        self._epoch, self._drops, self._stale = 0, 0, 0
        self._best = float("inf")

    @property
    def lr(self) -> float:
        """Rate of the present epoch."""
        if self._config.schedule == "steps":
            drops = sum(self._epoch >= epoch for epoch in self._config.steps)
        else:
            drops = min(self._drops, self._config.drops)
        return self._config.lr / 10**drops

    @property
    def finished(self) -> bool:
        """Whether the error stalled once more after the last drop."""
        return self._config.schedule == "plateau" and self._drops > self._config.drops

    def end_epoch(self, top1_error: float) -> None:
        """Take note of an epoch's centre-crop top-1 error, in percent."""
        self._epoch += 1
        if top1_error <= self._best - self._config.min_improvement:
            self._best, self._stale = top1_error, 0
        else:
            self._stale += 1
        if self._stale >= self._config.patience:
            self._drops, self._stale = self._drops + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"epoch": self._epoch, "drops": self._drops, "stale": self._stale, "best": self._best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._epoch, self._drops, self._stale, self._best = (
            state[name] for name in ("epoch", "drops", "stale", "best")
        )
