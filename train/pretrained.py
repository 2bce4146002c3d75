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
from train.checkpoint import FORMAT_VERSION, load_checkpoint, resolve_checkpoint
from train.cli import RENAMED

WEIGHTS = (".safetensors", ".pth")
"""Suffixes of files that hold weights alone."""


class Pretrained(NamedTuple):
    """A trained model, and the input that it expects."""

    path: Path
    config: AlexNetConfig
    state: dict[str, torch.Tensor]
    """Weights of both towers, on the CPU."""
    wnids: list[str] | None
    """Its classes; None if the file does not list them."""
    basis: Eigenbasis
    """The basis of its training, of which evaluation uses the mean and the mean image."""
    augmentation: Augmentation
    """The augmentation of its training, without lighting."""
    decode: str
    """The `DataConfig.decode` of its training."""


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
        mean_only = Eigenbasis(np.array(weights.mean), np.zeros(3), np.eye(3))
        augmentation = Augmentation(lighting=Lighting(strength=0))
        return Pretrained(path, weights.config, weights.for_std(1.0), None, mean_only, augmentation, "auto")
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
    """Rename settings of version 0.1 in a configuration as JSON; leave out those that were removed."""
    renamed = {}
    for key, value in section.items():
        name = RENAMED.get(f"{prefix}{key}", f"{prefix}{key}")
        if isinstance(value, dict):
            value = rename_settings(value, f"{prefix}{key}.")
        if name:
            renamed[name.rpartition(".")[2]] = value
    return renamed


def check_shapes(state: dict[str, torch.Tensor], config: AlexNetConfig, path: Path) -> None:
    """Raise `UserError` unless a state has the tensors of the model, or velocities of their names and shapes."""
    try:
        check_tensors(state, config)
    except ValueError as error:
        raise UserError(
            f"{path}: expected weights that fit its configuration, {error}; give another checkpoint"
        ) from None


def check_finite(state: dict[str, torch.Tensor], path: Path) -> None:
    """Raise `UserError` for weights that are NaN or infinite."""
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise UserError(
            f"{path}: expected finite weights, got NaN or infinity; give an older checkpoint, or another file"
        )


def init_from(
    path: Path,
    config: AlexNetConfig,
    basis: Eigenbasis,
    stds: tuple[float, ...],
    state: dict[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], str]:
    """Read the weights that a run starts from. Returns them, and a sentence to log.

    Args:
        path: File or run directory, as for `read_pretrained`.
        config: The run's model, which must be the file's, apart from dropout and the number of classes.
        basis: The run's mean and RGB axes.
        stds: The numbers by which the run divides R, G and B.
        state: The run's random initial weights; with another number of classes fc8 is taken from these.

    Raises `FileNotFoundError` or `UserError`.
    """
    trained = read_pretrained(path)
    may_differ = {"num_classes": config.outputs, "dropout": config.dropout}
    ours = config.resolved().__dict__
    theirs = {**trained.config.resolved().__dict__, **may_differ}
    for name, value in ours.items():
        if theirs[name] != value:
            raise UserError(
                f"{trained.path}: expected model.{name} {value}, as this run has it, got {theirs[name]}; set "
                f"model.{name} to the latter, or give another file"
            )
    factors = torch.tensor(stds, dtype=torch.float64) / torch.tensor(trained.augmentation.stds)
    conv1 = trained.state["conv1.weight"]
    conv1 = (conv1 * factors.reshape(1, 3, 1, 1)).to(conv1.dtype)
    weights, message = trained.state | {"conv1.weight": conv1}, f"starting from the weights of {trained.path}"
    if trained.config.outputs != config.outputs:
        weights = weights | {name: tensor for name, tensor in state.items() if name.startswith("fc8.")}
        message += f"; fc8 is initialized, for {config.outputs} classes instead of {trained.config.outputs}"
    if np.abs(trained.basis.mean - basis.mean).max() > 0.5:
        before, now = (", ".join(f"{level:.1f}" for level in each.mean) for each in (trained.basis, basis))
        message += f"; it was trained with the mean ({before}), this run subtracts ({now})"
    return weights, message
