"""The picture of a comparison: validation errors over epochs, and differences to the base beside the paper's."""

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from tools.ablation.comparison import BASE, PAPER, Entry

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(path: Path, entries: list[Entry]) -> None:
    """Write a PNG. The first entry is the base."""
    from train.charts import saved_figure

    with saved_figure(path) as figure:
        figure.set_size_inches(12, max(4.5, 1.8 + 0.36 * len(entries)))
        curves, bars = figure.subplots(1, 2, width_ratios=[5, 4])
        draw_curves(curves, entries)
        draw_differences(bars, entries)


def draw_curves(axes: "Axes", entries: list[Entry]) -> None:
    """A line for each entry, the mean over its seeds, in a band from the least to the greatest."""
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    for number, entry in enumerate(entries):
        if not entry.runs:
            continue
        colour = "black" if entry.name == BASE else colormaps["tab10"]((number - 1) % 10)
        style = "--" if number > 10 else "-"
        by_epoch = list(
            zip(*(run.val_errors for run in entry.runs), strict=False)
        )  # as far as all seeds went
        epochs = range(1, len(by_epoch) + 1)
        axes.fill_between(
            epochs, [*map(min, by_epoch)], [*map(max, by_epoch)], color=colour, alpha=0.15, linewidth=0
        )
        name = entry.name if entry.rate is None else f"{entry.name}, rate {entry.rate:g}"
        marker = "o" if len(by_epoch) < 20 else None
        axes.plot(
            epochs, [*map(fmean, by_epoch)], style, marker=marker, markersize=3, color=colour, label=name
        )
    seeds = len(entries[0].runs)
    title = (
        f"Validation error (mean of {seeds} seeds, least to greatest)" if seeds > 1 else "Validation error"
    )
    axes.set(xlabel="epoch", ylabel="top-1 error of the centre crop, %", title=title)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def draw_differences(axes: "Axes", entries: list[Entry]) -> None:
    """A bar for each ablation with its spread over the seeds, and a mark where the paper has a figure."""
    base, others = entries[0], entries[1:]
    for place, entry in enumerate(others):
        differences = entry.differences(base)
        if differences:
            mean = fmean(differences)
            axes.barh(place, mean, color="steelblue", height=0.6)
            spread = [[mean - min(differences)], [max(differences) - mean]]
            axes.errorbar(mean, place, xerr=spread, color="black", capsize=3, linewidth=1)
        else:
            axes.text(0, place, " diverged", va="center", color="firebrick")
    marks = [(PAPER[entry.name][0], place) for place, entry in enumerate(others) if entry.name in PAPER]
    if marks:
        axes.plot(*zip(*marks, strict=True), "D", color="darkorange", label="the paper, on ImageNet")
        axes.legend(fontsize=8, loc="upper right")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(others)), [entry.name for entry in others])
    axes.set_ylim(max(len(others), 4) - 0.5, -1.3 if marks else -0.5)  # from above, below room for the legend
    axes.set(xlabel="points of validation error above the base's", title="Difference to the base")
    axes.grid(axis="x", alpha=0.3)
