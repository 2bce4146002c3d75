"""AlexNet with two towers (Krizhevsky, Sutskever, Hinton 2012), on one device.

The two towers are groups: conv2, conv4 and conv5 see the channels of their own tower, conv3 and the fully connected
layers see both. 60,965,224 parameters with 1,000 classes. All memory is channels-last.

    images            (N,   3, 224, 224)   RGB, 0..255 minus the mean
    conv1  11x11/4    (N,  96,  55,  55)   padded by 3 at right and bottom, as the 2012 program did; then pool -> 27
    conv2  5x5        (N, 256,  27,  27)   on 48 channels each; then pool -> 13
    conv3  3x3        (N, 384,  13,  13)   on all 256 channels
    conv4  3x3        (N, 384,  13,  13)   on 192 channels each
    conv5  3x3        (N, 256,  13,  13)   on 192 channels each; then pool -> 6
    fc6, fc7          (N, 4096)
    fc8               (N, classes)         raw logits

Dropout multiplies by a 0/1 mask in training and by one half in evaluation, as in 2012. (torch's dropout doubles the
activations that it keeps; with N(0, 0.01) weights that network does not train at the learning rate of 2012.)

Shape suffixes: N images, C channels, H and W height and width, K classes.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from model.lrn import local_response_norm, to_float32
from model.settings import Activation, AlexNetConfig

ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "abs_tanh": lambda x: torch.tanh(x).abs(),
}


class AlexNet(nn.Module):
    """`model(images_NCHW) -> logits_NK`: (N, 3, 224, 224) in any floating dtype to (N, num_classes), at least float32.

    With `variant: torchvision`, `load_state_dict` also takes a state dict of torchvision's `alexnet`.
    """

    def __init__(self, config: AlexNetConfig) -> None:
        super().__init__()
        c1, c2, c3, c4, c5 = config.conv_channels
        towers, fc_dim = config.num_towers, config.fc_dim
        self.conv1 = nn.Conv2d(3, c1, 11, stride=4, padding=config.padding)
        self.conv2 = nn.Conv2d(c1, c2, 5, padding=2, groups=towers)
        self.conv3 = nn.Conv2d(c2, c3, 3, padding=1) if c3 else None
        self.conv4 = nn.Conv2d(c3 or c2, c4, 3, padding=1, groups=towers) if c4 else None
        self.conv5 = nn.Conv2d(c4 or c3 or c2, c5, 3, padding=1, groups=towers) if c5 else None
        self.fc6 = nn.Linear((c5 or c4 or c3 or c2) * 6 * 6, fc_dim)
        self.fc7 = nn.Linear(fc_dim, fc_dim)
        self.fc8 = nn.Linear(fc_dim, config.outputs)
        self.config, self.towers, self.activation = config, towers, ACTIVATIONS[config.activation]
        if config.variant != "torchvision":
            self.init_weights()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.register_load_state_dict_pre_hook(rename_torchvision)

    def init_weights(self) -> None:
        """Draw weights from N(0, std) and set biases to constants (section 5).

        layer                     std                                            bias
        conv1, conv2, fc6-8       .01                                            conv2, fc6, fc7: 1; else 0
        conv3, conv4, conv5       .01 in the paper, .03 in the 2012 program      conv4, conv5: 1; conv3: 0

        A narrower net sums fewer terms. If a tower has fewer channels in conv1 than the paper's 48 (which its net for
        one GPU has, too), std is divided by sqrt(channels / 48).
        """
        width = min(1.0, self.config.conv_channels[0] / self.config.num_towers / 48)
        middle = 0.03 if self.config.variant == "original" else 0.01
        for name, layer in self.named_children():
            assert isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None
            std = middle if name in ("conv3", "conv4", "conv5") else 0.01
            nn.init.normal_(layer.weight, 0.0, std / math.sqrt(width))
            nn.init.constant_(layer.bias, 1.0 if name in ("conv2", "conv4", "conv5", "fc6", "fc7") else 0.0)

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Compute raw logits, (N, K)."""
        variant = self.config.variant
        x = images_NCHW.to(self.conv1.weight.dtype, memory_format=torch.channels_last)
        if variant != "torchvision":
            x = F.pad(x, (0, 3, 0, 3))  # (224 + 3 - 11) / 4 + 1 = 55
        x = self.conv1(x)
        if variant == "original":
            x = self.activation(self.pool(self.normalize(x)))
            x = self.pool(self.normalize_twice(self.activation(self.conv2(x))))
        else:
            x = self.pool(self.normalize(self.activation(x)))
            x = self.pool(self.normalize(self.activation(self.conv2(x))))
        for conv in (self.conv3, self.conv4, self.conv5):
            if conv is not None:
                x = self.activation(conv(x))
        x = self.pool(x).flatten(1)
        if variant == "torchvision":
            x = self.activation(self.fc6(F.dropout(x, self.config.dropout, self.training)))
            x = self.activation(self.fc7(F.dropout(x, self.config.dropout, self.training)))
        else:
            x = self.drop(self.activation(self.fc6(x)))
            x = self.drop(self.activation(self.fc7(x)))
        return to_float32(self.fc8(x))

    def normalize(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        """Normalize across the channels of each tower."""
        convention = self.config.normalization
        return x_NCHW if convention == "none" else local_response_norm(x_NCHW, convention, self.towers)

    def normalize_twice(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        """Normalize across channels, then within each: layer 2 of the 2012 program."""
        none = self.config.normalization == "none"
        return x_NCHW if none else normalize_within_channels(self.normalize(x_NCHW))

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """Apply max pooling: 55 -> 27 -> 13 -> 6, overlapping or not."""
        return F.max_pool2d(x, 3 if self.config.pooling == "overlapping" else 2, 2)

    def drop(self, x: torch.Tensor) -> torch.Tensor:
        """Apply dropout without scaling in training; in evaluation multiply by the probability to keep a unit."""
        if self.training:
            return x * torch.empty_like(x).bernoulli_(1 - self.config.dropout)
        return x * (1 - self.config.dropout)


TORCHVISION_NAMES = {
    "features.0": "conv1", "features.3": "conv2", "features.6": "conv3", "features.8": "conv4", "features.10": "conv5",
    "classifier.1": "fc6", "classifier.4": "fc7", "classifier.6": "fc8",
}  # fmt: skip
"""Layers of torchvision's `alexnet`, as named in its state dict, and ours."""


def rename_torchvision(module: nn.Module, state: dict[str, torch.Tensor], *_: Any) -> None:
    """Replace torchvision's names by ours before a state dict is loaded."""
    for theirs, ours in TORCHVISION_NAMES.items():
        for kind in ("weight", "bias"):
            if f"{theirs}.{kind}" in state:
                state[f"{ours}.{kind}"] = state.pop(f"{theirs}.{kind}")


def normalize_within_channels(x_NCHW: torch.Tensor) -> torch.Tensor:
    """Divide each unit by (1 + 1e-3 m)^0.75, with m the mean square of the 5x5 units around it in its channel: the 2012
    program's second normalization of layer 2 (k 1, alpha 1e-3 / 25 times the sum, beta 0.75).

    Units outside of the image count as zero in the mean. Computed in at least float32; the result has the dtype of the
    input.
    """
    x = to_float32(x_NCHW)
    return (x * (1 + 1e-3 * F.avg_pool2d(x * x, 5, stride=1, padding=2)).pow(-0.75)).to(x_NCHW.dtype)
