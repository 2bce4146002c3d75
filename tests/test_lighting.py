"""Both conventions are the written-out formulas, and what the real graph does to colours has their distribution."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.eigenbasis import Eigenbasis
from pipeline.lighting import Lighting, shifted_means
from pipeline.loader import decoded_batches
from pipeline.settings import Augmentation
from tests.helpers import Make, collect, jpeg, loaders

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3)).astype(np.float64)
DRAWS = np.random.default_rng(1).standard_normal((5, 3))


@pytest.mark.parametrize("convention", ["stddev", "eigenvalue"])
@pytest.mark.parametrize("strength", [0.0, 0.1, 0.7])
def test_formula(plain_basis: Eigenbasis, convention: str, strength: float) -> None:
    """The formulas of the module's docstring, image by image; strength 0 only subtracts the mean."""
    lighting = Lighting(convention, strength)  # type: ignore[arg-type]
    got = (IMAGES - shifted_means(DRAWS, plain_basis, lighting)[:, None, None]) / lighting.divisor
    vectors, values = plain_basis.eigenvectors, plain_basis.eigenvalues
    for image, draw, result in zip(IMAGES, DRAWS, got, strict=True):
        if convention == "stddev":
            expected = (image - plain_basis.mean + strength * vectors @ (np.sqrt(values) * draw)) / (
                1 + strength
            )
        else:
            expected = image - plain_basis.mean + 255 * vectors @ (values / 255**2 * (strength * draw))
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-9)
    assert (np.abs(got - (IMAGES - plain_basis.mean)).max() > 0.5) == (strength > 0)


def test_strength_is_checked() -> None:
    """A negative or infinite strength is refused by name."""
    for strength in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"lighting\.strength"):
            Lighting("stddev", strength)


@pytest.mark.parametrize("convention", ["stddev", "eigenvalue"])
def test_what_the_loader_does_to_colours(
    numbered_shards: Make, plain_basis: Eigenbasis, convention: str
) -> None:
    """Of 4,000 visits of one flat image, each moves as a whole and has its own draw; along the axes shifts are
    independent and normal with the convention's deviations, within four standard errors (.09 of a variance). Variances
    in place of deviations, and axes that are not turned, are noticed."""
    colour = np.full((256, 256, 3), (140, 120, 90), np.uint8)
    shards, lighting = (
        numbered_shards(400, 2, jpeg(colour, quality=100, subsampling=0)),
        Lighting(convention, 0.1),
    )  # type: ignore[arg-type]
    (stored,) = {tuple(batch[0, 0, 0].tolist()) for batch in decoded_batches(shards, 400)}
    (loader,) = loaders(
        shards, plain_basis, 1, training=True, batch_size=100, augmentation=Augmentation(lighting=lighting)
    )
    batches = collect(loader, range(10))
    images, labels = (torch.cat(each).numpy() for each in zip(*batches, strict=True))
    levels = images[:, :, ::50, ::50] * lighting.divisor + plain_basis.mean[:, None, None]
    np.testing.assert_allclose(levels, np.broadcast_to(levels[:, :, :1, :1], levels.shape), atol=1e-3)
    shifts = levels[:, :, 0, 0] - stored
    assert len(np.unique(shifts.round(4), axis=0)) > 3990

    def distance(basis: Eigenbasis, per_axis: np.ndarray) -> float:
        draws = shifts @ basis.eigenvectors / (0.1 * per_axis)
        correlations = np.corrcoef(draws.T, labels)[3, :3]
        return float(
            max(
                np.abs(np.cov(draws.T) - np.eye(3)).max(),
                np.abs(draws.mean(0)).max(),
                np.abs(correlations).max(),
            )
        )

    values, stddev = plain_basis.eigenvalues, np.sqrt(plain_basis.eigenvalues)
    right, wrong = (stddev, values) if convention == "stddev" else (values / 255, stddev)
    assert distance(plain_basis, right) < 0.09
    assert distance(plain_basis, wrong) > 0.09
    assert distance(replace(plain_basis, eigenvectors=np.eye(3)), right) > 0.09
