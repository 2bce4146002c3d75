"""The DALI graph on its CPU backend equals an independent computation with Pillow and numpy; its windows are even."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def
from PIL import Image
from scipy.stats import chisquare

from pipeline.decode import Decoder
from pipeline.draws import sample_params
from pipeline.eigenbasis import Eigenbasis
from pipeline.graph import decode_full, normalize_graph, train_graph
from pipeline.lighting import Lighting, apply_lighting
from pipeline.reader import parse_labels
from pipeline.settings import Augmentation
from tests.helpers import jpeg, photo
from tools.packing.images import crop256


def images_of_every_kind() -> list[bytes]:
    """72 JPEGs of 256x256, kinds in turn."""
    kinds: tuple[tuple[str, dict[str, Any]], ...] = (
        *(("RGB", {"subsampling": each}) for each in ("4:2:0", "4:2:2", "4:4:4")),
        *(("L", {}), ("CMYK", {}), ("RGB", {"progressive": True})),
    )
    rng = np.random.default_rng(0)
    return [jpeg(photo(rng), mode, **options) for _ in range(12) for mode, options in kinds]


def feed(items: list[bytes]) -> Iterator[list[np.ndarray]]:
    """One batch for an external source."""
    yield [np.frombuffer(item, np.uint8) for item in items]


@pytest.mark.parametrize(
    "augmentation",
    [Augmentation(), Augmentation("center", flip=0, lighting=Lighting("eigenvalue", 0.3), std=2.0)],
    ids=["random, stddev", "center, eigenvalue"],
)
def test_train_graph_equals_pillow_and_numpy(plain_basis: Eigenbasis, augmentation: Augmentation) -> None:
    """Decoding within one level of Pillow, the window to the bit, and what a GPU does with it, here by the same
    operations on a CPU, within float16's rounding; on the parameters that the graph itself puts out."""
    encoded = images_of_every_kind()

    @pipeline_def(batch_size=len(encoded), num_threads=2, device_id=None, seed=0)
    def pipeline() -> tuple[object, ...]:
        files = fn.external_source(feed(encoded))
        params = sample_params(augmentation, 5, 0)
        windows, mirror, noise = train_graph(files, params, plain_basis, augmentation, Decoder(), "cpu")
        images = normalize_graph(windows, noise, plain_basis, augmentation, mirror=mirror)
        return windows, images, decode_full(files, Decoder()), *params

    windows, images, decoded, crop_x, crop_y, mirror, noise = (
        output.as_array() for output in pipeline().run()
    )
    pillow = np.stack(
        [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int) for data in encoded]
    )
    assert np.abs(decoded - pillow).max() <= 1
    left, top = (np.rint(each * 32).astype(int).ravel() for each in (crop_x, crop_y))
    expected = np.stack(
        [decoded[n, y : y + 224, x : x + 224] for n, (x, y) in enumerate(zip(left, top, strict=True))]
    )
    assert np.array_equal(windows, expected) and windows.dtype == np.uint8
    flipped = mirror.ravel() == 1
    expected[flipped] = expected[flipped, :, ::-1]
    expected = apply_lighting(expected, noise, plain_basis, augmentation.lighting, augmentation.std)
    np.testing.assert_allclose(images, expected, rtol=2**-11, atol=1e-3)
    assert images.dtype == np.float16 and np.abs(noise).max() > 1.5
    if augmentation.crop == "center":
        assert set(left) == set(top) == {16} and not flipped.any()


def draw(
    count: int, batches: int, seed: int = 11, rank: int = 0, per_crop: int = 1, **start: object
) -> tuple[list[np.ndarray], bytes]:
    """Offsets, flips and noise of some batches of a pipeline, and its state in the end."""

    @pipeline_def(batch_size=count, num_threads=1, device_id=None, seed=0, enable_checkpointing=True)
    def pipeline() -> tuple[object, ...]:
        return sample_params(Augmentation(images_per_crop=per_crop), seed, rank)

    pipe = pipeline(**start)
    runs = [[output.as_array() for output in pipe.run()] for _ in range(batches)]
    return [np.concatenate(column) for column in zip(*runs, strict=True)], pipe.checkpoint()


