"""What a run is: one dataclass per part, each beside the code that reads it, put together here.

    python -m train.run --config train/configs/NAME.yaml [--section.key value ...]     # or --config NAME

Values come from the file, then from the command line; unknown keys and bad values are refused in one sentence.
"""

import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from jsonargparse import set_parsing_settings

from model.settings import AlexNetConfig
from pipeline.settings import DataConfig
from train.program import Parser, told_once
from train.recipe import find_recipe
from train.schedule import LAYERS, OptimizerConfig


@dataclass(frozen=True)
class TrainConfig:
    """How the network is trained."""

    batch_size: int
    """Images per update, over all processes (the paper: 128)."""
    epochs: int
    """Passes over the training images, at most (the paper: roughly 90)."""
    seed: int
    """Seed of weights, dropout, shuffling, windows, flips and lighting."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """bf16: convolutions and matrix products in bfloat16, weights in float32; fp16: in float16, with a scaled loss."""
    accumulate: int = 1
    """Forward and backward passes per update: each sees so much smaller a batch, and memory need hold no more."""
    compile: bool = True
    """Compile the local response normalization (on a GPU: the whole network and the update) with torch.compile."""
    weights: Path | None = None
    """Start from these weights: a checkpoint, a .safetensors file or torchvision's .pth; of another number of classes
    all but fc8."""

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise ValueError(f"train.accumulate must be at least 1, not {self.accumulate}")
        if self.batch_size < 1 or self.epochs < 1:
            raise ValueError(
                f"train.batch_size ({self.batch_size}) and train.epochs ({self.epochs}) must be at least 1"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"train.seed must lie in 0..2^63-1, not {self.seed}")


@dataclass(frozen=True)
class RunConfig:
    """Where a run computes and writes, and how often."""

    dir: Path
    """Run directory; a run that was stopped resumes from it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the first GPU if there is one."""
    deterministic: bool = False
    """Only operations that give the same bits every time on a GPU, too (a CPU's always do); slower there."""
    log_every: int = 50
    """Steps between rows in metrics.jsonl."""
    save_every: int = 1000
    """Steps between checkpoints, which are also written at the end of each epoch."""
    keep: int = 3
    """Newest checkpoints to keep; the best one, by centre top-1 error, stays, too."""
    keep_every: int = 0
    """Keep the checkpoint at the end of every so many epochs for good; 0: of none."""

    def __post_init__(self) -> None:
        if min(self.log_every, self.save_every, self.keep) < 1:
            raise ValueError("run.log_every, run.save_every and run.keep must be at least 1")
        if self.keep_every < 0:
            raise ValueError(f"run.keep_every must not be negative, but is {self.keep_every}")


@dataclass(frozen=True)
class ParallelConfig:
    """How a run is spread over the processes of a torchrun."""

    placement: Literal["single", "towers"] = "single"
    """single: the whole network in every process, gradients are averaged. towers: one tower in each of two neighbouring
    processes, which decode half of their images each; gradients are averaged over such pairs. docs/towers.md: when
    that pays."""


@dataclass(frozen=True)
class ResumeConfig:
    """How a run resumes."""

    allow_world_change: bool = False
    """Resume under another number of processes or another placement, from the end of an epoch: of the last one that a
    kept checkpoint has. Order and augmentation are other ones from there."""


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
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    """Resuming."""

    def __post_init__(self) -> None:
        if self.optimizer.warmup_epochs >= self.train.epochs:
            raise ValueError(
                f"optimizer.warmup_epochs ({self.optimizer.warmup_epochs:g}) must be less than train.epochs "
                f"({self.train.epochs}); give --optimizer.warmup_epochs {self.train.epochs - 1} or less, or more epochs"
            )
        for change in self.optimizer.changes:
            if change.of in LAYERS[:5] and not self.model.conv_channels[LAYERS.index(change.of)]:
                raise ValueError(
                    f"optimizer.changes sets a rate of {change.of}, which model.channels leaves out"
                )

    def with_classes(self, classes: int) -> "Config":
        """The same for shards of so many classes, unless `model.num_classes` says how many there have to be."""
        known = self.model.num_classes is not None
        return self if known else replace(self, model=replace(self.model, num_classes=classes))

    def to_json(self) -> dict[str, Any]:
        """Nested dicts of plain values, as written to config.yaml and into checkpoints."""
        return plain(asdict(self))


def parse_config(arguments: list[str] | None = None) -> Config:
    """Read a configuration from the command line (`sys.argv` by default).

    Leaves the process with code 2 and one sentence when an option is unknown or of the wrong type; raises `ValueError`
    when a value is out of range.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(
        prog="python -m train.run",
        usage="%(prog)s --config FILE --data.shards DIR --run.dir DIR [--section.key VALUE ...]\n"
        "       %(prog)s --run.dir DIR    (resume)",
    )
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file with any of the options below; paper, fast and others are there by name.",
    )
    parser.add_class_arguments(Config)
    with told_once():
        words = add_saved_config(split_pairs(sys.argv[1:] if arguments is None else arguments))
        parsed = parser.instantiate(parser.parse_args(with_recipes(words)))
        return Config(
            parsed.data,
            parsed.train,
            parsed.run,
            parsed.model,
            parsed.optimizer,
            parsed.parallel,
            parsed.resume,
        )


def split_pairs(arguments: list[str]) -> list[str]:
    """`--config=FILE` and `--run.dir=DIR` as two words, as all others may stay."""
    pairs = ("--config=", "--run.dir=")
    return [word for each in arguments for word in (each.split("=", 1) if each.startswith(pairs) else [each])]


SECTIONS = (b"data:", b"\ntrain:", b"\nrun:", b"\nmodel:", b"\noptimizer:")
"""What the configuration of a run of ours has in it."""
REQUIRED = {"--data.shards", "--train.batch_size", "--train.epochs", "--train.seed"}
"""Options without a default, but for `--run.dir`."""


def is_run_config(path: Path) -> bool:
    """Whether a file is the config.yaml of a run."""
    return path.is_file() and all(section in path.read_bytes() for section in SECTIONS)


def add_saved_config(words: list[str]) -> list[str]:
    """The same, with the configuration that a run was started with where `--run.dir` names its directory and the rest
    is no configuration of its own: what else is given comes on top. Raises `ValueError` where a directory alone is
    given and holds no run."""
    named = {word.partition("=")[0] for word in words}
    if "--config" in named or "--run.dir" not in words[:-1] or named >= REQUIRED:
        return words
    directory = Path(words[words.index("--run.dir") + 1])
    if is_run_config(directory / "config.yaml"):
        return ["--config", str(directory / "config.yaml"), *words]
    if "--data.shards" not in named:
        raise ValueError(
            f"{directory} holds no run to resume (no config.yaml); give an earlier run's --run.dir, or --config FILE "
            "and --data.shards SHARDS"
        )
    return words


def with_recipes(words: list[str]) -> list[str]:
    """The same, with paths in place of bare names of recipes."""
    pairs = zip(["", *words], words, strict=False)
    return [str(find_recipe(word)) if before == "--config" else word for before, word in pairs]


def plain(value: Any) -> Any:
    """Paths to text and tuples to lists, all the way down."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def check_same_run(saved: dict[str, Any], now: dict[str, Any], begun: int) -> None:
    """Refuse to continue a run under another configuration.

    What may differ: where it writes, how often it logs, speed knobs, where the (same) shards lie; what a schedule says
    of epochs to come, after the `begun` ones, as it was set by hand in 2012; with `resume.allow_world_change` also how
    it is spread over processes.
    Raises `ValueError` that names the first other field.
    """
    before, after = flatten(saved), flatten(now)
    for name in sorted(before.keys() | after.keys()):
        spread = name.startswith("parallel.") or name == "train.accumulate"
        moves = name.startswith("resume.") or (spread and after["resume.allow_world_change"])
        free = (
            moves
            or (name.startswith(("run.", "data.speed.")) and name != "run.device")
            or name == "data.shards"
        )
        # A cosine is laid out over all epochs.
        ahead = name == "train.epochs" and after[name] >= begun and after["optimizer.schedule"] != "cosine"
        if name in ("optimizer.steps", "optimizer.changes"):
            ahead = changes_before(before.get(name), begun) == changes_before(after.get(name), begun)
        if before.get(name) != after.get(name) and not (free or ahead):
            if name in ("optimizer.steps", "optimizer.changes"):
                kept = changes_before(before.get(name), begun)
                raise ValueError(
                    f"this run is in epoch {begun}: {name} may change from then on, but has to keep "
                    f"{kept or 'nothing'} before; give that and what is to come"
                )
            if name == "train.epochs":
                cosine = after["optimizer.schedule"] == "cosine"
                wanted = (
                    f"{before[name]}, over which the cosine is laid out" if cosine else f"at least {begun}"
                )
                raise ValueError(
                    f"train.epochs: expected {wanted}, got {after[name]}; the run is in epoch {begun}"
                )
            raise ValueError(
                f"this run was started with {name} = {before.get(name)}, not {after.get(name)}; "
                "continue it with the same value or give another --run.dir"
            )


def changes_before(changes: Any, begun: int) -> list[Any]:
    """Those of a schedule's steps or changes that were made in the first `begun` epochs."""
    return [each for each in changes or () if (each["epoch"] if isinstance(each, dict) else each) < begun]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
