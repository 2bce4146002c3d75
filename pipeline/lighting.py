"""Lighting, or Fancy PCA, the colour augmentation of Krizhevsky et al. 2012 (section 4.1), in numpy.

Each time an image is shown, three random numbers shift all its pixels along the principal RGB axes. The paper's text
and its program differ, so there are two named conventions (x on 0..255, V the axes as columns, s the strength):

* `stddev`, what the 2012 program ran: x <- (x - mean + s V (axis_stddev * n)) / (1 + s), n ~ N(0, I);
* `eigenvalue`, the paper's sentence as later code bases read it: x <- x - mean + 255 V (eigenvalues / 255^2 * a), a ~
  N(0, s^2 I).

Both are one shift per image and one constant divisor, so they become part of the mean and the divisor of the
normalization: lighting takes no extra pass over the pixels.

Shapes: N images.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from pipeline.eigenbasis import Eigenbasis
from pipeline.errors import check_choices


@dataclass(frozen=True)
class Lighting:
    """How colours are shifted in training."""

    convention: Literal["stddev", "eigenvalue"] = "stddev"
    """stddev: shifts in standard deviations of each axis, as in the 2012 program; eigenvalue: in eigenvalues, as the
    paper's text is commonly read (2 to 17 times weaker on ImageNet)."""
    strength: float = 0.1
    """Standard deviation of the random shift along each axis, in the convention's unit; 0 turns lighting off."""
    off_epoch: int | None = None
    """First epoch, counted from 0, without lighting (the 2012 program turned it off at 67); None: never."""

    def __post_init__(self) -> None:
        check_choices(self, "lighting")
        if self.off_epoch is not None and self.off_epoch < 0:
            raise ValueError(f"lighting.off_epoch: expected at least 0, got {self.off_epoch}")
        if not (math.isfinite(self.strength) and 0 <= self.strength <= 10):
            raise ValueError(f"lighting.strength: expected 0 to 10, got {self.strength}")

    def at_epoch(self, epoch: int) -> "Lighting":
        """Return the lighting of an epoch, with strength 0 from `off_epoch` on."""
        is_off = self.off_epoch is not None and epoch >= self.off_epoch
        return replace(self, strength=0.0) if is_off else self

    def shift_matrix(self, basis: Eigenbasis) -> np.ndarray:
        """Return the matrix, float64 (3, 3), that maps standard normal numbers to a shift in levels of R, G, B."""
        per_axis = basis.axis_stddev if self.convention == "stddev" else basis.eigenvalues / 255
        return self.strength * basis.eigenvectors * per_axis

    @property
    def divisor(self) -> float:
        """Divisor of shifted images, by which the 2012 program kept their variance about the same."""
        return 1 + self.strength if self.convention == "stddev" else 1.0


def shifted_means(noise_N3: np.ndarray, basis: Eigenbasis, lighting: Lighting) -> np.ndarray:
    """Compute the colour to subtract from each image: the mean minus the image's shift, float64 (N, 3), for standard
    normal numbers (N, 3). What is left is divided by `lighting.divisor`."""
    return basis.mean - noise_N3 @ lighting.shift_matrix(basis).T
