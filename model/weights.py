"""Weights in files that other programs read and write: safetensors, and torchvision's state dicts.

    weights = read_weights(Path("alexnet.safetensors"))     # or torchvision's .pth
    model = AlexNet(weights.config)
    model.load_state_dict(weights.state)

A safetensors file holds tensors under our names (`conv1.weight`, layer by layer as in `AlexNet`) or torchvision's
(`features.0.weight`), in the single-device layout, and as metadata, besides the usual `format: pt`:

    config    the `AlexNetConfig`, as JSON
    input     what images are, as JSON: RGB on 0..255, less `mean` (three levels), divided by `std`
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from model.alexnet import TORCHVISION_NAMES, AlexNet
from model.settings import AlexNetConfig, Names


class Weights(NamedTuple):
    """A network of a file."""

    config: AlexNetConfig
    state: dict[str, torch.Tensor]
    """Under our names, on the CPU."""
    mean: tuple[float, float, float]
    """Levels of 0..255, RGB, that images are to be less."""
    std: tuple[float, float, float]
    """What they are to be divided by then."""

    def for_std(self, std: float) -> dict[str, torch.Tensor]:
        """The state for images that are divided by `std` instead: conv1 makes up for it, exactly but for rounding."""
        factors = torch.tensor([std / own for own in self.std], dtype=torch.float64).reshape(1, 3, 1, 1)
        conv1 = self.state["conv1.weight"]
        return self.state | {"conv1.weight": (conv1 * factors).to(conv1.dtype)}


TORCHVISION_MEAN = (123.675, 116.28, 103.53)
TORCHVISION_STD = (58.395, 57.12, 57.375)
"""What torchvision's own weights expect: (.485, .456, .406) and (.229, .224, .225), times 255."""


def weights_bytes(
    state: Mapping[str, torch.Tensor],
    config: AlexNetConfig,
    inputs: dict[str, Any],
    names: Names = "alexnet-dali",
) -> bytes:
    """A safetensors file.

    Args:
        state: state dict of `AlexNet(config)`.
        config: The network; written with what its variant presets spelled out.
        inputs: {"mean": [red, green, blue], "std": divisor}, on 0..255.
        names: Of tensors. "torchvision" is for `variant: torchvision` alone: nothing else fits its `alexnet`.

    Raises `ValueError` where the state is of another network, or torchvision's names do not fit.
    """
    check_tensors(state, config)
    if names == "torchvision":
        sizes = {"channels": config.maps, "fc_dim": config.fc_dim, "num_classes": config.outputs}
        theirs = AlexNetConfig("torchvision", dropout=config.dropout, **sizes)  # type: ignore[arg-type]
        if config.spelled_out() != theirs.spelled_out() or not all(config.maps):
            raise ValueError(
                "torchvision's alexnet is another network; only model.variant=torchvision has its names"
            )
        renamed = {ours: name for name, ours in OURS.items()}
        state = {renamed[name]: tensor for name, tensor in state.items()}
    described = json.dumps(dataclasses.asdict(config.spelled_out()))
    metadata = {"format": "pt", "config": described, "input": json.dumps(inputs)}
    return save({name: tensor.cpu().contiguous() for name, tensor in state.items()}, metadata)


def read_weights(path: Path) -> Weights:
    """Read a .safetensors file, or a state dict that torch saved, onto the CPU, under our names.

    Without a configuration in the file, it has to be torchvision's `alexnet`, whose sizes the tensors tell. Tensors may
    have any floating dtype; a network that loads them keeps its own. Loading runs no code from the file. Raises
    `FileNotFoundError`, or `ValueError` when it is damaged or of another network.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; give a .safetensors file, or torchvision's .pth")
    try:
        described, inputs = None, {"mean": TORCHVISION_MEAN, "std": TORCHVISION_STD}
        if path.suffix == ".safetensors":
            state = load_file(path)
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
            described, inputs = metadata.get("config"), json.loads(metadata.get("input", json.dumps(inputs)))
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        config = AlexNetConfig.from_json(json.loads(described)) if described else torchvision_config(state)
        state = {OURS.get(name, name): tensor for name, tensor in state.items()}
        check_tensors(state, config)
        return Weights(config, state, triple(inputs["mean"]), triple(inputs["std"]))
    except Exception as error:  # files of all kinds get here; what is raised depends on where they are odd
        reason = (
            str(error).splitlines()[0]
            if isinstance(error, ValueError | SafetensorError) and str(error)
            else ""
        )
        raise ValueError(
            f"{path} holds no weights of this network{reason and f' ({reason})'}; give a .safetensors file that "
            "tools/export_weights.py wrote, or torchvision's .pth"
        ) from None


def triple(value: Any) -> tuple[float, float, float]:
    """One number or three, as three. Raises `ValueError` for others than finite ones."""
    red, green, blue = (float(each) for each in (value if isinstance(value, list | tuple) else [value] * 3))
    if not all(map(math.isfinite, (red, green, blue))):
        raise ValueError("what it says of images are no numbers")
    return red, green, blue


FLOATING = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
OURS = {
    f"{theirs}.{kind}": f"{layer}.{kind}"
    for theirs, layer in TORCHVISION_NAMES.items()
    for kind in ("weight", "bias")
}
"""torchvision's names of tensors, and ours."""


def check_tensors(state: Mapping[str, torch.Tensor], config: AlexNetConfig) -> None:
    """Raise `ValueError` unless a state has the tensors of a network."""
    try:
        with torch.device("meta"):
            expected = {name: tensor.shape for name, tensor in AlexNet(config).state_dict().items()}
    except (RuntimeError, TypeError) as error:  # sizes beyond 64 bits
        raise ValueError(f"there is no such network ({str(error).splitlines()[0]})") from None
    if not isinstance(state, Mapping) or not all(
        isinstance(tensor, torch.Tensor) for tensor in state.values()
    ):
        raise ValueError("what stands for its weights are no tensors")
    if {name: tensor.shape for name, tensor in state.items()} != expected:
        raise ValueError("its tensors have other names or shapes than those of its network")
    if any(
        each.dtype not in FLOATING or each.is_meta or each.layout != torch.strided for each in state.values()
    ):
        raise ValueError("its tensors are no floating-point numbers")


def torchvision_config(state: Mapping[str, torch.Tensor]) -> AlexNetConfig:
    """The sizes of a state dict under torchvision's names. Raises `ValueError` for other names."""
    if set(state) != set(OURS):
        raise ValueError(
            "it does not say which network it is of, and has not the names of torchvision's alexnet"
        )
    sizes = {layer: len(state[f"{name}.weight"]) for name, layer in TORCHVISION_NAMES.items()}
    c1, c2, c3, c4, c5 = (sizes[f"conv{k}"] for k in range(1, 6))
    return AlexNetConfig(
        variant="torchvision", channels=(c1, c2, c3, c4, c5), fc_dim=sizes["fc7"], num_classes=sizes["fc8"]
    )
