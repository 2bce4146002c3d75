"""Charts of a finished run: what its numbers look like. Learning and speed from the rows of metrics.jsonl, the colours
of conv1, the classes that are mistaken for each other.

A row may lack any figure: older runs did not write them all, and some are only there on a GPU or while a checkpoint is
being written. A chart shows those that are there.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.files import atomic_writer
from pipeline.shards import ClassName
from train.accuracy import EvalStats

if TYPE_CHECKING:  # it takes a third of a second, and every start of a run would wait for it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[dict[str, Any]]
"""Of metrics.jsonl."""
TRAINING, VALIDATION = "training, augmented, with dropout", "validation, centre crop"
TOWER_COLOURS = ("tab:blue", "tab:orange")
FLOAT32_MAX = float(np.finfo(np.float32).max)
NAMED_CLASSES = 40
"""Classes up to which a picture of confusions has room for their names."""


@contextmanager
def new_figure() -> "Iterator[Figure]":
    """A figure in which the dollar signs of class names are no formulas."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"text.parse_math": False}):
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


@contextmanager
def saved_figure(path: Path) -> "Iterator[Figure]":
    """A figure that is written to `path` when the block ends."""
    with new_figure() as figure:
        yield figure
        with atomic_writer(path) as file:
            figure.savefig(file, format="png", dpi=120)


def png_of(draw: "Callable[[Figure], Any]") -> bytes:
    """What `draw` makes of a figure of 5.2 by 3 inches, as a PNG file."""
    out = io.BytesIO()
    with new_figure() as figure:
        figure.set_size_inches(5.2, 3)
        draw(figure)
        figure.savefig(out, format="png", dpi=140)
    return out.getvalue()


