"""What runs of one base and its ablations say beside each other: figures of each run, and a table.

Errors are top-1, in percent. The training error is the mean over the last epoch's rows of metrics.jsonl: of images as
they are augmented, with dropout. The validation error is the centre crop's at the end. Differences are taken seed by
seed, as equal seeds share order, windows and flips of the images.
"""

from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from train.kernels import TowerColours

PAPER = {
    "one-gpu": (1.7, "+1.7"),
    "no-lrn": (1.4, "+1.4"),
    "no-overlapping-pooling": (0.4, "+0.4"),
    "no-lighting": (1.0, "over +1"),
    "no-conv4": (2.0, "about +2"),
}
"""Points of top-1 error that the paper's network loses without it, and how the paper says so (sections 3.2-3.4, 4.1
and 7)."""
BASE = "base"
FEW_SEEDS = 3
"""Below which a spread says nothing."""
COLOUR_NOTE = (
    "Saturation, the share of a kernel's energy that is not grey (noise: 0.67), as each tower's mean. Towers split "
    "where random halves of the kernels lie as far apart in less than 1 % of cases (p); chance is the difference that "
    "random halves exceed in 1 %. One tower has no other to differ from."
)


@dataclass(frozen=True)
class Figures:
    """What one run came to."""

    seed: int
    train_error: float
    val_errors: tuple[float, ...]
    """After each epoch."""
    epochs_to_error: float | None
    """Until a row of metrics.jsonl first had the training error in question or less; None: never."""
    colours: TowerColours | None
    """Of conv1."""

    @property
    def val_error(self) -> float:
        """At the end."""
        return self.val_errors[-1]


@dataclass(frozen=True)
class Entry:
    """The base or an ablation: its runs at the rate that did best."""

    name: str
    rate: float | None
    """The best of `--rates`; None: the base's."""
    runs: tuple[Figures, ...]
    """One for each seed, in the same order everywhere; empty where training diverged at every rate."""

    @property
    def epochs_to_error(self) -> float | None:
        """Mean over the seeds; None if one of them never came there."""
        reached = [run.epochs_to_error for run in self.runs if run.epochs_to_error is not None]
        return fmean(reached) if self.runs and len(reached) == len(self.runs) else None

    @property
    def train_error(self) -> float:
        """Mean over the seeds."""
        return fmean(run.train_error for run in self.runs)

    @property
    def val_error(self) -> float:
        """Mean over the seeds."""
        return fmean(run.val_error for run in self.runs)

    def differences(self, base: "Entry") -> list[float]:
        """Points of validation error above the base's, for each seed; none where training diverged."""
        return (
            [run.val_error - its.val_error for run, its in zip(self.runs, base.runs, strict=True)]
            if self.runs
            else []
        )


def figures(rows: list[dict[str, Any]], seed: int, error: float, colours: TowerColours | None) -> Figures:
    """The figures of a finished run.

    Args:
        rows: Of its metrics.jsonl, with at least one of either kind.
        seed: Its seed.
        error: Training error whose first time is sought, in percent.
        colours: Of its first layer.
    """
    train, val = ([row for row in rows if row["kind"] == kind] for kind in ("train", "eval"))
    steps_per_epoch = val[0]["step"] / val[0]["epoch"]
    reached = (row["step"] / steps_per_epoch for row in train if row["top1_error"] <= error)
    return Figures(
        seed=seed,
        train_error=fmean(row["top1_error"] for row in train if row["epoch"] == train[-1]["epoch"]),
        val_errors=tuple(row["centre_top1_error"] for row in val),
        epochs_to_error=next(reached, None),
        colours=colours,
    )


def best_entry(name: str, by_rate: dict[float | None, list[Figures | None]]) -> Entry:
    """The entry at the best rate: fewest epochs to the training error in question, or, if at no rate every seed came
    there, the lowest training error. A rate at which a seed diverged (None) is out."""
    entries = [
        Entry(name, rate, tuple(run for run in runs if run))
        for rate, runs in by_rate.items()
        if None not in runs
    ]

    def order(entry: Entry) -> tuple[float, float]:
        epochs = entry.epochs_to_error
        return (float("inf") if epochs is None else epochs, entry.train_error)

    return min(entries, key=order, default=Entry(name, None, ()))


