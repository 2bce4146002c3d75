"""DALI operators that decode images: whole ones, and windows (crops) of images of any size.

A window of an image of any size has to be what packing and cropping would give: shorter side resized to 256
(antialiased bicubic), of this the central 256x256, and of these the window. Here one resampling makes only the window:
it is traced back to a region of the stored image, and on a CPU only that region is decoded.
"""

from typing import TYPE_CHECKING, NamedTuple

from nvidia.dali import fn, math, types

from pipeline.shards import IMAGE_SIDE

if TYPE_CHECKING:
    from nvidia.dali.data_node import DataNode


class Decoder(NamedTuple):
    """Device and size of images to decode."""

    device: str = "cpu"
    """"gpu" (whole images, nvJPEG) or "cpu" (in training the window alone)."""
    any_size: bool = False
    """True if images are of any size; else they are 256x256."""
    hw_load: float = 0.65
    """Share of the images for a GPU's JPEG engine (`Speed.hw_decoder_load`)."""


def decode_crop(encoded: "DataNode", side: int, x: "DataNode | float", y: "DataNode | float") -> "DataNode":
    """Decode on the CPU a window of side x side of 256x256 images, at (x, y) from 0 to 1; uint8 HWC RGB.

    The position depends on `peek_image_shape`, so that it reads every header first and raises for a damaged one. DALI's
    decoder alone may crash the process then: it leaves a function whose variables its other threads still use (2.4,
    image_decoder.h, "Prepare descs").
    """
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


def decode_image(encoded: "DataNode", decoder: Decoder) -> "DataNode":
    """Decode whole images to uint8 HWC RGB, which stay on the decoder's device: on a CPU 256x256 ones, on a GPU of any
    size. EXIF orientation is ignored."""
    if decoder.device == "cpu":
        return decode_crop(encoded, IMAGE_SIDE, 0.5, 0.5)
    return fn.decoders.image(
        encoded,
        device="mixed",
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,  # interpolated chroma, as libjpeg and Pillow have it
        hw_decoder_load=decoder.hw_load,
        preallocate_width_hint=IMAGE_SIDE,  # else the JPEG engine allocates again for each larger image
        preallocate_height_hint=IMAGE_SIDE,
        affine=False,  # do not pin threads to cores, which other threads use, too
    )


class Roi(NamedTuple):
    """Region of a stored image that a window is resampled from, in one direction, in pixels of the image; float32."""

    start: "DataNode"
    end: "DataNode"
    """Edges of the window."""
    first: "DataNode"
    last: "DataNode"
    """First and last whole pixel that the filter reads for the window."""


def decode_resize_crop(
    encoded: "DataNode",
    decoder: Decoder,
    side: int,
    left: "DataNode | float",
    top: "DataNode | float",
    device: str,
) -> "DataNode":
    """Decode and resample a window of side x side at (left, top) of the central 256x256 of an image of any size.

    The geometry is that of `tools/make_shards.py pack`. On a CPU only the region that the window needs is decoded. It
    is resampled on `device`. Returns uint8 HWC RGB.
    """
    rois = trace_window(encoded, side, left, top)
    if decoder.device == "cpu":
        images, corner = decode_rois(encoded, rois), [each.first for each in rois]
    else:
        images, corner = decode_image(encoded, decoder), [0.0, 0.0]
    return fn.resize(
        images.gpu() if device == "gpu" else images,
        size=[side, side],
        roi_start=fn.stack(*(each.start - pixels for each, pixels in zip(rois, corner, strict=True))),
        roi_end=fn.stack(*(each.end - pixels for each, pixels in zip(rois, corner, strict=True))),
        interp_type=types.INTERP_CUBIC,
        antialias=True,
    )


def trace_window(
    encoded: "DataNode", side: int, left: "DataNode | float", top: "DataNode | float"
) -> tuple[Roi, Roi]:
    """Trace a window of side x side at (left, top) of the central 256x256 back to the stored image, vertically and
    horizontally."""
    shape = fn.peek_image_shape(encoded, adjust_orientation=False)  # int64 height, width, channels
    shorter = math.min(shape[0], shape[1])
    return trace_side(shape[0], shorter, top, side), trace_side(shape[1], shorter, left, side)


def decode_rois(encoded: "DataNode", rois: tuple[Roi, Roi]) -> "DataNode":
    """Decode the regions on the CPU, uint8 HWC RGB."""
    return fn.decoders.image_slice(
        encoded,
        device="cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        start=fn.cast(fn.stack(*(each.first for each in rois)), dtype=types.INT32),
        end=fn.cast(fn.stack(*(each.last for each in rois)), dtype=types.INT32),
        axes=[0, 1],
    )


def trace_side(size: "DataNode", shorter: "DataNode", offset: "DataNode | float", side: int) -> Roi:
    """Trace `side` pixels at `offset` of the central 256 back to an image of this size."""
    scaled = divide_rounded(size * IMAGE_SIDE, shorter)
    pixels = fn.cast(
        size, dtype=types.FLOAT
    )  # float32 is exact to a thousandth of a pixel up to ten thousand pixels
    scale = pixels / scaled
    start = ((scaled - IMAGE_SIDE) // 2 + offset) * scale
    end = start + side * scale
    support = 2 * math.max(scale, 1.0) + 1  # of the bicubic filter, which is wider if an image is reduced
    return Roi(
        start, end, math.max(math.floor(start - support), 0.0), math.min(math.ceil(end + support), pixels)
    )


def divide_rounded(dividend: "DataNode", divisor: "DataNode") -> "DataNode":
    """Compute Python's `round(dividend / divisor)` of positive int64: halves go to the even neighbour."""
    doubled = 2 * dividend + divisor
    quotient = doubled // (2 * divisor)
    is_tie = quotient * (2 * divisor) == doubled
    return quotient - fn.cast(is_tie, dtype=types.INT64) * (quotient - quotient // 2 * 2)
