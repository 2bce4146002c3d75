"""Weights go out to safetensors and come back to the bit, under both names; foreign files are refused."""

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from model.alexnet import AlexNet, AlexNetConfig
from model.weights import OURS, Weights, read_weights, weights_bytes
from tests.helpers import TORCHVISION

SLIM = AlexNetConfig(variant="original", channels=(8, 16, 24, 0, 16), fc_dim=32, num_classes=7, dropout=0.25)
TORCHVISIONS = AlexNetConfig("torchvision", channels=(8, 24, 48, 40, 32), fc_dim=16, num_classes=10)
INPUTS = {"mean": [120.5, 115.0, 100.0], "std": 1.0}


def read_by_hand(data: bytes) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """A safetensors file by its published format: length of the header, JSON header, tensors."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    metadata = header.pop("__metadata__")
    return metadata, {
        name: np.frombuffer(body[slice(*entry["data_offsets"])], np.float32).reshape(entry["shape"])
        for name, entry in header.items()
    }


@pytest.mark.parametrize(("config", "names"), [(SLIM, "alexnet-dali"), (TORCHVISIONS, "torchvision")])
def test_there_and_back(tmp_path: Path, config: AlexNetConfig, names: Any) -> None:
    """Configuration, input and every tensor to the bit, under either names, though the network's own memory is
    channels-last; version 0.1 wrote `hidden` for `fc_dim`."""
    state = AlexNet(config).state_dict()
    data = weights_bytes(state, config, INPUTS, names)
    metadata, tensors = read_by_hand(data)
    assert metadata["format"] == "pt" and json.loads(metadata["input"]) == INPUTS
    assert {OURS.get(name, name) for name in tensors} == set(state)
    assert {name.rpartition(".")[0] for name in tensors} >= (
        set(TORCHVISION) if names == "torchvision" else {"fc8"}
    )
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, state[OURS.get(name, name)].numpy())
    (tmp_path / "x.safetensors").write_bytes(data)
    (tmp_path / "old.safetensors").write_bytes(data.replace(b"fc_dim", b"hidden"))
    for name in ("x", "old"):
        found, same, mean, std = read_weights(tmp_path / f"{name}.safetensors")
        assert found == config.resolved() and mean == tuple(INPUTS["mean"]) and std == (1, 1, 1)  # type: ignore[arg-type]
        assert all(torch.equal(same[name], tensor) for name, tensor in state.items())


def test_torchvisions_file(tmp_path: Path) -> None:
    """A state dict that torch saved: sizes are those of its tensors, the input is torchvision's."""
    state = AlexNet(TORCHVISIONS).state_dict()
    torch.save({theirs: state[ours] for theirs, ours in OURS.items()}, tmp_path / "alexnet.pth")
    config, same, mean, std = read_weights(tmp_path / "alexnet.pth")
    assert config.resolved() == TORCHVISIONS.resolved()
    assert all(torch.equal(same[name], tensor) for name, tensor in state.items())
    assert mean == (123.675, 116.28, 103.53) and std == (58.395, 57.12, 57.375)


def test_another_std() -> None:
    """Logits of images / 255, less a mean and divided by a std per channel, are those of images on 0..255 less the
    mean with the std moved into conv1."""
    model = AlexNet(TORCHVISIONS).double().eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = Weights(TORCHVISIONS, state, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
    pixels = torch.rand(2, 3, 224, 224, dtype=torch.float64) * 255
    mean, std = (
        torch.tensor(values, dtype=torch.float64).reshape(3, 1, 1)
        for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    expected = model((pixels / 255 - mean) / std).detach()
    for divisor in (1.0, 50.0):
        model.load_state_dict(weights.for_std(divisor))
        torch.testing.assert_close(model((pixels - 255 * mean) / divisor), expected, rtol=1e-6, atol=1e-9)


ODD = (
    {"config": []},
    {"config": {"variant": "vgg"}},
    {"config": {"fc_dim": 32.0}},
    {"config": {"fc_dim": 2**62}},
    {"config": {"channels": [16, 24, 0, 16]}},
    {"config": {"colour": 3}},
    {"input": {"mean": [1, 2], "std": 1}},
    {"input": {"mean": [1, 2, "x"], "std": 1}},
    {"input": {"mean": [1, 2, float("nan")], "std": 1}},
    {"more": torch.ones(1)},
    {"fc8.bias": torch.ones(7, dtype=torch.int32)},
)
"""Changes to metadata and tensors of a file."""


@pytest.mark.parametrize("change", ODD, ids=str)
def test_odd_content_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """A sound file with one odd value or tensor: one sentence with the file's name."""
    config = {"variant": "original", "channels": [8, 16, 24, 0, 16], "fc_dim": 32, "num_classes": 7}
    content = {"config": config, "input": INPUTS}
    tensors = {name: tensor.contiguous() for name, tensor in AlexNet(SLIM).state_dict().items()}
    path = tmp_path / "x.safetensors"
    for name, value in change.items():
        if name in content:
            content[name] = {**content[name], **value} if isinstance(value, dict) else value
        else:
            tensors[name] = value
    path.write_bytes(save(tensors, {name: json.dumps(value) for name, value in content.items()}))
    with pytest.raises(ValueError, match=r"x.safetensors holds no weights of this network"):
        read_weights(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    """None, a cut one, and what torch loads that is not torchvision's state dict of dense floating tensors."""
    with pytest.raises(FileNotFoundError, match="not a file"):
        read_weights(tmp_path / "x.pth")
    path = tmp_path / "x.safetensors"
    path.write_bytes(weights_bytes(AlexNet(SLIM).state_dict(), SLIM, INPUTS)[:-5])
    with pytest.raises(ValueError, match=r"x\.safetensors holds no weights of this network"):
        read_weights(path)
    sound = {theirs: AlexNet(TORCHVISIONS).state_dict()[ours] for theirs, ours in OURS.items()}
    path, name = tmp_path / "x.pth", "classifier.6.weight"
    torch.save(sound, path)
    assert read_weights(path).config.fc_dim == TORCHVISIONS.fc_dim
    odd = (
        sound[name].to_sparse(),
        torch.empty(sound[name].shape, device="meta"),
        [1.0] * len(sound[name]),
        sound[name].bool(),
    )
    empty = {each: torch.ones(0) for each in sound}
    for content in ([1, 2], {"epoch": 3}, empty, *({**sound, name: each} for each in odd)):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"x\.pth holds no weights of this network"):
            read_weights(path)


@pytest.mark.parametrize(
    "change",
    [{"activation": "tanh"}, {"pooling": "plain"}, {"lrn": "paper"}, {"towers": 2}, {"variant": "paper"}],
)
def test_only_torchvisions_network_has_its_names(change: dict[str, Any]) -> None:
    """Another activation, pooling, normalization or a second tower would load there and be something else."""
    config = replace(TORCHVISIONS, **change)
    with pytest.raises(ValueError, match=r"only model.variant=torchvision"):
        weights_bytes(AlexNet(config).state_dict(), config, INPUTS, "torchvision")
