"""Lay out the pictures of tools/preview.py: the sheet of augmented images, and the RGB eigenbasis."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.eigenbasis import Eigenbasis
from pipeline.lighting import Lighting
from pipeline.shards import IMAGE_SIDE, DataError, ShardSet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 120
"""That of `saved_figure`: a pixel of the figure is one of the file."""
COLUMNS, CROP = 8, 224
"""Crops in a row, and pixels of their sides."""
MARGIN, GAP, HEADING, LINE = 28, 14, 38, 21
"""Pixels around blocks, between crops, of a heading, and of a line of a caption."""
IMAGENET = {
    "mean": (127.3, 119.7, 104.9),
    "axis_stddev": (121.78, 37.09, 19.72),
    "eigenvectors": ((0.5635, 0.7126, -0.4180), (0.5762, 0.0235, 0.8170), (0.5920, -0.7012, -0.3973)),
}
"""ILSVRC-2012's training images, shorter side 256, central 256x256, on 0..255 (cuda-convnet2, make-data/input_meta),
with our signs: the largest component of a column is positive."""
AMOUNTS = tuple(range(-3, 4))
"""Standard deviations by which pca.png moves colours."""


class View(NamedTuple):
    """One image as the training graph makes it."""

    key: str
    label: int
    jpeg: bytes
    """As it is stored."""
    stored: np.ndarray
    """uint8 (256, 256, 3): the image that the crop is cut from."""
    pixels: np.ndarray
    """uint8 (224, 224, 3): the crop, normalization undone."""
    left: int
    """Offset of the crop in the image, 0..32."""
    top: int
    mirrored: bool


def draw_sheet(
    path: Path, shards: ShardSet, repeated: list[View], training: list[View], lighting: Lighting, seed: int
) -> None:
    """Write preview.png: two blocks of crops, each under a heading; left of the first, the stored image."""
    from train.charts import saved_figure

    names, one = [class_name(view, shards) for view in training], repeated[0]
    once = (
        f"{class_name(one, shards)}, {one.key}, {len(repeated)} times: crops of {CROP}x{CROP}, half of them "
    )
    once += f"flipped, lighting of strength {lighting.strength:g} by {lighting.convention}"
    first = f"The first {len(training)} of {shards.num_samples:,} images that training sees with seed {seed}"
    width, above = 2 * MARGIN + IMAGE_SIDE + COLUMNS * (CROP + GAP) + GAP, block_height(len(repeated), 1)
    with saved_figure(path) as figure:
        figure.set_dpi(DPI)
        figure.set_size_inches(width / DPI, (3 * MARGIN + above + block_height(len(training), 2)) / DPI)
        paste(figure, MARGIN, MARGIN + HEADING, one.stored)
        for top, heading in ((MARGIN, once), (2 * MARGIN + above, first)):
            write_text(figure, MARGIN, top, width - 2 * MARGIN, heading, size=14, weight="bold")
        draw_block(figure, MARGIN, repeated, [[describe_crop(view)] for view in repeated])
        captions = [[name, view.key] for name, view in zip(names, training, strict=True)]
        draw_block(figure, 2 * MARGIN + above, training, captions)


def class_name(view: View, shards: ShardSet) -> str:
    """Return the first of the class's words. Raises `DataError` for a label beyond the classes."""
    if view.label >= len(shards.classes):
        raise DataError(
            f"{view.key}: expected a label below {len(shards.classes)}, the number of classes, got {view.label}; "
            f"tools/make_shards.py verify {Path(shards.tars[0]).parent.parent} lists all damage"
        )
    return shards.classes[view.label].words.split(",")[0]


def describe_crop(view: View) -> str:
    """Say where a crop lies in the stored image."""
    return f"{view.left} right, {view.top} down{', flipped' * view.mirrored}"


