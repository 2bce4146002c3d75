"""Draw a finished run with matplotlib: charts of its metrics, kernels of conv1, augmented images, confused classes.

Pictures are PNG files: in an SVG class names would be markup. matplotlib takes a third of a second to import, which the
start of a run does not wait for, so functions import it.

Shape suffixes: N images, C kernels, H height, W width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from pipeline.augment import CROP_SIDE
from pipeline.eigenbasis import Eigenbasis
from pipeline.files import atomic_writer
from pipeline.lighting import shifted_means
from pipeline.loader import decoded_batches, train_loader
from pipeline.settings import DataConfig
from pipeline.shards import ClassName, ShardSet
from train.accuracy import MIDDLE, EvalStats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEARNING = ("Loss", "Error")
CHARTS = {
    "Loss": ("cross-entropy", {"training, with dropout": ("train", "loss")}),
    "Error": (
        "top-1 error, %",
        {"training, with dropout": ("train", "top1_error"), "validation": ("eval", "centre_top1_error")},
    ),
    "Throughput": ("images/s", {"training speed": ("train", "images_per_s")}),
    "Input": ("% of the time", {"waiting for input": ("train", "wait_percent")}),
    "Steps": ("ms", {"step": ("train", "step_ms_p50"), "step while saving": ("train", "saving_step_ms_p50")}),
    "Evaluation": ("s", {"evaluation time": ("eval", "eval_s")}),
    "Memory": ("GB", {"GPU memory, at most": ("train", "gpu_memory_gb")}),
}
"""Title: (unit, {label of a line: (kind of row, name of the value)})."""
FLOAT32_MAX = float(np.finfo(np.float32).max)
NAMED_CLASSES = 40
"""Most classes for which a confusion matrix has room for their names."""


@contextmanager
def png_figure(file: BinaryIO) -> "Iterator[Figure]":
    """Open a figure that is written to `file` when the block ends; dollar signs in it do not start formulas."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(5.2, 3), layout="constrained")
        yield figure
        figure.savefig(file, format="png", dpi=120)


@contextmanager
def saved_figure(path: Path) -> "Iterator[Figure]":
    """Open a figure that is written to `path` when the block ends."""
    with atomic_writer(path) as file, png_figure(file) as figure:
        yield figure


def draw_png(draw: Callable[..., None], *arguments: Any) -> bytes:
    """Call `draw` with a new figure and more arguments; return the figure as a PNG file."""
    file = BytesIO()
    with png_figure(file) as figure:
        draw(figure, *arguments)
    return file.getvalue()


