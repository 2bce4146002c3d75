"""The DALI graph on its CPU backend equals an independent computation with Pillow and numpy; its windows are even."""

import io
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def
from PIL import Image
from scipy.stats import chisquare

from pipeline.decode import Decoder, decode_image
from pipeline.draws import sample_params
from pipeline.eigenbasis import Eigenbasis
from pipeline.graph import decode_full, normalize_graph, train_graph, val_graph
from pipeline.lighting import Lighting
from pipeline.reader import parse_labels
from pipeline.settings import Augmentation
from tests.helpers import jpeg, photo
from tools.packing.images import crop256

KINDS: list[tuple[str, dict[str, object]]] = [
    ("RGB", {"subsampling": "4:2:0"}),
    ("RGB", {"subsampling": "4:4:4"}),
    ("L", {}),
    ("CMYK", {}),
    ("RGB", {"progressive": True}),
    ("RGB", {"subsampling": "4:2:2"}),
]


def images_of_every_kind(count: int) -> list[bytes]:
    """256x256 JPEGs, kinds in turn."""
    rng = np.random.default_rng(0)
    return [
        jpeg(photo(rng), mode, **options) for mode, options in (KINDS[k % len(KINDS)] for k in range(count))
    ]


def feed(items: list[bytes]) -> Iterator[list[np.ndarray]]:
    """One batch for an external source."""
    yield [np.frombuffer(item, np.uint8) for item in items]


@pytest.mark.parametrize("convention", ["stddev", "eigenvalue"])
def test_train_graph_equals_pillow_and_numpy(plain_basis: Eigenbasis, convention: str) -> None:
    """Decoding within one level of Pillow, the window to the bit, and what a GPU does with it, here by the same
    operations on a CPU, within float16's rounding; on the parameters that the graph itself puts out."""
    encoded = images_of_every_kind(72)
    augmentation = Augmentation(lighting=Lighting(convention, 0.1), std=1.0)  # type: ignore[arg-type]

    @pipeline_def(batch_size=len(encoded), num_threads=2, device_id=None, seed=0)
    def pipeline() -> tuple[object, ...]:
        files = fn.external_source(feed(encoded))
        params = sample_params(augmentation, 5, 0)
        windows, mirror, noise = train_graph(files, params, plain_basis, augmentation, Decoder(), "cpu")
        images = normalize_graph(windows, noise, plain_basis, augmentation, mirror=mirror)
        return windows, images, decode_image(files, Decoder()), *params

    windows, images, decoded, crop_x, crop_y, mirror, noise = (
        output.as_array() for output in pipeline().run()
    )
    assert windows.shape == (72, 224, 224, 3) and windows.dtype == np.uint8
    for n, data in enumerate(encoded):
        pillow = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
        assert np.abs(decoded[n] - pillow).max() <= 1
        left, top = round(float(crop_x[n]) * 32), round(float(crop_y[n]) * 32)
        window = decoded[n, top : top + 224, left : left + 224]
        assert np.array_equal(windows[n], window)
        seen = window[:, ::-1].astype(float) if mirror[n] else window.astype(float)
        if convention == "stddev":
            shift = 0.1 * plain_basis.eigenvectors @ (np.sqrt(plain_basis.eigenvalues) * noise[n])
            expected = (seen - plain_basis.mean + shift) / 1.1
        else:
            shift = plain_basis.eigenvectors @ (plain_basis.eigenvalues / 255 * 0.1 * noise[n])
            expected = seen - plain_basis.mean + shift
        np.testing.assert_allclose(images[n], expected, rtol=2**-11, atol=1e-3)
    assert images.dtype == np.float16
    # The test would be empty if nothing varied.
    assert len(np.unique(crop_x)) > 15 and 20 < mirror.sum() < 52 and np.abs(noise).max() > 1.5
    assert np.abs(np.corrcoef([crop_x, crop_y, mirror])[np.triu_indices(3, 1)]).max() < 0.4


def test_whole_images_and_center_crops(plain_basis: Eigenbasis) -> None:
    """Validation images are those that are decoded; `crop: center` and `flip: 0` give their
    middle window, unmirrored."""
    augmentation = Augmentation(crop="center", flip=0, lighting=Lighting(strength=0))
    encoded = images_of_every_kind(12)

    @pipeline_def(batch_size=12, num_threads=2, device_id=None, seed=0)
    def pipeline() -> tuple[object, ...]:
        files, params = fn.external_source(feed(encoded)), sample_params(augmentation, 5, 0)
        windows, *_ = train_graph(files, params, plain_basis, augmentation, Decoder(), "cpu")
        return (
            windows,
            *val_graph(files, plain_basis, augmentation, Decoder(), "cpu"),
            decode_image(files, Decoder()),
        )

    windows, images, decoded = (output.as_array() for output in pipeline().run())
    assert np.array_equal(images, decoded) and images.shape == (12, 256, 256, 3)
    assert np.array_equal(windows, decoded[:, 16:240, 16:240])


