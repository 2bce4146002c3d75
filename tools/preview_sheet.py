"""Lay out the pictures of tools/preview.py: the sheet of augmented images, and the RGB eigenbasis."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.eigenbasis import Eigenbasis
from pipeline.lighting import Lighting
from pipeline.shards import DataError, ShardSet

ROWS, COLUMNS = 3, 9
"""Of the cells in each half of the sheet."""
CAPTION = 24
"""Letters that fit below a crop."""
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
    """Write preview.png: above, a stored image and its crops; below, the first images of training."""
    from train.charts import saved_figure

    one, crops = repeated[0], f"lighting of strength {lighting.strength:g}, convention {lighting.convention}"
    above = f"{one.key}, as it is stored, and {len(repeated)} times as training may show it: {crops}"
    below = f"The first {len(training)} of {shards.num_samples:,} training images, seed {seed}"
    places = [f"{view.left} right, {view.top} down{', flipped' * view.mirrored}" for view in repeated]
    names = [f"{class_name(view, shards)[:CAPTION]}\n{view.key[-CAPTION:]}" for view in training]
    cells = [(one.stored, f"{class_name(one, shards)[:CAPTION]}, stored")]
    cells += [(view.pixels, place) for view, place in zip(repeated, places, strict=True)]
    firsts = [(view.pixels, name) for view, name in zip(training, names, strict=True)]
    with saved_figure(path) as figure:
        figure.set_size_inches(18, 15)  # at 120 dots per inch a crop has about its own size
        for half, heading, images in zip(figure.subfigures(2), (above, below), (cells, firsts), strict=True):
            half.suptitle(heading)
            panels = half.subplots(ROWS, COLUMNS).flat
            for axes in panels:
                axes.axis("off")
            for axes, (pixels_HWC, caption) in zip(half.axes, images, strict=False):
                axes.imshow(pixels_HWC)
                axes.set_title(caption, fontsize=8, y=0, va="top", pad=-2)


def class_name(view: View, shards: ShardSet) -> str:
    """Return the first of the class's words. Raises `DataError` for a label beyond the classes."""
    if view.label >= len(shards.classes):
        raise DataError(
            f"{view.key}: expected a label below {len(shards.classes)}, the number of classes, got {view.label}; "
            f"tools/make_shards.py verify {Path(shards.tars[0]).parent.parent} lists all damage"
        )
    return shards.classes[view.label].words.split(",")[0]


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
        ["angle to ImageNet's, degrees", *(f"{angle:.1f}" for angle in angles)],
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
