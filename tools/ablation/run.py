"""One run of a comparison: trained in a process of its own, gone on with, recognized when it has ended."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.files import open_locked, read_json, write_json
from pipeline.shards import ShardSet
from tools.ablation.comparison import Figures, figures
from train.config import Config, check_same_run
from train.kernels import TowerColours, tower_colours
from train.metrics import read_metrics
from train.program import DIVERGED


class Run(NamedTuple):
    """One run of a comparison."""

    name: str
    """BASE or the ablation's."""
    rate: float | None
    seed: int
    arguments: list[str]
    """Of train.run."""
    config: Config
    """What they come to."""

    def beside(self, suffix: str) -> Path:
        """The file beside the run directory that has its name and this suffix."""
        directory = self.config.run.dir
        return directory.with_name(directory.name + suffix)


def ended(run: Run, train: ShardSet) -> dict[str, Any] | None:
    """What is written beside a run that ended, or None where it has not, or is to have more epochs. Raises `ValueError`
    when it was another run."""
    path = run.beside(".json")
    if not (path.is_file() and (run.config.run.dir / "metrics.jsonl").is_file()):
        return None
    result: dict[str, Any] = read_json(path)
    try:
        same_shards, epochs = result["shards"] == train.manifest_sha256, result["config"]["train"]["epochs"]
        check_same_run(result["config"], run.config.to_json(), begun=epochs)
    except ValueError as error:
        reason, _, _ = str(error).partition(";")
        raise ValueError(f"{run.config.run.dir}: {reason}; give another OUT") from None
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is none of this program's; give another OUT") from None
    if not same_shards:
        raise ValueError(f"{run.config.run.dir} was trained on other shards; give another OUT")
    return result if epochs == run.config.train.epochs else None


def result_of(run: Run, train: ShardSet, error: float) -> Figures | None:
    """Train a run unless it has ended, and read its figures; None where it diverged."""
    title = f"{run.name}{'' if run.rate is None else f', rate {run.rate:g}'}, seed {run.seed}"
    result = ended(run, train)
    if result is None:
        print(f"{title}: training, output in {run.beside('.log')}", flush=True)
        diverged = not trained(run)
        result = {"config": run.config.to_json(), "shards": train.manifest_sha256, "diverged": diverged}
        result["colours"] = None if diverged else colours_of(run)
        write_json(run.beside(".json"), result)
    if result.get("diverged"):
        print(f"{title}: diverged", flush=True)
        return None
    try:
        colours = result["colours"] and TowerColours(**result["colours"])
        found = figures(read_metrics(run.config.run.dir / "metrics.jsonl"), run.seed, error, colours)
    except (KeyError, TypeError, IndexError, ValueError):
        raise ValueError(
            f"what {run.config.run.dir} ended with is damaged; remove that folder and {run.beside('.json')}, and it is "
            "trained again"
        ) from None
    print(
        f"{title}: validation error {found.val_error:.1f} %, training error {found.train_error:.1f} %",
        flush=True,
    )
    return found


def trained(run: Run) -> bool:
    """Train to the end, or go on to it. Returns False when training diverged.

    The lock on the log is the child's as well: should this process be killed and that one live on, nobody else trains
    in its folder.
    Raises `ValueError` with the last lines of a run that failed, or that someone else stopped.
    """
    try:
        locked = open_locked(run.beside(".log"), wait=False)
    except BlockingIOError:
        raise ValueError(
            f"{run.config.run.dir} is being trained by another process; wait for it or stop it"
        ) from None
    with locked as log:
        begin = log.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            [sys.executable, "-m", "train.run", *run.arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches it through us alone, once: twice would end it unsaved
        )
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
        log.seek(begin)
        told = log.read().decode(errors="replace")
    if code == DIVERGED:
        return False
    last = " / ".join(line.strip() for line in told.splitlines()[-3:])
    if code:
        raise ValueError(f"{run.config.run.dir} ended with exit code {code}: {last}")
    if "stopped and saved at step" in told:
        raise ValueError(f"{run.config.run.dir} was stopped; the same command goes on")
    return True


def colours_of(run: Run) -> dict[str, Any] | None:
    """`TowerColours` of a finished run's first layer."""
    from train.checkpoint import find_checkpoint, load_checkpoint  # torch takes its time

    path = find_checkpoint(run.config.run.dir)
    weight = load_checkpoint(path)["model"]["conv1.weight"].float().numpy() if path else None
    return None if weight is None else tower_colours(weight, run.config.model.num_towers)._asdict()
