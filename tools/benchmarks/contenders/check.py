"""Whether a contender of `bench peers` does all the work, judged by what it hands over and by nothing it says."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from pipeline.draws import CROP_SIDE, OFFSETS
from pipeline.lighting import Lighting
from tools.benchmarks.contenders.data import Batches, PeerData
from tools.benchmarks.contenders.finish import pillow_pixels

GRID = 16
"""Every so many-th pixel is enough to find where a window was cut."""
ROUNDING = 0.01
"""Levels by which float32 may change a pixel on its way."""


class Found(NamedTuple):
    """What was found out about one image of a batch."""

    left: int
    top: int
    flipped: bool
    draw: np.ndarray
    """The normal draws of its lighting, (3,)."""
    levels: float
    """How far its pixels are from those of its file, at most, in levels of 0..255."""


def check_decoded(
    name: str, decoded: Iterator[np.ndarray], data: PeerData, levels: int
) -> tuple[str, np.ndarray]:
    """Compare all images with Pillow's, and assert that none is further off than `levels`.

    Returns what was found, and the images, uint8 (N, 256, 256, 3).
    """
    wanted_NHWC = np.stack([pillow_pixels(path) for path, _ in data.files])
    pixels_NHWC = np.stack(list(decoded))
    assert pixels_NHWC.dtype == np.uint8, f"{name} decodes to {pixels_NHWC.dtype}, not to uint8"
    assert pixels_NHWC.shape == wanted_NHWC.shape, (
        f"{name} decodes to {pixels_NHWC.shape}, not {wanted_NHWC.shape}"
    )
    off = np.abs(pixels_NHWC.astype(np.int16) - wanted_NHWC)
    assert off.max() <= levels, f"{name} decodes pixels {off.max()} levels off Pillow's, {levels} are allowed"
    found = f"decodes {len(off)} images within {off.max()} levels of Pillow's, {off.mean():.2f} in the mean"
    return found, pixels_NHWC


def check_batches(name: str, batches: Batches, decoded_NHWC: np.ndarray, data: PeerData) -> str:
    """Take one epoch of images whose class indexes are their numbers; returns what was found.

    Asserts that each image came once, as float32 of the right shape, and is a window of what the contender decodes, at
    any place, in half of the cases flipped, relit by standard normal draws and normalized.
    """
    found, seen = [], []
    for _ in range(len(decoded_NHWC) // data.batch_size):
        images, labels = next(batches)
        assert images.dtype == torch.float32, f"{name} hands out {images.dtype}, not float32"
        shape, interleaved = tuple(images.shape), images.shape[-1] == 3
        wanted = (CROP_SIDE, CROP_SIDE, 3) if interleaved else (3, CROP_SIDE, CROP_SIDE)
        assert shape == (data.batch_size, *wanted), f"{name} hands out {shape}, not {data.batch_size} windows"
        windows_NHWC = images if interleaved else images.permute(0, 2, 3, 1)
        seen += labels.tolist()
        for window, label in zip(windows_NHWC.numpy(), labels.tolist(), strict=True):
            found.append(find_window(window, decoded_NHWC[label], data))
    distinct, count = len(set(seen)), len(decoded_NHWC)
    assert sorted(seen) == list(range(count)), f"{name} hands out {distinct} of {count} images in an epoch"
    worst = max(each.levels for each in found)
    assert worst <= ROUNDING, f"{name} hands out pixels {worst:.2f} levels off those that it decodes"
    places = [len({each.left for each in found}), len({each.top for each in found})]
    assert min(places) > OFFSETS / 2, f"{name} cuts windows at {places[0]} x {places[1]} places"
    flipped = float(np.mean([each.flipped for each in found]))
    assert 0.3 < flipped < 0.7, f"{name} flips {flipped:.0%} of the images"
    draws = np.array([each.draw for each in found])
    mean, spread = draws.mean(0), draws.std(0)
    normal = (np.abs(mean) < 0.45).all() and (
        np.abs(spread - 1) < 0.3
    ).all()  # of 128 draws: five standard errors
    assert normal, f"{name} relights by draws of {mean} +- {spread}, not by standard normal ones"
    memory = "NHWC" if windows_NHWC.is_contiguous() else "NCHW"
    return (
        f"{distinct} of {count} images, once each; float32 {shape}, {memory} in memory, {4 * CROP_SIDE**2 * 3} bytes "
        f"an image; at {places[0]} x {places[1]} places, {flipped:.0%} flipped, lighting +- {spread.mean():.2f}"
    )


def find_window(window_HWC: np.ndarray, image_HWC: np.ndarray, data: PeerData) -> Found:
    """Find which window of an image this is, and undo what was done to it."""
    lighting = Lighting()
    levels = window_HWC.astype(np.float64) * lighting.divisor + data.basis.mean
    views = [levels, levels[:, ::-1]]
    everywhere = sliding_window_view(image_HWC[:, :, 1], (CROP_SIDE, CROP_SIDE))[:, :, ::GRID, ::GRID]
    # A shift moves all pixels alike, so at the right place they are all equally far off. Green is enough to see that.
    scores = [(view[::GRID, ::GRID, 1] - everywhere).std((2, 3)) for view in views]
    flipped, top, left = (int(k) for k in np.unravel_index(np.argmin(scores), np.shape(scores)))
    moved = views[flipped] - image_HWC[top : top + CROP_SIDE, left : left + CROP_SIDE]
    shift = moved.mean((0, 1))
    draw = np.linalg.solve(lighting.shift_matrix(data.basis), shift)
    return Found(left, top, bool(flipped), draw, float(np.abs(moved - shift).max()))
