"""Moments are exact and do not depend on how pixels are grouped; the basis equals numpy's in float64."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.eigenbasis import Eigenbasis
from tools.moments import Moments, write_eigenbasis


def test_equals_numpy(tmp_path: Path) -> None:
    """mean, cov(ddof=0) and eigh of the concatenated pixels, to 1e-9; deviations are square roots of variances."""
    rng = np.random.default_rng(0)
    images = (rng.integers(0, 200, (20, 16, 16, 1)) + rng.integers(0, 56, (20, 16, 16, 3))).astype(np.uint8)
    content = write_eigenbasis(tmp_path / "pca.json", Moments.of(images), "m", "test")
    pixels = images.reshape(-1, 3).astype(np.float64)
    covariance = np.cov(pixels.T, ddof=0)
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1], vectors[:, ::-1]
    np.testing.assert_allclose(content["mean"], pixels.mean(0), rtol=1e-9)
    np.testing.assert_allclose(content["covariance"], covariance, rtol=1e-9)
    np.testing.assert_allclose(content["eigenvalues"], values, rtol=1e-9)
    np.testing.assert_allclose(content["axis_stddev"], np.sqrt(values), rtol=1e-9)
    got = np.array(content["eigenvectors"])
    np.testing.assert_allclose(np.abs((got * vectors).sum(0)), 1, rtol=1e-9)
    assert (got[np.abs(got).argmax(0), range(3)] > 0).all()
    basis = Eigenbasis.load(tmp_path / "pca.json", "m")
    np.testing.assert_array_equal(basis.eigenvectors, got)


@settings(max_examples=50, deadline=None)
@given(
    arrays(np.uint8, st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5), st.just(3))),
    st.data(),
)
def test_any_partition(images: np.ndarray, data: st.DataObject) -> None:
    """Moments of parts, added in any order, are the moments of the whole, as Python's own integers give them."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(images)), max_size=4)))
    parts = [Moments.of(part, at_a_time=data.draw(st.integers(1, 7))) for part in np.split(images, cuts)]
    total = Moments()
    for part in data.draw(st.permutations(parts)):
        total += part
    pixels = [[int(v) for v in pixel] for pixel in images.reshape(-1, 3)]
    assert total.num_images == len(images) and total.num_pixels == len(pixels)
    assert list(total.sum) == [sum(pixel[i] for pixel in pixels) for i in range(3)]
    assert list(total.sum_products) == [
        sum(pixel[i] * pixel[j] for pixel in pixels) for i in range(3) for j in range(3)
    ]


@pytest.mark.parametrize("levels", [[0], [255], [0, 127, 128, 129, 255]])
@pytest.mark.parametrize(("height", "width"), [(256, 256), (31, 37), (1, 1025)])
def test_extreme_levels_are_exact(levels: list[int], height: int, width: int) -> None:
    """Whole blocks of the darkest and brightest pixels, where the sums in floating point are largest, and sizes that do
    not fill a block: equal to int64."""
    images = np.random.default_rng(0).choice(np.array(levels, np.uint8), (3, height, width, 3))
    pixels = images.reshape(-1, 3).astype(np.int64)
    moments = Moments.of(images, at_a_time=2)
    assert moments.sum == tuple(pixels.sum(0).tolist())
    assert moments.sum_products == tuple((pixels.T @ pixels).ravel().tolist())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"manifest_sha256": "x"}, "other shards"),
        ({"format_version": 2}, "format version"),
        ({"mean": [1, 2]}, "no RGB eigenbasis"),
        ({"mean": ["1", "2", "3"]}, "damaged"),
        ({"mean": [float("nan")] * 3}, "damaged"),
        ({"mean": [10**30, 1, 1]}, "damaged"),
        ({"eigenvalues": [1, 1, -1]}, "no RGB eigenbasis"),
        ({"eigenvectors": [[1, 0, 0], [0, 1, 0], [0, 1, 0]]}, "damaged"),
        ({"decoder": None}, "damaged"),
        ({"channel_order": "BGR"}, "other pixels"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("error")
def test_foreign_file(tmp_path: Path, change: dict[str, object], message: str) -> None:
    """A file of other shards, another version or without sense is refused; so is none, and a mean image that is not
    finite, of which numpy does not complain."""
    path, image = tmp_path / "pca.json", np.full((256, 256, 3), 7, np.uint8)
    with pytest.raises(FileNotFoundError, match="compute_pca"):
        Eigenbasis.load(path, "m")
    content = write_eigenbasis(path, Moments.of(image[None]), "m", "test")
    np.save(tmp_path / "mean_image.npy", image.astype(np.float32))
    Eigenbasis.load(path, "m", with_mean_image=True)
    np.save(tmp_path / "mean_image.npy", np.where(image, np.float32(np.inf), 0))
    with pytest.raises(ValueError, match="mean_image"):
        Eigenbasis.load(path, "m", with_mean_image=True)
    path.write_text(json.dumps({**content, **change}))
    with pytest.raises(ValueError, match=message):
        Eigenbasis.load(path, "m")
