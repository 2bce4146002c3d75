"""A run starts from weights of any origin, if they are of its network; what does not fit is told."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.alexnet import AlexNet, AlexNetConfig
from model.weights import weights_bytes
from pipeline.eigenbasis import Eigenbasis
from pipeline.errors import UserError
from tests.helpers import ROOT, STEPS, TRAIN, final, run_ok, small_run, tiny, train_refuses
from tools.export_weights import export_weights
from train.checkpoint import save_checkpoint
from train.config import parse_config
from train.pretrained import init_from, read_pretrained

CONFIG = AlexNetConfig("original", channels=(8, 16, 16, 16, 16), fc_dim=64, num_classes=10)


def test_the_same_network(tmp_path: Path, shards: Path, basis: Eigenbasis) -> None:
    """Tensors as they are; for images divided by 2, conv1 doubles."""
    model = tiny(tmp_path / "w.safetensors", shards)
    config, own = model.config, AlexNet(model.config).state_dict()
    for std in (1.0, 2.0):
        state, told = init_from(tmp_path / "w.safetensors", config, basis, std, own)
        assert told == f"starting from the weights of {tmp_path / 'w.safetensors'}"
        for name, tensor in model.state_dict().items():
            assert torch.equal(state[name], tensor * std if name == "conv1.weight" else tensor)


def test_other_classes_and_another_mean(tmp_path: Path, basis: Eigenbasis) -> None:
    """Another number of classes: fc8 is the run's own, and it is said; so is a mean that differs."""
    theirs = AlexNet(replace(CONFIG, num_classes=7, dropout=0.1))
    inputs = {"mean": [1.0, 2.0, 3.0], "std": 1.0}
    (tmp_path / "w.safetensors").write_bytes(weights_bytes(theirs.state_dict(), theirs.config, inputs))
    own = AlexNet(CONFIG).state_dict()
    state, told = init_from(tmp_path / "w.safetensors", CONFIG, basis, 1.0, own)
    assert "10 classes instead of 7" in told and "(1.0, 2.0, 3.0)" in told
    assert torch.equal(state["fc8.weight"], own["fc8.weight"]) and torch.equal(
        state["fc7.weight"], theirs.state_dict()["fc7.weight"]
    )
    AlexNet(CONFIG).load_state_dict(state)


def test_torchvisions(tmp_path: Path, basis: Eigenbasis) -> None:
    """A .pth under torchvision's names: the standard deviations of its channels move into conv1."""
    config = AlexNetConfig("torchvision", channels=(8, 8, 8, 8, 8), fc_dim=16, num_classes=10)
    model = AlexNet(config)
    from model.weights import OURS

    torch.save({name: model.state_dict()[ours] for name, ours in OURS.items()}, tmp_path / "alexnet.pth")
    state, _ = init_from(tmp_path / "alexnet.pth", config, basis, 1.0, model.state_dict())
    ratio = (state["conv1.weight"] / model.state_dict()["conv1.weight"]).detach().numpy()
    np.testing.assert_allclose(1 / ratio[:, :, 0, 0], np.tile([58.395, 57.12, 57.375], (8, 1)), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc_dim": 32}, "expected model.fc_dim 32, as this run has it, got 64"),
        ({"lrn": "none"}, "model.lrn"),
        ({"activation": "tanh"}, "model.activation"),
    ],
)
def test_another_network(
    tmp_path: Path, basis: Eigenbasis, shards: Path, change: dict[str, object], message: str
) -> None:
    """Refused with the field."""
    tiny(tmp_path / "w.safetensors", shards, variant="original")
    config = replace(CONFIG, **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=re.escape(message)):
        init_from(tmp_path / "w.safetensors", config, basis, 1.0, AlexNet(config).state_dict())


