"""Saturation is what its formula says, and towers split by colour where colours were planted, not by chance."""

import numpy as np
import pytest

from train.kernels import saturation, tower_colours

LUMA_FREE = np.array([[1.0, -1.0, 0.0], [1.0, 1.0, -2.0], [0.5, 0.5, -1.0]])
"""Colours whose channels cancel."""


def kernels(rng: np.random.Generator, colour: np.ndarray, maps: int) -> np.ndarray:
    """Random patterns in one colour, shape (maps, 3, 11, 11)."""
    return rng.normal(size=(maps, 1, 11, 11)) * colour[None, :, None, None]


@pytest.mark.parametrize("scale", [1e-170, 1e-3, 1e3])
def test_grey_and_colour(scale: float) -> None:
    """Kernels with equal channels have 0, those whose channels cancel 1, at any strength; zeros count as grey."""
    rng = np.random.default_rng(1)
    np.testing.assert_allclose(saturation(kernels(rng, scale * np.ones(3), 5)), 0, atol=1e-12)
    for colour in LUMA_FREE:
        np.testing.assert_allclose(saturation(kernels(rng, scale * colour, 5)), 1, atol=1e-12)
    assert saturation(np.zeros((2, 3, 11, 11))).tolist() == [0, 0]


def test_formula() -> None:
    """One colour (r, g, b): the squared sine of its angle to (1, 1, 1). Red alone has 2/3, as noise has on average."""
    rng = np.random.default_rng(2)
    for colour in rng.normal(size=(20, 3)):
        cosine = colour.sum() / np.sqrt(3 * (colour**2).sum())
        np.testing.assert_allclose(saturation(kernels(rng, colour, 3)), 1 - cosine**2, atol=1e-12)
    np.testing.assert_allclose(saturation(kernels(rng, np.array([1.0, 0, 0]), 2)), 2 / 3)
    assert abs(saturation(rng.normal(size=(100, 3, 11, 11))).mean() - 2 / 3) < 0.01


def test_grey_and_colour_add_up() -> None:
    """A grey pattern plus a colour pattern of the same energy is half saturated, whatever the two patterns are."""
    rng = np.random.default_rng(3)
    grey, colour = kernels(rng, np.ones(3), 6), kernels(rng, LUMA_FREE[1], 6)
    grey, colour = (part / np.sqrt((part**2).sum((1, 2, 3), keepdims=True)) for part in (grey, colour))
    np.testing.assert_allclose(saturation(grey + colour), 0.5, atol=1e-12)
    np.testing.assert_allclose(saturation((grey + 3 * colour).astype(np.float32)), 0.9, atol=1e-6)


def test_a_planted_split_is_found() -> None:
    """A grey half and a coloured one split, whichever comes first; the same kernels dealt out evenly do not."""
    rng = np.random.default_rng(4)
    noise = 0.3 * rng.normal(size=(48, 3, 11, 11))
    grey, coloured = kernels(rng, np.ones(3), 24) + noise[:24], kernels(rng, LUMA_FREE[0], 24) + noise[24:]
    for order in ((grey, coloured), (coloured, grey)):
        found = tower_colours(np.concatenate(order), 2)
        assert found.split and found.p is not None and 0 < found.p < 0.001
        np.testing.assert_allclose(found.saturations, [saturation(tower).mean() for tower in order])
    dealt_out = np.concatenate([grey[::2], coloured[::2], grey[1::2], coloured[1::2]])
    even = tower_colours(dealt_out, 2)
    assert not even.split and even.p is not None and even.p > 0.01


def test_chance_is_rarely_a_split() -> None:
    """Kernels without a plan, some grey and some coloured: about 1 of 100 nets is said to split, and p is spread evenly
    over 0..1."""
    p = []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        mixed = rng.normal(size=(16, 3, 2, 2)) + rng.normal(size=(16, 1, 2, 2))
        p.append(tower_colours(mixed, 2, halvings=500, seed=seed).p)
    assert sum(value is not None and value < 0.01 for value in p) <= 10
    np.testing.assert_allclose(
        np.quantile(np.array(p, float), [0.1, 0.25, 0.5, 0.75, 0.9]), [0.1, 0.25, 0.5, 0.75, 0.9], atol=0.07
    )


def test_one_tower() -> None:
    """The control has a mean, no p and no split, and the difference that chance alone reaches: that of two halves drawn
    one by one, in 1 of 100 cases. The same seed gives the same."""
    weight = np.random.default_rng(5).normal(size=(10, 3, 3, 3))
    found = tower_colours(weight, 1)
    values = saturation(weight)
    assert found.saturations == (pytest.approx(values.mean()),) and found.p is None and not found.split
    rng = np.random.default_rng(6)
    differences = []
    for _ in range(4000):
        first = rng.choice(10, 5, replace=False)
        differences.append(abs(values[first].mean() - np.delete(values, first).mean()))
    assert (np.array(differences) > found.chance).mean() == pytest.approx(0.01, abs=0.008)
    assert tower_colours(weight, 1) == found and tower_colours(weight, 2) == tower_colours(weight, 2)


@pytest.mark.parametrize(
    ("shape", "towers"), [((7, 3, 3, 3), 2), ((8, 3, 3, 3), 3), ((1, 3, 3, 3), 1), ((8, 4, 3, 3), 2)]
)
def test_other_shapes_are_refused(shape: tuple[int, ...], towers: int) -> None:
    """Maps that towers cannot share, other numbers of towers, and kernels that are not of three colours."""
    with pytest.raises(ValueError, match="must"):
        tower_colours(np.ones(shape), towers)
