"""Measure what each part of the network and its training is worth: the same run with and without it.

    python tools/ablate.py train/configs/paper.yaml SHARDS OUT --ablations '[no-lrn,no-dropout]' --seeds '[1,2,3]'

Writes OUT/ablations.md (the table), ablations.json and ablations.png. Each run is `python -m train.run --config BASE
--config ABLATION ...` in a folder of OUT, one after the other; NAME.log is its output, NAME.json says that it finished.
The same command resumes a comparison that was stopped, and more seeds, ablations, rates or epochs only add runs.

An ablation is a name in train/configs/ablations or a YAML file of your own: one-gpu and no-conv4 have the sizes of the
full network, and a slimmer base needs files with sizes that fit it.
"""

import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pipeline.eigenbasis import Eigenbasis
from pipeline.files import read_json, write_bytes, write_json
from pipeline.shards import ShardSet, open_shards
from tools.ablation_report import (
    BASE,
    Figures,
    draw_curves,
    format_markdown,
    pick_rate,
    read_figures,
    to_json,
)
from train.config import Config, check_same_run, parse_config
from train.metrics import read_metrics
from train.program import DIVERGED, run_program
from train.recipe import ABLATIONS, find_recipe

ANY_WIDTH = (
    "no-lrn",
    "no-overlapping-pooling",
    "no-lighting",
    "no-windows-and-flips",
    "no-dropout",
    "no-weight-decay",
)
"""Those that fit a network of any width and change the paper's recipe in one thing."""
OURS = ("--data.shards", "--run.dir", "--train.seed")
"""Settings that differ from run to run; a rate of `--rates` wins over one in `--settings`."""


class Run(NamedTuple):
    """One run of a comparison."""

    arguments: list[str]
    """Of train.run."""
    config: Config
    """What they come to."""

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.config.run.dir

    @property
    def result(self) -> Path:
        """The file that says that the run finished."""
        return self.directory.with_name(f"{self.directory.name}.json")


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
    """Train a base and its ablations, and write what each difference is worth next to the paper's figure.

    Args:
        base: Configuration of the base, a YAML file.
        shards: Folder written by make_shards and compute_pca.
        out: Folder for runs and results.
        ablations: Names in train/configs/ablations, or YAML files; by default those that fit a network of any width.
            The base always runs too.
        seeds: Seeds, each for every ablation.
        rates: Learning rates, each for every ablation; the best is taken. By default the configuration's.
        error: Training error in percent; the table has the epochs to reach it.
        settings: Settings for all runs, as for train.run: "--train.epochs 3 --model.hidden 64". An ablation wins over
            them.
    """
    train, val = open_shards(shards, "train"), open_shards(shards, "val")
    Eigenbasis.load(shards / "pca.json", train.manifest_sha256)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(
            f"--seeds: expected different numbers, at least one, got {[*seeds]}; such as [1,2,3]"
        )
    if rates is not None and (not rates or len(set(rates)) < len(rates) or min(rates) <= 0):
        raise ValueError(f"--rates: expected different positive numbers, got {rates}; such as [.01,.001]")
    if not 0 < error < 100:
        raise ValueError(
            f"--error: expected a percentage between 0 and 100, got {error:g}; leave it out for 25"
        )
    base, files = find_recipe(str(base)), find_ablations(list(ANY_WIDTH) if ablations is None else ablations)
    each_rate: list[float | None] = [None] if rates is None else [*rates]
    plan = {
        name: {
            rate: [plan_run(base, shards, out, name, file, rate, seed, settings) for seed in seeds]
            for rate in each_rate
        }
        for name, file in ({BASE: None} | files).items()
    }
    check_plan(plan, train, base)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: not a directory; give one for runs and results")
    out.mkdir(parents=True, exist_ok=True)

    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # so that the run in progress is stopped and saved
    entries = []
    for name, by_rate in plan.items():
        figures = {rate: [finish_run(run, train, error) for run in runs] for rate, runs in by_rate.items()}
        entries.append(pick_rate(name, figures))
        if not entries[0].runs:
            raise ValueError(
                f"{BASE}: diverged; give another OUT and lower --rates, or a lower --optimizer.lr"
            )
    table = format_markdown(entries, error, val.num_samples)
    about = {"base": str(base), "settings": settings, "error": error, "seeds": seeds, "rates": rates}
    about |= {"shards": str(shards), "shards_manifest_sha256": train.manifest_sha256}
    write_json(out / "ablations.json", about | {"entries": [to_json(entry, entries[0]) for entry in entries]})
    write_bytes(out / "ablations.md", table.encode())
    draw_curves(out / "ablations.png", entries)
    print(f"\n{table}\nwritten: {out}/ablations.md, ablations.json, ablations.png")


