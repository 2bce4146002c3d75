"""Settings of a run: one dataclass per section, from a YAML file and the command line. Does not import torch, so that
--help and errors come at once.

    python -m train.run --config train/configs/NAME.yaml [--section.key value ...]     # or --config NAME

Values come from the file, then from the command line; unknown keys and bad values are refused in one sentence.
"""

import math
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from jsonargparse import set_parsing_settings

from model.settings import AlexNetConfig
from pipeline.errors import UserError
from pipeline.settings import DataConfig
from train.cli import Parser, check_renamed, expand_home, find_recipe

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")


@dataclass(frozen=True)
class RateChange:
    """One entry of `optimizer.changes`: a learning rate set by hand."""

    epoch: int
    """Epoch, counted from 0, at whose start it is made."""
    lr: float
    """The rate from there on; 0 freezes these parameters and their velocity."""
    of: str = "weights"
    """Which parameters: weights, biases, or the weights of one layer, such as conv1."""

    def __post_init__(self) -> None:
        if self.epoch < 1 or not 0 <= self.lr < math.inf:
            raise ValueError(
                f"optimizer.changes: expected an epoch from 1 on and a rate from 0 on, got {self}"
            )
        if self.of not in ("weights", "biases", *LAYERS):
            raise ValueError(f"optimizer.changes: expected weights, biases or one of {LAYERS}, got {self.of}")


@dataclass(frozen=True)
class OptimizerConfig:
    """Update rule (section 5 of the paper) and learning rate schedule."""

    lr: float = 0.01
    """Learning rate at the start."""
    momentum: float = 0.9
    """Factor on the velocity."""
    weight_decay: float = 5e-4
    """Weight decay, multiplied by the rate."""
    bias_lr: float | None = None
    """Learning rate of biases at the start (2012 program: .02); by default `lr`. It falls as that of the weights does;
    with `manual` only changes with `of: biases` apply to it."""
    bias_weight_decay: float | None = None
    """Weight decay of biases (2012 program: 0); by default `weight_decay`, as in the paper's text."""
    schedule: Literal["plateau", "steps", "manual", "cosine"] = "plateau"
    """plateau: divide the rate by 10 when the validation error stalls; steps: divide it by 10 at the epochs in `steps`;
    manual: set it by `changes`; cosine: lower it to 0 at the last epoch's end along half a cosine."""
    warmup_epochs: float = 0.0
    """Number of epochs of linear warm-up from 0; large batches need it."""
    patience: int = 5
    """plateau: epochs without a better centre-crop top-1 error before the rate falls."""
    min_delta: float = 0.1
    """plateau: percentage points by which an error must be lower to count as better."""
    max_drops: int = 3
    """plateau: number of times the rate falls (the paper: three); the next plateau ends the training."""
    steps: tuple[int, ...] = ()
    """steps: epochs, counted from 0, at whose start the rate is divided by 10."""
    changes: tuple[RateChange, ...] = ()
    """manual: learning rates by epoch, such as {epoch: 67, of: conv1, lr: 0.00001}."""

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "bias_lr", "bias_weight_decay", "warmup_epochs", "min_delta"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"optimizer.{name}: expected a finite number from 0 on, got {value}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optimizer.momentum: expected 0 to 1, 1 excluded, got {self.momentum}")
        if self.patience < 1 or self.max_drops < 0:
            raise ValueError(
                f"optimizer.patience: expected at least 1, got {self.patience}; optimizer.max_drops: at least 0, got "
                f"{self.max_drops}"
            )
        if list(self.steps) != sorted(set(self.steps)) or any(epoch < 1 for epoch in self.steps):
            raise ValueError(f"optimizer.steps: expected rising epochs from 1 on, got {self.steps}")
        if len({(change.epoch, change.of) for change in self.changes}) < len(self.changes):
            raise ValueError(
                "optimizer.changes sets one rate twice at the same epoch; leave one of the two out"
            )
        for name, schedule in (("steps", "steps"), ("changes", "manual")):
            if getattr(self, name) and self.schedule != schedule:
                raise ValueError(
                    f"optimizer.{name} needs optimizer.schedule {schedule}, got {self.schedule}; set that, or "
                    f"optimizer.{name} []"
                )


