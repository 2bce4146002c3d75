"""Weights in files that other programs read and write: safetensors, and torchvision's state dicts.

    weights = read_weights(Path("alexnet.safetensors"))     # or torchvision's .pth
    model = AlexNet(weights.config)
    model.load_state_dict(weights.state)

A safetensors file holds tensors under our names (`conv1.weight`, layer by layer as in `AlexNet`) or torchvision's
(`features.0.weight`), in the single-device layout, and as metadata, with the usual `format: pt`:

    config    the `AlexNetConfig`, as JSON
    input     `mean` (three levels) and `std`, as JSON: images are RGB on 0..255, minus `mean`, divided by `std`
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from model.alexnet import TORCHVISION_NAMES, AlexNet
from model.settings import AlexNetConfig, Names

OURS = {
    f"{theirs}.{kind}": f"{layer}.{kind}"
    for theirs, layer in TORCHVISION_NAMES.items()
    for kind in ("weight", "bias")
}
"""torchvision's names of tensors, and ours."""
TORCHVISION_INPUT = {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}
"""Input that torchvision's own weights expect: (.485, .456, .406) and (.229, .224, .225), times 255."""


class Weights(NamedTuple):
    """The network in a file."""

    config: AlexNetConfig
    state: dict[str, torch.Tensor]
    """Under our names, on the CPU."""
    mean: tuple[float, float, float]
    """RGB levels, 0..255, that are subtracted from images."""
    std: tuple[float, float, float]
    """Divisors of R, G and B after that."""

    def for_std(self, std: float) -> dict[str, torch.Tensor]:
        """Return the state for images divided by `std` instead: conv1 is scaled, logits are equal up to rounding."""
        factors = torch.tensor([std / own for own in self.std], dtype=torch.float64).reshape(1, 3, 1, 1)
        conv1 = self.state["conv1.weight"]
        return self.state | {"conv1.weight": (conv1 * factors).to(conv1.dtype)}


def weights_bytes(
    state: Mapping[str, torch.Tensor],
    config: AlexNetConfig,
    inputs: dict[str, Any],
    names: Names = "alexnet-dali",
) -> bytes:
    """Encode a safetensors file.

    Args:
        state: state dict of `AlexNet(config)`.
        config: The network; written with all values resolved.
        inputs: {"mean": [red, green, blue], "std": divisor}, on 0..255.
        names: Names of the tensors; "torchvision" only for `variant: torchvision`, as no other fits its `alexnet`.

    Raises `ValueError` where the state is of another network, or torchvision's names do not fit.
    """
    check_tensors(state, config)
    if names == "torchvision":
        theirs = dataclasses.replace(
            config, variant="torchvision", towers=None, lrn=None, activation="relu", pooling="overlapping"
        )
        if config.resolved() != theirs.resolved() or not all(config.conv_channels):
            raise ValueError(
                "torchvision's alexnet is another network; only model.variant=torchvision has its names"
            )
        state = {name: state[ours] for name, ours in OURS.items()}
    metadata = {
        "format": "pt",
        "config": json.dumps(dataclasses.asdict(config.resolved())),
        "input": json.dumps(inputs),
    }
    return save({name: tensor.cpu().contiguous() for name, tensor in state.items()}, metadata)


def read_weights(path: Path) -> Weights:
    """Read a .safetensors file, or a state dict that torch saved, onto the CPU, under our names.

    A file without a configuration has to be of torchvision's `alexnet`; sizes are inferred from its tensors.
    Tensors may have any floating dtype; a network that loads them keeps its own. Loading runs no code from the file.
    Raises `FileNotFoundError`, or `ValueError` when it is damaged or of another network.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not a file; give a .safetensors file, or torchvision's .pth")
    try:
        metadata: dict[str, str] = {}
        if path.suffix == ".safetensors":
            state = load_file(path)
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        inputs = json.loads(metadata["input"]) if "input" in metadata else TORCHVISION_INPUT
        if "config" in metadata:
            config = AlexNetConfig.from_json(json.loads(metadata["config"]))
        else:
            config = infer_torchvision_config(state)
        state = {OURS.get(name, name): tensor for name, tensor in state.items()}
        check_tensors(state, config)
        mean, std = (np.broadcast_to(np.array(inputs[name], np.float64), 3) for name in ("mean", "std"))
        if not np.isfinite([mean, std]).all():
            raise ValueError("mean and std of its images are not finite")
        return Weights(config, state, tuple(mean.tolist()), tuple(std.tolist()))
    except Exception as error:  # json, torch and safetensors raise many kinds for other or damaged files
        reason = str(error).partition("\n")[0] if isinstance(error, ValueError | SafetensorError) else ""
        raise ValueError(
            f"{path} holds no weights of this network{reason and f' ({reason})'}; give a .safetensors file that "
            "tools/export_weights.py wrote, or torchvision's .pth"
        ) from None


def check_tensors(state: Mapping[str, torch.Tensor], config: AlexNetConfig) -> None:
    """Raise `ValueError` unless a state has the tensors of a network."""
    try:
        with torch.device("meta"):
            expected = {name: tensor.shape for name, tensor in AlexNet(config).state_dict().items()}
    except (RuntimeError, TypeError):
        raise ValueError("its sizes are too large") from None
    found = {
        name: tensor.shape
        for name, tensor in (state.items() if isinstance(state, Mapping) else ())
        if isinstance(tensor, torch.Tensor)
        and tensor.is_floating_point()
        and tensor.layout == torch.strided
        and not tensor.is_meta
    }
    if found != expected or len(state) != len(expected):
        raise ValueError("its tensors have other names, shapes or types than those of its network")


def infer_torchvision_config(state: Mapping[str, torch.Tensor]) -> AlexNetConfig:
    """Infer the configuration of a state dict under torchvision's names. Raises `ValueError` for other names."""
    if set(state) != set(OURS):
        raise ValueError("it has no configuration, and not the names of torchvision's alexnet")
    sizes = {layer: len(state[f"{name}.weight"]) for name, layer in TORCHVISION_NAMES.items()}
    c1, c2, c3, c4, c5 = (sizes[f"conv{k}"] for k in range(1, 6))
    return AlexNetConfig(
        variant="torchvision", channels=(c1, c2, c3, c4, c5), fc_dim=sizes["fc7"], num_classes=sizes["fc8"]
    )
