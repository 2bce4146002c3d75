"""Both conventions are the written-out formulas."""

import numpy as np
import pytest

from pipeline.eigenbasis import Eigenbasis
from pipeline.lighting import Lighting, relight

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
    got = relight(IMAGES, DRAWS, plain_basis, Lighting(convention, strength))  # type: ignore[arg-type]
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
