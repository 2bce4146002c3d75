"""A finished run on one page: `RUN/report.html`, a file that needs no other file, no network and no script.

Every text on it goes through `html.escape`, as class words and paths may hold anything; pictures are PNG files inside
the page. `page.html` has the frame and the style.
"""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image

from pipeline.shards import ClassName
from train import charts
from train.accuracy import EvalStats, Example
from train.kernels import saturation, tower_colours
from train.markup import inline, percent, picture, table

THUMBNAIL_SIDE = 160
"""Pixels: twenty photographs of this size are about 1.5 MB."""
HARDEST = 10


@dataclass(frozen=True)
class Story:
    """All that the page tells."""

    name: str
    """The run directory's."""
    summary: str
    """One line."""
    accuracy: list[tuple[str, str]]
    """(name, value), the most important first."""
    facts: list[tuple[str, str]]
    """What was trained on what, likewise."""
    rows: charts.Rows
    steps_per_epoch: int
    classes: Sequence[ClassName]
    findings: EvalStats
    pixels: Callable[[Example], np.ndarray]
    """An example as uint8 (256, 256, 3) RGB."""
    conv1: np.ndarray
    """Its weights, (maps, 3, 11, 11)."""
    towers: int
    kernels: bytes
    """The picture of conv1, a PNG file."""
    augmentation: bytes
    """The sheet of augmented images, likewise."""
    config: dict[str, Any]
    """Resolved."""


def build_page(story: Story) -> bytes:
    """The page as UTF-8."""
    sections = {
        "What": table(story.facts, css="facts"),
        "Learning and speed": curves(story),
        "First layer": kernels(story),
        "Hardest classes": hardest(story),
        "Surest mistakes": mistakes(story),
        "Augmentation": picture(
            story.augmentation,
            "One image moved along the three RGB axes by lighting, and a batch of training images",
            "Above, one image moved along each axis of the training images' colours, as lighting moves it. Below, "
            "images as the network saw them in training.",
        ),
        "Configuration": settings(story.config),
    }
    shown = {title: content for title, content in sections.items() if content}
    ids = {title: title.lower().replace(" ", "-") for title in shown}
    links = "\n".join(f'<a href="#{ids[title]}">{title}</a>' for title in shown)
    figures = "".join(f"<div><b>{escape(value)}</b>{escape(name)}</div>" for name, value in story.accuracy)
    parts = [
        f"<header>\n<h1>{escape(story.name)}</h1>",
        f'<p class="quiet">{escape(story.summary)}</p>',
        f'<div class="figures">{figures}</div>\n<nav>{links}</nav>\n</header>',
        "<main>",
    ]
    parts += [
        f'<section id="{ids[title]}">\n<h2>{title}</h2>\n{content}\n</section>'
        for title, content in shown.items()
    ]
    frame = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    html = frame.substitute(title=escape(story.name), body="\n".join([*parts, "</main>"]))
    return html.encode("utf-8", "replace")  # a file's name may be no UTF-8


def curves(story: Story) -> str:
    """Charts of learning, then of speed."""
    rows, steps, classes = story.rows, story.steps_per_epoch, len(story.classes)
    content = ""
    if rows:
        loss = charts.png_of(lambda figure: charts.draw_loss(figure.subplots(), rows, steps, classes))
        error = charts.png_of(lambda figure: charts.draw_error(figure.subplots(), rows, steps))
        content = picture(loss, "Training loss over epochs")
        content += picture(error, "Top-1 error over epochs, in training and validation")
    for title, (png, told) in charts.speed_charts(rows).items():
        content += picture(png, f"{title} over steps", told)
    return (
        f'<div class="charts">{content}</div>'
        if content
        else "<p>The run was too short for a row of metrics.</p>"
    )


def kernels(story: Story) -> str:
    """conv1's kernels in their order, and how colourful they are."""
    towers = np.split(saturation(story.conv1), story.towers)
    chart = charts.png_of(lambda figure: charts.draw_saturations(figure, towers))
    listed = "".join(
        f"<p>tower {number}: {' '.join(f'{value:.2f}' for value in values)}</p>"
        for number, values in enumerate(towers)
    )
    order = "one block for each tower, in their order" if len(towers) > 1 else "in their order"
    return (
        f"<p>{escape(colours_told(story.conv1, story.towers))}</p>"
        + picture(
            story.kernels, f"The {len(story.conv1)} kernels of conv1", f"conv1's kernels, {order}.", "medium"
        )
        + picture(
            chart,
            "Saturation of every kernel of conv1, sorted, for each tower",
            "A kernel's saturation is the share of its energy that is off the grey axis; noise has about 2/3.",
            "chart",
        )
        + f"<details><summary>Every kernel's saturation, in the picture's order</summary>{listed}</details>"
    )


