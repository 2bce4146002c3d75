"""A trained model from a file: a checkpoint of a run, or weights of any origin that `model/weights.py` reads."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from model.alexnet import AlexNetConfig
from model.weights import check_tensors, read_weights
from pipeline.eigenbasis import Eigenbasis
from pipeline.errors import UserError
from pipeline.lighting import Lighting
from pipeline.settings import Augmentation
from train.checkpoint import FORMAT_VERSION, resolve_checkpoint, load_checkpoint
from train.cli import RENAMED

WEIGHTS = (".safetensors", ".pth")
"""Suffixes of files that hold weights alone."""


class Pretrained(NamedTuple):
    """A model, and what it expects of images."""

    path: Path
    config: AlexNetConfig
    state: dict[str, torch.Tensor]
    """Single-device layout, on the CPU."""
    wnids: list[str] | None
    """Its classes; None where the file does not say."""
    basis: Eigenbasis
    """Of which evaluation uses the mean."""
    augmentation: Augmentation
    """Without lighting."""
    decode: str
    """`DataConfig.decode` of its training."""


def read_pretrained(path: Path) -> Pretrained:
    """Read a checkpoint (the newest one of a run directory), a .safetensors file or torchvision's .pth.

    Raises `FileNotFoundError` or `UserError`.
    """
    if path.suffix in WEIGHTS and not path.is_dir():
        try:
            weights = read_weights(path)
        except ValueError as error:
            raise UserError(str(error)) from None
        check_finite(weights.state, path)
        grey = Eigenbasis(np.array(weights.mean), np.zeros(3), np.eye(3))
        augmentation = Augmentation(lighting=Lighting(strength=0))
        return Pretrained(path, weights.config, weights.for_std(1.0), None, grey, augmentation, "auto")
    path = resolve_checkpoint(path)
    content = load_checkpoint(path, formats=(1, FORMAT_VERSION))
    try:
        saved, image = rename_settings(content["config"]), content.get("mean_image")
        basis = Eigenbasis.from_json(content["eigenbasis"])
        pretrained = Pretrained(
            path,
            AlexNetConfig.from_json(saved["model"]),
            content["model"],
            content["wnids"],
            replace(basis, mean_image=None if image is None else image.numpy()),
            Augmentation(**{**saved["data"]["augmentation"], "lighting": Lighting(strength=0)}),
            saved["data"]["decode"],
        )
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(f"{path}: not a checkpoint of a training run; give one of RUN/checkpoints") from None
    check_shapes(pretrained.state, pretrained.config, path)
    check_finite(pretrained.state, path)
    return pretrained


def rename_settings(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration as JSON, with settings of version 0.1 under their present names, or left out."""
    renamed = {}
    for key, value in section.items():
        name = RENAMED.get(f"{prefix}{key}", f"{prefix}{key}")
        if isinstance(value, dict):
            value = rename_settings(value, f"{prefix}{key}.")
        if name:
            renamed[name.rpartition(".")[2]] = value
    return renamed


def check_shapes(state: dict[str, torch.Tensor], config: AlexNetConfig, path: Path) -> None:
    """Raise `UserError` where tensors are not those of the model."""
    try:
        check_tensors(state, config)
    except ValueError as error:
        raise UserError(
            f"{path}: expected weights of its own model, {error}; give another checkpoint"
        ) from None


def check_finite(state: dict[str, torch.Tensor], path: Path) -> None:
    """Raise `UserError` where weights are NaN or infinite."""
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise UserError(
            f"{path}: expected finite weights, got NaN or infinity; take an older one, or another file"
        )


def init_from(
    path: Path, config: AlexNetConfig, basis: Eigenbasis, std: float, state: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], str]:
    """Weights for a run to start from, and a sentence about them.

    Args:
        path: As `read_pretrained` takes it.
        config: The run's model, which has to be the same but for dropout and the number of classes.
        basis: The run's.
        std: What the run divides pixels by.
        state: The run's own initial weights; with another number of classes fc8 is taken from here.

    Raises `FileNotFoundError` or `UserError`.
    """
    trained = read_pretrained(path)
    free = {"num_classes": config.outputs, "dropout": config.dropout}
    ours = config.resolved().__dict__
    theirs = {**trained.config.resolved().__dict__, **free}
    for name, value in ours.items():
        if theirs[name] != value:
            raise UserError(
                f"{trained.path}: expected model.{name} {value}, as this run has it, got {theirs[name]}; set that, or "
                "give another file"
            )
    conv1 = trained.state["conv1.weight"] * (std / trained.augmentation.std)
    weights, message = trained.state | {"conv1.weight": conv1}, f"starting from the weights of {trained.path}"
    if trained.config.outputs != config.outputs:
        weights = weights | {name: tensor for name, tensor in state.items() if name.startswith("fc8.")}
        message += f"; fc8 is initialized, for {config.outputs} classes instead of {trained.config.outputs}"
    if np.abs(trained.basis.mean - basis.mean).max() > 0.5:
        before, now = (", ".join(f"{level:.1f}" for level in each.mean) for each in (trained.basis, basis))
        message += f"; it was trained with the mean ({before}), this run subtracts ({now})"
    return weights, message