def test_a_checkpoint_that_contradicts_itself(tmp_path: Path, basis: Eigenbasis) -> None:
    """Tensors of another network than its configuration tells: one sentence with the file."""
    place = ["--config", str(ROOT / "train/configs/quickstart.yaml"), "--data.shards", "s", "--run.dir", "r"]
    small = ["--model.channels", "[8,16,16,16,16]", "--model.fc_dim", "64"]
    config = parse_config([*place, *small])
    content = {"config": config.to_json(), "model": AlexNet(config.model).state_dict(), "wnids": ["n0"] * 10}
    content |= {"eigenbasis": basis.to_json()}
    assert read_pretrained(save_checkpoint(tmp_path, 1, content, keep_last=2)).config == config.model
    content["config"] = parse_config([*place, *small, "--model.fc_dim", "32"]).to_json()
    path = save_checkpoint(tmp_path, 2, content, keep_last=2)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: "):
        read_pretrained(path)


def test_refused_before_anything_is_written(tmp_path: Path, few: Path) -> None:
    """A missing file and one of another network."""
    tiny(tmp_path / "w.safetensors", few)  # of the paper's variant
    for name, message in (("none.safetensors", "none.safetensors"), ("w.safetensors", "model.variant")):
        more = ["--train.init_from", str(tmp_path / name)]
        assert message in train_refuses(*small_run(few, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_from_the_weights_of_another(tmp_path: Path, few: Path) -> None:
    """At a rate of next to nothing it ends with the weights that it started from, going on or not."""
    tiny(tmp_path / "w.safetensors", few, variant="original")
    more = [
        "--train.init_from",
        str(tmp_path / "w.safetensors"),
        "--optimizer.lr",
        "1e-12",
        "--train.epochs",
        "1",
    ]
    assert "starting from the weights of" in run_ok(*TRAIN, *small_run(few, tmp_path / "run", *more))
    expected = (
        AlexNet(CONFIG).state_dict()
        | init_from(
            tmp_path / "w.safetensors", CONFIG, Eigenbasis(np.zeros(3), np.zeros(3), np.eye(3)), 1.0, {}
        )[0]
    )
    for name, tensor in final(tmp_path / "run")["model"].items():  # type: ignore[attr-defined]
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-8)
    (tmp_path / "w.safetensors").unlink()  # what it started from is needed no more
    assert "resuming from" in run_ok(*TRAIN, *small_run(few, tmp_path / "run", *more))
    begun = tmp_path / "run" / "checkpoints"
    tiny(tmp_path / "w.safetensors", few, variant="original", num_classes=10)
    second = ["--train.init_from", str(begun / f"step-{STEPS:08d}.pt"), *more[2:]]
    assert f"starting from the weights of {begun}" in run_ok(
        *TRAIN, *small_run(few, tmp_path / "two", *second)
    )


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("model", [1.0]),
        ("model", {"conv1.weight": None}),
        (
            "eigenbasis",
            {
                "mean": ["x", 1, 2],
                "eigenvalues": [1, 1, 1],
                "eigenvectors": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
            },
        ),
        (
            "eigenbasis",
            {
                "mean": [[1], 1, 2],
                "eigenvalues": [1, 1, 1],
                "eigenvectors": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
            },
        ),
        ("eigenbasis", 3),
        ("config", {"model": {"variant": 2**40}}),
        ("config", {"model": {"fc_dim": 2**62}}),
        ("config", []),
        ("mean_image", "x"),
    ],
)
def test_checkpoints_of_another_form(tmp_path: Path, basis: Eigenbasis, part: str, value: object) -> None:
    """Whole files whose content is not what a run writes: one sentence with the file, to read and to export."""
    place = ["--config", str(ROOT / "train/configs/quickstart.yaml"), "--data.shards", "s", "--run.dir", "r"]
    config = parse_config([*place, "--model.channels", "[8,16,16,16,16]", "--model.fc_dim", "64"])
    content = {"config": config.to_json(), "model": AlexNet(config.model).state_dict(), "wnids": ["n0"] * 10}
    content |= {"eigenbasis": basis.to_json()}
    if part == "config" and isinstance(value, dict):
        value = {**config.to_json(), "model": {**config.to_json()["model"], **value["model"]}}
    path = save_checkpoint(tmp_path, 1, {**content, part: value}, keep_last=2)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: "):
        read_pretrained(path)
    if part in ("model", "config"):
        with pytest.raises(UserError, match=f"^{re.escape(str(path))}: "):
            export_weights(path, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
