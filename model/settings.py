"""The network's configuration and the presets of its variants. Does not import torch, so that --help comes at once."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

Activation = Literal["relu", "tanh", "sigmoid", "abs_tanh"]
Names = Literal["alexnet-dali", "torchvision"]
"""Naming schemes of the tensors in a file of weights."""


@dataclass(frozen=True)
class AlexNetConfig:
    """Architecture. `variant` sets the differences between versions of AlexNet; its values for `towers`, `channels` and
    `lrn` (see `PRESETS`) apply unless these are given."""

    variant: Literal["paper", "original", "torchvision"] = "paper"
    """paper: the paper's text: ReLU, normalization, pooling; N(0, .01) weights. original: the 2012 program: pooling
    before layer 1's ReLU, a second normalization within channels in layer 2, alpha / 5, N(0, .03) in conv3-5.
    torchvision: one tower without normalization, padding of 2, torch's dropout before fc6 and fc7, and torch's
    initialization, for which images have to be divided by a std of about 58 (Krizhevsky 2014, as in torchvision)."""
    towers: Literal[1, 2] | None = None
    """Groups of channels that meet only in conv3 and the fully connected layers; 1: every layer sees all channels."""
    channels: tuple[int, int, int, int, int] | None = None
    """Channels of conv1-5, counted over both towers; a 0 in conv3-5 leaves that layer out."""
    fc_dim: int = 4096
    """Units of fc6 and of fc7, counted over both towers."""
    num_classes: int | None = None
    """Outputs of fc8; by default the number of classes in a run's shards (without shards 1000, ImageNet's)."""
    activation: Activation = "relu"
    """After conv1-5, fc6 and fc7 (section 3.1)."""
    lrn: Literal["none", "paper", "original"] | None = None
    """Local response normalization after conv1 and conv2 (section 3.3)."""
    pooling: Literal["overlapping", "plain"] = "overlapping"
    """overlapping: 3x3 every 2 (section 3.4); plain: 2x2 every 2."""
    dropout: float = 0.5
    """Probability that a unit of fc6 or fc7 is set to zero in training (section 4.2)."""

    def __post_init__(self) -> None:
        choices: dict[str, Iterable[Any]] = {
            "variant": PRESETS, "towers": (None, 1, 2), "activation": get_args(Activation),
            "lrn": (None, "none", "paper", "original"), "pooling": ("overlapping", "plain"),
        }  # fmt: skip
        for (
            name,
            allowed,
        ) in choices.items():  # files of weights hold configurations that no parser has checked
            if getattr(self, name) not in allowed:
                raise ValueError(f"model.{name}: expected one of {[*allowed]}, got {getattr(self, name)}")
        if any(c % self.num_towers or c < 0 for c in self.conv_channels) or not all(self.conv_channels[:2]):
            raise ValueError(
                f"model.channels: expected positive multiples of {self.num_towers}, the towers (0 leaves conv3, 4 or 5 "
                f"out), got {self.conv_channels}"
            )
        if self.fc_dim < 1 or self.fc_dim % self.num_towers:
            raise ValueError(
                f"model.fc_dim: expected a positive multiple of {self.num_towers}, the towers, got {self.fc_dim}"
            )
        if self.outputs < 2:
            raise ValueError(f"model.num_classes: expected at least 2, got {self.num_classes}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout: expected 0 to 1, 1 excluded, got {self.dropout}")

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "AlexNetConfig":
        """Read what `dataclasses.asdict` returned from JSON or YAML. Raises `TypeError` for unknown fields."""
        fields = {
            "fc_dim" if name == "hidden" else name: value for name, value in content.items()
        }  # as of 0.1
        channels = fields.get("channels")
        return cls(**{**fields, "channels": tuple(channels) if channels else None})

    def resolved(self) -> "AlexNetConfig":
        """Return the configuration with the variant's values for fields that are not given."""
        values = {"channels": self.conv_channels, "lrn": self.normalization, "num_classes": self.outputs}
        return replace(self, towers=self.num_towers, **values)  # type: ignore[arg-type]

    @property
    def conv_channels(self) -> tuple[int, int, int, int, int]:
        """`channels`, or the variant's."""
        return PRESETS[self.variant].channels if self.channels is None else self.channels

    @property
    def outputs(self) -> int:
        """`num_classes`, or ImageNet's."""
        return 1000 if self.num_classes is None else self.num_classes

    @property
    def padding(self) -> int:
        """Padding of conv1, on all sides."""
        return 2 if self.variant == "torchvision" else 0

    @property
    def num_towers(self) -> int:
        """`towers`, or the variant's."""
        return PRESETS[self.variant].towers if self.towers is None else self.towers

    @property
    def normalization(self) -> Literal["none", "paper", "original"]:
        """`lrn`, or the variant's."""
        return PRESETS[self.variant].lrn if self.lrn is None else self.lrn


class Preset(NamedTuple):
    """Values of a variant for fields that are not given."""

    towers: int
    channels: tuple[int, int, int, int, int]
    lrn: Literal["none", "paper", "original"]


PRESETS = {
    "paper": Preset(2, (96, 256, 384, 384, 256), "paper"),
    "original": Preset(2, (96, 256, 384, 384, 256), "original"),
    "torchvision": Preset(1, (64, 192, 384, 256, 256), "none"),
}
