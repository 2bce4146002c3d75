"""A trained network from a file: a checkpoint of a run, or weights of any origin that `model/weights.py` reads."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from model.alexnet import AlexNetConfig
from model.weights import check_tensors, read_weights
from pipeline.eigenbasis import Eigenbasis
from pipeline.lighting import Lighting
from pipeline.settings import Augmentation
from train.checkpoint import checkpoint_path, load_checkpoint

WEIGHTS = (".safetensors", ".pth")
"""Suffixes of files that hold weights alone."""


class Trained(NamedTuple):
    """A network, and what it expects of images."""

    path: Path
    config: AlexNetConfig
    state: dict[str, torch.Tensor]
    """Single-device layout, on the CPU."""
    wnids: list[str] | None
    """Its classes; None where the file does not tell."""
    basis: Eigenbasis
    """Of which evaluation uses the mean."""
    augmentation: Augmentation
    """Without lighting."""
    decode: str
    """`DataConfig.decode` of its training."""


def read_trained(path: Path) -> Trained:
    """Read a checkpoint (the newest one of a run directory), a .safetensors file or torchvision's .pth.

    Raises `FileNotFoundError` or `ValueError`.
    """
    if path.suffix in WEIGHTS and not path.is_dir():
        weights = read_weights(path)
        check_finite(weights.state, path)
        grey = Eigenbasis(np.array(weights.mean), np.zeros(3), np.eye(3))
        augmentation = Augmentation(lighting=Lighting(strength=0))
        return Trained(path, weights.config, weights.for_std(1.0), None, grey, augmentation, "auto")
    path = checkpoint_path(path)
    content = load_checkpoint(path)
    try:
        saved, image = (
            content["config"],
            content.get("mean_image"),
        )  # checkpoints of before there was one lack it
        basis = replace(
            Eigenbasis.from_json(content["eigenbasis"]), mean_image=None if image is None else image.numpy()
        )
        trained = Trained(
            path,
            AlexNetConfig.from_json(saved["model"]),
            content["model"],
            content["wnids"],
            basis,
            Augmentation(**{**saved["data"]["augmentation"], "lighting": Lighting(strength=0)}),
            saved["data"]["decode"],
        )
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ValueError(f"{path} is no checkpoint of a training run; give one of RUN/checkpoints") from None
    try:
        check_tensors(trained.state, trained.config)
    except ValueError as error:
        raise ValueError(
            f"{path} is of another network than it says: {error}; give another checkpoint"
        ) from None
    check_finite(trained.state, path)
    return trained


def check_finite(state: dict[str, torch.Tensor], path: Path) -> None:
    """Raise `ValueError` where weights are no numbers: nothing could come of them."""
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise ValueError(f"{path} holds weights that are not finite; take an older one, or another file")


def initial_state(
    path: Path, config: AlexNetConfig, basis: Eigenbasis, std: float, state: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], str]:
    """Weights for a run to start from, and a sentence about them.

    Args:
        path: As `read_trained` takes it.
        config: The run's network, which has to be the same but for dropout and the number of classes.
        basis: The run's.
        std: What the run divides pixels by.
        state: The run's own initial weights; of another number of classes fc8 is taken from here.

    Raises `FileNotFoundError` or `ValueError`.
    """
    trained = read_trained(path)
    same = {"num_classes": config.outputs, "dropout": config.dropout}
    if replace(trained.config.resolved(), **same) != config.resolved():  # type: ignore[arg-type]
        theirs, ours = (each.resolved().__dict__ for each in (trained.config, config))
        name = next(name for name in ours if ours[name] != theirs[name] and name not in same)
        raise ValueError(
            f"{trained.path} is of another network: its model.{name} is {theirs[name]}, this run's {ours[name]}"
        )
    conv1 = trained.state["conv1.weight"] * (std / trained.augmentation.std)
    weights, told = trained.state | {"conv1.weight": conv1}, f"starting from the weights of {trained.path}"
    if trained.config.outputs != config.outputs:
        weights = weights | {name: tensor for name, tensor in state.items() if name.startswith("fc8.")}
        told += f"; fc8 starts afresh, for {config.outputs} classes instead of {trained.config.outputs}"
    if np.abs(trained.basis.mean - basis.mean).max() > 0.5:
        before, now = (", ".join(f"{level:.1f}" for level in each.mean) for each in (trained.basis, basis))
        told += f"; its images were less a mean of ({before}), these are less ({now})"
    return weights, told
