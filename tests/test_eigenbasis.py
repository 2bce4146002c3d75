"""Moments are exact and do not depend on how pixels are grouped; the basis equals numpy's in float64."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.eigenbasis import Eigenbasis, Moments, read_mean_image, write_eigenbasis


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


@pytest.mark.parametrize("levels", [[0], [255], [0, 255], [0, 127, 128, 129, 255]])
def test_extreme_levels_are_exact(levels: list[int]) -> None:
    """Whole blocks of the darkest and brightest pixels, where the sums in floating point are largest, and sizes that do
    not fill a block: equal to int64."""
    rng = np.random.default_rng(0)
    for height, width in ((64, 64), (256, 256), (31, 37), (1, 1025)):
        images = rng.choice(np.array(levels, np.uint8), (3, height, width, 3))
        pixels = images.reshape(-1, 3).astype(np.int64)
        for at_a_time in (1, 2, 3):
            moments = Moments.of(images, at_a_time)
            assert moments.sum == tuple(pixels.sum(0).tolist())
            assert moments.sum_products == tuple((pixels.T @ pixels).ravel().tolist())


def test_degenerate_colours(tmp_path: Path) -> None:
    """Grey images have one axis, a constant image none; no eigenvalue is negative or not a number."""
    grey = np.repeat(np.random.default_rng(1).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8), 3, axis=3)
    for images, axes in ((grey, 1), (np.full((1, 8, 8, 3), 77, np.uint8), 0)):
        content = write_eigenbasis(tmp_path / "pca.json", Moments.of(images), "m", "test")
        values = np.array(content["eigenvalues"])
        assert np.isfinite(values).all() and (values >= 0).all() and (values > 0).sum() == axes
        Eigenbasis.load(tmp_path / "pca.json", "m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"manifest_sha256": "x"}, "other shards"),
        ({"format_version": 2}, "format version"),
        ({"mean": [1, 2]}, "no RGB eigenbasis"),
        ({"eigenvalues": [1, 1, -1]}, "no RGB eigenbasis"),
        ({"eigenvectors": None}, "damaged"),
        ({"mean": ["x", 1, 2]}, "damaged"),
        ({"mean": [float("nan")] * 3}, "damaged"),
        ({"mean": ["1", "2", "3"]}, "damaged"),
        ({"mean": [True, False, True]}, "damaged"),
        ({"mean": [10**30, 1, 1]}, "damaged"),
        ({"num_images": "many"}, "damaged"),
        ({"decoder": None}, "damaged"),
        ({"axis_stddev": ["x"]}, "damaged"),
        ({"eigenvectors": [[1, 0, 0], [0, 1, 0], [0, 1, 0]]}, "damaged"),
        ({"scale": 1}, "other pixels"),
        ({"channel_order": "BGR"}, "other pixels"),
        ({"geometry": "224x224"}, "other pixels"),
    ],
)
def test_foreign_file(tmp_path: Path, change: dict[str, object], message: str) -> None:
    """A file of other shards, another version or without sense is refused; so is none."""
    with pytest.raises(FileNotFoundError, match="compute_pca"):
        Eigenbasis.load(tmp_path / "pca.json", "m")
    images = np.random.default_rng(2).integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
    content = write_eigenbasis(tmp_path / "pca.json", Moments.of(images), "m", "test")
    (tmp_path / "pca.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(ValueError, match=message):
        Eigenbasis.load(tmp_path / "pca.json", "m")


@pytest.mark.parametrize("level", [np.nan, np.inf, -np.inf])
@pytest.mark.filterwarnings("error")
def test_mean_images_that_are_not_finite(tmp_path: Path, level: float) -> None:
    """Are none, and numpy does not complain."""
    image = np.full((256, 256, 3), level, np.float32)
    np.save(tmp_path / "mean_image.npy", image)
    assert read_mean_image(tmp_path / "mean_image.npy", image[0, 0]) is None
