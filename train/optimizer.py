"""The paper's update rule, with loss scaling for half precision.

    v <- momentum * v - weight_decay * rate * w - rate * gradient;   w <- w + v            (section 5)

The velocity holds the rate that each gradient came with. `torch.optim.SGD` keeps the rate outside of its buffer: the
two agree only while the rate is constant. A rate of 0 freezes the weights, velocity included, as it did in the 2012
program.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from train.schedule import OptimizerConfig, is_bias

Tensors = list[torch.Tensor]


class PaperSGD:
    """The update rule over named parameters. Rates are an argument of every step, not state."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> None:
        self._named = dict(parameters)
        self._velocity = {name: torch.zeros_like(parameter) for name, parameter in self._named.items()}
        self._momentum = config.momentum
        on_biases = config.weight_decay if config.bias_weight_decay is None else config.bias_weight_decay
        self._decay = {name: on_biases if is_bias(name) else config.weight_decay for name in self._named}
        self._update: Callable[..., None] = update

    def compile(self) -> None:
        """Fuse the passes over the weights from the next step on.

        Rates are tensors there: torch.compile makes another graph for every Python number that it meets, gives up
        after eight, and a rate changes at every step.
        """
        fused = torch.compile(update_at_tensor_rate, dynamic=False)

        def update_fused(
            weights: Tensors,
            gradients: Tensors,
            velocity: Tensors,
            rate: float,
            momentum: float,
            decay: float,
        ) -> None:
            rate_tensor = torch.tensor(rate, dtype=torch.float64)
            fused(weights, gradients, velocity, rate_tensor, rate_tensor * decay, momentum)

        self._update = update_fused

    @property
    def gradients(self) -> list[torch.Tensor]:
        """Of every parameter, after `backward`."""
        found = [parameter.grad for parameter in self._named.values() if parameter.grad is not None]
        assert len(found) == len(self._named), "gradients are asked for after backward()"
        return found

    @torch.no_grad()
    def step(self, rates: Mapping[str, float], overflow: torch.Tensor | None = None) -> None:
        """Update every parameter from its `.grad`, at the rate under its name, and clear it; where `overflow`, a bool
        on the device, is true, change nothing."""
        groups = defaultdict(list)
        for name in self._named:
            groups[rates[name], self._decay[name]].append(name)
        gradients = dict(zip(self._named, self.gradients, strict=True))
        for (rate, decay), names in groups.items():
            if rate > 0:
                weights, velocity = (
                    [self._named[name] for name in names],
                    [self._velocity[name] for name in names],
                )
                before = [tensor.clone() for tensor in (*weights, *velocity)] if overflow is not None else []
                self._update(
                    weights,
                    [gradients[name] for name in names],
                    velocity,
                    rate,
                    self._momentum,
                    decay,
                )
                for tensor, old in zip((*weights, *velocity), before, strict=False):
                    tensor.copy_(torch.where(overflow, old, tensor))  # type: ignore[arg-type]
        for parameter in self._named.values():
            parameter.grad = None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Velocities by parameter name."""
        return dict(self._velocity)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Set the velocities."""
        for name, velocity in self._velocity.items():
            velocity.copy_(state[name])


def update(
    weights: Tensors, gradients: Tensors, velocity: Tensors, rate: float, momentum: float, decay: float
) -> None:
    """One step of the rule, in place."""
    torch._foreach_mul_(velocity, momentum)
    torch._foreach_add_(velocity, weights, alpha=-decay * rate)
    torch._foreach_add_(velocity, gradients, alpha=-rate)
    torch._foreach_add_(weights, velocity)


def update_at_tensor_rate(
    weights: Tensors,
    gradients: Tensors,
    velocity: Tensors,
    rate: torch.Tensor,
    decay_rate: torch.Tensor,
    momentum: float,
) -> None:
    """`update` with the rate, and its product with the weight decay, as 0-dim tensors."""
    torch._foreach_mul_(velocity, momentum)
    torch._foreach_sub_(velocity, torch._foreach_mul(weights, decay_rate))
    torch._foreach_sub_(velocity, torch._foreach_mul(gradients, rate))
    torch._foreach_add_(weights, velocity)


class LossScale:
    """A factor on the loss that keeps float16 gradients from vanishing: halved, and the step left out, where one
    overflows; doubled after 2,000 good steps (Micikevicius et al. 2018; the figures are those of `torch.amp`).

    Unlike `torch.amp.GradScaler.step` it never waits for the device.
    """

    START, GOOD_STEPS = 2.0**16, 2000

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self.enabled = enabled
        self.factor = torch.full((), self.START if enabled else 1.0, device=device)
        """float32 scalar on the device."""
        self._good = torch.zeros((), dtype=torch.int64, device=device)

    def unscale(
        self, gradients: list[torch.Tensor], any_process: Callable[[torch.Tensor], torch.Tensor]
    ) -> Any:
        """Divide gradients by the factor, in place, and adapt it. Returns whether they overflowed (in any process, as
        `any_process` tells of a bool tensor); None where nothing is scaled."""
        if not self.enabled:
            return None
        torch._foreach_div_(gradients, self.factor)
        overflow = any_process(~torch.stack([gradient.isfinite().all() for gradient in gradients]).all())
        grown = self._good + 1 >= self.GOOD_STEPS
        self.factor = torch.where(overflow, self.factor / 2, torch.where(grown, self.factor * 2, self.factor))
        self._good = torch.where(overflow | grown, 0, self._good + 1)
        return overflow

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Factor and count of good steps."""
        return {"factor": self.factor, "good": self._good}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from `state`."""
        self.factor, self._good = state["factor"].to(self.factor.device), state["good"].to(self._good.device)
