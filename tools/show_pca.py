"""What an eigenbasis looks like: a table beside ImageNet's, and a picture."""

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.eigenbasis import Eigenbasis
from pipeline.shards import ShardSet

IMAGENET = {
    "mean": (127.3, 119.7, 104.9),
    "axis_stddev": (121.78, 37.09, 19.72),
    "eigenvectors": ((0.5635, 0.7126, -0.4180), (0.5762, 0.0235, 0.8170), (0.5920, -0.7012, -0.3973)),
}
"""ILSVRC-2012's training images, shorter side 256, central 256x256, on 0..255 (cuda-convnet2, make-data/input_meta),
with our signs: the largest component of a column is positive."""
AMOUNTS = tuple(range(-3, 4))
"""Standard deviations by which the picture moves colours."""


def table(content: dict[str, Any]) -> str:
    """The figures of a `pca.json` beside ImageNet's, as text."""
    basis = Eigenbasis.from_json(content)
    vectors, reference = basis.eigenvectors, np.array(IMAGENET["eigenvectors"])
    deviations, published = basis.axis_stddev, np.array(IMAGENET["axis_stddev"])
    ours, theirs = (np.sqrt((axes**2) @ spread**2) for axes, spread in ((vectors, deviations), (reference, published)))
    angles = np.degrees(np.arccos(np.clip(np.abs((vectors * reference).sum(0)), 0, 1)))
    told = [f"{angle:.1f}" if spread else "-" for angle, spread in zip(angles, deviations, strict=True)]
    rows = [
        ("channels", "red", "green", "blue"),
        ("mean", *figures(basis.mean, IMAGENET["mean"])),
        ("standard deviation", *figures(ours, theirs)),
        ("axes", "first", "second", "third"),
        ("standard deviation", *figures(deviations, published)),
        ("variance (eigenvalue)", *figures(deviations**2, published**2, 0)),
        ("share of the variance, %", *figures(shares(deviations), shares(published))),
        *((name, *figures(vectors[k], reference[k], 4)) for k, name in enumerate(("red", "green", "blue"))),
        ("angle to ImageNet's, degrees", *told),
    ]
    head = f"{what(content)}, levels of 0..255; in brackets ImageNet's"
    return "\n".join([head, *(f"{name:<29}" + "".join(f"{cell:>21}" for cell in cells) for name, *cells in rows)])


def what(content: dict[str, Any]) -> str:
    """What the file is of."""
    sample = content.get("sample")
    return f"{content.get('num_images')} images" + (f", drawn at random (seed {sample['seed']})" if sample else "")


def figures(ours: Any, imagenet: Any, digits: int = 2) -> list[str]:
    """Each number with ImageNet's in brackets."""
    return [f"{a:.{digits}f} ({b:.{digits}f})" for a, b in zip(ours, imagenet, strict=True)]


def shares(deviations: np.ndarray) -> np.ndarray:
    """Percentages of the variance; zero where there is none."""
    total: float = (deviations**2).sum()
    return 100 * deviations**2 / total if total else deviations


def draw(path: Path, shards: ShardSet, content: dict[str, Any]) -> None:
    """Write a PNG: the axes as ramps of colour, and the most colourful of the first images moved along them."""
    from pipeline.lighting import Lighting
    from pipeline.reader import decoded_batches
    from train.charts import saved_figure
    from train.pictures import most_colourful, moved_along, tile

    basis, lighting = Eigenbasis.from_json(content), Lighting()
    images_NHWC = most_colourful(next(decoded_batches(shards, min(32, shards.num_samples))).numpy(), 2)
    with saved_figure(path) as figure:
        figure.set_size_inches(10, 12)
        figure.suptitle(f"RGB eigenbasis of {what(content)}")
        panels = figure.subplots(6, 1, height_ratios=[1, 5] * 3)
        for axis in range(3):
            ramp, moved = panels[2 * axis], panels[2 * axis + 1]
            reach = np.linspace(AMOUNTS[0], AMOUNTS[-1], 601)[:, None]
            colours = basis.mean + reach * basis.axis_stddev[axis] * basis.eigenvectors[:, axis]
            ramp.imshow(
                np.rint(colours.clip(0, 255)).astype(np.uint8)[None],
                aspect="auto",
                extent=(AMOUNTS[0], AMOUNTS[-1], 0, 1),
            )
            share = shares(basis.axis_stddev)[axis]
            ramp.set_title(
                f"axis {axis + 1}: the mean colour moved by -3 to +3 standard deviations of the data "
                f"({basis.axis_stddev[axis]:.1f} levels each, {share:.1f} % of the variance)",
                fontsize=9,
            )
            ramp.set_yticks([])
            rows = [moved_along(image, axis, AMOUNTS, basis, lighting) for image in images_NHWC]
            moved.imshow(tile(np.concatenate(rows), len(AMOUNTS)))
            moved.set_title(
                f"images moved by -3 to +3 standard deviations of lighting ({lighting.strength})", fontsize=9
            )
            moved.axis("off")
