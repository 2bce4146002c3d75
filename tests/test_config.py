"""A configuration is complete, checked, and explains itself; a run goes on only under its own."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, run_python, train_refuses
from train.config import Config, check_same_run, parse_config

REQUIRED = ["--data.shards", "s", "--run.dir", "r"]
QUICKSTART = ["--config", str(ROOT / "train/configs/quickstart.yaml"), *REQUIRED]


def fields(cls: Any, prefix: str = "") -> list[tuple[str, type, str]]:
    """(dotted name, owner, name) of every leaf field."""
    found = []
    for field in dataclasses.fields(cls):
        kind = field.type if isinstance(field.type, type) else None
        if kind is not None and dataclasses.is_dataclass(kind):
            found += fields(kind, f"{prefix}{field.name}.")
        else:
            found.append((f"{prefix}{field.name}", cls, field.name))
    return found


def test_every_docstring_is_in_help() -> None:
    """--help lists every field with the docstring that stands under it in the source."""
    import inspect

    done = run_python("-m", "train.run", "--help")
    shown = "".join(done.stdout.split())  # lines are wrapped at hyphens too
    assert done.returncode == 0
    names = fields(Config)
    assert len(names) > 30
    for dotted, owner, name in names:
        match = re.search(rf'^    {name}: [^\n]*\n    """(.*?)"""', inspect.getsource(owner), re.M | re.S)
        assert match, f"{dotted} has no docstring"
        assert f"--{dotted}" in shown
        assert "".join(match[1].split()) in shown, dotted


@pytest.mark.parametrize("path", sorted((ROOT / "train/configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs(path: Path) -> None:
    """Each parses; the command line wins over the file; its comments give its own command."""
    config = parse_config(
        ["--config", str(path), *REQUIRED, "--train.batch_size", "7", "--data.augmentation.lighting.strength", "0.3"]
    )
    assert (
        config.train.batch_size == 7
        and config.data.augmentation.lighting.strength == 0.3
        and config.data.shards == Path("s")
    )
    assert f"python -m train.run --config train/configs/{path.name}" in path.read_text()


def test_paper_is_the_paper() -> None:
    """The figures of sections 3 to 5."""
    config = parse_config(["--config", str(ROOT / "train/configs/paper.yaml"), *REQUIRED])
    assert (config.train.batch_size, config.train.epochs) == (128, 90)
    assert (config.optimizer.lr, config.optimizer.momentum, config.optimizer.weight_decay, config.optimizer.drops) == (
        0.01,
        0.9,
        5e-4,
        3,
    )
    assert (
        config.model.maps == (96, 256, 384, 384, 256)
        and config.model.hidden == 4096
        and config.model.num_classes == 1000
    )
    assert config.data.augmentation.lighting.convention == "eigenvalue"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.chanels", "[1]"], "model.chanels"),
        (["--data.augmentation.flip", "1.5"], "augmentation.flip is a probability"),
        (["--optimizer.lr", "fast"], "optimizer.lr"),
        (["--train.batch_size", "0"], "train.batch_size (0)"),
        (["--model.variant", "vgg"], "model.variant"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--run.device", "tpu"], "run.device"),
    ],
)
def test_wrong_values(arguments: list[str], message: str, tmp_path: Path) -> None:
    """One sentence that names the field, exit code 2, and no run directory."""
    assert message in train_refuses(*QUICKSTART[:4], "--run.dir", tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


def test_unknown_key_in_a_file(tmp_path: Path) -> None:
    """A typo in a YAML file is refused by name."""
    (tmp_path / "typo.yaml").write_text("train: {batch_size: 4, epochs: 1, seed: 0, epoch: 3}\n")
    assert "epoch" in train_refuses("--config", tmp_path / "typo.yaml", *REQUIRED)


def test_same_run() -> None:
    """Speed, logging, places and more epochs are free; anything else, fewer epochs too, is refused by name."""
    saved = parse_config(QUICKSTART).to_json()
    free = ["--run.log_every", "3", "--data.speed.threads", "1", "--train.epochs", "11", "--data.shards", "elsewhere"]
    check_same_run(saved, parse_config([*QUICKSTART, *free]).to_json())
    for name, value in [
        ("train.epochs", "9"),
        ("optimizer.lr", "0.1"),
        ("train.seed", "1"),
        ("data.augmentation.flip", "0"),
    ]:
        with pytest.raises(ValueError, match=re.escape(f"started with {name} = ")):
            check_same_run(saved, parse_config([*QUICKSTART, f"--{name}", value]).to_json())
