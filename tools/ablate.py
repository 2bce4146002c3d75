"""Measure the effect of each part of the network and its training: the same run with and without it.

    python tools/ablate.py train/configs/paper.yaml SHARDS OUT --ablations '[no-lrn,no-dropout]' --seeds '[1,2,3]'

Writes OUT/ablations.md (the table), ablations.json and ablations.png. Each run is `python -m train.run --config BASE
--config ABLATION ...` in a folder of OUT, one after the other; NAME.log is its output, NAME.json is written when it
finishes. The same command resumes an interrupted comparison; more seeds, ablations, rates or epochs only add runs.

An ablation is a name in train/configs/ablations or a YAML file: one-gpu and no-conv4 have the sizes of the full
network; a narrower base needs files with matching sizes.
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
from train.cli import ABLATIONS, DIVERGED, find_recipe, run_program
from train.config import Config, check_same_run, parse_config
from train.metrics import read_metrics

ANY_WIDTH = (
    "no-lrn",
    "no-overlapping-pooling",
    "no-lighting",
    "no-windows-and-flips",
    "no-dropout",
    "no-weight-decay",
)
"""Ablations that fit a network of any width and change one thing of the paper's recipe."""
PER_RUN = ("--data.shards", "--run.dir", "--train.seed")
"""Settings that differ between runs; `--rates` overrides a rate in `--settings`."""


class Run(NamedTuple):
    """One run of a comparison."""

    arguments: list[str]
    """Arguments of train.run."""
    config: Config
    """The parsed arguments."""

    @property
    def directory(self) -> Path:
        """Return the run directory."""
        return self.config.run.dir

    @property
    def result(self) -> Path:
        """Return the file that is written when the run finishes."""
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
    """Train a base and its ablations, and compare each difference with the paper's.

    Args:
        base: Configuration of the base, a YAML file.
        shards: Folder written by make_shards and compute_pca.
        out: Folder for runs and results.
        ablations: Names in train/configs/ablations, or YAML files; by default those that fit a network of any width.
            The base always runs.
        seeds: Seeds of every ablation.
        rates: Learning rates to try for every ablation, of which the best counts; by default the configuration's.
        error: Training error in percent; the table lists the epochs to reach it.
        settings: Settings for all runs, as for train.run: "--train.epochs 3 --model.fc_dim 64". An ablation
            overrides them.
    """
    train, val = open_shards(shards, "train"), open_shards(shards, "val")
    Eigenbasis.load(shards / "pca.json", train.manifest_sha256)
    base, files = find_recipe(str(base)), find_ablations(list(ANY_WIDTH) if ablations is None else ablations)
    each_rate: list[float | None] = [None] if rates is None else [*rates]
    for name, values in {"--seeds": seeds, "--rates": each_rate}.items():
        if not values or len(set(values)) < len(values):
            raise ValueError(
                f"{name}: expected different numbers, at least one, got {[*values]}; such as [1,2]"
            )
    plan = {
        name: {
            rate: [plan_run(base, shards, out, name, file, rate, seed, settings) for seed in seeds]
            for rate in each_rate
        }
        for name, file in ({BASE: None} | files).items()
    }
    check_plan(plan, train, base)
    out.mkdir(parents=True, exist_ok=True)

    # SIGTERM stops and saves the run in progress, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    entries = []
    for name, by_rate in plan.items():
        figures = {rate: [finish_run(run, train, error) for run in runs] for rate, runs in by_rate.items()}
        entries.append(pick_rate(name, figures))
        if not entries[0].runs:
            raise ValueError(f"{BASE}: diverged; give another OUT and a lower --rates or --optimizer.lr")
    table = format_markdown(entries, error, val.num_samples)
    content = {"base": str(base), "settings": settings, "error": error, "seeds": seeds, "rates": rates}
    content |= {"shards": str(shards), "shards_manifest_sha256": train.manifest_sha256}
    write_json(
        out / "ablations.json", content | {"entries": [to_json(entry, entries[0]) for entry in entries]}
    )
    write_bytes(out / "ablations.md", table.encode())
    draw_curves(out / "ablations.png", entries)
    print(f"\n{table}\nwritten: {out}/ablations.md, ablations.json, ablations.png")


def find_ablations(names: list[str]) -> dict[str, Path]:
    """Find the YAML files of ablations by name. Raises `ValueError` for an unknown or a duplicate one."""
    files: dict[str, Path] = {}
    for text in names:
        try:
            path = find_recipe(text)
        except FileNotFoundError:
            known = ", ".join(sorted(path.stem for path in ABLATIONS.glob("*.yaml")))
            raise ValueError(f"--ablations {text}: not found; give a YAML file or one of {known}") from None
        if path.stem in {BASE, *files}:
            raise ValueError(
                f"--ablations: expected different names, got {path.stem} twice; rename one or leave it out"
            )
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
    """Build a run from the base, the settings of all runs, the ablation, and the settings per run, later ones
    overriding."""
    try:
        words = shlex.split(settings)
    except ValueError as error:
        raise ValueError(f"--settings {settings}: {error}; quote it as in a shell") from None
    if clash := [word for word in words if word.partition("=")[0] in PER_RUN]:
        raise ValueError(f"--settings: {clash[0]} is set for each run; leave it out")
    directory = out / f"{name}{'' if rate is None else f'-lr{rate!r}'}-seed{seed}"
    arguments = ["--config", str(base), *words, *(["--config", str(file)] if file else [])]
    arguments += ["--data.shards", str(shards), "--run.dir", str(directory), "--train.seed", str(seed)]
    arguments += [] if rate is None else ["--optimizer.lr", repr(rate)]
    return Run(arguments, parse_config(arguments))


def check_plan(plan: dict[str, dict[float | None, list[Run]]], train: ShardSet, base: Path) -> None:
    """Raise `ValueError` for a run that logs nothing, equals the base, or finished with other settings."""
    runs = [run for by_rate in plan.values() for runs in by_rate.values() for run in runs]
    for run in runs:
        config = run.config
        steps = train.num_samples // config.train.batch_size
        if config.run.log_every > steps:
            raise ValueError(
                f"run.log_every: expected at most {steps}, an epoch's, got {config.run.log_every}; give "
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
    """Read the outcome of a run: "trained" or "diverged"; None if it is unfinished, or needs more epochs.

    Raises `ValueError` when it had other settings or shards.
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
    """Train a run unless it has finished, and read its figures; None if it diverged."""
    name = run.directory.name
    outcome = read_result(run, train)
    if outcome is None:
        print(f"{name}: training, output in {name}.log", flush=True)
        outcome = "trained" if run_training(run) else "diverged"
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


def run_training(run: Run) -> bool:
    """Train or resume a run. Returns False when it diverged; raises `ValueError` when it failed or was stopped."""
    log, report = run.result.with_suffix(".log"), run.directory / "report.html"
    report.unlink(missing_ok=True)  # a run writes it at its end
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "train.run", *run.arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches it only through us: a second one would end it unsaved
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
        raise ValueError(f"{run.directory}: unfinished; run the same command to resume")
    return code == 0


if __name__ == "__main__":
    run_program(ablate)
