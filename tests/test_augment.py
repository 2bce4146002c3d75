"""Crops, flips and colour noise are even, normal and independent, and depend on (seed, epoch, position) alone."""

import numpy as np
import pytest
from scipy.stats import chisquare, norm

from pipeline.augment import Draws, log, normal_quantile, sample_draws
from pipeline.settings import Augmentation


def draw(first: int, count: int, seed: int = 11, epoch: int = 0, **settings: object) -> Draws:
    """Draws of consecutive positions, without the axis of batches."""
    draws = sample_draws([first], count, seed, epoch, Augmentation(**settings))  # type: ignore[arg-type]
    return Draws(*(each[0] for each in draws))


def test_draws_are_even_normal_and_independent() -> None:
    """Of 30,000 draws offsets fit an even distribution by chi-squared, edges included, which those of a rounded float
    do not; flips a fair coin; of 20,000 noise has covariance I and mean 0, and nothing correlates: .05 is seven
    standard errors."""
    draws = draw(0, 30_000)
    for offsets in (draws.left, draws.top):
        assert chisquare(np.bincount(offsets, minlength=33)).pvalue > 1e-3
    rounded = np.rint(np.random.default_rng(0).random(30_000) * 32).astype(int)
    assert chisquare(np.bincount(rounded, minlength=33)).pvalue < 1e-3
    assert abs(draws.mirrored.mean() - 0.5) < 0.02
    noise = draws.noise[:20_000]
    assert np.abs(np.cov(noise.T) - np.eye(3)).max() < 0.05 and np.abs(noise.mean(0)).max() < 0.04
    columns = np.column_stack([draws.left, draws.top, draws.mirrored, draws.noise])
    assert np.abs(np.corrcoef(columns.T) - np.eye(6)).max() < 0.04


def test_draws_depend_on_the_position_alone() -> None:
    """Any part, of any number of batches, is that part of the whole; another epoch or seed is another."""
    whole = draw(0, 96)
    parts = sample_draws([10, 40], 20, 11, 0, Augmentation())
    for part, all_of_it in zip(parts, whole, strict=True):
        np.testing.assert_array_equal(part[0], all_of_it[10:30])
        np.testing.assert_array_equal(part[1], all_of_it[40:60])
    for other in (draw(0, 96, epoch=1), draw(0, 96, seed=12)):
        assert (
            np.abs(other.noise - whole.noise).min(1).max() > 0.1 and (other.left != whole.left).mean() > 0.8
        )


@pytest.mark.parametrize("group", [4, 32])
def test_shared_crops(group: int) -> None:
    """With `images_per_crop` n, positions k * n to (k + 1) * n - 1 have the crop and flip that the first of them would
    have alone, and their own noise, wherever a batch begins."""
    alone, shared = draw(0, 200), draw(0, 200, images_per_crop=group)
    first = np.arange(200) // group * group
    for name in ("left", "top", "mirrored"):
        np.testing.assert_array_equal(getattr(shared, name), getattr(alone, name)[first])
    np.testing.assert_array_equal(shared.noise, alone.noise)
    for part, whole in zip(draw(37, 50, images_per_crop=group), shared, strict=True):
        np.testing.assert_array_equal(part, whole[37:87])


def test_fixed_draws() -> None:
    """`crop: center` is the central crop; flips come with their probability, never with 0 and always with 1."""
    draws = draw(0, 1000, crop="center", flip=0.0)
    assert set(draws.left) == set(draws.top) == {16} and not draws.mirrored.any()
    assert draw(0, 1000, flip=1.0).mirrored.all() and 0.05 < draw(0, 1000, flip=0.1).mirrored.mean() < 0.15


def test_values_are_pinned() -> None:
    """Runs resume with the augmentation that they began with, on any machine: these numbers never change."""
    draws = draw(1_000_000, 2, 2012, 3)
    assert (draws.left.tolist(), draws.top.tolist(), draws.mirrored.tolist()) == VIEWS
    assert [value.hex() for value in draws.noise[0].tolist()] == NOISE


VIEWS = ([1, 4], [17, 14], [False, True])
NOISE = ["-0x1.9a8fc52c9eb2bp+0", "0x1.132e13ad8fea0p+0", "0x1.636195843d01ep-2"]


def test_quantile_and_logarithm() -> None:
    """Against scipy's and numpy's over all magnitudes, both ends included."""
    words = np.random.default_rng(0).integers(0, 2**32, 100_000)
    p = (np.concatenate([words, [0, 1, 2**31, 2**32 - 1]]) + 0.5) / 2**32
    np.testing.assert_allclose(normal_quantile(p), norm.ppf(p), atol=1e-6)
    np.testing.assert_allclose(log(p), np.log(p), rtol=1e-9, atol=1e-10)
    assert normal_quantile(np.array([0.5]))[0] == 0
