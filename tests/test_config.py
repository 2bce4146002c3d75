"""A configuration is complete, checked and documented; a run resumes only under its own; old names are refused."""

import dataclasses
import inspect
import re
import runpy
import shlex
from argparse import ArgumentParser, _SubParsersAction
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.errors import UserError
from tests.helpers import ROOT, run_ok, shipped, train_refuses
from train import cli
from train.cli import RENAMED
from train.config import Config, check_same_run, parse_config
from train.optimizer import LRSchedule

PLACE = ["--data.shards", "s", "--run.dir", "r"]
QUICKSTART = ["--config", "quickstart", *PLACE]


def leaves(cls: Any, prefix: str = "") -> dict[str, Any]:
    """The dataclass of every setting, by dotted name."""
    found = {}
    for field in dataclasses.fields(cls):
        name = f"{prefix}{field.name}"
        section = dataclasses.is_dataclass(field.type)
        found |= leaves(field.type, f"{name}.") if section else {name: cls}
    return found


def test_every_docstring_is_in_help() -> None:
    """--help lists every setting with the docstring that stands under it in the source."""
    shown = "".join(run_ok("-m", "train.run", "--help").split())  # lines are wrapped at hyphens too
    for dotted, owner in leaves(Config).items():
        name = dotted.rpartition(".")[2]
        match = re.search(rf'^    {name}: [^\n]*\n    """(.*?)"""', inspect.getsource(owner), re.M | re.S)
        assert match, f"{dotted} has no docstring"
        assert f"--{dotted}" in shown and "".join(match[1].split()) in shown, dotted


def option_names(parser: ArgumentParser) -> set[str]:
    """Names of the options that a program takes, those of its subcommands too."""
    own = [each for each in parser._actions if each.dest not in ("help", "config", "print_config")]
    groups = [each for each in own if isinstance(each, _SubParsersAction)]
    subcommands = (option_names(sub) for group in groups for sub in group.choices.values())
    return {each.dest for each in own if each.option_strings}.union(*subcommands)


