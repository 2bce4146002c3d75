"""Weights in files that other programs read and write: safetensors, and torchvision's state dicts.

    network, state = read_weights(Path("alexnet.safetensors"))     # or torchvision's .pth
    model = AlexNet(network)
    model.load_state_dict(state)

A safetensors file holds tensors under our names (`conv1.weight`, layer by layer as in `AlexNet`) or torchvision's
(`features.0.weight`), in the single-device layout, and as metadata, besides the usual `format: pt`:

    config    the `AlexNetConfig`, as JSON
    input     what images are, as JSON: RGB on 0..255, less `mean` (three levels), divided by `std`
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from model.alexnet import TORCHVISION_NAMES, AlexNet, AlexNetConfig

Names = Literal["alexnet-dali", "torchvision"]


def weights_bytes(
    state: Mapping[str, torch.Tensor], config: AlexNetConfig, inputs: dict[str, Any], names: Names = "alexnet-dali"
) -> bytes:
    """A safetensors file.

    Args:
        state: state dict of `AlexNet(config)`.
        config: The network; written with what its variant presets spelled out.
        inputs: {"mean": [red, green, blue], "std": divisor}, on 0..255.
        names: Of tensors. "torchvision" is for `variant: torchvision` alone: nothing else fits its `alexnet`.

    Raises `ValueError` where torchvision's names do not fit.
    """
    if names == "torchvision":
        if config.variant != "torchvision" or config.num_towers != 1 or not all(config.maps):
            raise ValueError("torchvision's alexnet is another network; only model.variant=torchvision has its names")
        theirs = {ours: name for name, ours in TORCHVISION_NAMES.items()}
        state = {f"{theirs[layer]}.{kind}": state[f"{layer}.{kind}"] for layer in theirs for kind in ("weight", "bias")}
    spelled = dataclasses.replace(config, towers=config.num_towers, channels=config.maps, lrn=config.normalization)  # type: ignore[arg-type]
    metadata = {"format": "pt", "config": json.dumps(dataclasses.asdict(spelled)), "input": json.dumps(inputs)}
    return save({name: tensor.cpu().contiguous() for name, tensor in state.items()}, metadata)


def read_weights(path: Path) -> tuple[AlexNetConfig, dict[str, torch.Tensor]]:
    """Read a .safetensors file, or a state dict that torch saved, onto the CPU, under our names.

    Without a configuration in the file, it has to be torchvision's `alexnet`, whose sizes the tensors tell. Loading
    runs no code from the file. Raises `FileNotFoundError`, or `ValueError` when it is damaged or of another network.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; give a .safetensors file, or torchvision's .pth")
    config = None
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
            with safe_open(path, "pt") as file:
                if described := (file.metadata() or {}).get("config"):
                    config = AlexNetConfig.from_json(json.loads(described))
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
                raise TypeError
    except Exception as error:  # what torch raises for damage depends on where it is
        if isinstance(error, SafetensorError | ValueError | OSError):
            raise ValueError(f"{path} holds no weights ({error}); copy or export it again") from None
        raise ValueError(f"{path} holds no weights; give a .safetensors file, or torchvision's .pth") from None
    kinds, layers = ("weight", "bias"), TORCHVISION_NAMES.items()
    ours = {f"{name}.{kind}": f"{layer}.{kind}" for name, layer in layers for kind in kinds}
    if config is None and set(state) == set(ours):
        config = torchvision_config(state)
    if config is None:
        raise ValueError(f"{path} does not say which network it is of; export it from its checkpoint again")
    state = {ours.get(name, name): tensor for name, tensor in state.items()}
    with torch.device("meta"):
        expected = AlexNet(config).state_dict()
    if {name: tensor.shape for name, tensor in state.items()} != {name: each.shape for name, each in expected.items()}:
        raise ValueError(f"{path} holds other tensors than its network has; export it from its checkpoint again")
    return config, state


def torchvision_config(state: Mapping[str, torch.Tensor]) -> AlexNetConfig:
    """The sizes of a state dict under torchvision's names."""
    sizes = {layer: len(state[f"{name}.weight"]) for name, layer in TORCHVISION_NAMES.items()}
    c1, c2, c3, c4, c5 = (sizes[f"conv{k}"] for k in range(1, 6))
    return AlexNetConfig(
        variant="torchvision", channels=(c1, c2, c3, c4, c5), hidden=sizes["fc7"], num_classes=sizes["fc8"]
    )