def find_ablations(names: list[str]) -> dict[str, Path]:
    """Find the YAML files of ablations by name. Raises `ValueError` for one that is unknown or comes twice."""
    files: dict[str, Path] = {}
    for text in names:
        try:
            path = find_recipe(text)
        except FileNotFoundError:
            known = ", ".join(sorted(path.stem for path in ABLATIONS.glob("*.yaml")))
            raise ValueError(f"--ablations {text}: not found; give a YAML file or one of {known}") from None
        if path.stem in {BASE, *files}:
            raise ValueError(f"--ablations: two runs would be called {path.stem}; rename one or leave it out")
        files[path.stem] = path
    return files


def plan_run(
    base: Path,
    shards: Path,
    out: Path,
    name: str,
    file: Path | None,
    rate: float | None,
    seed: int,
    settings: str,
) -> Run:
    """Put together a run: the base, the settings of all runs, the ablation over them, and what differs per run."""
    try:
        words = shlex.split(settings)
    except ValueError as error:
        raise ValueError(f"--settings {settings}: {error}; quote it as in a shell") from None
    if clash := [word for word in words if word.partition("=")[0] in OURS]:
        raise ValueError(f"--settings: {clash[0]} is set for each run; leave it out")
    directory = out / f"{name}{'' if rate is None else f'-lr{rate!r}'}-seed{seed}"
    arguments = ["--config", str(base), *words, *(["--config", str(file)] if file else [])]
    arguments += ["--data.shards", str(shards), "--run.dir", str(directory), "--train.seed", str(seed)]
    arguments += [] if rate is None else ["--optimizer.lr", repr(rate)]
    return Run(arguments, parse_config(arguments))


def check_plan(plan: dict[str, dict[float | None, list[Run]]], train: ShardSet, base: Path) -> None:
    """Raise `ValueError` for a run that cannot work, that would show nothing, or that finished with other settings."""
    runs = [run for by_rate in plan.values() for runs in by_rate.values() for run in runs]
    for run in runs:
        config = run.config
        steps = train.num_samples // config.train.batch_size
        if config.run.log_every > steps:
            raise ValueError(
                f"run.log_every: expected at most {steps}, the steps of an epoch, got {config.run.log_every}; give "
                f'--settings "--run.log_every {max(1, steps // 2)}", or a smaller --train.batch_size'
            )
        read_result(run, train)
    first = {name: next(iter(by_rate.values()))[0].config for name, by_rate in plan.items()}
    for name, config in first.items():
        if name != BASE and replace(config, run=first[BASE].run) == first[BASE]:
            raise ValueError(
                f"{name}: expected a change of {base} with these settings, got none; leave it out"
            )


def read_result(run: Run, train: ShardSet) -> str | None:
    """Read how a run finished: "trained" or "diverged"; None where it has not, or is to have more epochs.

    Raises `ValueError` when it was a run with other settings or of other shards.
    """
    if not run.result.is_file() or not (run.directory / "metrics.jsonl").is_file():
        return None
    content = read_json(run.result)
    epochs = content["config"]["train"]["epochs"]
    if content["shards"] != train.manifest_sha256:
        raise ValueError(f"{run.directory}: trained on other shards; give another OUT")
    try:
        check_same_run(content["config"], run.config.to_json(), begun=epochs)
    except ValueError as error:
        raise ValueError(f"{run.directory}: {str(error).partition(';')[0]}; give another OUT") from None
    return str(content["outcome"]) if epochs == run.config.train.epochs else None


def finish_run(run: Run, train: ShardSet, error: float) -> Figures | None:
    """Train a run unless it has finished, and read its figures; None where it diverged."""
    name = run.directory.name
    outcome = read_result(run, train)
    if outcome is None:
        print(f"{name}: training, output in {name}.log", flush=True)
        outcome = "trained" if train_to_end(run) else "diverged"
        write_json(
            run.result, {"config": run.config.to_json(), "shards": train.manifest_sha256, "outcome": outcome}
        )
    if outcome == "diverged":
        print(f"{name}: diverged", flush=True)
        return None
    figures = read_figures(read_metrics(run.directory / "metrics.jsonl"), run.config.train.seed, error)
    print(
        f"{name}: validation error {figures.val_error:.1f} %, training error {figures.train_error:.1f} %",
        flush=True,
    )
    return figures


def train_to_end(run: Run) -> bool:
    """Train or resume a run. Returns False when it diverged; raises `ValueError` when it failed or was stopped."""
    log, report = run.result.with_suffix(".log"), run.directory / "report.html"
    report.unlink(missing_ok=True)  # a run writes it at its end
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "train.run", *run.arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches it through us alone, once: twice would end it unsaved
        )
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
    if code not in (0, DIVERGED):
        raise ValueError(f"{run.directory}: training failed with exit code {code}; see the end of {log}")
    if code == 0 and not report.is_file():
        raise ValueError(f"{run.directory}: stopped before its end; run the same command to resume")
    return code == 0


if __name__ == "__main__":
    run_program(ablate)
