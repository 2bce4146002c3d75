"""Both conventions are the written-out formulas, and what the real graph does to colours has their distribution."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from pipeline.eigenbasis import Eigenbasis
from pipeline.lighting import Lighting, apply_lighting
from pipeline.loader import train_loader
from pipeline.settings import Augmentation, DataConfig
from pipeline.shards import ShardSet
from tests.helpers import jpeg

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3)).astype(np.float64)
DRAWS = np.random.default_rng(1).standard_normal((5, 3))


def by_hand(basis: Eigenbasis, convention: str, strength: float) -> np.ndarray:
    """The formulas of the module's docstring, pixel by pixel."""
    result = np.empty_like(IMAGES)
    for n, y, x in np.ndindex(IMAGES.shape[:3]):
        shift = np.zeros(3)
        for axis in range(3):
            direction = basis.eigenvectors[:, axis]
            if convention == "stddev":
                shift += strength * direction * np.sqrt(basis.eigenvalues[axis]) * DRAWS[n, axis]
            else:
                shift += 255 * direction * (basis.eigenvalues[axis] / 255**2) * (strength * DRAWS[n, axis])
        result[n, y, x] = IMAGES[n, y, x] - basis.mean + shift
        if convention == "stddev":
            result[n, y, x] /= 1 + strength
    return result


@pytest.mark.parametrize("convention", ["stddev", "eigenvalue"])
@pytest.mark.parametrize("strength", [0.0, 0.1, 0.7])
def test_formula(plain_basis: Eigenbasis, convention: str, strength: float) -> None:
    """numpy's version equals the formula; strength 0 only subtracts the mean."""
    got = apply_lighting(IMAGES, DRAWS, plain_basis, Lighting(convention, strength))  # type: ignore[arg-type]
    np.testing.assert_allclose(got, by_hand(plain_basis, convention, strength), rtol=0, atol=1e-9)
    if strength == 0:
        np.testing.assert_allclose(got, IMAGES - plain_basis.mean)
    else:
        assert np.abs(got - (IMAGES - plain_basis.mean)).max() > 0.5


def test_strength_is_checked() -> None:
    """A negative or infinite strength is refused by name."""
    for strength in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"lighting\.strength"):
            Lighting("stddev", strength)


BAR = slice(40, 48)
"""Rows and columns of the dark bars in the marked image: whole blocks of a JPEG, so that the rest stays flat."""
COLOUR = (140, 120, 90)
STRENGTH = 0.1


class Visits(NamedTuple):
    """Measured off the real graph's outputs for each image handed out; one row per visit, in order."""

    shifts: np.ndarray
    """(visits, 3): by how many levels colours moved."""
    left: np.ndarray
    top: np.ndarray
    """Offsets of the window."""
    flipped: np.ndarray
    labels: np.ndarray


@pytest.fixture
def marked_shards(numbered_shards: Callable[..., ShardSet]) -> Callable[[int], ShardSet]:
    """Make shards of one flat image with a dark bar down and another across: a window of it shows where it lies,
    whether it is flipped, and how far its colours moved."""
    pixels = np.full((256, 256, 3), COLOUR, np.uint8)
    pixels[BAR], pixels[:, BAR] = 0, 0
    image = jpeg(pixels, quality=100, subsampling=0)
    return lambda samples: numbered_shards(samples, 2, image)


def visit(shards: ShardSet, basis: Eigenbasis, lighting: Lighting, epochs: int, seed: int = 5) -> Visits:
    """Run the real loader, and read each visit off its outputs."""
    config = DataConfig(Path(), augmentation=Augmentation(lighting=lighting))
    loader = train_loader(shards, basis, config, batch_size=100, seed=seed, rank=0, num_ranks=1, device="cpu")
    rows = []
    for epoch in range(epochs):
        for images, labels in loader.epoch(epoch):
            windows_NHWC = images.permute(0, 2, 3, 1).numpy()
            row_NWC, column_NHC = (  # levels of a pixel and its shift
                line * lighting.divisor + basis.mean
                for line in (windows_NHWC[:, 110], windows_NHWC[:, :, 112])
            )
            flat = row_NWC[:, 112]
            np.testing.assert_allclose(flat, column_NHC[:, 200], atol=1e-3)  # the whole image moves alike
            # The bars are darker by the colour, whatever the shift.
            across, down = ((line[:, :, 0] < flat[:, :1] - 50).argmax(1) for line in (row_NWC, column_NHC))
            flipped = across > 112  # a bar that begins at column 8..40 ends up at 176..208 by a flip
            left = np.where(flipped, across - (224 - 8 - 40), 40 - across)
            rows.append((flat, left, 40 - down, flipped, labels.numpy()))
    loader.close()
    flat, *places = (np.concatenate(column) for column in zip(*rows, strict=True))
    return Visits(flat - decoded_colour(), *places)


