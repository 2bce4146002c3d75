"""Figures of what was measured, as PNG files."""

import statistics
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from train.charts import saved_figure

if TYPE_CHECKING:
    from tools.benchmarks.measure import Table

HEIGHT_OF_A_BAR = 0.32
"""Inches."""


def draw_tables(tables: "list[Table]", path: Path, caption: str) -> None:
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
            axes.errorbar(medians, names, xerr=[below, above], fmt="none", color="black", capsize=3, linewidth=1)
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
