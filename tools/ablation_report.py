"""Compare runs of one base and its ablations: figures of each run, a table and a chart.

Errors are top-1, in percent. The training error is the mean of metrics.jsonl over the last epoch, with augmentation and
dropout. The validation error is the centre crop's at the end. Differences are paired by seed, as equal seeds share
order, crops and flips of the images.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

PAPER = {
    "one-gpu": "+1.7",
    "no-lrn": "+1.4",
    "no-overlapping-pooling": "+0.4",
    "no-lighting": "over +1",
    "no-conv4": "about +2",
}
"""Points of top-1 error that the ablation adds, from the paper (sections 3.2-3.4, 4.1 and 7)."""
BASE = "base"
FEW_SEEDS = 3
"""Fewer seeds show no difference."""


@dataclass(frozen=True)
class Figures:
    """Errors of one run, in percent."""

    seed: int
    train_error: float
    val_errors: tuple[float, ...]
    """After each epoch."""
    epochs_to_error: float | None
    """Epochs until a row of metrics.jsonl first had the target training error or less; None: never."""

    @property
    def val_error(self) -> float:
        """Return the last validation error."""
        return self.val_errors[-1]


@dataclass(frozen=True)
class Entry:
    """The base or an ablation: its runs at the best rate."""

    name: str
    rate: float | None
    """The best of `--rates`; None: the configuration's."""
    runs: tuple[Figures, ...]
    """One per seed, in the same order; empty if training diverged at every rate."""

    @property
    def epochs_to_error(self) -> float | None:
        """Return the mean over the seeds; None if one of them never reached the error."""
        reached = [run.epochs_to_error for run in self.runs if run.epochs_to_error is not None]
        return fmean(reached) if self.runs and len(reached) == len(self.runs) else None

    def mean(self, name: str) -> float:
        """Average a figure over the seeds."""
        return fmean(getattr(run, name) for run in self.runs)

    def differences(self, base: "Entry") -> list[float]:
        """Subtract the base's validation error, seed by seed; empty if training diverged, and for the base."""
        if self is base or not self.runs:
            return []
        return [run.val_error - other.val_error for run, other in zip(self.runs, base.runs, strict=True)]


def read_figures(rows: list[dict[str, Any]], seed: int, error: float) -> Figures:
    """Read the figures of a finished run from the rows of its metrics.jsonl; `error`: target training error,
    percent."""
    train, val = ([row for row in rows if row["kind"] == kind] for kind in ("train", "eval"))
    steps_per_epoch = val[0]["step"] / val[0]["epoch"]
    return Figures(
        seed=seed,
        train_error=fmean(row["top1_error"] for row in train if row["epoch"] == train[-1]["epoch"]),
        val_errors=tuple(row["centre_top1_error"] for row in val),
        epochs_to_error=next(
            (row["step"] / steps_per_epoch for row in train if row["top1_error"] <= error), None
        ),
    )


def pick_rate(name: str, by_rate: dict[float | None, list[Figures | None]]) -> Entry:
    """Pick the rate with the fewest epochs to the target training error, or, if no rate reached it with every seed, the
    lowest training error; never a rate at which a seed diverged (None)."""
    entries = [
        Entry(name, rate, tuple(filter(None, runs))) for rate, runs in by_rate.items() if None not in runs
    ]

    def rank(entry: Entry) -> tuple[float, float]:
        epochs = entry.epochs_to_error
        return (float("inf") if epochs is None else epochs, entry.mean("train_error"))

    return min(entries, key=rank, default=Entry(name, None, ()))


def format_markdown(entries: list[Entry], error: float, val_images: int) -> str:
    """Format the table and notes on how to read it. The first entry is the base."""
    head = ["", "rate", "training error", "validation error", "gap", f"epochs to {error:g} %"]
    rows = [[*head, "difference", "the paper's"], *(format_cells(entry, entries[0]) for entry in entries)]
    seeds = ", ".join(str(run.seed) for run in entries[0].runs)
    notes = (
        f"Top-1 errors in %, means over the seeds {seeds}. Rate: of `--rates` the one with the fewest epochs "
        f"to {error:g} % training error, or with the lowest training error if no rate reached it with every "
        "seed. Training: the last epoch, with augmentation and dropout. Validation: the centre crop at the "
        f"end; one image is {100 / val_images:.2g} points. Gap: validation minus training. Epochs: until a row "
        "of metrics.jsonl had that training error, - if a seed never did. Difference: points of validation "
        "error above the base's with the same seed, mean (min to max). The paper's is for ImageNet."
    )
    weaknesses = list_weaknesses(entries[0], error)
    return "\n\n".join(["# Ablations", *weaknesses, align_columns(rows), notes]) + "\n"


def list_weaknesses(base: Entry, error: float) -> list[str]:
    """List reasons why the differences are not significant: too few seeds, too few epochs."""
    few = (
        f"**With fewer than {FEW_SEEDS} seeds this comparison shows nothing: one network differs as much "
        "between seeds. Give more `--seeds`.**"
    )
    short = (
        "**This comparison shows nothing: the base did not reach "
        f'{error:g} % training error. Train longer (`--settings "--train.epochs N"`), or give another '
        "`--error`.**"
    )
    return [few] * (len(base.runs) < FEW_SEEDS) + [short] * (base.epochs_to_error is None)


def format_cells(entry: Entry, base: Entry) -> list[str]:
    """Format a row of the table."""
    paper, epochs, differences = PAPER.get(entry.name, ""), entry.epochs_to_error, entry.differences(base)
    rate = "" if entry.rate is None else f"{entry.rate:g}"
    if not entry.runs:
        return [entry.name, rate, "diverged", "", "", "-", "", paper]
    train_error, val_error = entry.mean("train_error"), entry.mean("val_error")
    errors = [f"{train_error:.1f}", f"{val_error:.1f}", f"{val_error - train_error:+.1f}"]
    difference = f"{fmean(differences):+.1f}" if differences else ""
    if len(differences) > 1:
        difference += f" ({min(differences):+.1f} to {max(differences):+.1f})"
    return [entry.name, rate, *errors, "-" if epochs is None else f"{epochs:.1f}", difference, paper]


def align_columns(rows: list[list[str]]) -> str:
    """Format a Markdown table with aligned columns."""
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def to_json(entry: Entry, base: Entry) -> dict[str, Any]:
    """Return an entry in plain values."""
    differences = entry.differences(base)
    spread = (
        {"mean": fmean(differences), "min": min(differences), "max": max(differences)}
        if differences
        else None
    )
    means = {name: entry.mean(name) if entry.runs else None for name in ("train_error", "val_error")}
    more = {"epochs_to_error": entry.epochs_to_error, "difference": spread, "paper": PAPER.get(entry.name)}
    return {"diverged": not entry.runs, **means, **more, **asdict(entry)}


def draw_curves(path: Path, entries: list[Entry]) -> None:
    """Plot validation errors over epochs: a line per run, a colour per entry."""
    from train.pictures import saved_figure

    with saved_figure(path) as figure:
        figure.set_size_inches(9, 6)
        axes = figure.subplots()
        for number, entry in enumerate(entries):
            label = entry.name + ("" if entry.rate is None else f", rate {entry.rate:g}")
            axes.plot([], [], color=f"C{number}", label=label + ("" if entry.runs else ", diverged"))
            for run in entry.runs:
                epochs = range(1, len(run.val_errors) + 1)
                axes.plot(epochs, run.val_errors, ".-", color=f"C{number}", alpha=0.6)
        axes.set(
            xlabel="epoch", ylabel="top-1 error of the centre crop, %", title="Validation error of every seed"
        )
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
