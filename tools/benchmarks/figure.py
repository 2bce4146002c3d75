"""Figures of what was measured, as PNG files."""

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tools.benchmarks.measure import Table
from train.charts import saved_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT_OF_A_BAR = 0.32
"""Inches."""


def draw_tables(tables: list[Table], path: Path, caption: str) -> None:
    """A panel for each table, a bar for each contender: its median, its spread, its ratio to the reference."""
    caption += "; beside each bar its ratio to the orange one"
    bars = [len(table.measured) + 2 for table in tables]
    with saved_figure(path) as figure:
        figure.set_size_inches(9, 0.7 + HEIGHT_OF_A_BAR * sum(bars))
        figure.set_layout_engine("constrained")
        panels = figure.subplots(len(tables), height_ratios=bars, squeeze=False)[:, 0]
        for axes, table in zip(panels, tables, strict=True):
            names = list(table.measured)
            medians = [statistics.median(table.measured[name]) for name in names]
            below = [median - min(table.measured[name]) for name, median in zip(names, medians, strict=True)]
            above = [max(table.measured[name]) - median for name, median in zip(names, medians, strict=True)]
            colours = ["darkorange" if name == table.reference else "steelblue" for name in names]
            axes.barh(names, medians, color=colours, height=0.7)
            axes.errorbar(
                medians, names, xerr=[below, above], fmt="none", color="black", capsize=3, linewidth=1
            )
            for place, name in enumerate(names):
                axes.annotate(
                    f"{table.ratio(name):.2f}",
                    (max(table.measured[name]), place),
                    xytext=(6, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                )
            axes.set_xlim(0, 1.1 * max(max(values) for values in table.measured.values()))
            axes.invert_yaxis()
            axes.tick_params(labelsize=8)
            axes.set_title(f"{table.title}, {table.unit}", fontsize=9, loc="left")
            axes.spines[["top", "right"]].set_visible(False)
        figure.supxlabel("\n".join(textwrap.wrap(caption, 120)), fontsize=7, color="dimgrey")


class Panel(NamedTuple):
    """What was measured over one quantity."""

    title: str
    """What was measured."""
    unit: str
    """Of every value."""
    x: str
    """Name of the quantity."""
    curves: Mapping[str, Mapping[int, Sequence[float]]]
    """By label, the values at each x."""
    ideal: bool = False
    """Whether the line is drawn on which values grow as x does, from the first point on."""
    log: bool = False
    """Whether both axes are logarithmic."""


def draw_panels(panels: Sequence[Panel], path: Path, caption: str) -> None:
    """Two panels beside each other, of curves: medians, from the least to the largest value."""
    rows = -(-len(panels) // 2)
    with saved_figure(path) as figure:
        figure.set_size_inches(10, 0.5 + 2.9 * rows)
        figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.08)
        places = list(figure.subplots(rows, 2, squeeze=False).flat)
        for axes, panel in zip(places, panels, strict=False):
            draw_panel(axes, panel)
        for axes in places[len(panels) :]:
            axes.set_axis_off()
        figure.supxlabel("\n".join(textwrap.wrap(caption, 130)), fontsize=7, color="dimgrey")


def draw_panel(axes: "Axes", panel: Panel) -> None:
    """One of them."""
    for label, points in panel.curves.items():
        medians = [statistics.median(values) for values in points.values()]
        below = [median - min(values) for median, values in zip(medians, points.values(), strict=True)]
        above = [max(values) - median for median, values in zip(medians, points.values(), strict=True)]
        axes.errorbar(
            list(points), medians, [below, above], fmt="o-", markersize=4, capsize=3, linewidth=1, label=label
        )
    every = sorted({x for points in panel.curves.values() for x in points})
    steps = [0.0]
    if panel.ideal:
        points = next(iter(panel.curves.values()))
        first = min(points)
        steps = [value / first * statistics.median(points[first]) for value in every]
        axes.plot(every, steps, ":", color="grey", linewidth=1, label="ideal")
    largest = max(max(values) for points in panel.curves.values() for values in points.values())
    if panel.log:
        set_logarithmic(axes)
    else:
        axes.set_xlim(left=0)
        axes.set_ylim(0, 1.1 * max(largest, *steps))
        axes.locator_params(axis="x", integer=True)
    axes.set_title(f"{panel.title}, {panel.unit}", fontsize=9, loc="left")
    axes.set_xlabel(panel.x, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(fontsize=7)


def set_logarithmic(axes: "Axes") -> None:
    """Both axes, with room around the curves and plain numbers: house figures write no formulas."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    low, high = axes.dataLim.intervaly
    axes.set(xscale="log", yscale="log", ylim=(low / 2, high * 2))
    for axis, subs in ((axes.xaxis, (1,)), (axes.yaxis, (1, 2, 5) if high / low < 100 else (1,))):
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_formatter("{x:g}")
