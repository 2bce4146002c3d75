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
"""With fewer seeds the table warns that differences mean nothing."""


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

    def mean(self, name: str) -> float | None:
        """Average a figure over the seeds; None if training diverged, or one of them has none."""
        values = [getattr(run, name) for run in self.runs]
        return fmean(values) if values and None not in values else None

    def differences(self, base: "Entry") -> list[float]:
        """Subtract the base's validation error, seed by seed; empty if training diverged, and for the base."""
        if self is base or not self.runs:
            return []
        return [run.val_error - other.val_error for run, other in zip(self.runs, base.runs, strict=True)]


def read_figures(rows: list[dict[str, Any]], seed: int, error: float) -> Figures:
    """Read the figures of a finished run from the rows of its metrics.jsonl; `error`: target training error,
    percent."""
    train, val = ([row for row in rows if row["kind"] == kind] for kind in ("train", "eval"))
    train_error = fmean(row["top1_error"] for row in train if row["epoch"] == train[-1]["epoch"])
    reached = next((row["step"] for row in train if row["top1_error"] <= error), None)
    epochs = None if reached is None else reached * val[0]["epoch"] / val[0]["step"]
    return Figures(seed, train_error, tuple(row["centre_top1_error"] for row in val), epochs)


def pick_rate(name: str, by_rate: dict[float | None, list[Figures | None]]) -> Entry:
    """Pick the rate with the fewest epochs to the target training error, or, if no rate reached it with every seed, the
    lowest training error; never a rate at which a seed diverged (None)."""

    def rank(entry: Entry) -> tuple[float, float]:
        epochs, train_error = entry.mean("epochs_to_error"), entry.mean("train_error")
        return float("inf") if epochs is None else epochs, train_error or 0.0

    runs = {rate: [run for run in runs if run] for rate, runs in by_rate.items() if None not in runs}
    return min(
        (Entry(name, rate, tuple(runs[rate])) for rate in runs), key=rank, default=Entry(name, None, ())
    )


def format_markdown(entries: list[Entry], error: float, val_images: int) -> str:
    """Format the table and notes on how to read it. The first entry is the base."""
    base = entries[0]
    head = ["", "rate", "training error", "validation error", "gap", f"epochs to {error:g} %"]
    rows = [[*head, "difference", "the paper's"], *(format_cells(entry, base) for entry in entries)]
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])
    warnings = []
    if len(base.runs) < FEW_SEEDS:
        few = f"**With fewer than {FEW_SEEDS} seeds this comparison shows nothing: the same network differs as much"
        warnings.append(f"{few} between seeds. Give more `--seeds`.**")
    if base.mean("epochs_to_error") is None:
        short = f"**This comparison shows nothing: the base did not reach {error:g} % training error."
        warnings.append(
            f'{short} Train longer (`--settings "--train.epochs N"`), or give another `--error`.**'
        )
    seeds = ", ".join(str(run.seed) for run in base.runs)
    notes = (
        f"Top-1 errors in %, means over the seeds {seeds}. Rate: of `--rates` the one with the fewest epochs "
        f"to {error:g} % training error, or with the lowest training error if no rate reached it with every "
        "seed. Training: the last epoch, with augmentation and dropout. Validation: the centre crop at the "
        f"end; one image is {100 / val_images:.2g} points. Gap: validation minus training. Epochs: until a row "
        "of metrics.jsonl had that training error, - if a seed never did. Difference: points of validation "
        "error above the base's with the same seed, mean (min to max). The paper's is for ImageNet."
    )
    return "\n\n".join(["# Ablations", *warnings, table, notes]) + "\n"


def format_cells(entry: Entry, base: Entry) -> list[str]:
    """Format a row of the table."""
    rate, paper = "" if entry.rate is None else f"{entry.rate:g}", PAPER.get(entry.name, "")
    train_error, val_error = entry.mean("train_error"), entry.mean("val_error")
    if train_error is None or val_error is None:
        return [entry.name, rate, "diverged", "", "", "-", "", paper]
    errors = [f"{train_error:.1f}", f"{val_error:.1f}", f"{val_error - train_error:+.1f}"]
    epochs, differences = entry.mean("epochs_to_error"), entry.differences(base)
    difference = f"{fmean(differences):+.1f}" if differences else ""
    if len(differences) > 1:
        difference += f" ({min(differences):+.1f} to {max(differences):+.1f})"
    return [entry.name, rate, *errors, "-" if epochs is None else f"{epochs:.1f}", difference, paper]


def to_json(entry: Entry, base: Entry) -> dict[str, Any]:
    """Return an entry in plain values."""
    means = {name: entry.mean(name) for name in ("train_error", "val_error", "epochs_to_error")}
    spread = None
    if differences := entry.differences(base):
        spread = {"mean": fmean(differences), "min": min(differences), "max": max(differences)}
    more = {"diverged": not entry.runs, "difference": spread, "paper": PAPER.get(entry.name)}
    return means | more | asdict(entry)


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
