"""A configuration is complete, checked, and explains itself; a run goes on only under its own."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT, run_here, shipped, train_refuses
from train.config import Config, RateSchedule, check_same_run, parse_config

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

    done = run_here("-m", "train.run", "--help")
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
        [
            "--config",
            str(path),
            *REQUIRED,
            "--train.batch_size",
            "7",
            "--data.augmentation.lighting.strength",
            "0.3",
        ]
    )
    assert (
        config.train.batch_size == 7
        and config.data.augmentation.lighting.strength == 0.3
        and config.data.shards == Path("s")
    )
    assert f"python -m train.run --config train/configs/{path.name}" in path.read_text()


def test_paper_is_the_paper() -> None:
    """The figures of sections 2 to 5."""
    config = shipped("paper")
    optimizer, augmentation = config.optimizer, config.data.augmentation
    assert (config.train.batch_size, config.train.epochs, optimizer.schedule) == (128, 90, "plateau")
    assert (optimizer.lr, optimizer.momentum, optimizer.weight_decay, optimizer.max_drops) == (
        0.01,
        0.9,
        5e-4,
        3,
    )
    assert (optimizer.patience, optimizer.min_delta, optimizer.bias_lr) == (5, 0.1, None)
    assert config.model.conv_channels == (96, 256, 384, 384, 256) and config.model.normalization == "paper"
    assert (config.model.fc_dim, config.model.num_classes, config.model.dropout) == (
        4096,
        None,
        0.5,
    ) and config.model.outputs == 1000
    assert augmentation.lighting.convention == "eigenvalue" and augmentation.lighting.strength == 0.1
    assert (augmentation.crop, augmentation.flip, augmentation.mean) == ("random", 0.5, "image")


def test_alexnet2012_is_the_program() -> None:
    """The 2012 run, epoch by epoch: rates of conv1, of the other weights, of biases, and of colour noise."""
    config = shipped("alexnet2012")
    schedule, names = (
        RateSchedule(config.optimizer, config.train.epochs),
        ["conv1.weight", "fc8.weight", "fc8.bias"],
    )
    expected = {
        0: (1e-2, 1e-2),
        25: (1e-3, 1e-3),
        51: (1e-4, 1e-4),
        67: (1e-5, 1e-4),
        72: (0, 1e-4),
        79: (0, 1e-5),
    }
    assert config.train.epochs == 91 and config.model.normalization == config.model.variant == "original"
    for epoch in range(91):
        conv1, others = expected[max(begin for begin in expected if begin <= epoch)]
        assert tuple(schedule.rates(names).values()) == (conv1, others, 0.02)
        assert config.data.augmentation.lighting.at_epoch(epoch).strength == (0.1 if epoch < 67 else 0)
        schedule.end_epoch(50)
    assert config.data.augmentation.images_per_crop == 32 and config.optimizer.bias_weight_decay == 0


def test_fast() -> None:
    """The paper's rate, scaled by the batch, in bfloat16; down to nothing at the end."""
    config = shipped("fast")
    assert config.train.precision == "bf16" and config.train.compile and config.optimizer.schedule == "cosine"
    assert config.optimizer.lr / config.train.batch_size == pytest.approx(0.01 / 128)
    assert config.model.num_towers == 2 and config.parallel.mode == "single"


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
        (["--train.grad_accum_steps", "0"], "train.grad_accum_steps must be at least 1"),
        (["--train.grad_accum_steps", "5"], "a multiple of 5 for train.grad_accum_steps 5"),
        (
            ["--data.augmentation.images_per_crop", "5"],
            "a multiple of 5 for data.augmentation.images_per_crop 5",
        ),
        (["--data.augmentation.images_per_crop", "0"], "images_per_crop must be at least 1"),
        (
            ["--optimizer.warmup_epochs", "10"],
            "optimizer.warmup_epochs (10) must be less than train.epochs (10)",
        ),
        (["--optimizer.changes", "[{epoch: 3, lr: 0.1}]"], "optimizer.changes is of optimizer.schedule=hand"),
        (["--optimizer.changes", "[{epoch: 0, lr: 0.1}]"], "a change of rate is made at an epoch from 1 on"),
        (["--optimizer.changes", "[{epoch: 3, rate: 0.1}]"], "'rate' is not accepted"),
        (["--train.epoch", "3"], "--train.epoch"),
        (
            [
                "--model.channels",
                "[8,8,8,0,8]",
                "--optimizer.schedule",
                "hand",
                "--optimizer.steps",
                "[]",
                "--optimizer.changes",
                "[{epoch: 3, lr: 0.1, of: conv4}]",
            ],
            "sets a rate of conv4, which model.channels leaves out",
        ),
        (["--run.keep_every", "-1"], "run.keep_every must not be negative"),
        (["--data.augmentation.std", "0"], "augmentation.std must be positive, not 0"),
        (["--data.augmentation.mean", "image"], "mean_image.npy is missing, damaged or of other images"),
        (["--data.shuffle_buffer", "0"], "data.shuffle_buffer must be at least 1"),
        (["--data.decode", "gpu"], "data.decode=gpu needs a GPU; say data.decode=cpu"),
        (["--data.speed.prefetch_queue_depth", "0"], "speed.prefetch_queue_depth must be at least 1, not 0"),
        (["--data.speed.hw_decoder_load", "2"], "speed.hw_decoder_load is a share, 0 to 1, not 2"),
    ],
)
def test_wrong_values(arguments: list[str], message: str, tmp_path: Path, shards: Path) -> None:
    """One sentence that names the field, exit code 2, and no run directory."""
    place = ["--data.shards", shards, "--run.dir", tmp_path / "run", "--run.device", "cpu"]
    assert message in train_refuses(*QUICKSTART[:2], *place, *arguments)
    assert not (tmp_path / "run").exists()