def read_lines(rows: list[dict[str, Any]], title: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Collect steps and values of each line of a chart, without lines that have no values, and without values that are
    not numbers or too large to draw, as in a damaged file."""
    lines = {}
    for label, (kind, name) in CHARTS[title][1].items():
        points = [(row["step"], row.get(name)) for row in rows if row["kind"] == kind]
        numbers = [p for p in points if all(isinstance(x, int | float) and abs(x) <= FLOAT32_MAX for x in p)]
        if numbers:
            steps, values = np.array(numbers, float).T
            lines[label] = steps, values
    return lines


def draw_charts(
    figure: "Figure", titles: Sequence[str], rows: list[dict[str, Any]], steps_per_epoch: int, classes: int
) -> None:
    """Draw some of `CHARTS` over epochs, from left to right."""
    figure.set_size_inches(5.2 * len(titles), 3)
    panels: Any = figure.subplots(1, len(titles), squeeze=False)
    for axes, title in zip(panels.flat, titles, strict=True):
        for label, (steps, values) in read_lines(rows, title).items():
            style = "o-" if len(values) < 25 else "-"
            axes.plot(steps / steps_per_epoch, values, style, markersize=4, label=label)
        if title == "Loss":
            axes.axhline(np.log(classes), color="grey", linestyle=":", label="chance: ln(classes)")
        highest = max(axes.dataLim.y1, 0) or 1.0
        limits = {"xlim": (0, None), "ylim": (0, 1.05 * highest)}
        axes.set(title=title, xlabel="epoch", ylabel=CHARTS[title][0], **limits)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)


def draw_kernels(figure: "Figure", towers: Sequence[np.ndarray]) -> None:
    """Draw conv1's kernels, (C, 3, H, W) per tower, as in the paper's figure 3: a block per tower, all scaled alike."""
    scaled = [to_pixels(127.5 * each / np.abs(towers).max(), 127.5).transpose(0, 2, 3, 1) for each in towers]
    sheets = [tile(each, 12 if len(each) % 16 else 16) for each in scaled]
    figure.set_size_inches(8, 0.6 + sum(8 * sheet.shape[0] / sheet.shape[1] + 0.3 for sheet in sheets))
    figure.suptitle("kernels of conv1 (noise at the start of training)")
    panels: Any = figure.subplots(len(sheets), squeeze=False)
    for number, (axes, sheet) in enumerate(zip(panels.flat, sheets, strict=True)):
        show_image(axes, sheet, f"tower {number}")


def draw_saturations(figure: "Figure", towers: Sequence[np.ndarray]) -> None:
    """Draw the saturations (0..1) of each tower's kernels in ascending order, and their means."""
    axes = figure.subplots()
    for number, values in enumerate(towers):
        axes.plot(np.sort(values), "o", markersize=4, color=f"C{number}", label=f"tower {number}")
        mean = values.mean()
        axes.axhline(mean, color=f"C{number}", linewidth=0.8, label=f"mean {mean:.2f}")
    axes.axhline(2 / 3, color="grey", linestyle=":", label="noise")
    axes.set(title="Saturation of kernels", xlabel="rank", ylabel="0 grey, 1 colour", ylim=(0, 1))
    axes.legend(fontsize=8)


def draw_augmentation(
    figure: "Figure", shards: ShardSet, basis: Eigenbasis, config: DataConfig, seed: int
) -> None:
    """Draw one image shifted along each RGB axis, and a batch as the training pipeline makes it."""
    settings = replace(config.augmentation, mean="channel", images_per_crop=1)
    lighting = settings.lighting
    images_NHWC = next(decoded_batches(shards, 16)).numpy()
    crops_NHWC = images_NHWC[:, MIDDLE : MIDDLE + CROP_SIDE, MIDDLE : MIDDLE + CROP_SIDE]
    most_colourful = np.ptp(crops_NHWC.mean((1, 2)), axis=1).argmax()
    draws_N3 = np.kron(np.eye(3), np.arange(-3, 4)[:, None])
    shifted_NHWC = crops_NHWC[[most_colourful]] - shifted_means(draws_N3, basis, lighting)[:, None, None]
    count = min(14, shards.num_samples)
    options: dict[str, Any] = {
        "rank": 0,
        "num_ranks": 1,
        "device": "cpu",
        "basis": basis,
        "augmentation": settings,
    }
    with closing(train_loader(shards, batch_size=count, seed=seed, **options)) as loader:
        batch_NHWC = next(iter(loader)).images.permute(0, 2, 3, 1).numpy()
    batch_NHWC = batch_NHWC * np.array(settings.stds) * lighting.divisor
    figure.set_size_inches(10, 7.8)
    upper, lower = figure.subplots(2, height_ratios=[3, 2])
    levels = ", ".join(f"{stddev:.0f}" for stddev in basis.axis_stddev)
    title = (
        f"one image shifted by lighting, -3 to +3 standard deviations along each axis (of {levels} levels)"
    )
    show_image(upper, tile(to_pixels(shifted_NHWC, basis.mean), 7), title)
    title = "training images from the pipeline: crop, flip, lighting"
    show_image(lower, tile(to_pixels(batch_NHWC, basis.mean), 7), title)


def draw_confusion(figure: "Figure", stats: EvalStats, classes: Sequence[ClassName]) -> None:
    """Draw how often images of each class (rows) are taken for each class (columns), as percentages of the row."""
    counts = stats.confusion[: len(classes)].cpu().numpy()
    percentages = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    named = len(classes) <= NAMED_CLASSES
    side = np.clip(0.3 * len(classes) + 3, 4, 9) if named else 8
    figure.set_size_inches(side + 1, side)
    axes = figure.subplots()
    image = axes.imshow(percentages, cmap="magma_r", vmin=0, vmax=100, interpolation="nearest")
    figure.colorbar(image, label="% of the images of the true class")
    axes.set(xlabel="taken for", ylabel="true class", title=f"{counts.sum()} validation images, all views")
    if named:
        names = [each.words.split(",")[0][:24] for each in classes]
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
        for row, column in np.argwhere(counts):
            colour = "white" if percentages[row, column] > 50 else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", color=colour)


def to_pixels(images_HWC: np.ndarray, mean: np.ndarray | float) -> np.ndarray:
    """Convert RGB on the 0..255 scale, from which the mean was subtracted, to uint8."""
    return np.rint(np.clip(images_HWC + mean, 0, 255)).astype(np.uint8)


def tile(images_NHWC: np.ndarray, columns: int) -> np.ndarray:
    """Join uint8 images to one image, `columns` per row, with white borders and white for missing images."""
    border = max(1, images_NHWC.shape[1] // 32)
    margins = (0, -len(images_NHWC) % columns), (0, border), (0, border), (0, 0)
    padded = np.pad(images_NHWC, margins, constant_values=255)
    _, height, width, _ = padded.shape
    return padded.reshape(-1, columns, height, width, 3).swapaxes(1, 2).reshape(-1, columns * width, 3)


def show_image(axes: "Axes", image_HWC: np.ndarray, title: str) -> None:
    """Show an image without axes."""
    axes.imshow(image_HWC)
    axes.set_title(title, fontsize=9)
    axes.axis("off")
