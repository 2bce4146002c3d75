"""The paper's update rule, its learning rate schedules, and loss scaling for float16.

    v <- momentum * v - weight_decay * lr * w - lr * gradient;   w <- w + v            (section 5)

Each gradient enters the velocity multiplied by the rate of its step. `torch.optim.SGD` multiplies its buffer by the
present rate instead, so the two agree only while the rate is constant. A rate of 0 freezes weights and velocity, as in
the 2012 program.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from train.config import OptimizerConfig

Tensors = list[torch.Tensor]


class AlexNetSGD(torch.optim.Optimizer):
    """The update rule. Parameter groups, by `name`: "weights", "biases", and each layer that `changes` names."""

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> None:
        layers = {change.of for change in config.changes}
        groups: dict[str, dict[str, Any]] = {}
        for name, parameter in named_parameters:
            layer = name.split(".")[0]
            is_bias = name.endswith("bias")
            key = "biases" if is_bias else layer if layer in layers else "weights"
            decay = config.bias_weight_decay if is_bias else None
            group = {"name": key, "params": [], "lr": 0.0, "momentum": config.momentum}
            group["weight_decay"] = config.weight_decay if decay is None else decay
            groups.setdefault(key, group)["params"].append((name, parameter))
        super().__init__(list(groups.values()), {})
        for parameter in self.named_parameters.values():
            self.state[parameter]["velocity"] = torch.zeros_like(parameter)
        self._update: Callable[..., None] = update

    def compile(self) -> None:
        """Compile the update, which fuses its passes over the weights."""
        fused = torch.compile(update_at_tensor_lr, dynamic=False)

        def update_fused(
            weights: Tensors, gradients: Tensors, velocity: Tensors, lr: float, momentum: float, decay: float
        ) -> None:
            lr_tensor = torch.tensor(lr, dtype=torch.float64)
            fused(weights, gradients, velocity, lr_tensor, lr_tensor * decay, momentum)

        self._update = update_fused

    @property
    def named_parameters(self) -> dict[str, nn.Parameter]:
        """All parameters by name."""
        pairs = (zip(group["param_names"], group["params"], strict=True) for group in self.param_groups)
        return {name: parameter for group in pairs for name, parameter in group}

    @property
    def gradients(self) -> Tensors:
        """Gradients of all parameters, as `backward` has set them."""
        return [parameter.grad for parameter in self.named_parameters.values() if parameter.grad is not None]

    @property
    def velocities(self) -> dict[str, torch.Tensor]:
        """Velocities by parameter name."""
        return {name: self.state[each]["velocity"] for name, each in self.named_parameters.items()}

    def load_velocities(self, velocities: dict[str, torch.Tensor]) -> None:
        """Copy the velocities of a checkpoint into the optimizer's."""
        for name, velocity in self.velocities.items():
            velocity.copy_(velocities[name])

    @torch.no_grad()
    def step(self, skip: torch.Tensor | None = None) -> None:  # type: ignore[override]
        """Update all parameters and clear their gradients; if `skip`, a bool tensor on the device, is true, only clear
        the gradients."""
        for group in self.param_groups:
            if group["lr"] > 0:
                weights, gradients = group["params"], [parameter.grad for parameter in group["params"]]
                velocity = [self.state[parameter]["velocity"] for parameter in weights]
                before = [tensor.clone() for tensor in (*weights, *velocity)] if skip is not None else []
                self._update(
                    weights, gradients, velocity, group["lr"], group["momentum"], group["weight_decay"]
                )
                for tensor, old in zip((*weights, *velocity), before, strict=False):
                    tensor.copy_(torch.where(skip, old, tensor))  # type: ignore[arg-type]
        self.zero_grad(set_to_none=True)


def update(
    weights: Tensors, gradients: Tensors, velocity: Tensors, lr: float, momentum: float, decay: float
) -> None:
    """Apply the update rule to all weights of a group, in place."""
    torch._foreach_mul_(velocity, momentum)
    torch._foreach_add_(velocity, weights, alpha=-decay * lr)
    torch._foreach_add_(velocity, gradients, alpha=-lr)
    torch._foreach_add_(weights, velocity)


def update_at_tensor_lr(
    weights: Tensors,
    gradients: Tensors,
    velocity: Tensors,
    lr: torch.Tensor,
    decay_lr: torch.Tensor,
    momentum: float,
) -> None:
    """Apply the update rule as `update` does, for torch.compile: the rate, and its product with the weight decay, are
    0-dim tensors, as it would compile again for each new Python number, and give up after eight."""
    torch._foreach_mul_(velocity, momentum)
    torch._foreach_sub_(velocity, torch._foreach_mul(weights, decay_lr))
    torch._foreach_sub_(velocity, torch._foreach_mul(gradients, lr))
    torch._foreach_add_(weights, velocity)


