"""Pictures of a finished run: curves, first-layer kernels, augmented images, predictions. PNG files in the run
directory."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from model.alexnet import AlexNet
from pipeline.draws import CROP_SIDE
from pipeline.eigenbasis import Eigenbasis
from pipeline.lighting import Lighting, apply_lighting
from pipeline.loader import train_loader
from pipeline.reader import decoded_batches
from pipeline.settings import Speed
from train.accuracy import MIDDLE
from train.charts import draw_curves, saved_figure, short_names
from train.directory import PICTURES
from train.findings import Example, Findings
from train.metrics import read_metrics
from train.state import TrainState

if TYPE_CHECKING:  # it takes a third of a second, and every start of a run would wait for it
    from matplotlib.figure import Figure


def draw_pictures(state: TrainState, network: AlexNet, findings: Findings) -> list[Path]:
    """Draw every picture; returns their paths."""
    paths = [state.config.run.dir / name for name in PICTURES]
    curves, kernels, augmentation, predictions = paths
    rows = read_metrics(state.config.run.dir / "metrics.jsonl")
    with saved_figure(curves) as figure:
        draw_curves(figure, rows, state.train_loader.steps_per_epoch, state.config.model.outputs)
    with saved_figure(kernels) as figure:
        draw_kernels(figure, network)
    with saved_figure(augmentation) as figure:
        draw_augmentation(figure, state)
    with saved_figure(predictions) as figure:
        draw_predictions(figure, state, findings)
    return paths


def draw_kernels(figure: "Figure", network: AlexNet) -> None:
    """The kernels of conv1 as in the paper's figure 3, one block per tower, on one colour scale."""
    kernels = network.conv1.weight.detach().float().cpu().permute(0, 2, 3, 1).numpy()
    blocks = np.split(kernels, network.config.num_towers)
    columns = 16 if len(blocks[0]) % 16 == 0 else 12
    reach = np.abs(kernels).max()
    sheets = [tile((block / reach + 1) / 2, columns) for block in blocks]
    figure.set_size_inches(8, 0.6 + sum(8 * sheet.shape[0] / sheet.shape[1] + 0.3 for sheet in sheets))
    figure.suptitle(f"conv1: {len(kernels)} kernels of 11x11x3 (noise at the start of training)")
    for number, (axes, sheet) in enumerate(
        zip(np.atleast_1d(figure.subplots(len(sheets), 1)), sheets, strict=True)
    ):
        axes.imshow(sheet, interpolation="nearest")
        axes.set_title(f"tower {number}", fontsize=9)
        axes.axis("off")


def draw_augmentation(figure: "Figure", state: TrainState) -> None:
    """One image moved along each RGB axis, and a batch as the network gets it from the real pipeline."""
    augmentation, basis = state.config.data.augmentation, state.basis
    images_NHWC = next(decoded_batches(state.train_shards, 16)).numpy()
    (image_HWC,) = most_colourful(images_NHWC[:, MIDDLE : MIDDLE + CROP_SIDE, MIDDLE : MIDDLE + CROP_SIDE], 1)
    amounts = range(-3, 4)
    rows = [moved_along(image_HWC, axis, amounts, basis, augmentation.lighting) for axis in range(3)]
    loader = train_loader(
        state.train_shards,
        basis,
        replace(
            state.config.data,
            decode="cpu",
            speed=Speed(),
            augmentation=replace(augmentation, mean="channel", images_per_crop=1),
        ),
        batch_size=min(14, state.train_shards.num_samples),
        seed=state.config.train.seed,
        rank=0,
        num_ranks=1,
        device="cpu",
    )
    batch = (
        next(iter(loader)).images.permute(0, 2, 3, 1).numpy()
        * augmentation.std
        * augmentation.lighting.divisor
    )
    loader.close()

    figure.set_size_inches(10, 8.4)
    titles = [f"axis {axis + 1} ({basis.axis_stddev[axis]:.0f} levels in the data)" for axis in range(3)]
    panels = figure.subplots(4, 1, height_ratios=[1, 1, 1, 2])
    for axes, images, title in zip(panels[:3], rows, titles, strict=True):
        axes.imshow(tile(images, len(amounts)))
        axes.set_title(
            f"one image moved by {amounts[0]} to +{amounts[-1]} standard deviations of lighting along {title}",
            fontsize=9,
        )
        axes.axis("off")
    panels[3].imshow(tile(to_pixels(batch, basis.mean), 7))
    panels[3].set_title("training images from the pipeline: window, flip, lighting", fontsize=9)
    panels[3].axis("off")