def figures_of(rows: Rows, kind: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows of a kind ("train" or "eval") that have a number of that name; what a disk
    or a hand made no number is left out."""
    of_kind = [(row["step"], row.get(name)) for row in rows if row["kind"] == kind]
    found = [point for point in of_kind if all(map(drawable, point))]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.array(steps, float), np.array(values, float)


def drawable(value: Any) -> bool:
    """Whether it is a number, finite and of a size that matplotlib has room for."""
    return isinstance(value, int | float) and -FLOAT32_MAX <= value <= FLOAT32_MAX


def draw_lines(axes: "Axes", title: str, unit: str, lines: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Lines of (x, y) by their labels; few points, as of evaluations, are marked."""
    for label, (x, y) in lines.items():
        if len(x):
            axes.plot(x, y, "o-" if len(x) < 25 else "-", markersize=4, label=label)
    axes.set(title=title, ylabel=unit)
    finish(axes)


def finish(axes: "Axes") -> None:
    """What all charts have in common."""
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(fontsize=8)


def draw_loss(axes: "Axes", rows: Rows, steps_per_epoch: int, classes: int) -> None:
    """Training loss over epochs."""
    steps, loss = figures_of(rows, "train", "loss")
    axes.axhline(np.log(classes), color="grey", linewidth=0.8, linestyle=":", label="chance: ln(classes)")
    draw_lines(axes, "Loss", "cross-entropy", {TRAINING: (steps / steps_per_epoch, loss)})
    axes.set(xlabel="epoch")


def draw_error(axes: "Axes", rows: Rows, steps_per_epoch: int) -> None:
    """Training and validation error over epochs."""
    names = {TRAINING: ("train", "top1_error"), VALIDATION: ("eval", "centre_top1_error")}
    found = {label: figures_of(rows, *name) for label, name in names.items()}
    lines = {label: (steps / steps_per_epoch, errors) for label, (steps, errors) in found.items()}
    draw_lines(axes, "Error", "top-1 error, %", lines)
    axes.set(xlabel="epoch")


def draw_curves(figure: "Figure", rows: Rows, steps_per_epoch: int, classes: int) -> None:
    """Loss and error beside each other."""
    figure.set_size_inches(10, 4)
    loss, error = figure.subplots(1, 2)
    draw_loss(loss, rows, steps_per_epoch, classes)
    draw_error(error, rows, steps_per_epoch)


SPEED = {
    "Throughput": ("images/s", {"training": ("train", "images_per_s")}),
    "Waiting for input": ("% of the time", {"training": ("train", "wait_percent")}),
    "Time of a step": (
        "ms",
        {"all": ("train", "step_ms_p50"), "while saving": ("train", "saving_step_ms_p50")},
    ),
    "Time of an evaluation": ("s", {"after an epoch, centre crop": ("eval", "eval_s")}),
}
"""Title: (unit, {label: (kind, figure)})."""


def speed_charts(rows: Rows) -> dict[str, tuple[bytes, str]]:
    """PNG and a sentence for each of `SPEED`, over steps; without those of which there are no figures."""
    charts = {}
    for title, (unit, names) in SPEED.items():
        lines = {label: figures_of(rows, *name) for label, name in names.items()}
        medians = {label: float(np.median(values)) for label, (_, values) in lines.items() if len(values)}

        def draw(
            figure: "Figure", title: str = title, unit: str = unit, lines: dict[str, Any] = lines
        ) -> None:
            axes = figure.subplots()
            draw_lines(axes, title, unit, lines)
            axes.set(xlabel="step")

        if medians:
            notes = {label: f" ({label})" if len(medians) > 1 else "" for label in names}
            values = {
                label: f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for label, value in medians.items()
            }
            told = ", ".join(f"{value} {unit}{notes[label]}" for label, value in values.items())
            charts[title] = png_of(draw), f"Median over the rows: {told}."
    return charts


def draw_saturations(figure: "Figure", towers: Sequence[np.ndarray]) -> None:
    """Each tower's kernels from the greyest to the most colourful, and their means; saturations 0..1."""
    axes = figure.subplots()
    for number, (values, colour) in enumerate(zip(towers, TOWER_COLOURS, strict=False)):
        axes.plot(
            np.arange(1, len(values) + 1),
            np.sort(values),
            "o",
            markersize=4,
            color=colour,
            label=f"tower {number}",
        )
        axes.axhline(values.mean(), color=colour, linewidth=0.8, label=f"its mean, {values.mean():.2f}")
    axes.axhline(2 / 3, color="grey", linewidth=0.8, linestyle=":", label="noise")
    axes.set(
        title="Saturation of every kernel",
        xlabel="kernels of a tower, the greyest first",
        ylabel="0 grey, 1 colour",
    )
    finish(axes)
    axes.set_ylim(0, 1)


def short_names(classes: Sequence[ClassName], longest: int = 24) -> list[str]:
    """The first of each class's words, with room in a figure."""
    names = [name.words.split(",")[0] for name in classes]
    return [name if len(name) <= longest else f"{name[: longest - 1]}…" for name in names]


def draw_confusion(figure: "Figure", findings: EvalStats, classes: Sequence[ClassName]) -> None:
    """How often images of each class (rows) are taken for each class (columns), as shares of the row."""
    counts = findings.confusion[: len(classes)].cpu().numpy()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    named = len(classes) <= NAMED_CLASSES
    side = np.clip(0.3 * len(classes) + 3, 4, 9) if named else 8
    figure.set_size_inches(side + 1, side)
    axes = figure.subplots()
    picture = axes.imshow(100 * shares, cmap="magma_r", vmin=0, vmax=100, interpolation="nearest")
    figure.colorbar(picture, label="% of the images of the true class")
    axes.set(xlabel="taken for", ylabel="true class", title=f"{counts.sum()} validation images, all views")
    if named:
        names = short_names(classes)
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
        for row, column in zip(*np.nonzero(counts), strict=True):
            dark = shares[row, column] > 0.5
            axes.text(
                column, row, counts[row, column], ha="center", va="center", color="white" if dark else "black"
            )
