"""A run starts from weights of any origin, if they are of its network."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from model.alexnet import AlexNet, AlexNetConfig
from model.weights import OURS, weights_bytes
from pipeline.eigenbasis import Eigenbasis
from pipeline.errors import UserError
from tests.helpers import STEPS, TRAIN, final, run_ok, shipped, small_run, tiny, train_refuses
from tools.export_weights import export_weights
from train.checkpoint import save_checkpoint
from train.pretrained import init_from, read_pretrained

CONFIG = AlexNetConfig("original", channels=(8, 16, 16, 16, 16), fc_dim=64, num_classes=10)


def test_weights_of_the_same_network(tmp_path: Path, shards: Path, basis: Eigenbasis) -> None:
    """Tensors as they are; for images divided by 2, conv1 doubles. Another network is refused with the field."""
    path = tmp_path / "w.safetensors"
    model = tiny(path, shards)
    for std in (1.0, 2.0):
        state, message = init_from(path, model.config, basis, std, AlexNet(model.config).state_dict())
        assert message == f"starting from the weights of {path}"
        for name, tensor in model.state_dict().items():
            assert torch.equal(state[name], tensor * std if name == "conv1.weight" else tensor)
    for change, named in (({"fc_dim": 32}, "model.fc_dim 32, .* got 64"), ({"lrn": "none"}, "model.lrn")):
        with pytest.raises(UserError, match=named):
            init_from(path, replace(model.config, **change), basis, 1.0, {})  # type: ignore[arg-type]


def test_other_classes_and_another_mean(tmp_path: Path, basis: Eigenbasis) -> None:
    """Another number of classes: fc8 is the run's own, and the message says so; so it does of a mean that differs."""
    theirs = AlexNet(replace(CONFIG, num_classes=7, dropout=0.1))
    inputs = {"mean": [1.0, 2.0, 3.0], "std": 1.0}
    (tmp_path / "w.safetensors").write_bytes(weights_bytes(theirs.state_dict(), theirs.config, inputs))
    own = AlexNet(CONFIG).state_dict()
    state, message = init_from(tmp_path / "w.safetensors", CONFIG, basis, 1.0, own)
    assert "10 classes instead of 7" in message and "(1.0, 2.0, 3.0)" in message
    expected = theirs.state_dict() | {name: own[name] for name in ("fc8.weight", "fc8.bias")}
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)


def test_torchvisions(tmp_path: Path, basis: Eigenbasis) -> None:
    """A .pth under torchvision's names: the standard deviations of its channels move into conv1."""
    config = AlexNetConfig("torchvision", channels=(8, 8, 8, 8, 8), fc_dim=16, num_classes=10)
    model = AlexNet(config)
    torch.save({name: model.state_dict()[ours] for name, ours in OURS.items()}, tmp_path / "alexnet.pth")
    state, _ = init_from(tmp_path / "alexnet.pth", config, basis, 1.0, model.state_dict())
    ratio = (state["conv1.weight"] / model.state_dict()["conv1.weight"]).detach().numpy()
    np.testing.assert_allclose(1 / ratio[:, :, 0, 0], np.tile([58.395, 57.12, 57.375], (8, 1)), rtol=1e-5)


@pytest.mark.slow
def test_a_run_from_the_weights_of_another(tmp_path: Path, few: Path) -> None:
    """At a rate of next to nothing it ends with the weights that it started from, which a resume needs no more; its
    checkpoint, too, is a start. Of another network, or missing, they are refused before anything is written."""
    weights, run = tmp_path / "w.safetensors", tmp_path / "run"
    more = ("--optimizer.lr", "1e-12", "--train.epochs", "1", "--train.init_from")
    tiny(weights, few)  # of the paper's variant
    for name, message in (("none.safetensors", "none.safetensors"), ("w.safetensors", "model.variant")):
        assert message in train_refuses(*small_run(few, run, *more, str(tmp_path / name)))
    assert not run.exists()
    expected = tiny(weights, few, variant="original").state_dict()
    assert "starting from the weights of" in run_ok(*TRAIN, *small_run(few, run, *more, str(weights)))
    for name, tensor in final(run)["model"].items():  # type: ignore[attr-defined]
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-8)
    weights.unlink()
    assert "resuming from" in run_ok(*TRAIN, *small_run(few, run, *more, str(weights)))
    second = small_run(few, tmp_path / "two", *more, str(run))
    assert f"starting from the weights of {run}/checkpoints/step-{STEPS:08d}.pt" in run_ok(*TRAIN, *second)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("model", [1.0]),
        ("model", {"conv1.weight": None}),
        ("eigenbasis", {"mean": ["x", 1, 2], "eigenvalues": [1] * 3, "eigenvectors": np.eye(3).tolist()}),
        ("eigenbasis", 3),
        ("config", {"variant": 2**40}),
        ("config", {"fc_dim": 2**62}),
        ("config", {"fc_dim": 32}),
        ("config", []),
        ("mean_image", "x"),
    ],
)
def test_checkpoints_of_another_form(tmp_path: Path, basis: Eigenbasis, part: str, value: object) -> None:
    """Whole files whose content is not what a run writes, or contradicts itself: one sentence with the file, to read
    and to export."""
    config = replace(shipped("quickstart"), model=CONFIG).to_json()
    content = {"config": config, "model": AlexNet(CONFIG).state_dict(), "wnids": ["n0"] * 10}
    content |= {"eigenbasis": basis.to_json()}
    assert read_pretrained(save_checkpoint(tmp_path, 1, content, keep_last=2)).config == CONFIG
    if part == "config" and isinstance(value, dict):
        value = config | {"model": config["model"] | value}
    path = save_checkpoint(tmp_path, 2, {**content, part: value}, keep_last=2)
    for read in (read_pretrained, partial(export_weights, out=tmp_path / "out.safetensors")):
        with pytest.raises(UserError, match=f"^{path}: "):
            read(path)
    assert not (tmp_path / "out.safetensors").exists()