def colours_told(conv1: np.ndarray, towers: int) -> str:
    """Whether the towers share out the colours, in a sentence or two."""
    found = tower_colours(conv1, towers)
    if found.p is None:
        return (
            f"The net has one tower, whose kernels have a mean saturation of {found.saturations[0]:.3f}: the control. "
            f"In 1 of 100 cases chance alone sets the means of two halves of them {found.chance:.3f} apart; two towers "
            "that share out the colours have to lie farther apart."
        )
    order = sorted(range(towers), key=lambda tower: found.saturations[tower])
    means = " and ".join(f"{found.saturations[tower]:.3f} in tower {tower}" for tower in order)
    split = (
        f"The towers split by colour, as in the paper's figure 3: tower {order[0]} is the grey one, tower {order[-1]} "
        "the colourful one"
        if found.split
        else "The towers do not split by colour"
    )
    return (
        f"Mean saturation of the kernels: {means}. {split}. Random halves of the same kernels lie as far apart in "
        f"{100 * found.p:.3g} % of cases (p = {found.p:.2g}); in 1 of 100 they lie {found.chance:.3f} apart or more."
    )


def hardest(story: Story) -> str:
    """The classes with the highest top-1 error, and for few classes what all are taken for; nothing where no class has
    images."""
    findings, classes = story.findings, story.classes
    found = [row for row in findings.table(classes) if row["images"]]
    if not found:
        return ""
    words = {name.wnid: name.words for name in classes}
    rows = []
    for row in sorted(found, key=lambda row: -row["top1_error"])[:HARDEST]:
        times, other = row.get("times", 0), words.get(row.get("mistaken_for", ""), "")
        mistaken = f"{other} ({times} of {row['images']})" if times else "–"
        rows.append((row["words"], f"{row['images']:,}", f"{row['top1_error']:.1f} %", mistaken))
    content = "<p>Over all views, by top-1 error.</p>" + table(
        rows, ("class", "images", "top-1 error", "most often taken for"), numbers=2
    )
    if len(classes) <= charts.NAMED_CLASSES and len(findings.confusion):
        content += picture(
            charts.png_of(lambda figure: charts.draw_confusion(figure, findings, classes)),
            "How often images of each class are taken for each class",
            "Rows are the true classes, columns what their images are taken for.",
            "medium",
        )
    return content


def mistakes(story: Story) -> str:
    """The images that the network was surest about and wrong, and those it was right about but least sure."""
    findings = story.findings
    content = (
        "<p>Validation images with the most probable classes over all views; the true class is green.</p>"
    )
    for title, examples, none in (
        ("Wrong, and sure of it", findings.mistakes, "No validation image was mistaken."),
        ("Right, but close", findings.close_calls, "No validation image was recognized."),
    ):
        cards = "".join(card(example, story) for example in examples)
        content += f"<h3>{title}</h3>" + (f'<div class="cards">{cards}</div>' if cards else f"<p>{none}</p>")
    return content


def card(example: Example, story: Story) -> str:
    """An image with its class, what it was taken for, and a bar for each guess."""
    names = [name.words.split(",")[0] for name in story.classes]
    true, guess, sure = names[example.label], names[example.guesses[0]], percent(example.probabilities[0])
    told = f"{true}, recognized at {sure}" if example.correct else f"{true}, taken for {guess} at {sure}"
    bars = ""
    for index, share in zip(example.guesses, example.probabilities, strict=True):
        css = ' class="true"' if index == example.label else ""
        bar = f'<i style="width:{100 * share:.1f}%"></i>'
        bars += f"<li{css}>{bar}<span>{escape(names[index])}</span>{percent(share)}</li>"
    out = io.BytesIO()
    image = Image.fromarray(story.pixels(example))
    image.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS).save(out, "PNG")
    return (
        f'<figure><img src="{inline(out.getvalue())}" alt="{escape(told)}" width="{THUMBNAIL_SIDE}" '
        f'height="{THUMBNAIL_SIDE}"><figcaption>{escape(told)}</figcaption><ul class="bars">{bars}</ul></figure>'
    )


def settings(config: dict[str, Any]) -> str:
    """A table for each section of the configuration."""
    return f'<div class="settings">{"".join(section(each, name) for name, each in config.items())}</div>'


def section(values: dict[str, Any], name: str) -> str:
    """A section's table, and those of the sections within."""
    inner = {key: each for key, each in values.items() if isinstance(each, dict)}
    plain = {key: each for key, each in values.items() if key not in inner}
    rows = [(key, each if isinstance(each, str) else json.dumps(each)) for key, each in plain.items()]
    return table(rows, caption=name) + "".join(section(each, f"{name}.{key}") for key, each in inner.items())
