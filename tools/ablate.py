"""What each part of the network and its training is worth: the same run with and without it.

    python tools/ablate.py train/configs/paper.yaml SHARDS OUT --ablations '[no-lrn,no-dropout]' --seeds '[1,2,3]'

Writes OUT/ablations.md (the table), ablations.json and ablations.png. Each run is `python -m train.run --config BASE
--config ABLATION ...` in a folder of OUT, one after the other, with its output in a .log beside it. A .json beside it
says that it ended; the same command goes on where a comparison was stopped, and more seeds, ablations, rates or epochs
only add runs. An ablation is a name in train/configs/ablations or a YAML file of your own: one-gpu and no-conv4 have
the sizes of the full network, and a slimmer base wants files with sizes that fit it.
"""

import shlex
import signal
from dataclasses import replace
from pathlib import Path

from pipeline.eigenbasis import Eigenbasis
from pipeline.files import write_bytes, write_json
from pipeline.shards import ShardSet, open_shards
from tools.ablation.comparison import BASE, as_json, best_entry, markdown
from tools.ablation.draw_comparison import draw
from tools.ablation.run import Run, ended, result_of
from train.config import parse_config
from train.program import run_program
from train.recipe import ABLATIONS, find_recipe

ANY_WIDTH = (
    "no-lrn",
    "no-overlapping-pooling",
    "no-lighting",
    "no-windows-and-flips",
    "no-dropout",
    "no-weight-decay",
)
"""Those that fit a network of any width and lighten the paper's recipe by one thing."""
OURS = ("--data.shards", "--run.dir", "--train.seed")


def ablate(
    base: Path,
    shards: Path,
    out: Path,
    ablations: list[str] | None = None,
    seeds: tuple[int, ...] = (1, 2, 3),
    rates: list[float] | None = None,
    error: float = 25.0,
    settings: str = "",
) -> None:
    """Train a base and its ablations, and write what each difference is worth beside the paper's figure.

    Args:
        base: Configuration of the base, a YAML file.
        shards: Folder written by make_shards and compute_pca.
        out: Folder for runs and results.
        ablations: Names in train/configs/ablations, or YAML files; by default those that fit a network of any width.
            The base always runs too.
        seeds: Seeds, each for every ablation.
        rates: Learning rates, each for every ablation; the best is taken. By default the configuration's.
        error: Training error in percent; told is how many epochs it takes to get there.
        settings: Settings for all runs, as for train.run: "--train.epochs 3 --model.hidden 64". An ablation wins over
            them.
    """
    train, val = open_shards(shards, "train"), open_shards(shards, "val")
    Eigenbasis.load(shards / "pca.json", train.manifest_sha256)
    check_numbers(seeds, rates, error)
    files = {BASE: None} | named(list(ANY_WIDTH) if ablations is None else ablations)
    base = find_recipe(str(base))
    each_rate: list[float | None] = [None] if rates is None else [*rates]

    def runs(name: str, rate: float | None) -> list[Run]:
        return [planned(base, shards, out, name, files[name], rate, seed, settings) for seed in seeds]

    plan = {name: {rate: runs(name, rate) for rate in each_rate} for name in files}
    check_plan(plan, train, base)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is no folder; give one for runs and results")
    out.mkdir(parents=True, exist_ok=True)

    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # so that the run in progress is stopped and saved
    entries = []
    for name, by_rate in plan.items():
        results = {rate: [result_of(run, train, error) for run in runs] for rate, runs in by_rate.items()}
        entries.append(best_entry(name, results))
        if not entries[0].runs:
            raise ValueError(
                f'the base diverged; give lower --rates, or --settings "--optimizer.lr RATE" and another {out}'
            )
    table = markdown(entries, error, rates, val.num_samples)
    about = {"base": str(base), "settings": settings, "error": error, "seeds": seeds, "rates": rates}
    about |= {"shards": str(shards), "shards_manifest_sha256": train.manifest_sha256}
    write_json(out / "ablations.json", about | {"entries": [as_json(entry, entries[0]) for entry in entries]})
    write_bytes(out / "ablations.md", table.encode())
    draw(out / "ablations.png", entries)
    print(f"\n{table}\nwritten: {out}/ablations.md, ablations.json, ablations.png")


