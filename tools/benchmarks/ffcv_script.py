"""Run FFCV as a contender of `bench peers`, in its own process, as FFCV needs its own environment.

    FFCV_PYTHON tools/benchmarks/ffcv_script.py SETTINGS.json

writes the JPEGs, byte for byte, in FFCV's format, or with `raw` their pixels as Pillow decodes them. Then it serves
batches; with `windows` uint8 crops alone.
"""

import types
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
from peer_protocol import serve
from PIL import Image


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


def write_beton(files: list[tuple[str, int]], raw: bool, path: Path) -> None:
    """Write FFCV's file. Its field would decode and re-encode JPEGs, so its `encode` is replaced."""
    field, pixels = RGBImageField(write_mode="jpg"), RGBImageField(write_mode="raw")

    def encode(_: Any, destination: Any, file: str, malloc: Any) -> None:
        image, jpeg = Image.open(file), Path(file).read_bytes()
        if raw:
            pixels.encode(destination, image.convert("RGB"), malloc)
            return
        destination["mode"] = IMAGE_MODES["jpg"]
        destination["width"], destination["height"] = image.size
        destination["data_ptr"], storage = malloc(len(jpeg))
        storage[:] = np.frombuffer(jpeg, np.uint8)

    field.encode = types.MethodType(encode, field)
    writer = DatasetWriter(str(path), {"image": field, "label": IntField()}, num_workers=1)
    writer.from_indexed_dataset(files)


def load_batches(settings: dict[str, Any], folder: Path) -> Iterator[tuple[Any, Any]]:
    """Yield batches forever. At this scale and ratio the random resized crop is a random 224x224 crop without
    resizing."""
    side, raw = 224, settings["raw"]
    beton = folder / f"{'checked' if settings['show'] else 'timed'}-{'raw' if raw else 'jpg'}.beton"
    if not beton.exists():
        write_beton(settings["files"], raw, beton)
    crop: dict[str, Any] = {"scale": ((side / 256) ** 2, (side / 256) ** 2), "ratio": (1.0, 1.0)}
    images = [RandomResizedCropRGBImageDecoder((side, side), **crop)]
    if not settings["windows"]:
        normalize = ShiftAndNormalize(settings["mean"], settings["matrix"], settings["divisor"])
        images += [RandomHorizontalFlip(), normalize]
    images += [ToTensor(), ToTorchImage(channels_last=True)]
    pipelines = {"image": images, "label": [IntDecoder(), ToTensor(), Squeeze()]}
    order: dict[str, Any] = {"order": OrderOption.RANDOM, "os_cache": True, "drop_last": True}
    order["indices"] = settings["numbers"].astype(np.uint64)  # it allocates its buffers again in every epoch
    batch_size, workers = settings["batch_size"], settings["workers"]
    loader = Loader(str(beton), batch_size=batch_size, num_workers=workers, pipelines=pipelines, **order)
    while True:
        yield from loader


if __name__ == "__main__":
    serve(load_batches)