def draw_predictions(figure: "Figure", state: TrainState, findings: Findings) -> None:
    """Ten validation images with their five most probable classes over all views: the surest mistakes, and what was
    right but close."""
    wrong, right = findings.mistakes, findings.close_calls
    shown = (wrong[: max(5, 10 - len(right))] + right)[:10]
    names = short_names(state.val_shards.classes)
    figure.set_size_inches(12, 7)
    panels = figure.subplots(4, 5, height_ratios=[2, 1, 2, 1])
    for axes in panels.flat:
        axes.axis("off")
    for place, example in enumerate(shown):
        row, column = place // 5 * 2, place % 5
        picture, bars = panels[row, column], panels[row + 1, column]
        picture.imshow(example_pixels(example, state))
        picture.set_title(names[example.label], color="black" if example.correct else "firebrick")
        bars.axis("on")
        bars.barh(
            [names[index] for index in example.guesses[::-1]],
            example.probabilities[::-1],
            color=["seagreen" if index == example.label else "grey" for index in example.guesses[::-1]],
        )
        bars.set_xlim(0, 1)
        bars.tick_params(labelsize=8)
    figure.suptitle("validation images: the surest mistakes (red), then what was right but close")


def example_pixels(example: Example, state: TrainState) -> np.ndarray:
    """An image that was looked at as uint8 (256, 256, 3) RGB."""
    image_HWC = example.image.permute(1, 2, 0).float().numpy()
    return to_pixels(image_HWC * state.config.data.augmentation.std, state.basis.mean)


def most_colourful(images_NHWC: np.ndarray, count: int) -> np.ndarray:
    """The `count` images whose mean colour is farthest from grey."""
    return images_NHWC[np.ptp(images_NHWC.mean((1, 2)), axis=1).argsort()[::-1][:count]]


def moved_along(
    image_HWC: np.ndarray, axis: int, amounts: Sequence[int], basis: Eigenbasis, lighting: Lighting
) -> np.ndarray:
    """An image as lighting moves it along one axis, uint8 (len(amounts), height, width, 3); amounts are draws."""
    draws_N3 = np.zeros((len(amounts), 3))
    draws_N3[:, axis] = amounts
    return to_pixels(
        apply_lighting(image_HWC[None], draws_N3, basis, lighting) * lighting.divisor, basis.mean
    )


def to_pixels(images_HWC: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Mean-free RGB on the 0..255 scale to uint8."""
    return np.rint(np.clip(images_HWC + mean, 0, 255)).astype(np.uint8)


def tile(images_NHWC: np.ndarray, columns: int) -> np.ndarray:
    """Images side by side, `columns` in a row, with a light border; missing ones stay blank."""
    count, height, width, _ = images_NHWC.shape
    blank = 255 if images_NHWC.dtype == np.uint8 else 1
    rows = -(-count // columns)
    border = max(1, height // 32)
    sheet = np.full(
        (rows * (height + border) - border, columns * (width + border) - border, 3), blank, images_NHWC.dtype
    )
    for number, image in enumerate(images_NHWC):
        top, left = number // columns * (height + border), number % columns * (width + border)
        sheet[top : top + height, left : left + width] = image
    return sheet
