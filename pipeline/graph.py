"""DALI graphs: functions from encoded images and their augmentation to tensors.

    crops:         encoded, x, y -> uint8 224x224                  (device cpu; `pixel_ops.py` does the rest)
                   encoded, x, y, mirror, mean, std -> float16     (device gpu)
    whole images:  encoded -> uint8 256x256                        (device cpu, or without `normalize`)
                   encoded, mean, std -> float16                   (device gpu)
    pixel stores:  pixels instead of encoded                       (device gpu; on a CPU nothing is left to do)

There is no reader and no state: a batch depends only on what is fed. `decode: gpu` is DALI's `mixed` decoder on whole
images; `decode: cpu` decodes on the host, of a crop only its window, and augments on the GPU if there is one. Images
come out as HWC, which for PyTorch is channels-last memory, RGB.

A crop of an image of any size has to be what packing and cropping would give: shorter side resized to 256 (antialiased
bicubic), of this the central 256x256, and of these the crop. Here one resampling makes only the crop: it is traced back
to a region of the stored image, and on a CPU only that region is decoded.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from nvidia.dali import Pipeline, fn, math, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.tensors import TensorCPU, TensorListCPU

from pipeline.augment import CROP_SIDE, OFFSETS
from pipeline.plan import Plan
from pipeline.shards import IMAGE_SIDE


@dataclass(frozen=True)
class Graph:
    """What a pipeline computes."""

    decode: str = "cpu"
    """"gpu" (whole images, nvJPEG), "cpu", or "stored" (pixel stores)."""
    device: str = "cpu"
    """Device of the result, "gpu" or "cpu"."""
    any_size: bool = False
    """True if images are of any size; else they are 256x256."""
    crop: bool = True
    """True for crops, False for whole 256x256 images."""
    normalize: bool = False
    """True to flip, subtract the mean and divide by std, to float16; only on a GPU."""
    hw_decoder_load: float = 0.65
    """Share of the images for a GPU's JPEG engine (`Speed.hw_decoder_load`)."""


def build_pipeline(graph: Graph, batch_size: int, threads: int, device_id: int | None) -> Pipeline:
    """Build the pipeline of a graph, for batches of up to `batch_size`.

    Feed it, call `schedule_run`, and take `outputs` in the same order; any number of runs may be scheduled ahead. What
    is fed as "encoded" has to stay as it is until its outputs are taken.
    """
    pipe = Pipeline(batch_size, threads, device_id, seed=0, prefetch_queue_depth=1)  # we count those ahead
    with pipe:
        pipe.set_outputs(connect(graph))
    return pipe


def connect(graph: Graph) -> DataNode:
    """Connect the operations of a graph to its inputs. Crops are at `window`, (x, y) from 0 to 1."""

    def source(name: str, ndim: int) -> DataNode:
        return fn.external_source(name=name, ndim=ndim, dtype=types.FLOAT)

    is_stored = graph.decode == "stored"
    shape: dict[str, Any] = {"ndim": 3, "layout": "HWC"} if is_stored else {"ndim": 1}
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, no_copy=True, **shape)
    window = (source("x", 0), source("y", 0)) if graph.crop else None
    if is_stored:
        pixels = encoded  # of a crop only its rows, which y moves nowhere
    elif graph.any_size:
        pixels = decode_resize_crop(encoded, graph, window)
    elif graph.decode == "gpu":
        pixels = decode_on_gpu(encoded, graph)  # whole images, also for crops
    else:
        pixels = decode_crop(encoded, window)
    if not graph.normalize:
        return pixels
    arguments: dict[str, Any] = {"mean": source("mean", 1), "std": source("std", 1)}
    if window:
        arguments["mirror"] = fn.external_source(name="mirror", ndim=0, dtype=types.INT32)
        if graph.decode != "cpu" and not graph.any_size:
            arguments |= {"crop": (CROP_SIDE, CROP_SIDE), "crop_pos_x": window[0], "crop_pos_y": window[1]}
    return fn.crop_mirror_normalize(pixels.gpu(), dtype=types.FLOAT16, output_layout="HWC", **arguments)


def feed(pipe: Pipeline, graph: Graph, encoded: Any, plan: Plan) -> None:
    """Feed one batch to a pipeline: its images, from `wrap_encoded`, or stored pixels (N, H, W, C); and its plan."""
    inputs: dict[str, Any] = {"encoded": encoded}
    if plan.draws and graph.crop:
        inputs["x"] = (plan.draws.left / OFFSETS).astype(np.float32)
        inputs["y"] = (plan.draws.top / OFFSETS).astype(np.float32)
    if graph.normalize:
        inputs |= {"mean": plan.means, "std": np.tile(plan.stds.astype(np.float32), (len(plan.rows), 1))}
        if plan.draws:
            inputs["mirror"] = plan.draws.mirrored.astype(np.int32)
    for name, values in inputs.items():
        pipe.feed_input(name, values)