@dataclass(frozen=True)
class TrainConfig:
    """How the network is trained."""

    batch_size: int
    """Images per update, over all processes (the paper: 128)."""
    epochs: int
    """Passes over the training images, at most (the paper: roughly 90)."""
    seed: int
    """Seed of weights, dropout, shuffling, crops, flips and lighting."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """bf16: convolutions and matrix products in bfloat16, weights in float32; fp16: in float16, with loss scaling."""
    grad_accum_steps: int = 1
    """Forward and backward passes per update, each over that fraction of the batch, for less memory."""
    compile: bool = True
    """Compile with torch.compile: on a GPU the whole network and the update, on a CPU the response normalization."""
    init_from: Path | None = None
    """Start from these weights: a checkpoint, a .safetensors file or torchvision's .pth; with another number of classes
    all but fc8."""

    def __post_init__(self) -> None:
        if min(self.grad_accum_steps, self.batch_size, self.epochs) < 1:
            raise ValueError(
                f"train.batch_size ({self.batch_size}), train.epochs ({self.epochs}) and train.grad_accum_steps "
                f"({self.grad_accum_steps}) must be at least 1"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"train.seed: expected 0..2^63-1, got {self.seed}")


@dataclass(frozen=True)
class RunConfig:
    """Where a run computes and writes, and how often."""

    dir: Path
    """Run directory; a run that was stopped resumes from it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    deterministic: bool = False
    """On a GPU, use only operations that give the same bits every time, which are slower (on a CPU all do)."""
    log_every: int = 250
    """Steps between rows in metrics.jsonl."""
    save_minutes: float = 10.0
    """Minutes between checkpoints, which are also written at the end of each epoch."""
    keep_last: int = 3
    """Number of newest checkpoints to keep; the best one, by centre top-1 error, is kept as well."""
    keep_every: int = 0
    """Keep the checkpoint of every N-th epoch's end for good; 0: none."""
    profile_steps: int = 0
    """Record this many steps, after the first eleven, as a Chrome trace in the run directory; 0: none."""

    def __post_init__(self) -> None:
        if min(self.log_every, self.keep_last) < 1:
            raise ValueError(
                f"run.log_every ({self.log_every}) and run.keep_last ({self.keep_last}) must be at least 1"
            )
        if not min(self.keep_every, self.profile_steps, self.save_minutes) >= 0 or math.isnan(
            self.save_minutes
        ):
            raise ValueError(
                f"run.keep_every ({self.keep_every}), run.profile_steps ({self.profile_steps}) and run.save_minutes "
                f"({self.save_minutes}) must not be negative"
            )


@dataclass(frozen=True)
class ParallelConfig:
    """How a run is spread over the processes of a torchrun."""

    mode: Literal["replicas", "towers"] = "replicas"
    """replicas: the whole network in every process, gradients are averaged. towers: one tower in each of two
    neighbouring processes, gradients are averaged over such pairs; docs/towers.md says when that pays."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    data: DataConfig
    """Images."""
    train: TrainConfig
    """Training."""
    run: RunConfig
    """Output."""
    model: AlexNetConfig = field(default_factory=AlexNetConfig)
    """Network."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Update rule."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Several processes."""

    def __post_init__(self) -> None:
        if self.optimizer.warmup_epochs >= self.train.epochs:
            raise ValueError(
                f"optimizer.warmup_epochs: expected less than train.epochs, got {self.optimizer.warmup_epochs:g} and "
                f"{self.train.epochs}; take {self.train.epochs - 1} or less, or more epochs"
            )
        for change in self.optimizer.changes:
            if change.of in LAYERS[:5] and not self.model.conv_channels[LAYERS.index(change.of)]:
                raise ValueError(
                    f"optimizer.changes sets a rate of {change.of}, which model.channels leaves out"
                )

    def with_classes(self, classes: int) -> "Config":
        """Return this configuration with `model.num_classes` set to `classes`, unless it was set already."""
        known = self.model.num_classes is not None
        return self if known else replace(self, model=replace(self.model, num_classes=classes))

    def to_json(self) -> dict[str, Any]:
        """Convert to nested dicts of plain values, as in config.yaml and checkpoints."""
        return to_plain(asdict(self))


def to_plain(value: Any) -> Any:
    """Convert paths to text and tuples to lists, at every depth."""
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def parse_config(arguments: list[str] | None = None) -> Config:
    """Read a configuration from the command line (`sys.argv` by default).

    Exits with code 2 and one sentence when an option is unknown or its value is wrong.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(
        prog="python -m train.run",
        usage="%(prog)s --config FILE --data.shards DIR --run.dir DIR [--section.key VALUE ...]\n"
        "       %(prog)s --run.dir DIR    (resume)",
    )
    config_help = "YAML file with any of the options below; paper, fast and others are found by name."
    parser.add_argument("--config", action="config", help=config_help)
    parser.add_class_arguments(Config)
    try:
        words = add_saved_config(split_pairs(sys.argv[1:] if arguments is None else arguments))
        for word in words:
            if word.startswith("--"):
                check_renamed(word[2:].partition("=")[0], "command line")
        parsed = parser.instantiate(parser.parse_args(words))
        return Config(**{name: parsed[name] for name in Config.__dataclass_fields__})
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