def check_numbers(seeds: tuple[int, ...], rates: list[float] | None, error: float) -> None:
    """Raise `ValueError` for numbers that no comparison can be made of."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds must be different numbers, at least one, such as [1,2,3], not {[*seeds]}")
    if rates is not None and (not rates or len(set(rates)) < len(rates) or min(rates) <= 0):
        raise ValueError(f"--rates must be different positive numbers, such as [.01,.001], not {rates}")
    if not 0 < error < 100:
        raise ValueError(f"--error is a percentage between 0 and 100, not {error:g}")


def named(ablations: list[str]) -> dict[str, Path | None]:
    """Names of ablations and their files. Raises `ValueError` for one that is unknown or comes twice."""
    if not ablations:
        raise ValueError("--ablations names none; give some, or leave it out for those that fit any width")
    known = sorted(path.stem for path in ABLATIONS.glob("*.yaml"))
    files: dict[str, Path | None] = {}
    for text in ablations:
        try:
            path = find_recipe(text)
        except FileNotFoundError:
            raise ValueError(
                f"there is no ablation {text}; give a YAML file or one of {', '.join(known)}"
            ) from None
        if path.stem in {BASE, *files}:
            raise ValueError(
                f"two of the runs would be called {path.stem}; name every ablation once, and none {BASE}"
            )
        files[path.stem] = path
    return files


def planned(
    base: Path,
    shards: Path,
    out: Path,
    name: str,
    file: Path | None,
    rate: float | None,
    seed: int,
    settings: str,
) -> Run:
    """A run: the base with the settings of all, the ablation over that, and what tells it from the others."""
    try:
        words = shlex.split(settings)
    except ValueError as error:
        raise ValueError(f"--settings cannot be read ({error}): {settings}") from None
    ours = OURS + ("--optimizer.lr",) * (rate is not None)
    for word in words:
        if word.partition("=")[0] in ours:
            raise ValueError(
                f"--settings must leave {', '.join(ours)} alone: they are what tells the runs apart"
            )
    directory = out / f"{name}{'' if rate is None else f'-lr{rate!r}'}-seed{seed}"
    arguments = ["--config", str(base), *words, *(["--config", str(file)] if file else [])]
    arguments += ["--data.shards", str(shards), "--run.dir", str(directory), "--train.seed", str(seed)]
    arguments += [] if rate is None else ["--optimizer.lr", repr(rate)]
    return Run(name, rate, seed, arguments, parse_config(arguments))


def check_plan(plan: dict[str, dict[float | None, list[Run]]], train: ShardSet, base: Path) -> None:
    """Raise `ValueError` where a run could not do, would show nothing, or is not the one that ended under its name."""
    runs = [run for by_rate in plan.values() for runs in by_rate.values() for run in runs]
    for run in runs:
        config, classes = run.config, len(train.classes)
        if config.model.num_classes not in (None, classes):
            raise ValueError(
                f"the shards hold {classes} classes, {run.name} has {config.model.num_classes}; say --settings "
                f'"--model.num_classes {classes}"'
            )
        steps = train.num_samples // config.train.batch_size
        if config.run.log_every > steps:
            raise ValueError(
                f"an epoch of {steps} steps of {config.train.batch_size} images gets no row in metrics.jsonl; say "
                f'--settings "--run.log_every {max(1, steps // 2)}", or a smaller --train.batch_size'
            )
        ended(run, train)
    first = {name: next(iter(by_rate.values()))[0].config for name, by_rate in plan.items()}
    for name, config in first.items():
        if name != BASE and replace(config, run=first[BASE].run) == first[BASE]:
            raise ValueError(f"{name} changes nothing: {base} with these settings is so already")


if __name__ == "__main__":
    run_program(ablate)