def markdown(entries: list[Entry], error: float, rates: list[float] | None, val_images: int) -> str:
    """The table and the colours of conv1, with what is to be known about them. The first entry is the base."""
    head = [
        "",
        "training error",
        "validation error",
        "gap",
        f"epochs to {error:g} %",
        "difference",
        "the paper's",
    ]
    table = [cells(entry, entries[0], rates) for entry in entries]
    if rates:
        head.insert(1, "rate")
    seeds = (
        "seed" + "s" * (len(entries[0].runs) > 1) + " " + ", ".join(str(run.seed) for run in entries[0].runs)
    )
    notes = [
        f"Top-1 errors in %, means over {seeds}. Training: the last epoch, as augmented and with dropout. "
        f"Validation: the centre crop at the end; one image is {100 / val_images:.2g} points. Gap: validation minus "
        f"training. Epochs: until a row of metrics.jsonl had a training error of {error:g} %, - where a seed never "
        "did. Difference: points of validation error above the base's with the same seed, mean (least to greatest). "
        "The paper's is of ImageNet.",
    ]
    if rates:
        tried = ", ".join(f"{rate:g}" for rate in rates)
        notes.append(
            f"Rates: of {tried} the one with the fewest epochs to {error:g} % training error; where it has a star, not "
            "every seed came there at any of them, and the lowest training error decided."
        )
    colours = [line for entry in entries for line in colour_lines(entry)]
    warnings = weaknesses(entries[0], error)
    sections = [
        *warnings,
        aligned([head, *table]),
        *notes,
        "## Colours of conv1",
        COLOUR_NOTE,
        "\n".join(colours),
    ]
    return "# Ablations\n\n" + "\n\n".join(sections) + "\n"


def weaknesses(base: Entry, error: float) -> list[str]:
    """Reasons why differences to the base show nothing yet: too few seeds to tell them from chance, too few epochs to
    learn."""
    warnings = []
    if len(base.runs) < FEW_SEEDS:
        warnings.append(
            f"**With {len(base.runs)} seed{'s' * (len(base.runs) > 1)} this comparison shows nothing: the same "
            f"network differs as much from seed to seed. Take {FEW_SEEDS} or more (`--seeds`).**"
        )
    if base.epochs_to_error is None:
        epochs = max(len(run.val_errors) for run in base.runs)
        warnings.append(
            f"**This comparison shows nothing of trained networks: the base did not reach {error:g} % training error "
            f'in {epochs} epochs. Train longer (`--settings "--train.epochs N"`), '
            "or give the error that it should reach (`--error`).**"
        )
    return warnings


def cells(entry: Entry, base: Entry, rates: list[float] | None) -> list[str]:
    """A row of the table."""
    epochs, paper = entry.epochs_to_error, PAPER.get(entry.name, (0, ""))[1]
    star = " *" if epochs is None else ""
    rate = ([f"{entry.rate:g}{star}"] if entry.rate is not None else [""]) if rates else []
    if not entry.runs:
        return [entry.name, *rate, "diverged", "", "", "-", "", paper]
    differences = [] if entry is base else entry.differences(base)
    spread = f" ({min(differences):+.1f} to {max(differences):+.1f})" if len(differences) > 1 else ""
    return [
        entry.name,
        *rate,
        f"{entry.train_error:.1f}",
        f"{entry.val_error:.1f}",
        f"{entry.val_error - entry.train_error:+.1f}",
        "-" if epochs is None else f"{epochs:.1f}",
        f"{fmean(differences):+.1f}{spread}" if differences else "",
        paper,
    ]


def aligned(rows: list[list[str]]) -> str:
    """A table in Markdown that is one on a screen as well."""
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        [f"{row[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))]
        for row in rows
    ]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def colour_lines(entry: Entry) -> list[str]:
    """A line for each run: its towers from the greyest on, and whether they split."""
    lines = []
    for run in entry.runs:
        found = run.colours
        if found is None:
            lines.append(f"- {entry.name}, seed {run.seed}: no checkpoint is left")
        elif found.p is None:
            lines.append(
                f"- {entry.name}, seed {run.seed}: one tower {found.saturations[0]:.2f}; chance {found.chance:.2f}"
            )
        else:
            ordered = sorted(enumerate(found.saturations), key=lambda pair: pair[1])
            towers = ", ".join(f"tower {number} {mean:.2f}" for number, mean in ordered)
            verdict = "split" if found.split else "no split"
            lines.append(
                f"- {entry.name}, seed {run.seed}: {towers}; {verdict} (p {found.p:.2g}, chance {found.chance:.2f})"
            )
    return lines


def as_json(entry: Entry, base: Entry) -> dict[str, Any]:
    """An entry in plain values."""
    differences = [] if entry is base else entry.differences(base)
    of_differences = (
        {"mean": fmean(differences), "min": min(differences), "max": max(differences)}
        if differences
        else None
    )
    return {
        "name": entry.name,
        "rate": entry.rate,
        "diverged": not entry.runs,
        "train_error": entry.train_error if entry.runs else None,
        "val_error": entry.val_error if entry.runs else None,
        "epochs_to_error": entry.epochs_to_error,
        "difference": of_differences,
        "paper": PAPER.get(entry.name, (None, None))[1],
        "runs": [
            asdict(run) | {"colours": run.colours and run.colours._asdict() | {"split": run.colours.split}}
            for run in entry.runs
        ],
    }