def decoded_colour() -> np.ndarray:
    """The flat colour after its way through JPEG, as Pillow decodes it."""
    content = jpeg(np.full((16, 16, 3), COLOUR, np.uint8), quality=100, subsampling=0)
    return np.asarray(Image.open(io.BytesIO(content)))[8, 8].astype(float)


def check_distribution(visits: Visits, basis: Eigenbasis, sigmas: np.ndarray) -> None:
    """Along the axes, in units of `sigmas`, shifts are standard normal and independent of each other and of everything
    else. Of 20,000 draws a variance is within .04, four standard errors (sqrt(2 / 20000) = .01), as are covariances and
    correlations, and a mean within .03 (.007 each); fewer draws have wider bounds, or a right graph would fail too."""
    wider = np.sqrt(20_000 / len(visits.labels))
    draws = visits.shifts @ basis.eigenvectors / sigmas
    assert np.abs(np.cov(draws.T, ddof=0) - np.eye(3)).max() < 0.04 * wider
    assert np.abs(draws.mean(0)).max() < 0.03 * wider
    for other in (visits.left, visits.top, visits.flipped, visits.labels):
        assert np.abs(np.corrcoef(draws.T, other)[3, :3]).max() < 0.04 * wider


def test_twenty_thousand_draws(marked_shards: Callable[[int], ShardSet], plain_basis: Eigenbasis) -> None:
    """What the real graph does to colours is s V (axis_stddev * n), n ~ N(0, I): over 20,000 visits the covariance,
    whitened, is s^2 times the identity within .04 s^2, uncorrelated with window, flip and label. Every visit of an
    image has its own draw."""
    visits = visit(marked_shards(1000), plain_basis, Lighting(strength=STRENGTH), epochs=20)
    assert len(visits.labels) == 20_000
    check_distribution(visits, plain_basis, STRENGTH * np.sqrt(plain_basis.eigenvalues))
    assert np.unique(visits.shifts.round(4), axis=0).shape[0] > 19_990
    for offsets in (visits.left, visits.top):  # 33 places, 606 visits each: five standard errors are 120
        counts = np.bincount(offsets, minlength=33)
        assert len(counts) == 33 and np.abs(counts - 20_000 / 33).max() < 120
    assert abs(visits.flipped.mean() - 0.5) < 0.02


def test_variances_for_deviations_are_noticed(
    marked_shards: Callable[[int], ShardSet], plain_basis: Eigenbasis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same check refuses a graph in which variances stand in for deviations, and one that forgot the axes; as many
    draws of the right graph pass."""
    shards, sigmas = marked_shards(500), STRENGTH * np.sqrt(plain_basis.eigenvalues)
    check_distribution(visit(shards, plain_basis, Lighting(strength=STRENGTH), epochs=4), plain_basis, sigmas)
    with monkeypatch.context() as patch:
        patch.setattr(Eigenbasis, "axis_stddev", property(lambda basis: basis.eigenvalues))
        wrong = visit(shards, plain_basis, Lighting(strength=STRENGTH), epochs=4)
    with pytest.raises(AssertionError):
        check_distribution(wrong, plain_basis, sigmas)
    unturned = replace(plain_basis, eigenvectors=np.eye(3))
    with pytest.raises(AssertionError):
        check_distribution(
            visit(shards, unturned, Lighting(strength=STRENGTH), epochs=4), plain_basis, sigmas
        )


def test_draws_of_the_eigenvalue_convention(
    marked_shards: Callable[[int], ShardSet], plain_basis: Eigenbasis
) -> None:
    """There the deviations are s * eigenvalue / 255 levels, and nothing is divided."""
    visits = visit(marked_shards(500), plain_basis, Lighting("eigenvalue", STRENGTH), epochs=4)
    spread = (visits.shifts @ plain_basis.eigenvectors).std(0)
    np.testing.assert_allclose(spread, STRENGTH * plain_basis.eigenvalues / 255, rtol=0.08)
