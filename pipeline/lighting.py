"""Fancy PCA, the colour augmentation of Krizhevsky et al. 2012 (section 4.1), in numpy and as DALI operations side by
side.

One draw per image and visit moves all its pixels along the principal RGB axes. The paper's sentence and its program
differ, so there are two named conventions (x on 0..255, V the axes as columns, s the strength):

* `stddev`, what the 2012 program ran: x <- (x - mean + s V (axis_stddev * n)) / (1 + s), n ~ N(0, I);
* `eigenvalue`, the paper's sentence as later code bases read it: x <- x - mean + 255 V (eigenvalues / 255^2 * a), a ~
  N(0, s^2 I).

Both are one shift per image and one constant divisor, so they ride in the mean and the divisor of the normalization:
lighting costs no pass over the pixels.
"""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from pipeline.eigenbasis import Eigenbasis

if TYPE_CHECKING:
    from nvidia.dali.data_node import DataNode


@dataclass(frozen=True)
class Lighting:
    """How far colours are moved in training."""

    convention: Literal["stddev", "eigenvalue"] = "stddev"
    """stddev: as the 2012 program did; eigenvalue: as the paper's text is commonly read (2 to 17 times weaker on
    ImageNet)."""
    strength: float = 0.1
    """Standard deviation of the draw on each axis, in units of the convention; 0 turns lighting off."""
    off_epoch: int | None = None
    """First epoch, counted from 0, without lighting (the 2012 program turned it off at 67); None: never."""

    def __post_init__(self) -> None:
        if self.off_epoch is not None and self.off_epoch < 0:
            raise ValueError(f"lighting.off_epoch must not be negative, but is {self.off_epoch}")
        if not (math.isfinite(self.strength) and 0 <= self.strength <= 10):
            raise ValueError(f"lighting.strength must lie in 0..10, not {self.strength}")

    def at_epoch(self, epoch: int) -> "Lighting":
        """Return the lighting of an epoch: strength 0 from `off_epoch` on."""
        over = self.off_epoch is not None and epoch >= self.off_epoch
        return replace(self, strength=0.0) if over else self

    def shift_matrix(self, basis: Eigenbasis) -> np.ndarray:
        """Float64, shape (3, 3): times a standard normal draw it is the image's shift in levels of R, G, B."""
        per_axis = basis.axis_stddev if self.convention == "stddev" else basis.eigenvalues / 255
        return self.strength * basis.eigenvectors * per_axis

    @property
    def divisor(self) -> float:
        """Divisor of shifted images, so that the added noise does not raise their variance (2012 program)."""
        return 1 + self.strength if self.convention == "stddev" else 1.0


def apply_lighting(
    images_NHWC: np.ndarray, noise_N3: np.ndarray, basis: Eigenbasis, lighting: Lighting, std: float = 1.0
) -> np.ndarray:
    """Subtract the mean and shift colours, in float64.

    Args:
        images_NHWC: RGB on 0..255, shape (N, height, width, 3).
        noise_N3: standard normal draws, shape (N, 3).
        basis: Mean and axes.
        lighting: Convention and strength.
        std: A further divisor of pixels.
    """
    return (images_NHWC - shifted_means(noise_N3, basis, lighting)[:, None, None, :]) / (
        std * lighting.divisor
    )


def shifted_means(noise_N3: np.ndarray, basis: Eigenbasis, lighting: Lighting) -> np.ndarray:
    """Compute what is subtracted from each image: the mean minus its shift, float64, shape (N, 3)."""
    return basis.mean - noise_N3 @ lighting.shift_matrix(basis).T


def lighting_arguments(
    pca_noise: "DataNode | None", basis: Eigenbasis, lighting: Lighting, std: float = 1.0
) -> "tuple[DataNode, float]":
    """Express it in arguments of DALI's `crop_mirror_normalize`: `mean`, float32 (3,) per sample, and constant `std`.

    Args:
        pca_noise: standard normal, float32, shape (3,) per sample, on the CPU; None: no lighting, one mean for all.
        basis: Mean and axes.
        lighting: Convention and strength.
        std: A further divisor of pixels.
    """
    from nvidia.dali import fn, types

    mean = basis.mean.astype(np.float32)
    if pca_noise is None:
        return types.Constant(mean, device="cpu"), std
    # mean - matrix @ noise, as one operation on a "point" rather than three: each costs a batch one per cent.
    matrix = -lighting.shift_matrix(basis).astype(np.float32)
    moved = fn.coord_transform(
        fn.reshape(pca_noise, shape=[1, 3]), M=matrix.ravel().tolist(), T=mean.tolist()
    )
    return fn.reshape(moved, shape=[3]), std * lighting.divisor
