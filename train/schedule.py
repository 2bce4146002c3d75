"""The rate of every parameter at every step."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")


@dataclass(frozen=True)
class RateChange:
    """One turn of the knob by hand."""

    epoch: int
    """Epoch, counted from 0, at whose start it is done."""
    lr: float
    """The rate from there on; 0 freezes, velocity included."""
    of: str = "weights"
    """weights, biases, or one layer, whose weights then have a rate of their own."""

    def __post_init__(self) -> None:
        if self.epoch < 1 or not 0 <= self.lr < math.inf:
            raise ValueError(
                f"a change of rate is made at an epoch from 1 on, to a rate from 0 on, not {self}"
            )
        if self.of not in ("weights", "biases", *LAYERS):
            raise ValueError(
                f"a change of rate is of weights, biases or one of {', '.join(LAYERS)}, not of {self.of}"
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """Update rule (section 5 of the paper) and how its rate falls."""

    lr: float = 0.01
    """Rate at the start."""
    momentum: float = 0.9
    """Share of the velocity that is kept."""
    weight_decay: float = 5e-4
    """Pull towards zero, times the rate."""
    bias_lr: float | None = None
    """Rate of biases at the start (2012 program: .02); by default `lr`. It falls with that of the weights; under `hand`
    it stays, but for changes of its own."""
    bias_weight_decay: float | None = None
    """Pull on biases (2012 program: 0); by default `weight_decay`, as the paper's text has it."""
    schedule: Literal["plateau", "steps", "hand", "cosine"] = "plateau"
    """plateau: divide the rate by 10 when the validation error stalls; steps: at the epochs in `steps`; hand: set it as
    `changes` tells; cosine: let it fall to 0 at the last epoch's end along half a cosine."""
    warmup_epochs: float = 0.0
    """Let the rate rise from 0 at the start, for so many epochs; large batches want it."""
    patience: int = 5
    """plateau: epochs without a better centre-crop top-1 error before the rate falls."""
    min_improvement: float = 0.1
    """plateau: how much lower an error must be, in points of a percent, to count as better."""
    drops: int = 3
    """plateau: how often the rate falls; the next plateau ends the training (the paper: three times)."""
    steps: tuple[int, ...] = ()
    """steps: epochs, counted from 0, at whose start the rate is divided by 10."""
    changes: tuple[RateChange, ...] = ()
    """hand: what is set when, such as {epoch: 67, of: conv1, lr: 0.00001}."""

    def __post_init__(self) -> None:
        for name in (
            "lr",
            "weight_decay",
            "bias_lr",
            "bias_weight_decay",
            "warmup_epochs",
            "min_improvement",
        ):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"optimizer.{name} must be finite and not negative, not {value}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optimizer.momentum must lie in 0..1, 1 excluded, not {self.momentum}")
        if self.patience < 1 or self.drops < 0:
            raise ValueError("optimizer.patience must be at least 1 and drops not negative")
        if list(self.steps) != sorted(set(self.steps)) or any(epoch < 1 for epoch in self.steps):
            raise ValueError(f"optimizer.steps must be rising epochs from 1 on, not {self.steps}")
        when = [(change.epoch, change.of) for change in self.changes]
        if len(set(when)) < len(when):
            raise ValueError(
                "optimizer.changes sets one rate twice at the same epoch; leave one of the two out"
            )
        for name, theirs in (("steps", "steps"), ("changes", "hand")):
            if getattr(self, name) and self.schedule != theirs:
                raise ValueError(
                    f"optimizer.{name} is of optimizer.schedule={theirs}; say that, or leave it out"
                )


def is_bias(name: str) -> bool:
    """Whether a parameter of this name is a bias."""
    return name.endswith("bias")


class RateSchedule:
    """The rates of the present epoch, from the configuration and the validation errors of the epochs before."""

    def __init__(self, config: OptimizerConfig, epochs: int) -> None:
        """`epochs`: of the whole run, at whose end a cosine arrives at 0."""
        self._config, self._epochs = config, epochs
        self._epoch, self._drops, self._stale = 0, 0, 0
        self._best = float("inf")

    def rates(self, names: Iterable[str], progress: float = 0.5) -> dict[str, float]:
        """The rate of each named parameter; `progress` is the share of the epoch that is over, in the midst of the
        step."""
        factor, drops = self._factor(progress), self._divisions()
        return {name: self._start(name) * factor / 10**drops for name in names}

    def lr(self, progress: float = 0.5) -> float:
        """The rate of weights that have none of their own."""
        return self.rates(["weight"], progress)["weight"]

    def _start(self, name: str) -> float:
        """The rate before it falls; under `hand`, what was set last."""
        config, layer = self._config, name.split(".")[0]
        kind, start = "weights", config.lr
        if is_bias(name):
            kind, start = "biases", config.lr if config.bias_lr is None else config.bias_lr
        past = [change for change in config.changes if change.epoch <= self._epoch]
        of_kind = [change for change in past if change.of == kind]
        own = [change for change in past if change.of == layer and kind == "weights"]
        changes = sorted(own or of_kind, key=lambda change: change.epoch)
        return changes[-1].lr if changes else start

    def _factor(self, progress: float) -> float:
        """Share of the rate that warm-up and cosine leave."""
        config, passed = self._config, self._epoch + progress
        factor = min(1.0, passed / config.warmup_epochs) if config.warmup_epochs else 1.0
        if config.schedule == "cosine" and passed > config.warmup_epochs:
            share = (passed - config.warmup_epochs) / (self._epochs - config.warmup_epochs)
            factor *= (1 + math.cos(math.pi * share)) / 2
        return factor

    def _divisions(self) -> int:
        """How often the rate was divided by 10."""
        if self._config.schedule == "plateau":
            return min(self._drops, self._config.drops)
        return sum(self._epoch >= epoch for epoch in self._config.steps)

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
