"""Weights go out to safetensors and come back to the bit, under both names; foreign files are refused."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from model.alexnet import AlexNet, AlexNetConfig
from model.weights import OURS, Weights, read_weights, weights_bytes
from tests.helpers import TORCHVISION

SLIM = AlexNetConfig(variant="original", channels=(8, 16, 24, 0, 16), fc_dim=32, num_classes=7, dropout=0.25)
TORCHVISIONS = AlexNetConfig("torchvision", channels=(8, 8, 8, 8, 8), fc_dim=16, num_classes=10)
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


def test_there_and_back(tmp_path: Path) -> None:
    """The configuration, and every tensor to the bit, though the network's own memory is channels-last."""
    model = AlexNet(SLIM)
    data = weights_bytes(model.state_dict(), SLIM, INPUTS)
    metadata, tensors = read_by_hand(data)
    assert metadata["format"] == "pt" and json.loads(metadata["input"]) == INPUTS
    assert set(tensors) == set(model.state_dict()) and "conv4.weight" not in tensors
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(tensors[name], tensor.numpy())
    (tmp_path / "x.safetensors").write_bytes(data)
    config, state, mean, std = read_weights(tmp_path / "x.safetensors")
    assert (config.conv_channels, config.normalization, config.dropout) == (
        SLIM.conv_channels,
        "original",
        0.25,
    )
    assert mean == tuple(INPUTS["mean"]) and std == (1, 1, 1)  # type: ignore[arg-type]
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_torchvisions_names(tmp_path: Path) -> None:
    """Both file formats of a torchvision state dict are read, sizes and all; the names go out again."""
    shapes = {name: (shape[0] // 8, *shape[1:]) for name, shape in TORCHVISION.items()}
    ins = {"features.0": 3, "classifier.1": shapes["features.10"][0] * 36}
    previous = 0
    state = {}
    for name, shape in shapes.items():
        shape = (shape[0], ins.get(name, previous), *shape[2:])
        previous = shape[0]
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.randn(shape), torch.randn(shape[0])
    torch.save(state, tmp_path / "alexnet.pth")
    config, ours, mean, std = read_weights(tmp_path / "alexnet.pth")
    assert (config.variant, config.conv_channels, config.fc_dim, config.num_classes) == (
        "torchvision",
        (8, 24, 48, 32, 32),
        512,
        125,
    )
    model = AlexNet(config)
    model.load_state_dict(ours)
    data = weights_bytes(model.state_dict(), config, INPUTS, "torchvision")
    _, tensors = read_by_hand(data)
    assert set(tensors) == set(state)
    for name, tensor in state.items():
        np.testing.assert_array_equal(tensors[name], tensor.numpy())
    (tmp_path / "x.safetensors").write_bytes(data)
    assert mean == (123.675, 116.28, 103.53) and std == (58.395, 57.12, 57.375)
    again, same, mean, std = read_weights(tmp_path / "x.safetensors")
    assert mean == tuple(INPUTS["mean"]) and std == (1, 1, 1)  # type: ignore[arg-type]
    assert again.conv_channels == config.conv_channels and all(
        torch.equal(ours[name], same[name]) for name in ours
    )


def test_another_std(tmp_path: Path) -> None:
    """Logits of images / 255, less a mean and divided by a std per channel, are those of images on 0..255 less the
    mean with the std moved into conv1."""
    config = AlexNetConfig("torchvision", channels=(8, 8, 8, 8, 8), fc_dim=16, num_classes=3)
    model = AlexNet(config).double().eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = Weights(config, state, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
    pixels = torch.rand(2, 3, 224, 224, dtype=torch.float64) * 255
    mean, std = (
        torch.tensor(values, dtype=torch.float64).reshape(3, 1, 1)
        for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    expected = model((pixels / 255 - mean) / std).detach()
    for divisor in (1.0, 50.0):
        model.load_state_dict(weights.for_std(divisor))
        torch.testing.assert_close(model((pixels - 255 * mean) / divisor), expected, rtol=1e-6, atol=1e-9)


def test_refusals(tmp_path: Path) -> None:
    """Cut, foreign, of another network: one sentence with the file's name."""
    data = weights_bytes(AlexNet(SLIM).state_dict(), SLIM, INPUTS)
    with pytest.raises(ValueError, match=r"only model.variant=torchvision"):
        weights_bytes(AlexNet(SLIM).state_dict(), SLIM, INPUTS, "torchvision")
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match="not a file"):
        read_weights(path)
    odd = AlexNet(SLIM).state_dict()
    described = json.dumps(
        {"variant": "original", "channels": [8, 16, 24, 0, 16], "fc_dim": 32, "num_classes": 7}
    )

    def with_config(text: str, input: str | None = None, **tensors: torch.Tensor) -> bytes:
        metadata = {"config": text} | ({"input": input} if input else {})
        return save({name: tensor.contiguous() for name, tensor in (odd | tensors).items()}, metadata)

    for name in ("fc_dim", "hidden"):  # hidden: as version 0.1 wrote it
        path.write_bytes(with_config(described.replace("fc_dim", name)))
        assert read_weights(path)[0].fc_dim == 32
    for content in (
        data[:-5],
        b"",
        b"junk" * 10,
        with_config(described, more=torch.ones(1)),
        with_config(described, **{"fc8.bias": torch.ones(7, dtype=torch.int32)}),
        with_config("[]"),
        with_config("null"),
        with_config(described.replace("original", "vgg")),
        with_config(described.replace("32", "32.0")),
        with_config(described.replace("32", str(2**62))),
        with_config(described.replace("8, ", "")),
        with_config(described.replace('"fc_dim"', '"lrn": "foo", "fc_dim"')),
        with_config(described.replace('"fc_dim"', '"colour": 3, "fc_dim"')),
        with_config(described, input="null"),
        with_config(described, input=json.dumps({"mean": [1, 2], "std": 1})),
        with_config(described, input=json.dumps({"mean": [1, 2, "x"], "std": 1})),
        with_config(described, input='{"mean": [1, 2, NaN], "std": 1}'),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x.safetensors holds no weights of this network"):
            read_weights(path)
    theirs = {f"{name}.{kind}": torch.tensor(1.0) for name in TORCHVISION for kind in ("weight", "bias")}
    for number, state in enumerate(
        (odd, {"epoch": 3}, [1, 2], theirs, {name: torch.ones(0) for name in theirs})
    ):
        torch.save(state, tmp_path / f"{number}.pth")
        with pytest.raises(ValueError, match=r".pth holds no weights of this network"):
            read_weights(tmp_path / f"{number}.pth")


def test_only_torchvisions_network_has_its_names() -> None:
    """Another activation, pooling, normalization or a second tower would load there and be something else."""
    plain = AlexNetConfig("torchvision", channels=(8, 8, 8, 8, 8), fc_dim=16, num_classes=3, dropout=0.2)
    assert weights_bytes(AlexNet(plain).state_dict(), plain, INPUTS, "torchvision")
    for change in (
        {"activation": "tanh"},
        {"pooling": "plain"},
        {"lrn": "paper"},
        {"towers": 2},
        {"variant": "paper"},
    ):
        config = replace(plain, **change)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"only model.variant=torchvision"):
            weights_bytes(AlexNet(config).state_dict(), config, INPUTS, "torchvision")


def test_tensors_that_are_none(tmp_path: Path) -> None:
    """Sparse ones, such without data, and other things in their place are refused before anything is computed of
    them."""
    state = {theirs: AlexNet(TORCHVISIONS).state_dict()[ours] for theirs, ours in OURS.items()}
    path, name = tmp_path / "x.pth", "classifier.6.weight"
    torch.save(state, path)
    assert read_weights(path).config.fc_dim == TORCHVISIONS.fc_dim
    sound = state[name]
    for odd in (
        sound.to_sparse(),
        torch.empty(sound.shape, device="meta"),
        [1.0] * len(sound),
        None,
        sound.bool(),
    ):
        torch.save({**state, name: odd}, path)
        with pytest.raises(ValueError, match=r"x\.pth holds no weights of this network"):
            read_weights(path)
