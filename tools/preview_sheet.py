"""How tools/preview.py lays out its sheet, pixel by pixel."""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.lighting import Lighting
from pipeline.shards import IMAGE_SIDE, DataError, ShardSet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 8
"""Windows in a row."""
DPI = 120
"""That of `saved_figure`: a pixel of the figure is one of the file."""
SIDE, CELL = IMAGE_SIDE, 224
"""Pixels of the stored image, whose column also holds the text, and of a window."""
MARGIN, GAP = 28, 14
HEADING, LINE = 38, 21
"""Height of a heading and of a line of a caption, in pixels."""
WRAP = 27
"""Letters in a line of the left column."""


class View(NamedTuple):
    """One image as the training graph makes it."""

    key: str
    label: int
    pixels: np.ndarray
    """uint8 (224, 224, 3): the window, normalization undone."""
    stored: np.ndarray
    """uint8 (256, 256, 3): the image that it is cut from."""
    left: int
    """Offset of the window in the image, 0..32."""
    top: int
    mirrored: bool


def draw_sheet(
    path: Path, shards: ShardSet, repeated: list[View], training: list[View], lighting: Lighting, seed: int
) -> None:
    """Write the sheet: two blocks of windows, each with a column of text and, above, the stored image."""
    from train.charts import saved_figure

    names = [class_words(view, shards) for view in training]
    settings = (
        f"Windows of {CELL}x{CELL} pixels, each flipped with probability 1/2. Lighting: strength "
        f"{lighting.strength:g}, convention {lighting.convention}. Colours beyond 0..255 are cut here, not in training."
    )
    order = (
        f"As training with seed {seed} begins on one rank: from {shards.num_samples:,} images in {len(shards.tars):,} "
        f"shard{'s' * (len(shards.tars) > 1)}, shuffled, augmented as above."
    )
    above = block_height(len(repeated), 1)
    with saved_figure(path) as figure:
        figure.set_dpi(DPI)
        width = 2 * MARGIN + SIDE + COLUMNS * (CELL + GAP) + GAP
        figure.set_size_inches(width / DPI, (3 * MARGIN + above + block_height(len(training), 2)) / DPI)
        one, at = repeated[0], MARGIN
        write(figure, MARGIN, at, width - 2 * MARGIN, f"One image, {len(repeated)} times", size=14, weight="bold")
        paste(figure, MARGIN, at + HEADING, one.stored)
        below = at + HEADING + SIDE + 4
        write(figure, MARGIN, below, SIDE, class_words(one, shards), size=10.5)
        write(figure, MARGIN, below + LINE, SIDE, one.key, keep_end=True, size=9, color="dimgrey")
        write_lines(figure, MARGIN, below + 3 * LINE, settings)
        draw_block(figure, at, repeated, [[place(view)] for view in repeated])

        at += above + MARGIN
        write(
            figure, MARGIN, at, width - 2 * MARGIN, f"The first {len(training)} training images", size=14, weight="bold"
        )
        write_lines(figure, MARGIN, at + HEADING, order)
        draw_block(figure, at, training, [[name, view.key] for name, view in zip(names, training, strict=True)])


def class_words(view: View, shards: ShardSet) -> str:
    """What a person calls the view's class, in short. Raises `DataError` for a label beyond the classes."""
    if view.label >= len(shards.classes):
        raise DataError(
            f"{view.key} has label {view.label}, there are {len(shards.classes)} classes; tools/make_shards.py verify "
            f"{Path(shards.tars[0]).parent.parent} lists all damage"
        )
    return shards.classes[view.label].words.split(",")[0]


def place(view: View) -> str:
    """Where a window lies in the stored image, in words."""
    return f"{view.left} right, {view.top} down{', flipped' * view.mirrored}"


def block_height(count: int, lines: int) -> int:
    """Pixels that so many windows take with captions of so many lines."""
    return HEADING + -(-count // COLUMNS) * (CELL + lines * LINE + GAP)


def window_corner(number: int, lines: int) -> tuple[int, int]:
    """Left and top pixel of a window within its block, whose captions have so many lines."""
    left = MARGIN + SIDE + 2 * GAP + number % COLUMNS * (CELL + GAP)
    return left, HEADING + number // COLUMNS * (CELL + lines * LINE + GAP)


def draw_block(figure: "Figure", top: int, views: list[View], captions: list[list[str]]) -> None:
    """Paste windows with captions below: a line for people, and a key of which the end matters."""
    for number, (view, lines) in enumerate(zip(views, captions, strict=True)):
        x, y = window_corner(number, len(lines))
        paste(figure, x, top + y, view.pixels)
        for row, text in enumerate(lines):
            style = {"size": 9, "color": "dimgrey"} if row or len(lines) == 1 else {"size": 10.5}
            write(figure, x, top + y + CELL + 3 + row * LINE, CELL, text, keep_end=row > 0, **style)


def paste(figure: "Figure", left: int, top: int, pixels_HWC: np.ndarray) -> None:
    """Put an image into the figure, pixel for pixel, by its upper left corner."""
    figure.figimage(pixels_HWC, left, round(figure.bbox.height) - top - len(pixels_HWC), origin="upper")


def write(figure: "Figure", left: int, top: int, width: int, text: str, keep_end: bool = False, **style: Any) -> None:
    """Write one line, cut to `width` pixels; `keep_end` cuts it in front."""
    line = figure.text(
        left / figure.bbox.width, 1 - top / figure.bbox.height, text, va="top", ha="left", parse_math=False, **style
    )
    while line.get_window_extent().width > width and len(text) > 1:
        text = text[1:] if keep_end else text[:-1]
        line.set_text(f"…{text}" if keep_end else f"{text.rstrip()}…")


def write_lines(figure: "Figure", left: int, top: int, text: str) -> None:
    """Write wrapped text of ours in the left column."""
    for row, line in enumerate(textwrap.wrap(text, WRAP)):
        write(figure, left, top + row * LINE, SIDE, line, size=10)
