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
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.eigenbasis import Eigenbasis
from pipeline.errors import UserError
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

ANY_WIDTH = (
    "no-lrn",
    "no-overlapping-pooling",
    "no-lighting",
    "no-windows-and-flips",
    "no-dropout",
    "no-weight-decay",
)
"""Ablations that fit a network of any width and change one thing of the paper's recipe."""


class Run(NamedTuple):
    """One run of a comparison."""

    arguments: list[str]
    """Arguments of train.run."""
    config: Config
    """The parsed arguments."""

    def path(self, suffix: str = "") -> Path:
        """Return the run directory, or with a suffix the file next to it: .json when it has finished, .log."""
        return Path(f"{self.config.run.dir}{suffix}")


def ablate(
    base: Path,
    shards: Path,
    out: Path,
    ablations: Sequence[str] = ANY_WIDTH,
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
        settings: Settings for all runs, as for train.run: "--train.epochs 3 --model.fc_dim 64". An ablation, --seeds
            and --rates override them.
    """
    train, val = open_shards(shards, "train"), open_shards(shards, "val")
    base, files = find_recipe(str(base)), find_ablations(ablations)
    each_rate: list[float | None] = [None] if rates is None else [*rates]
    for name, values in {"--seeds": seeds, "--rates": each_rate}.items():
        if not values or len(set(values)) < len(values):
            raise UserError(
                f"{name}: expected different numbers, at least one, got {[*values]}; such as [1,2]"
            )
    try:
        common = ["--config", str(base), *shlex.split(settings), "--data.shards", str(shards)]
    except ValueError as reason:
        raise UserError(f"--settings {settings}: {reason}; quote it as in a shell") from None
    plan: dict[str, dict[float | None, list[Run]]] = {
        name: {rate: [plan_run(common, out, name, file, rate, seed) for seed in seeds] for rate in each_rate}
        for name, file in ({BASE: None} | files).items()
    }
    first = {name: by_rate[each_rate[0]][0].config for name, by_rate in plan.items()}
    Eigenbasis.load(first[BASE].data.eigenbasis or shards / "pca.json", train.manifest_sha256)
    for name, config in first.items():
        if name != BASE and replace(config, run=first[BASE].run) == first[BASE]:
            raise UserError(
                f"{name}: expected a change of {base} with these settings, got none; leave it out"
            )
    for run in (run for by_rate in plan.values() for runs in by_rate.values() for run in runs):
        check_log_steps(run.config, train)
        read_outcome(run, train)
    out.mkdir(parents=True, exist_ok=True)

    # SIGTERM stops and saves the run in progress, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    entries = []
    for name, by_rate in plan.items():
        figures = {rate: [finish_run(run, train, error) for run in runs] for rate, runs in by_rate.items()}
        entries.append(pick_rate(name, figures))
        if not entries[0].runs:
            raise UserError(f"{BASE}: diverged; give another OUT and a lower --rates or --optimizer.lr")
    table = format_markdown(entries, error, val.num_samples)
    content = {"base": str(base), "settings": settings, "error": error, "seeds": seeds, "rates": rates}
    content |= {"shards": str(shards), "shards_manifest_sha256": train.manifest_sha256}
    content["entries"] = [to_json(entry, entries[0]) for entry in entries]
    write_json(out / "ablations.json", content)
    write_bytes(out / "ablations.md", table.encode())
    draw_curves(out / "ablations.png", entries)
    print(f"\n{table}\nwritten: {out}/ablations.md, ablations.json, ablations.png")


def find_ablations(names: Sequence[str]) -> dict[str, Path]:
    """Find the YAML files of ablations by name. Raises `UserError` for an unknown or a duplicate one."""
    files: dict[str, Path] = {}
    for text in names:
        try:
            path = find_recipe(text)
        except FileNotFoundError:
            known = ", ".join(sorted(path.stem for path in ABLATIONS.glob("*.yaml")))
            raise UserError(f"--ablations {text}: not found; give a YAML file or one of {known}") from None
        if path.stem in {BASE, *files}:
            raise UserError(f"--ablations: expected different names, got {path.stem} twice; leave one out")
        files[path.stem] = path
    return files


def plan_run(
    common: list[str], out: Path, name: str, file: Path | None, rate: float | None, seed: int
) -> Run:
    """Build a run from the settings of all runs, the ablation, and its own, later ones overriding."""
    directory = out / f"{name}{'' if rate is None else f'-lr{rate!r}'}-seed{seed}"
    arguments = [*common, *(["--config", str(file)] if file else []), "--run.dir", str(directory)]
    arguments += ["--train.seed", str(seed), *([] if rate is None else ["--optimizer.lr", repr(rate)])]
    return Run(arguments, parse_config(arguments))


def check_log_steps(config: Config, train: ShardSet) -> None:
    """Raise `UserError` for a run with fewer steps per epoch than `run.log_every`, which logs no training error."""
    steps = train.num_samples // config.train.batch_size
    if config.run.log_every > steps:
        remedy = f'give --settings "--run.log_every {max(1, steps // 2)}", or a smaller --train.batch_size'
        got = f"got {config.run.log_every}"
        raise UserError(f"run.log_every: expected at most {steps}, an epoch's, {got}; {remedy}")


def read_outcome(run: Run, train: ShardSet) -> str | None:
    """Read the outcome of a run: "trained" or "diverged"; None if it is unfinished or needs more epochs.

    Raises `UserError` if it had other settings or shards.
    """
    if not run.path(".json").is_file() or not (run.path() / "metrics.jsonl").is_file():
        return None
    content = read_json(run.path(".json"))
    epochs = content["config"]["train"]["epochs"]
    if content["shards"] != train.manifest_sha256:
        raise UserError(f"{run.path()}: trained on other shards; give another OUT")
    try:
        check_same_run(content["config"], run.config.to_json(), epochs_begun=epochs)
    except UserError as error:
        raise UserError(f"{run.path()}: {str(error).partition(';')[0]}; give another OUT") from None
    return str(content["outcome"]) if epochs == run.config.train.epochs else None


def finish_run(run: Run, train: ShardSet, error: float) -> Figures | None:
    """Train a run unless it has finished, and read its figures; None if it diverged."""
    name, outcome = run.path().name, read_outcome(run, train)
    if outcome is None:
        print(f"{name}: training, output in {name}.log", flush=True)
        outcome = train_run(run)
        content = {"config": run.config.to_json(), "shards": train.manifest_sha256, "outcome": outcome}
        write_json(run.path(".json"), content)
    if outcome == "diverged":
        print(f"{name}: diverged", flush=True)
        return None
    from train.metrics import read_metrics  # imports torch, for which --help does not wait

    figures = read_figures(read_metrics(run.path() / "metrics.jsonl"), run.config.train.seed, error)
    errors = f"validation error {figures.val_error:.1f} %, training error {figures.train_error:.1f} %"
    print(f"{name}: {errors}", flush=True)
    return figures


def train_run(run: Run) -> str:
    """Train or resume a run. Returns "trained" or "diverged"; raises `UserError` when it failed or was stopped."""
    log, report = run.path(".log"), run.path() / "report.html"
    report.unlink(missing_ok=True)  # a run writes it at its end
    command = [sys.executable, "-m", "train.run", *run.arguments]
    with log.open("ab") as file:
        # In a new session, so that the terminal's Ctrl-C does not reach it: with our SIGTERM it would be the second
        # signal, which ends a run unsaved.
        options: dict[str, Any] = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, **options)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
    if code not in (0, DIVERGED):
        raise UserError(f"{run.path()}: training failed with exit code {code}; see the end of {log}")
    if code == 0 and not report.is_file():
        raise UserError(f"{run.path()}: unfinished; run the same command to resume")
    return "trained" if code == 0 else "diverged"


if __name__ == "__main__":
    run_program(ablate)
