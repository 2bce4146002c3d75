"""The DALI graphs on the CPU equal an independent computation with Pillow and numpy; those of a GPU can be built."""

import io
from itertools import product
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.augment import Draws
from pipeline.graph import Graph, build_pipeline, feed, wrap_encoded
from pipeline.plan import Plan
from tests.helpers import jpeg, photo
from tools.packing.images import crop256


def run(graph: Graph, encoded: list[bytes], draws: Draws | None = None) -> np.ndarray:
    """The output for one batch."""
    pipe = build_pipeline(graph, len(encoded), 2, None)
    images, ones = [np.frombuffer(data, np.uint8) for data in encoded], np.ones((len(encoded), 3), np.float32)
    feed(pipe, graph, wrap_encoded(images), Plan(np.arange(len(encoded)), ones, ones[0], draws))
    pipe.schedule_run()
    return np.array(pipe.outputs()[0].as_array())


def draw(count: int) -> Draws:
    """Any offsets, edges included."""
    rng = np.random.default_rng(5)
    left, top = rng.integers(0, 33, (2, count))
    left[:2], top[:2] = (0, 32), (32, 0)
    return Draws(left, top, rng.random(count) < 0.5, rng.standard_normal((count, 3)))


def test_crops_equal_pillow() -> None:
    """72 JPEGs of all kinds: whole images within one level of Pillow, crops those of whole images to the bit."""
    kinds: tuple[tuple[str, dict[str, Any]], ...] = (
        *(("RGB", {"subsampling": each}) for each in ("4:2:0", "4:2:2", "4:4:4")),
        *(("L", {}), ("CMYK", {}), ("RGB", {"progressive": True})),
    )
    rng = np.random.default_rng(0)
    encoded = [jpeg(photo(rng), mode, **options) for _ in range(12) for mode, options in kinds]
    draws, whole = draw(len(encoded)), run(Graph(crop=False), encoded)
    pillow = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int) for data in encoded]
    assert np.abs(whole - np.stack(pillow)).max() <= 1
    crops = run(Graph(), encoded, draws)
    for n, crop in enumerate(crops):
        top, left = draws.top[n], draws.left[n]
        assert np.array_equal(crop, whole[n, top : top + 224, left : left + 224])
    assert crops.dtype == np.uint8


SIZES = [(375, 500), (256, 256), (257, 256), (512, 513), (512, 515), (100, 1000), (90, 60), (1200, 900)]
"""Heights and widths; 513 / 2 and 515 / 2 are ties of the rounding."""


def test_images_of_any_size() -> None:
    """Crops and whole squares out of images of any size are those of the packed route, which resamples before it cuts,
    within two levels."""
    rng = np.random.default_rng(3)
    # From a smooth picture of the image's own size, as JPEGs without subsampling: decoders agree in every pixel.
    encoded = [jpeg(photo(rng, *size), quality=98, subsampling=0) for size in SIZES for _ in range(4)]
    draws = draw(len(encoded))
    crops, squares = run(Graph(any_size=True), encoded, draws), run(Graph(any_size=True, crop=False), encoded)
    for n, data in enumerate(encoded):
        packed = crop256(np.array(Image.open(io.BytesIO(data)))).astype(int)
        assert np.abs(squares[n] - packed).max() <= 2, SIZES[n // 4]
        top, left = draws.top[n], draws.left[n]
        assert np.abs(crops[n] - packed[top : top + 224, left : left + 224]).max() <= 2, SIZES[n // 4]


@pytest.mark.parametrize(
    ("decode", "any_size", "crop"), product(("gpu", "cpu"), (False, True), (False, True))
)
def test_gpu_graphs_can_be_built(decode: str, any_size: bool, crop: bool) -> None:
    """Without a GPU, up to their serialized form: operators, their arguments and the types of their inputs fit. Headers
    are read before the decoder (`peek_image_shape`), and the last operator gives float16 (DALIDataType 8)."""
    graph = Graph(decode, "gpu", any_size, crop, normalize=True)
    serialized = build_pipeline(graph, 8, 2, None).serialize()
    assert b"peek_image_shape" in serialized and b"CropMirrorNormalize" in serialized
    assert (b"mixed" in serialized) == (decode == "gpu")
