"""Run FFCV as a contender of `bench peers`, in its own process, as FFCV needs its own environment.

    FFCV_PYTHON tools/benchmarks/ffcv_script.py SETTINGS.json

writes the JPEGs, byte for byte, in FFCV's format. Then it loads a batch, prints a line, and repeats this for each line
on stdin. If the settings have `show`, it saves each batch as an .npz of images and labels before it prints the line. It
does not import this project.
"""

import io
import json
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
from ffcv.fields.rgb_image import IMAGE_MODES
from ffcv.loader import Loader, OrderOption
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.operation import Operation
from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToTensor, ToTorchImage
from ffcv.writer import DatasetWriter
from PIL import Image

EPOCH = 200_000
"""Least images per epoch: FFCV allocates its buffers again in every epoch, which costs most on a small set."""


class ShiftAndNormalize(Operation):
    """Lighting, which FFCV lacks, and normalization in one pass, uint8 to float32."""

    def __init__(self, mean: list[float], matrix: list[list[float]], divisor: float) -> None:
        super().__init__()
        self.mean, self.matrix = np.array(mean, np.float32), np.array(matrix, np.float32)
        self.inverse = np.float32(1 / divisor)

    def generate_code(self) -> Callable[..., Any]:
        """Return the function that numba compiles."""
        my_range, means, matrix, inverse = Compiler.get_iterator(), self.mean, self.matrix, self.inverse

        def normalize(images: Any, out: Any) -> Any:
            count, height, width, colours = images.shape
            draws = np.random.standard_normal((count, colours)).astype(np.float32)
            for i in my_range(count):
                # Whole rows are twice as fast as three colours each.
                row = np.empty((width, colours), np.float32)
                for colour in range(colours):
                    row[:, colour] = means[colour] - (matrix[colour] * draws[i]).sum()
                mean = row.reshape(width * colours)
                for y in range(height):
                    pixels, result = images[i, y].reshape(width * colours), out[i, y].reshape(width * colours)
                    for x in range(width * colours):
                        result[x] = (np.float32(pixels[x]) - mean[x]) * inverse
            return out

        normalize.is_parallel = True  # type: ignore[attr-defined]
        return normalize

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, Any]:
        """Declare the output buffer."""
        dtype = np.dtype(np.float32)
        state = replace(previous_state, jit_mode=True, dtype=dtype)
        return state, AllocationQuery(previous_state.shape, dtype)


def write_beton(files: list[tuple[str, int]], path: Path) -> None:
    """Write FFCV's file. Its field would decode and re-encode, so its `encode` is replaced."""
    field = RGBImageField(write_mode="jpg")

    def encode(_: Any, destination: Any, jpeg: bytes, malloc: Any) -> None:
        destination["mode"] = IMAGE_MODES["jpg"]
        destination["width"], destination["height"] = Image.open(io.BytesIO(jpeg)).size
        destination["data_ptr"], storage = malloc(len(jpeg))
        storage[:] = np.frombuffer(jpeg, np.uint8)

    field.encode = types.MethodType(encode, field)
    writer = DatasetWriter(str(path), {"image": field, "label": IntField()}, num_workers=1)
    writer.from_indexed_dataset([(Path(file).read_bytes(), label) for file, label in files])


def load_batches(settings: dict[str, Any], beton: str) -> Iterator[tuple[Any, Any]]:
    """Yield augmented batches forever. At this scale and ratio the random resized crop is a random 224x224 crop without
    resizing."""
    side, count = 224, len(settings["files"])
    crop: dict[str, Any] = {"scale": ((side / 256) ** 2, (side / 256) ** 2), "ratio": (1.0, 1.0)}
    decode = [RandomResizedCropRGBImageDecoder((side, side), **crop), RandomHorizontalFlip()]
    normalize = ShiftAndNormalize(settings["mean"], settings["matrix"], settings["divisor"])
    images = [*decode, normalize, ToTensor(), ToTorchImage(channels_last=True)]
    pipelines = {"image": images, "label": [IntDecoder(), ToTensor(), Squeeze()]}
    repeats = 1 if settings["show"] else -(-EPOCH // count)
    numbers = np.tile(np.arange(count, dtype=np.uint64), repeats)
    order: dict[str, Any] = {
        "order": OrderOption.RANDOM,
        "indices": numbers,
        "os_cache": True,
        "drop_last": True,
    }
    batch_size, workers = settings["batch_size"], settings["workers"]
    loader = Loader(beton, batch_size=batch_size, num_workers=workers, pipelines=pipelines, **order)
    while True:
        yield from loader


def main() -> None:
    """Answer the lines on standard input, after the first batch."""
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # keep what libraries print out of the answers
    path = Path(sys.argv[1])
    settings = json.loads(path.read_text())
    beton = path.with_suffix(".beton")
    write_beton(settings["files"], beton)
    for images, labels in load_batches(settings, str(beton)):
        if settings["show"]:
            images_NHWC = images.permute(0, 2, 3, 1).numpy()
            np.savez(path.with_suffix(".npz"), images=images_NHWC, labels=labels.numpy())
        print("done", file=answers)
        if not sys.stdin.readline():
            break
    os._exit(0)  # FFCV's threads are still running


if __name__ == "__main__":
    main()