def test_unknown_key_in_a_file(tmp_path: Path) -> None:
    """A typo in a YAML file is refused by name."""
    (tmp_path / "typo.yaml").write_text("train: {batch_size: 4, epochs: 1, seed: 0, epoch: 3}\n")
    assert "epoch" in train_refuses("--config", tmp_path / "typo.yaml", *REQUIRED)


def test_same_run() -> None:
    """Speed, logging, places and epochs to come are free; anything else, also epochs that have begun, is refused."""
    saved = parse_config(QUICKSTART).to_json()
    free = [
        "--run.log_every",
        "3",
        "--data.speed.threads",
        "1",
        "--train.epochs",
        "11",
        "--data.shards",
        "elsewhere",
    ]
    check_same_run(saved, parse_config([*QUICKSTART, *free]).to_json(), 10)
    for name, value in [
        ("train.epochs", "9"),
        ("optimizer.lr", "0.1"),
        ("train.seed", "1"),
        ("data.augmentation.flip", "0"),
    ]:
        with pytest.raises(ValueError, match=re.escape(name)):
            check_same_run(saved, parse_config([*QUICKSTART, f"--{name}", value]).to_json(), 10)
    spread = [*QUICKSTART, "--train.grad_accum_steps", "2"]  # fewer GPUs want more passes
    with pytest.raises(ValueError, match=r"started with train\.accumulate = 1"):
        check_same_run(saved, parse_config(spread).to_json(), 1)
    check_same_run(saved, parse_config([*spread, "--resume.allow_world_change", "true"]).to_json(), 1)
    cosine = [*QUICKSTART, "--optimizer.schedule", "cosine", "--optimizer.steps", "[]"]
    with pytest.raises(ValueError, match=r"train\.epochs: expected 10"):  # the curve would be another
        check_same_run(
            parse_config(cosine).to_json(), parse_config([*cosine, "--train.epochs", "11"]).to_json(), 1
        )


@pytest.mark.parametrize(
    ("epochs", "steps", "begun", "free"),
    [
        (9, "[8]", 9, True),
        (9, "[8]", 10, False),
        (10, "[8,9]", 9, True),
        (10, "[8,9]", 10, False),
        (10, "[5]", 5, True),
        (10, "[5]", 6, False),
    ],
)
def test_what_may_change_of_a_schedule(epochs: int, steps: str, begun: int, free: bool) -> None:
    """What it says of epochs after those that have begun; the quickstart has 10, its rate falls at the start of the
    eighth, counted from 0."""
    now = parse_config([*QUICKSTART, "--train.epochs", str(epochs), "--optimizer.steps", steps]).to_json()
    if free:
        check_same_run(parse_config(QUICKSTART).to_json(), now, begun)
    else:
        with pytest.raises(ValueError, match=r"train\.epochs: expected at least|optimizer\.steps may change"):
            check_same_run(parse_config(QUICKSTART).to_json(), now, begun)