def wrap_encoded(images: Iterable[np.ndarray]) -> TensorListCPU:
    """Wrap encoded images for `feed`, without a copy; not done there, as it takes a microsecond for each."""
    tensors = [TensorCPU(image, "") for image in images]
    return TensorListCPU(tensors, "", contiguous=False)  # type: ignore[call-overload]  # not in DALI's stubs


def decode_crop(encoded: DataNode, window: tuple[DataNode, DataNode] | None) -> DataNode:
    """Decode 256x256 images on the CPU, of crops the window alone, to uint8 HWC RGB.

    The position depends on `peek_image_shape`, so that it reads every header first and raises for a damaged one. DALI's
    decoder alone may crash the process then: it leaves a function whose variables its other threads still use (2.4,
    image_decoder.h, "Prepare descs").
    """
    side = CROP_SIDE if window else IMAGE_SIDE
    x, y = window or (0.5, 0.5)
    shape = fn.peek_image_shape(encoded, adjust_orientation=False)
    return fn.decoders.image_crop(
        encoded,
        device="cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        crop=(side, side),
        crop_pos_x=shape[1] * 0 + x,
        crop_pos_y=y,
    )


def decode_on_gpu(encoded: DataNode, graph: Graph) -> DataNode:
    """Decode whole images of any size on the GPU to uint8 HWC RGB. EXIF orientation is ignored.

    Headers are read first here, too (see `decode_crop`): the reshaping changes nothing, but waits for them.
    """
    shape = fn.peek_image_shape(encoded, adjust_orientation=False)
    return fn.decoders.image(
        fn.reshape(encoded, shape=fn.cast(encoded.shape() + 0 * shape[0], dtype=types.INT32)),
        device="mixed",
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,  # interpolated chroma, as libjpeg and Pillow have it
        hw_decoder_load=graph.hw_decoder_load,
        preallocate_width_hint=IMAGE_SIDE,  # else the JPEG engine allocates again for each larger image
        preallocate_height_hint=IMAGE_SIDE,
        affine=False,  # do not pin threads to cores, which other threads use, too
    )


def decode_resize_crop(encoded: DataNode, graph: Graph, window: tuple[DataNode, DataNode] | None) -> DataNode:
    """Decode and resample a window of the central 256x256 of an image of any size, to uint8 HWC RGB on `graph.device`,
    with the geometry of `tools/make_shards.py pack`."""
    side = CROP_SIDE if window else IMAGE_SIDE
    corner = fn.stack(window[1], window[0]) * OFFSETS if window else 0.0
    shape = fn.peek_image_shape(encoded, adjust_orientation=False)  # int64 height, width, channels
    size = fn.cast(shape[:2], dtype=types.FLOAT)  # exact to a thousandth of a pixel up to ten thousand pixels
    resized = divide_rounded(shape[:2] * IMAGE_SIDE, math.min(shape[0], shape[1]))
    # The window, row and column, traced back to pixels of the stored image.
    scale = size / resized
    start = ((resized - IMAGE_SIDE) // 2 + corner) * scale
    end = start + side * scale
    first: Any = 0.0
    if graph.decode == "cpu":
        support = 2 * math.max(scale, 1.0) + 1  # of the bicubic filter, which is wider if an image is reduced
        first = math.max(math.floor(start - support), 0.0)
        last = math.min(math.ceil(end + support), size)
        images = fn.decoders.image_slice(
            encoded,
            device="cpu",
            output_type=types.RGB,
            adjust_orientation=False,
            start=fn.cast(first, dtype=types.INT32),
            end=fn.cast(last, dtype=types.INT32),
            axes=[0, 1],
        )
    else:
        images = decode_on_gpu(encoded, graph)
    return fn.resize(
        images.gpu() if graph.device == "gpu" else images,
        size=[side, side],
        roi_start=start - first,
        roi_end=end - first,
        interp_type=types.INTERP_CUBIC,
        antialias=True,
    )


def divide_rounded(dividend: DataNode, divisor: DataNode) -> DataNode:
    """Compute Python's `round(dividend / divisor)` of positive int64: halves go to the even neighbour."""
    doubled = 2 * dividend + divisor
    quotient = doubled // (2 * divisor)
    is_tie = quotient * (2 * divisor) == doubled
    return quotient - fn.cast(is_tie, dtype=types.INT64) * (quotient - quotient // 2 * 2)