class LRSchedule:
    """Learning rates, from the configuration, the position in the run, and the validation errors of past epochs.

    torch's schedulers do not fit: `ReduceLROnPlateau` can neither end a run nor be combined with a warm-up.
    """

    def __init__(self, config: OptimizerConfig, epochs: int) -> None:
        """`epochs`: number of epochs of the whole run, at the end of which a cosine reaches 0."""
        self._config, self._epochs = config, epochs
        self._epoch, self._drops, self._stale, self._best = 0, 0, 0, math.inf

    def lr(self, group: str = "weights", progress: float = 0.5) -> float:
        """Compute the rate of a parameter group; `progress`: fraction of the epoch at the middle of the step."""
        config, passed = self._config, self._epoch + progress
        factor = min(1.0, passed / config.warmup_epochs) if config.warmup_epochs else 1.0
        if config.schedule == "cosine" and passed > config.warmup_epochs:
            fraction = (passed - config.warmup_epochs) / (self._epochs - config.warmup_epochs)
            factor *= (1 + math.cos(math.pi * fraction)) / 2
        drops = sum(self._epoch >= epoch for epoch in config.steps)
        if config.schedule == "plateau":
            drops = min(self._drops, config.max_drops)
        return self._base_lr(group) * factor / 10**drops

    def _base_lr(self, group: str) -> float:
        """Return a group's rate before warm-up and drops: the last change for this group, else, for a layer, the last
        one for all weights, else the configured rate."""
        config = self._config
        past = sorted(
            (each for each in config.changes if each.epoch <= self._epoch), key=lambda each: each.epoch
        )
        own = [each.lr for each in past if each.of == group]
        if group == "biases":
            return own[-1] if own else config.lr if config.bias_lr is None else config.bias_lr
        return [config.lr, *(each.lr for each in past if each.of == "weights"), *own][-1]

    def set_lrs(self, optimizer: AlexNetSGD, progress: float) -> None:
        """Set the rates of a step in all parameter groups."""
        for group in optimizer.param_groups:
            group["lr"] = self.lr(group["name"], progress)

    @property
    def finished(self) -> bool:
        """True once the validation error has stalled again after the last drop."""
        return self._config.schedule == "plateau" and self._drops > self._config.max_drops

    def end_epoch(self, top1_error: float) -> None:
        """Count an epoch and its centre-crop top-1 error, in percent."""
        self._epoch += 1
        improved = top1_error <= self._best - self._config.min_delta
        self._best, self._stale = (top1_error, 0) if improved else (self._best, self._stale + 1)
        if self._stale >= self._config.patience:
            self._drops, self._stale = self._drops + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain numbers."""
        return {"epoch": self._epoch, "drops": self._drops, "stale": self._stale, "best": self._best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state`."""
        self._epoch, self._drops, self._stale, self._best = (
            state[k] for k in ("epoch", "drops", "stale", "best")
        )


class LossScale:
    """Factor on the loss that keeps float16 gradients from underflow. If a gradient overflows, the step is skipped and
    the factor halved; after 2,000 steps without overflow it is doubled (Micikevicius et al. 2018; numbers as in
    `torch.amp`).

    Unlike `torch.amp.GradScaler.step` it never waits for the device.
    """

    START, GOOD_STEPS = 2.0**16, 2000

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self.enabled = enabled
        self.factor = torch.full((), self.START if enabled else 1.0, device=device)
        """float32 scalar on the device."""
        self._good = torch.zeros((), dtype=torch.int64, device=device)

    def unscale(
        self, gradients: Tensors, any_rank: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor | None:
        """Divide gradients by the factor, in place, then adapt the factor. Returns a bool tensor: whether gradients
        overflowed on any rank, which `any_rank` computes; None if scaling is off."""
        if not self.enabled:
            return None
        torch._foreach_div_(gradients, self.factor)
        overflow = any_rank(~torch.stack([gradient.isfinite().all() for gradient in gradients]).all())
        grown = self._good + 1 >= self.GOOD_STEPS
        self.factor = torch.where(overflow, self.factor / 2, torch.where(grown, self.factor * 2, self.factor))
        self._good = torch.where(overflow | grown, 0, self._good + 1)
        return overflow

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the factor and the count of steps without overflow."""
        return {"factor": self.factor, "good": self._good}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Resume from `state`."""
        self.factor, self._good = state["factor"].to(self.factor.device), state["good"].to(self._good.device)