def block_height(count: int, lines: int) -> int:
    """Compute the pixels that so many crops take with captions of so many lines."""
    return HEADING + -(-count // COLUMNS) * (CROP + lines * LINE + GAP)


def draw_block(figure: "Figure", top: int, views: list[View], captions: list[list[str]]) -> None:
    """Paste crops with captions below them: a line for people, and a key of which the end matters."""
    for number, (view, lines) in enumerate(zip(views, captions, strict=True)):
        x = MARGIN + IMAGE_SIDE + 2 * GAP + number % COLUMNS * (CROP + GAP)
        y = top + HEADING + number // COLUMNS * (CROP + len(lines) * LINE + GAP)
        paste(figure, x, y, view.pixels)
        for row, text in enumerate(lines):
            style = {"size": 9, "color": "dimgrey"} if row or len(lines) == 1 else {"size": 10.5}
            write_text(figure, x, y + CROP + 3 + row * LINE, CROP, text, keep_end=row > 0, **style)


def paste(figure: "Figure", left: int, top: int, pixels_HWC: np.ndarray) -> None:
    """Put an image into the figure, pixel for pixel, by its upper left corner."""
    figure.figimage(pixels_HWC, left, round(figure.bbox.height) - top - len(pixels_HWC), origin="upper")


def write_text(
    figure: "Figure", left: int, top: int, width: int, text: str, keep_end: bool = False, **style: Any
) -> None:
    """Write one line, cut to `width` pixels; `keep_end` cuts it in front."""
    x, y = left / figure.bbox.width, 1 - top / figure.bbox.height
    line = figure.text(x, y, text, va="top", ha="left", parse_math=False, **style)
    while line.get_window_extent().width > width and len(text) > 1:
        text = text[1:] if keep_end else text[:-1]
        line.set_text(f"…{text}" if keep_end else f"{text.rstrip()}…")


def format_eigenbasis(content: dict[str, Any]) -> str:
    """Format the numbers of a `pca.json` next to ImageNet's as a table."""
    basis, published = Eigenbasis.from_json(content), {name: np.array(IMAGENET[name]) for name in IMAGENET}
    vectors, reference = basis.eigenvectors, published["eigenvectors"]
    stddev, known = basis.axis_stddev, published["axis_stddev"]
    angles = np.degrees(np.arccos(np.clip(np.abs((vectors * reference).sum(0)), 0, 1)))

    def pairs(ours: np.ndarray, imagenet: np.ndarray, digits: int = 2) -> list[str]:
        return [f"{a:.{digits}f} ({b:.{digits}f})" for a, b in zip(ours, imagenet, strict=True)]

    rows = [
        ["channels", "red", "green", "blue"],
        ["mean", *pairs(basis.mean, published["mean"])],
        ["standard deviation", *pairs(np.sqrt(vectors**2 @ stddev**2), np.sqrt(reference**2 @ known**2))],
        ["axes", "first", "second", "third"],
        ["standard deviation", *pairs(stddev, known)],
        ["share of the variance, %", *pairs(variance_shares(stddev), variance_shares(known))],
        *([name, *pairs(vectors[k], reference[k], 4)] for k, name in enumerate(("red", "green", "blue"))),
        [
            "angle to ImageNet's, degrees",
            *(f"{a:.1f}" if s else "-" for a, s in zip(angles, stddev, strict=True)),
        ],
    ]
    table = "\n".join(f"{name:<29}" + "".join(f"{cell:>21}" for cell in cells) for name, *cells in rows)
    return f"{content['num_images']} images, levels of 0..255; in brackets ImageNet's\n{table}"


def variance_shares(stddev: np.ndarray) -> np.ndarray:
    """Compute each axis's percentage of the variance; zeros where there is none."""
    return 100 * stddev**2 / ((stddev**2).sum() or 1.0)


def draw_eigenbasis(path: Path, shards: ShardSet, content: dict[str, Any]) -> None:
    """Write pca.png: the axes as ramps of colour, and the most colourful of the first images moved along them."""
    from pipeline.reader import decoded_batches
    from train.charts import saved_figure
    from train.pictures import most_colourful, moved_along, tile

    basis, lighting = Eigenbasis.from_json(content), Lighting()
    images_NHWC = most_colourful(next(decoded_batches(shards, min(32, shards.num_samples))).numpy(), 2)
    steps = np.linspace(AMOUNTS[0], AMOUNTS[-1], 601)[:, None]
    with saved_figure(path) as figure:
        figure.set_size_inches(10, 12)
        figure.suptitle(f"RGB eigenbasis of {content['num_images']} images")
        panels = figure.subplots(6, 1, height_ratios=[1, 5] * 3)
        for axis, (ramp, moved) in enumerate(panels.reshape(3, 2)):
            stddev = basis.axis_stddev[axis]
            colours = np.rint((basis.mean + steps * stddev * basis.eigenvectors[:, axis]).clip(0, 255))
            ramp.imshow(colours.astype(np.uint8)[None], aspect="auto", extent=(AMOUNTS[0], AMOUNTS[-1], 0, 1))
            ramp.set_yticks([])
            share = variance_shares(basis.axis_stddev)[axis]
            title = f"axis {axis + 1}: the mean colour moved by -3 to +3 standard deviations of the data "
            ramp.set_title(f"{title}({stddev:.1f} levels each, {share:.1f} % of the variance)", fontsize=9)
            rows = [moved_along(image_HWC, axis, AMOUNTS, basis, lighting) for image_HWC in images_NHWC]
            moved.imshow(tile(np.concatenate(rows), len(AMOUNTS)))
            title = f"images moved by -3 to +3 standard deviations of lighting ({lighting.strength})"
            moved.set_title(title, fontsize=9)
            moved.axis("off")