def offset_counts(positions: np.ndarray) -> np.ndarray:
    """How often each of the 33 offsets is hit; DALI rounds position * 32."""
    return np.bincount(np.floor(positions * 32 + 0.5).astype(int), minlength=33)


def test_offsets_are_even() -> None:
    """Chi-squared over 30,000 samples in each direction, edges included; evenly drawn floats would fail it."""

    @pipeline_def(batch_size=3000, num_threads=1, device_id=None, seed=0)
    def pipeline() -> tuple[object, ...]:
        params = sample_params(Augmentation(), 11, 0)
        return params.crop_x, params.crop_y, fn.random.uniform(range=[0.0, 1.0], seed=11)

    pipe = pipeline()
    runs = [[output.as_array() for output in pipe.run()] for _ in range(10)]
    crop_x, crop_y, floats = (np.concatenate(column) for column in zip(*runs, strict=True))
    assert len(crop_x) == 30_000
    for positions in (crop_x, crop_y):
        assert chisquare(offset_counts(positions)).pvalue > 1e-3
        np.testing.assert_allclose(positions * 32, np.rint(positions * 32), atol=1e-5)  # no rounding decides
    assert chisquare(offset_counts(floats)).pvalue < 1e-9


def test_shared_windows() -> None:
    """With 4 to a window, images 0 to 3, 4 to 7, ... have the window and flip that the first of them would have alone,
    and their own noise; a restored pipeline continues alike."""

    @pipeline_def(batch_size=12, num_threads=1, device_id=None, seed=0, enable_checkpointing=True)
    def pipeline(share: int) -> tuple[object, ...]:
        return sample_params(Augmentation(images_per_crop=share), 3, 0)

    alone, shared = pipeline(1), pipeline(4)
    for _ in range(20):
        state = shared.checkpoint()
        *views, noise = (output.as_array() for output in shared.run())
        *firsts, same_noise = (output.as_array() for output in alone.run())
        for view, first in zip(views, firsts, strict=True):
            np.testing.assert_array_equal(view, np.repeat(first[::4], 4))
        np.testing.assert_array_equal(noise, same_noise)
    restored = pipeline(4, checkpoint=state)
    for output, view in zip(restored.run(), views, strict=False):
        np.testing.assert_array_equal(output.as_array(), view)


@pytest.mark.parametrize("seeds", [((1, 0), (1, 1)), ((1, 0), (2, 0))])
def test_seeds(seeds: tuple[tuple[int, int], tuple[int, int]]) -> None:
    """Ranks and seeds draw differently; the same ones draw the same."""

    def noise(seed: int, rank: int) -> np.ndarray:
        @pipeline_def(batch_size=64, num_threads=1, device_id=None, seed=0)
        def pipeline() -> tuple[object, ...]:
            return (sample_params(Augmentation(), seed, rank).pca_noise,)

        (output,) = pipeline().run()
        return output.as_array()

    one, two = (noise(*pair) for pair in seeds)
    assert np.abs(one - two).min(1).max() > 0.1
    np.testing.assert_array_equal(one, noise(*seeds[0]))


def test_labels() -> None:
    """Digits and what fills them up become the number."""
    texts = ["0", "7", "10", "999", "1234", "20480", "999999", "000012"]
    digits = np.array([list(text.encode().ljust(6, b"\0")) for text in texts], np.uint8)
    labels = parse_labels(torch.from_numpy(digits))
    assert labels.dtype == torch.int64 and labels.tolist() == [int(text) for text in texts]


SIZES = [
    (375, 500),
    (500, 375),
    (256, 256),
    (257, 256),
    (512, 513),
    (512, 515),
    (100, 1000),
    (90, 60),
    (256, 300),
    (1200, 900),
]
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
    for n, data in enumerate(encoded):
        packed = crop256(np.array(Image.open(io.BytesIO(data))))
        assert np.abs(squares[n].astype(int) - packed).max() <= 2, SIZES[n // 4]
        left, top = round(float(crop_x[n]) * 32), round(float(crop_y[n]) * 32)
        window = packed[top : top + 224, left : left + 224]
        assert np.abs(windows[n].astype(int) - window).max() <= 2, SIZES[n // 4]
