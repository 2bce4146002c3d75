"""Draw augmented training images, SHARDS/preview.png, with the training graph, and the eigenbasis, SHARDS/pca.png.

    python tools/preview.py SHARDS

preview.png: above, one stored image and 24 augmentations of it; below, the first 24 training images, of which the upper
one is the most colourful. Normalization is undone; colours that lighting shifts beyond 0..255 are clipped in the
picture, not in training. pca.png shows the axes of pca.json as colours; the numbers of pca.json are printed next to
ImageNet's.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from pipeline.eigenbasis import Eigenbasis, read_eigenbasis
from pipeline.errors import UserError
from pipeline.files import check_writable
from pipeline.lighting import Lighting
from pipeline.settings import Augmentation, DataConfig
from pipeline.shards import ShardSet, open_shards
from train.cli import run_program

COUNT = 24
"""Images in each half of the sheet."""
ROWS, COLUMNS = 3, 9
"""Cells in each half of the sheet."""
CAPTION = 24
"""Characters that fit below a crop."""
IMAGENET = {
    "mean": (127.3, 119.7, 104.9),
    "axis_stddev": (121.78, 37.09, 19.72),
    "eigenvectors": ((0.5635, 0.7126, -0.4180), (0.5762, 0.0235, 0.8170), (0.5920, -0.7012, -0.3973)),
}
"""ILSVRC-2012's training images, shorter side 256, central 256x256, on 0..255 (cuda-convnet2, make-data/input_meta),
with our signs: the largest component of a column is positive."""
MAX_SHIFT = 3
"""Standard deviations by which pca.png shifts the mean colour."""


class View(NamedTuple):
    """One image from the training graph."""

    row: int
    """Row of `ShardSet.samples`."""
    key: str
    """The stored file's name up to its first dot, without folders."""
    label: int
    stored: np.ndarray
    """uint8 (256, 256, 3): the image before cropping."""
    pixels: np.ndarray
    """uint8 (224, 224, 3): the crop, normalization undone."""
    left: int
    """Offset of the crop in the image, 0..32."""
    top: int
    mirrored: bool


def preview(
    shards: Path,
    out: Path | None = None,
    seed: int = 2012,
    strength: float = Lighting.strength,
    convention: Literal["stddev", "eigenvalue"] = "stddev",
) -> None:
    """Draw 24 augmentations of one image, the first 24 training images, and the RGB eigenbasis.

    Args:
        shards: Folder written by make_shards and compute_pca.
        out: Folder for preview.png and pca.png; SHARDS by default.
        seed: Seed of order, crops, flips and lighting; with a run's `train.seed` the lower half is its first images.
        strength: Strength of lighting; 0 turns it off.
        convention: Convention of lighting.
    """
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed: expected 0..2^63-1, got {seed}; give another seed")
    train = open_shards(shards, "train")
    content = read_eigenbasis(shards / "pca.json", train.manifest_sha256)
    basis, augmentation = Eigenbasis.from_json(content), Augmentation(lighting=Lighting(convention, strength))
    sheet, axes = ((out or shards) / name for name in ("preview.png", "pca.png"))
    check_writable(sheet)
    training = render_views(train, basis, augmentation, seed)
    colourful = max(training, key=lambda view: np.ptp(view.stored.mean((0, 1))))
    same = replace(train, samples=np.repeat(train.samples[[colourful.row]], COUNT))
    repeated = render_views(same, basis, augmentation, seed + 1)  # other draws than in the lower half
    lighting = f"lighting of strength {strength:g}, convention {convention}"
    upper = f"{colourful.key}, as it is stored, and {COUNT} times as training may show it: {lighting}"
    lower = f"The first {len(training)} of {train.num_samples:,} training images, seed {seed}"
    stored = colourful._replace(pixels=colourful.stored)
    cells = [(stored, "stored")] + [
        (view, f"{view.left} right, {view.top} down{', flipped' * view.mirrored}") for view in repeated
    ]
    words = [train.classes[view.label].words.split(",")[0][:CAPTION] for view in training]
    firsts = [(view, f"{word}\n{view.key[-CAPTION:]}") for view, word in zip(training, words, strict=True)]
    draw_sheet(sheet, {upper: cells, lower: firsts})
    print(f"{format_eigenbasis(content)}\n")
    draw_eigenbasis(axes, content)
    print(f"pictures: {sheet}, {axes}")


