"""How colourful the first layer's kernels are, and whether the towers share that work out between them.

The paper's figure 3 and section 6.1: the kernels of one GPU were largely colour-agnostic, those of the other largely
colour-specific, "during every run". Here a kernel's saturation is the share of its energy off the grey axis, and a
permutation test asks whether the towers' means lie farther apart than those of random halves of the same kernels.
"""

from typing import NamedTuple

import numpy as np

from pipeline.errors import UserError

SIGNIFICANT = 0.01
"""Towers split by colour where random halves lie as far apart less often than this."""


class TowerColours(NamedTuple):
    """What conv1's kernels tell of their towers."""

    saturations: tuple[float, ...]
    """Mean saturation of each tower's kernels, 0 (grey) to 1."""
    chance: float
    """By how much the means of two random halves of all kernels differ in 1 of 100 cases or less: what a difference
    between towers has to beat, and how far apart towers would lie in a net that has only one."""
    p: float | None
    """How often random halves lie at least as far apart as the two towers do; None for one tower."""

    @property
    def split(self) -> bool:
        """Whether one tower took the colours."""
        return self.p is not None and self.p < SIGNIFICANT


def saturation(kernels: np.ndarray) -> np.ndarray:
    """Share of each kernel's energy (its sum of squares) that is off the grey axis.

    With g the mean over the three channels at each place, it is 1 - sum(3 g^2) / sum(w^2): 0 where all channels are
    equal, 1 where they cancel at every place. A kernel of pure noise has about 2/3, as two of three directions in
    colour space are not grey; one of zeros counts as grey. How strong a kernel is does not matter.

    Args:
        kernels: Weights, any float, shape (maps, 3, height, width), channels R, G, B.

    Returns:
        Float64, shape (maps,), in [0, 1].
    """
    wide = np.asarray(kernels, np.float64)
    if wide.ndim != 4 or wide.shape[1] != 3:
        raise UserError(f"kernels must have shape (maps, 3, height, width), not {wide.shape}")
    peaks = np.abs(wide).max((1, 2, 3), keepdims=True)
    wide = wide / np.where(peaks > 0, peaks, 1)  # squares of tiny weights would vanish
    energy = (wide**2).sum((1, 2, 3))
    colour = ((wide - wide.mean(1, keepdims=True)) ** 2).sum((1, 2, 3))
    return np.divide(colour, energy, out=np.zeros_like(energy), where=energy > 0).clip(0, 1)


def tower_colours(weight: np.ndarray, towers: int, halvings: int = 10_000, seed: int = 0) -> TowerColours:
    """Mean saturation of each tower, and whether the towers split by colour.

    Eight kernels or fewer can be halved in so few ways that they never split: the most extreme one comes by chance in 1
    of 35 cases.

    Args:
        weight: conv1's weights, shape (maps, 3, height, width); the first half of the maps is tower 0's.
        towers: 1 or 2. One tower has nothing to be compared with: its mean and what chance does are the control.
        halvings: Random halvings of the kernels behind `p` and `chance`.
        seed: Of these.
    """
    if towers not in (1, 2) or len(weight) < 2 or len(weight) % towers:
        raise UserError(f"{len(weight)} kernels are not those of {towers} towers, which must be 1 or 2")
    saturations = saturation(weight)
    means = saturations.reshape(towers, -1).mean(1)
    half = len(saturations) // 2
    shuffled = np.random.default_rng(seed).permuted(np.tile(saturations, (halvings, 1)), axis=1)
    differences = np.abs(shuffled[:, :half].mean(1) - shuffled[:, half:].mean(1))
    chance = float(np.quantile(differences, 1 - SIGNIFICANT))
    if towers == 1:
        return TowerColours((float(means[0]),), chance, None)
    as_far = int(
        (differences >= abs(means[0] - means[1]) - 1e-12).sum()
    )  # the same halving may round otherwise
    # The towers themselves are one of the halvings that could have come: p is never 0.
    return TowerColours((float(means[0]), float(means[1])), chance, (1 + as_far) / (1 + halvings))