def split_pairs(arguments: list[str]) -> list[str]:
    """Split `--config=FILE` and `--run.dir=DIR` into two words, and replace the names of recipes by their paths."""
    pairs = ("--config=", "--run.dir=")
    words = [
        word for each in arguments for word in (each.split("=", 1) if each.startswith(pairs) else [each])
    ]
    before = ["", *words]
    return [str(find_recipe(word)) if before[k] == "--config" else word for k, word in enumerate(words)]


def refuse_old_run(directory: Path) -> None:
    """Raise `UserError` for the run directory of a version 0.1, by its files."""
    if (directory / "lock").is_file() and (directory / "checkpoints").is_dir():
        raise UserError(
            f"{directory}: expected a run of this version, got one of 0.1; start a new run from its weights: "
            f"--train.init_from {directory}, and another --run.dir"
        )


REQUIRED = {"--data.shards", "--train.batch_size", "--train.epochs", "--train.seed"}
"""Options without a default, apart from `--run.dir`."""


def add_saved_config(words: list[str]) -> list[str]:
    """Add `--config` with the saved configuration if `--run.dir` names an earlier run and no configuration is given.

    Raises `UserError` if a directory alone is given and holds no run.
    """
    given = {word.partition("=")[0] for word in words}
    if "--config" in given or "--run.dir" not in words[:-1] or given >= REQUIRED:
        return words
    directory = expand_home(words[words.index("--run.dir") + 1])
    refuse_old_run(directory)
    if (directory / "run.lock").is_file() and (directory / "config.yaml").is_file():
        return ["--config", str(directory / "config.yaml"), *words]
    if "--data.shards" not in given:
        raise UserError(
            f"{directory}: expected a run of this version to resume, found none; give an earlier run's --run.dir, or "
            "--config FILE and --data.shards SHARDS"
        )
    return words


def check_same_run(saved: dict[str, Any], now: dict[str, Any], epochs_begun: int) -> None:
    """Raise `UserError` for a setting with which a run cannot resume, given both configurations as JSON.

    These may differ: sections `run` (except the device), `data.speed` and `parallel`; `data.on_corrupt` and
    `train.grad_accum_steps`; the paths of shards and eigenbasis, whose content is compared elsewhere; what a schedule
    sets for epochs after the first `epochs_begun`.
    """
    before, after = flatten(saved), flatten(now)
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        may_differ = name.startswith(("run.", "data.speed.", "parallel.")) and name != "run.device"
        may_differ |= name in ("data.shards", "data.eigenbasis", "data.on_corrupt", "train.grad_accum_steps")
        if may_differ or old == new:
            continue
        if name in ("optimizer.steps", "optimizer.changes"):
            fixed = list_changes_before(old, epochs_begun)
            if fixed == list_changes_before(new, epochs_begun):
                continue
            raise UserError(
                f"{name}: the run is in epoch {epochs_begun}, expected {fixed or 'nothing'} before that; keep this and "
                "change only later epochs"
            )
        if name == "train.epochs" and after["optimizer.schedule"] != "cosine":
            if new is not None and new >= epochs_begun:
                continue
            raise UserError(
                f"train.epochs: expected at least {epochs_begun}, the run's epoch, got {new}; give more"
            )
        raise UserError(
            f"{name}: expected {old}, with which this run was started, got {new}; use {old}, or another --run.dir"
        )


def list_changes_before(changes: Any, epochs_begun: int) -> list[Any]:
    """List those of `optimizer.steps` or `optimizer.changes` that applied in the first `epochs_begun` epochs."""
    return [
        each for each in changes or () if (each["epoch"] if isinstance(each, dict) else each) < epochs_begun
    ]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
