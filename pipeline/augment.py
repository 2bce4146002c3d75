"""Random crop, flip and colour noise of a sample: a pure function of (seed, epoch, position).

Each position has four Philox words of its own. They become draws by integer and IEEE arithmetic in a fixed order, never
by a `Generator`, whose methods reject numbers and change between versions, or by a math library's logarithm, whose last
digit differs between processors.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipeline.order import AUGMENT, random_words
from pipeline.settings import Augmentation
from pipeline.shards import IMAGE_SIDE

CROP_SIDE = 224
"""Side of the crops that the network sees (paper, section 4.1)."""
OFFSETS = IMAGE_SIDE - CROP_SIDE
"""A crop starts at one of 0..32 in each direction: 33 * 33 * 2 = 2,178 views of an image (the 2012 program; the paper
says 2,048)."""


class Draws(NamedTuple):
    """Augmentation of some samples."""

    left: np.ndarray
    """int64: first column of the crop, 0..32."""
    top: np.ndarray
    """int64: first row, 0..32."""
    mirrored: np.ndarray
    """bool: flipped horizontally."""
    noise: np.ndarray
    """float64 (..., 3): standard normal numbers, one per axis of the eigenbasis."""


def sample_draws(
    firsts: Sequence[int], count: int, seed: int, epoch: int, augmentation: Augmentation
) -> Draws:
    """Draw for positions first .. first + count - 1 of an epoch, for each of `firsts`; shapes (len(firsts), count).

    With `images_per_crop` n, crop and flip are those of position - position % n.
    """
    group = augmentation.images_per_crop
    own, view = [], []
    for first in firsts:
        start = first // group * group
        words = random_words(seed, epoch, AUGMENT, start, first - start + count)
        positions = np.arange(first, first + count)
        own.append(words[first - start :])
        view.append(words[positions // group * group - start])
    words, views = np.stack(own).view("<u4"), np.stack(view).view("<u4")  # eight halves, the lower one first
    left, top = (views[..., n].astype(np.int64) * (OFFSETS + 1) >> 32 for n in (0, 1))
    if augmentation.crop == "center":
        left, top = (np.full_like(each, OFFSETS // 2) for each in (left, top))
    noise = normal_quantile((words[..., 2::2] + 0.5) / 2**32)
    return Draws(left, top, views[..., 3] < augmentation.flip * 2.0**32, noise)


def normal_quantile(p: np.ndarray) -> np.ndarray:
    """Compute the inverse of the standard normal distribution function for 2^-33 <= p <= 1 - 2^-33, float64.

    Algorithm AS 241, PPND7 (Wichura 1988, Applied Statistics 37, 477-484): exact to 1e-7.
    """
    q = p - 0.5
    r = 0.180625 - q * q
    numerator = ((59.109374720 * r + 159.29113202) * r + 50.434271938) * r + 3.3871327179
    central = q * numerator / (((67.187563600 * r + 78.757757664) * r + 17.895169469) * r + 1)
    r = np.sqrt(-log(np.minimum(p, 1 - p))) - 1.6
    numerator = ((0.17023821103 * r + 1.3067284816) * r + 2.7568153900) * r + 1.4234372777
    tail = numerator / ((0.12021132975 * r + 0.73700164250) * r + 1)
    return np.where(np.abs(q) <= 0.425, central, np.copysign(tail, q))


def log(x: np.ndarray) -> np.ndarray:
    """Compute the natural logarithm to 1e-10 by basic arithmetic: x = m 2^e, log m by the series of artanh."""
    mantissa, exponent = np.frexp(x)
    s = (mantissa - np.sqrt(0.5)) / (mantissa + np.sqrt(0.5))
    z = s * s
    series = 1 + z * (1 / 3 + z * (1 / 5 + z * (1 / 7 + z * (1 / 9 + z / 11))))
    return (exponent - 0.5) * 0.6931471805599453 + 2 * s * series