def test_draws_are_even_normal_and_independent() -> None:
    """Of 30,000 draws offsets fit an even distribution by chi-squared, edges included, flips a fair coin; noise has
    covariance I and mean 0, and nothing correlates: .04 is seven standard errors."""
    (crop_x, crop_y, mirror, noise), _ = draw(3000, 10)
    for positions in (crop_x, crop_y):
        np.testing.assert_allclose(positions * 32, np.rint(positions * 32), atol=1e-5)  # no rounding decides
        assert chisquare(np.bincount(np.rint(positions * 32).astype(int).ravel(), minlength=33)).pvalue > 1e-3
    assert abs(mirror.mean() - 0.5) < 0.02
    assert np.abs(np.cov(noise.T) - np.eye(3)).max() < 0.04 and np.abs(noise.mean(0)).max() < 0.03
    columns = np.column_stack([crop_x.ravel(), crop_y.ravel(), mirror.ravel(), noise])
    assert np.abs(np.corrcoef(columns.T) - np.eye(6)).max() < 0.04


def test_shared_windows() -> None:
    """With 4 to a window, images 0 to 3, 4 to 7, ... have the window and flip that the first of them would have alone,
    and their own noise; a restored pipeline continues alike."""
    (*views, noise), _ = draw(12, 20, per_crop=4)
    (*firsts, same_noise), _ = draw(12, 20)
    for view, first in zip(views, firsts, strict=True):
        np.testing.assert_array_equal(view, np.repeat(first[::4], 4, axis=0))
    np.testing.assert_array_equal(noise, same_noise)
    _, state = draw(12, 19, per_crop=4)
    (*restored, _), _ = draw(12, 1, per_crop=4, checkpoint=state)
    for output, view in zip(restored, views, strict=True):
        np.testing.assert_array_equal(output, view[-12:])


def test_seeds() -> None:
    """Ranks and seeds draw differently; the same ones draw the same."""
    one, same, rank, seed = (draw(64, 1, *numbers)[0][3] for numbers in ((1, 0), (1, 0), (1, 1), (2, 0)))
    np.testing.assert_array_equal(one, same)
    for other in (rank, seed):
        assert np.abs(one - other).min(1).max() > 0.1


def test_labels() -> None:
    """Digits and what fills them up become the number."""
    texts = ["0", "7", "10", "999", "1234", "20480", "999999", "000012"]
    digits = np.array([list(text.encode().ljust(6, b"\0")) for text in texts], np.uint8)
    labels = parse_labels(torch.from_numpy(digits))
    assert labels.dtype == torch.int64 and labels.tolist() == [int(text) for text in texts]


SIZES = [(375, 500), (256, 256), (257, 256), (512, 513), (512, 515), (100, 1000), (90, 60), (1200, 900)]
"""Heights and widths; 513 / 2 and 515 / 2 are ties of the rounding."""


def test_images_of_any_size(plain_basis: Eigenbasis) -> None:
    """Windows and whole squares out of images of any size are those of the packed route, which resamples before it
    cuts, within two levels."""
    rng = np.random.default_rng(3)
    # From a smooth picture of the image's own size, as JPEGs without subsampling: decoders agree in every pixel.
    encoded = [jpeg(photo(rng, *size), quality=98, subsampling=0) for size in SIZES for _ in range(4)]
    augmentation = Augmentation(lighting=Lighting(strength=0))
    decoder = Decoder(any_size=True)

    @pipeline_def(batch_size=len(encoded), num_threads=2, device_id=None, seed=0)
    def pipeline() -> tuple[object, ...]:
        files = fn.external_source(feed(encoded))
        params = sample_params(augmentation, 5, 0)
        windows, *_ = train_graph(files, params, plain_basis, augmentation, decoder, "cpu")
        return windows, decode_full(files, decoder), params.crop_x, params.crop_y

    windows, squares, crop_x, crop_y = (output.as_array() for output in pipeline().run())
    left, top = (np.rint(each * 32).astype(int).ravel() for each in (crop_x, crop_y))
    for n, data in enumerate(encoded):
        packed = crop256(np.array(Image.open(io.BytesIO(data)))).astype(int)
        assert np.abs(squares[n] - packed).max() <= 2, SIZES[n // 4]
        window = packed[top[n] : top[n] + 224, left[n] : left[n] + 224]
        assert np.abs(windows[n] - window).max() <= 2, SIZES[n // 4]