def test_the_number_of_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of a run and options of all programs, each counted once in a program, stay few enough to know."""

    def stop(parser: ArgumentParser, *args: Any, **kwargs: Any) -> None:
        raise SystemExit(option_names(parser))

    monkeypatch.setattr(cli.Parser, "parse_args", stop)
    options: dict[str, Any] = {"train.run": leaves(Config)}
    for path in [*(ROOT / "tools").glob("*.py"), ROOT / "train/evaluate.py"]:
        if "__main__" in path.read_text() and path.stem != "doctor_probe":  # which doctor.py starts
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(path), run_name="__main__")
            options[path.stem] = ended.value.code
    assert len(options) > 10 and min(map(len, options.values())) > 0
    assert sum(map(len, options.values())) <= 115, options


@pytest.mark.parametrize("path", sorted((ROOT / "train/configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs(path: Path) -> None:
    """Each parses; the command line wins over the file; its comments give its own command."""
    more = ["--train.batch_size", "7", "--data.augmentation.lighting.strength", "0.3"]
    config = parse_config(["--config", str(path), *PLACE, *more])
    assert (config.train.batch_size, config.data.augmentation.lighting.strength) == (7, 0.3)
    assert f"python -m train.run --config train/configs/{path.name}" in path.read_text()


def test_paper_is_the_paper() -> None:
    """The figures of sections 2 to 5; `fast` scales the rate by the batch."""
    config, fast = shipped("paper"), shipped("fast")
    rule, model, augmentation = config.optimizer, config.model, config.data.augmentation
    assert (config.train.batch_size, config.train.epochs, rule.schedule) == (128, 90, "plateau")
    assert (rule.lr, rule.momentum, rule.weight_decay, rule.bias_lr) == (0.01, 0.9, 5e-4, None)
    assert (rule.patience, rule.min_delta, rule.max_drops) == (5, 0.1, 3)
    assert model.conv_channels == (96, 256, 384, 384, 256) and model.normalization == "paper"
    assert (model.fc_dim, model.outputs, model.dropout) == (4096, 1000, 0.5)
    assert (augmentation.lighting.convention, augmentation.lighting.strength) == ("eigenvalue", 0.1)
    assert (augmentation.crop, augmentation.flip, augmentation.mean) == ("random", 0.5, "image")
    assert fast.optimizer.lr / fast.train.batch_size == pytest.approx(rule.lr / 128)


def test_alexnet2012_is_the_program() -> None:
    """The 2012 run, epoch by epoch: rates of conv1, of the other weights, of biases, and of colour noise (layers-145 of
    computerhistory/AlexNet-Source-Code)."""
    config = shipped("alexnet2012")
    schedule = LRSchedule(config.optimizer, config.train.epochs)
    first = (0, 25, 51, 67, 72, 79)
    conv1, others = (1e-2, 1e-3, 1e-4, 1e-5, 0, 0), (1e-2, 1e-3, 1e-4, 1e-4, 1e-4, 1e-5)
    assert config.train.epochs == 91 and config.model.normalization == config.model.variant == "original"
    for epoch in range(91):
        k = sum(epoch >= each for each in first) - 1
        assert tuple(map(schedule.lr, ("conv1", "weights", "biases"))) == (conv1[k], others[k], 0.02)
        assert config.data.augmentation.lighting.at_epoch(epoch).strength == (0.1 if epoch < 67 else 0)
        schedule.end_epoch(50)
    assert config.data.augmentation.images_per_crop == 32 and config.optimizer.bias_weight_decay == 0


MANUAL = "--optimizer.schedule manual --optimizer.steps [] --optimizer.changes"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--model.chanels [1]", "model.chanels"),
        ("--train.batch_size 0", "train.batch_size (0)"),
        ("--train.grad_accum_steps 5", "expected a multiple of 5 for train.grad_accum_steps 5, got 32"),
        ("--model.fc_dim 63", "model.fc_dim"),
        ("--run.save_minutes .nan", "run.save_minutes (nan)"),
        ("--data.augmentation.flip 1.5", "augmentation.flip"),
        ("--data.augmentation.mean image", "mean_image.npy"),
        ("--parallel.mode towers", "expected an even number of processes, got 1"),
        ("--optimizer.warmup_epochs 10", "optimizer.warmup_epochs: expected less than train.epochs"),
        (f"{MANUAL} '[{{epoch: 3, rate: 0.1}}]'", "rate"),
        (f"{MANUAL} '[{{epoch: 3, lr: 0.1, of: conv4}}]' --model.channels [8,8,8,0,8]", "a rate of conv4"),
    ],
)
def test_wrong_values(words: str, named: str, tmp_path: Path, shards: Path) -> None:
    """One sentence that names the setting, exit code 2, and no run directory."""
    place = ["--data.shards", shards, "--run.dir", tmp_path / "run", "--run.device", "cpu"]
    assert named in train_refuses(*QUICKSTART[:2], *place, *shlex.split(words))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("old", RENAMED)
def test_old_names_are_refused(old: str, tmp_path: Path) -> None:
    """Of version 0.1, on the command line and in a file; the sentence has the new name, which is a setting."""
    new, content = RENAMED[old] or f"{old} was removed", 3
    assert not RENAMED[old] or RENAMED[old] in leaves(Config)
    for key in reversed(old.split(".")):
        content = {key: content}  # type: ignore[assignment]
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(content))
    for words in ([f"--{old}", "3"], [f"--{old}=3"], ["--config", str(tmp_path / "old.yaml")]):
        assert new in train_refuses(*QUICKSTART, *words)


def config_of(*words: str) -> dict[str, Any]:
    """The quickstart's, with changes, as in a checkpoint."""
    return parse_config([*QUICKSTART, *words]).to_json()


def test_same_run() -> None:
    """Speed, processes, logging, places and epochs to come are free; anything else is refused by name."""
    free = "--run.log_every 3 --data.speed.threads 1 --train.epochs 11 --data.shards a --data.eigenbasis b"
    free += " --data.on_corrupt skip --train.grad_accum_steps 2 --parallel.mode towers"
    check_same_run(config_of(), config_of(*free.split()), 10)
    other = "optimizer.lr=0.1 train.seed=1 data.augmentation.flip=0 run.device=cpu data.shuffle=blocks"
    for word in other.split():
        with pytest.raises(UserError, match=re.escape(word.partition("=")[0])):
            check_same_run(config_of(), config_of(f"--{word}"), 10)
    cosine = ("--optimizer.schedule", "cosine", "--optimizer.steps", "[]")
    with pytest.raises(UserError, match=r"train\.epochs: expected 10"):  # the curve would be another
        check_same_run(config_of(*cosine), config_of(*cosine, "--train.epochs", "11"), 1)