def render_views(shards: ShardSet, basis: Eigenbasis, augmentation: Augmentation, seed: int) -> list[View]:
    """Render the first training images, at most `COUNT`, on the CPU. Raises `DataError` when one cannot be decoded."""
    from pipeline.augment import CROP_SIDE
    from pipeline.graph import Graph  # DALI takes seconds; errors in the input come first
    from pipeline.plan import TrainSampler
    from pipeline.prefetch import Prefetcher
    from train.pictures import to_pixels

    count, config = min(COUNT, shards.num_samples), DataConfig(Path(), augmentation=augmentation)
    sampler = TrainSampler(shards, basis, config, count, seed, 0, 1)

    def decode(crop: bool) -> np.ndarray:
        graph = Graph("stored" if shards.is_decoded else "cpu", any_size=shards.any_size, crop=crop)
        batches = Prefetcher(
            shards, graph, sampler, batch_size=count, speed=config.speed, device_id=None
        ).batches(0)
        plan, pixels = next(batches)
        pixels = pixels.numpy().copy()
        if crop and shards.is_decoded and plan.draws:  # rows at full width
            pixels = np.stack(
                [rows[:, x : x + CROP_SIDE] for rows, x in zip(pixels, plan.draws.left, strict=True)]
            )
        return pixels

    plan, squares, crops = sampler(0), decode(crop=False), decode(crop=True)
    assert plan.draws is not None
    views = []
    for n, row in enumerate(plan.rows.tolist()):
        left, top, mirrored = (each[n].item() for each in plan.draws[:3])
        pixels = to_pixels((crops[n][:, ::-1] if mirrored else crops[n]) - plan.means[n], basis.mean)
        label = int(shards.samples["label"][row])
        views.append(View(row, shards.read_key(row), label, squares[n], pixels, left, top, mirrored))
    return views


def draw_sheet(path: Path, halves: dict[str, list[tuple[View, str]]]) -> None:
    """Write preview.png: views with their captions, by the heading of each half."""
    from train.pictures import saved_figure

    with saved_figure(path) as figure:
        figure.set_size_inches(18, 15)  # at 120 dots per inch a crop has about its own size
        subfigures: Any = figure.subfigures(len(halves))
        for half, (heading, cells) in zip(subfigures, halves.items(), strict=True):
            half.suptitle(heading)
            for number, axes in enumerate(half.subplots(ROWS, COLUMNS).flat):
                axes.axis("off")
                for view, caption in cells[number : number + 1]:
                    axes.imshow(view.pixels)
                    axes.set_title(caption, fontsize=8, y=0, va="top", pad=-2)


def format_eigenbasis(content: dict[str, Any]) -> str:
    """Format a table of a `pca.json` next to ImageNet's."""
    basis, published = Eigenbasis.from_json(content), {name: np.array(IMAGENET[name]) for name in IMAGENET}
    vectors, reference = basis.eigenvectors, published["eigenvectors"]
    stddev, known = basis.axis_stddev, published["axis_stddev"]
    angles = np.degrees(np.arccos(np.clip(np.abs((vectors * reference).sum(0)), 0, 1)))
    channel_stddev = np.sqrt(vectors**2 @ stddev**2), np.sqrt(reference**2 @ known**2)
    pairs = {
        "mean": (basis.mean, published["mean"]),
        "standard deviation of channels": channel_stddev,
        "standard deviation of axes": (stddev, known),
        "share of the variance, %": (compute_variance_shares(stddev), compute_variance_shares(known)),
        "red of axes": (vectors[0], reference[0]),
        "green of axes": (vectors[1], reference[1]),
        "blue of axes": (vectors[2], reference[2]),
        "angle of axes, degrees": (angles, np.zeros(3)),
    }
    about = "ImageNet's in brackets; columns are red, green, blue, or axes 1, 2, 3"
    lines = [f"{content['num_images']} images, levels of 0..255 ({about})"]
    for name, (values, imagenet) in pairs.items():
        digits = 4 if name.startswith(("red", "green", "blue")) else 2
        cells = (f"{a:.{digits}f} ({b:.{digits}f})" for a, b in zip(values, imagenet, strict=True))
        lines.append(f"{name:<31}" + "".join(f"{cell:>21}" for cell in cells))
    return "\n".join(lines)


def compute_variance_shares(stddev: np.ndarray) -> np.ndarray:
    """Compute each axis's percentage of the variance; zeros if there is none."""
    return 100 * stddev**2 / ((stddev**2).sum() or 1.0)


def draw_eigenbasis(path: Path, content: dict[str, Any]) -> None:
    """Write pca.png: ramps of the mean colour shifted along each axis."""
    from train.pictures import saved_figure

    basis, steps = Eigenbasis.from_json(content), np.linspace(-MAX_SHIFT, MAX_SHIFT, 601)[:, None]
    with saved_figure(path) as figure:
        figure.set_size_inches(10, 5)
        figure.suptitle(
            f"RGB eigenbasis of {content['num_images']} images: the mean colour shifted along each axis"
        )
        for axis, ramp in enumerate(figure.subplots(3)):
            stddev, share = basis.axis_stddev[axis], compute_variance_shares(basis.axis_stddev)[axis]
            colours = np.rint((basis.mean + steps * stddev * basis.eigenvectors[:, axis]).clip(0, 255))
            ramp.imshow(colours.astype(np.uint8)[None], aspect="auto", extent=(-MAX_SHIFT, MAX_SHIFT, 0, 1))
            ramp.set_yticks([])
            about = f"standard deviations of {stddev:.1f} levels, {share:.1f} % of the variance"
            ramp.set_title(f"axis {axis + 1}: {about}", fontsize=9)


if __name__ == "__main__":
    run_program(preview)
