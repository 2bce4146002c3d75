"""What contenders without operations of their own do in numpy, and Pillow's pixels."""

from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.draws import CROP_SIDE, OFFSETS
from pipeline.eigenbasis import Eigenbasis
from pipeline.lighting import Lighting


def finish(pixels_HWC: np.ndarray, basis: Eigenbasis, rng: np.random.Generator, out_HWC: np.ndarray) -> None:
    """What comes behind the decoder, in numpy: window, flip, lighting and normalization."""
    left, top = rng.integers(OFFSETS + 1, size=2)
    window = pixels_HWC[top : top + CROP_SIDE, left : left + CROP_SIDE]
    if rng.random() < 0.5:
        window = window[:, ::-1]
    lighting = Lighting()
    mean = basis.mean - lighting.shift_matrix(basis) @ rng.standard_normal(3)
    rows = (CROP_SIDE, CROP_SIDE * 3)  # numpy is slow at rows of three
    np.subtract(window.reshape(rows), np.tile(mean.astype(np.float32), CROP_SIDE), out=out_HWC.reshape(rows))
    out_HWC *= np.float32(1 / lighting.divisor)


def pillow_pixels(path: str | Path) -> np.ndarray:
    """A file's pixels, uint8 (256, 256, 3)."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
