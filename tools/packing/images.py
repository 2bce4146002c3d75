"""Decode one raw image, note its anomalies, and produce the JPEG for the shard.

`crop256`: shorter side to 256 (antialiased bicubic), longer side `round(long * 256 / short)`, central 256x256 from
offset `(long - 256) // 2`, encoded again. `original`: the file's own bytes unless `find_fault` objects. EXIF
orientation is ignored, as Pillow and torchvision ignore it.

Three outcomes: clean, kept with a note, undecodable (`ValueError`). A libjpeg warning is a note: ImageNet has such
files, and every decoder shows them. libjpeg-turbo decodes files without warnings, Pillow the others: its buffers start
as zeros, and it reports where it stops.
"""

import contextlib
import functools
import io
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageFile, JpegImagePlugin

from tools.packing.jpeg import DAMAGED_EXIF, MAX_SCANS, SOS, Jpeg, list_exif_notes, read_jpeg, rewrite_header

SIDE = 256
MAX_PIXELS = 50_000_000
"""Larger images are decoded at a reduced scale, or refused: with copies in RGB a process would need more than 1 GB."""
MAX_RATIO = MAX_PIXELS // SIDE**2
"""Longer to shorter side: a longer strip would exceed MAX_PIXELS once its shorter side is 256."""
SEPARATOR = "; "
GREY = "grey JPEG"


class Packed(NamedTuple):
    """An image for a shard."""

    jpeg: bytes
    """A JPEG file, RGB or (original) grey."""
    found: str
    """Anomalies of the raw file; empty for a clean one."""
    done: str
    """What was done about it."""


class Decoded(NamedTuple):
    """A raw file, decoded."""

    pixels: np.ndarray
    """uint8 (height, width, 3), RGB."""
    size: tuple[int, int]
    """Height and width of the file, before any reduction."""
    notes: list[tuple[str, str]]
    """(found, done): anomalies and how they are handled."""
    file: bytes | None
    """JPEG that a shard may hold: the file, or the file with its header rewritten; None if it needs encoding."""


class SizeError(ValueError):
    """An image that is too large, or too long for its width."""


def pack_image(raw: bytes, store: str, quality: int) -> Packed:
    """Convert a raw file, in any format that Pillow reads, to a shard's JPEG.

    Args:
        raw: The file.
        store: "crop256" or "original".
        quality: JPEG quality, 1 to 100, for images that need encoding.

    Raises `ValueError` with the decoder's reason for an undecodable file.
    """
    decoded = decode(raw, may_reduce=store == "original")
    notes = decoded.notes
    if store == "original" and decoded.file is not None:
        jpeg = decoded.file
        notes = [(found, "kept as it is" if jpeg is raw or found == GREY else done) for found, done in notes]
    else:
        pixels = crop256(decoded.pixels, decoded.size) if store == "crop256" else decoded.pixels
        jpeg = simplejpeg.encode_jpeg(pixels, quality, "RGB", colorsubsampling="420", fastdct=False)
    return Packed(
        jpeg, SEPARATOR.join(found for found, _ in notes), SEPARATOR.join(done for _, done in notes)
    )


def find_fault(raw: bytes) -> str:
    """Find the reason why a shard may not hold a file; empty if it may. Used by pack, adopt and verify.

    A file is valid if its markers are those of an 8-bit baseline or progressive JPEG of a common sampling, from first
    byte to end marker, and libjpeg-turbo decodes all of it without a warning. DALI decodes such files, whole and in
    crops, to libjpeg's pixels.
    """
    jpeg = read_jpeg(raw)
    if not raw.startswith(b"\xff\xd8"):
        return f"{find_format(raw)}, not a JPEG file"
    if jpeg.anomaly:
        return jpeg.anomaly
    try:
        check_shape(jpeg.height, jpeg.width)
        if jpeg.height * jpeg.width > MAX_PIXELS:
            raise too_large_error(jpeg.height, jpeg.width)
        decode_strictly(raw, jpeg, 8)
    except SizeError as error:
        return str(error)
    except ValueError as error:
        return f"libjpeg warns: {error}"
    return ""


def find_format(raw: bytes) -> str:
    """Return the format of an image file, by Pillow."""
    with contextlib.suppress(Exception), silence_stderr(), open_with_pillow(raw) as image:
        return f"{image.format} file"
    return "no image"


def decode(raw: bytes, may_reduce: bool = False) -> Decoded:
    """Decode a file. Raises `ValueError` when no decoder can.

    Args:
        raw: bytes of any image file.
        may_reduce: Decode a file that needs no encoding at 1/8 scale: all of its data is still checked, in a quarter
            less time.
    """
    jpeg = read_jpeg(raw)
    if (scans := sum(segment.marker == SOS for segment in jpeg.segments)) > MAX_SCANS:
        raise SizeError(f"too large: {scans} scans, each of which takes about a second in a large image")
    if not jpeg.is_common:
        return decode_with_pillow(rewrite_header(raw, jpeg) if jpeg.segments else raw, jpeg)
    size, notes = (jpeg.height, jpeg.width), list_exif_notes(raw, jpeg)
    factor = find_reduction(*size, jpeg.one_scan)
    rewritten = any(found == DAMAGED_EXIF for found, _ in notes)
    if jpeg.color == "grey":
        notes.append((GREY, "converted to RGB"))
    if 0 < jpeg.end < len(raw):
        notes.append((f"{len(raw) - jpeg.end} bytes after the image's end", "dropped"))
    if factor > 1:
        notes.append((f"{jpeg.width}x{jpeg.height} pixels", f"reduced to 1/{factor}"))
    fault = jpeg.anomaly
    try:
        pixels = decode_strictly(raw, jpeg, 8 if may_reduce and factor == 1 and not fault else factor)
    except ValueError as error:
        fault = f"libjpeg warns: {error}"
    if not fault:
        file = rewrite_header(raw, jpeg) if rewritten else raw
        return Decoded(pixels, size, notes, file if factor == 1 else None)
    file = rewrite_header(raw, jpeg)
    try:
        pixels = decode_strictly(file, jpeg, factor)
    except ValueError:
        pixels = decode_with_pillow(file + FAKE_ENDS, jpeg).pixels
        return Decoded(pixels, size, [*notes, (fault, "decoded as far as it goes")], None)
    if read_jpeg(file).anomaly or factor > 1:
        return Decoded(pixels, size, [*notes, (fault, "decoded")], None)
    return Decoded(pixels, size, [*notes, (fault, "header rewritten")], file)


FAKE_ENDS = b"\xff\xd9" * 2**15
"""End markers, enough for the longest segment, as libjpeg's memory source appends them to a truncated file. With them
Pillow decodes as much of it as libjpeg does."""


def decode_strictly(raw: bytes, jpeg: Jpeg, factor: int) -> np.ndarray:
    """Decode a common JPEG at 1/factor (1, 2, 4 or 8) to uint8 RGB (height, width, 3), sides rounded up.

    Raises `ValueError` with libjpeg's first warning or error: after a warning, simplejpeg ignores errors and returns
    uninitialized memory.
    """
    assert jpeg.is_common, "libjpeg-turbo decodes other frames at other sizes, past the end of the buffer"
    height, width = (-(-side // factor) for side in (jpeg.height, jpeg.width))
    pixels: np.ndarray = simplejpeg.decode_jpeg(
        raw,
        "RGB",
        fastdct=False,
        fastupsample=False,
        min_height=height,
        min_width=width,
        min_factor=float(factor),
    )
    return pixels


def decode_with_pillow(raw: bytes, jpeg: Jpeg) -> Decoded:
    """Decode damaged and uncommon JPEGs (such as CMYK) and other formats. Raises `ValueError`."""
    try:
        with silence_stderr(), open_with_pillow(raw) as image:
            width, height = image.size
            factor = find_reduction(height, width, jpeg.one_scan)
            kind = f"{image.mode} {image.format} file"
            if factor > 1:
                image.draft(image.mode, (width // factor, height // factor))
            is_truncated = load_pixels(image)
            is_deep = image.mode[0] in "IF"
            pixels = (
                np.repeat(to_grey8(image)[:, :, None], 3, 2) if is_deep else np.array(image.convert("RGB"))
            )
    except SizeError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise SizeError(
            f"too large: more than {MAX_PIXELS} pixels ({str(error).partition(',')[0]})"
        ) from None
    except Exception as error:  # Pillow's decoders raise many kinds for damaged files
        reason = re.sub(r" ?<_io\.BytesIO[^>]*>", "", str(error))
        raise ValueError(f"not decodable: {reason}") from None
    notes = [(kind, "converted to RGB")]
    notes += [(f"{width}x{height} pixels", f"reduced to 1/{factor}")] * (factor > 1)
    notes += [("file ends too early", "decoded as far as it goes")] * is_truncated
    return Decoded(pixels, (height, width), notes, None)


def open_with_pillow(raw: bytes) -> Image.Image:
    """Open an image file. Raises whatever Pillow raises, for formats other than JPEG also for too many pixels."""
    if raw.startswith(b"\xff\xd8"):
        return JpegImagePlugin.JpegImageFile(io.BytesIO(raw))
    warnings.simplefilter("error", Image.DecompressionBombWarning)  # until the end of `silence`
    return Image.open(io.BytesIO(raw), formats=list_raster_formats())


@functools.cache
def list_raster_formats() -> list[str]:
    """List Pillow's formats except EPS, which runs Ghostscript."""
    Image.init()
    return [name for name in Image.ID if name != "EPS"]


@contextlib.contextmanager
def silence_stderr() -> Iterator[None]:
    """Suppress Pillow's warnings and libtiff's output on stderr."""
    with warnings.catch_warnings(), Path(os.devnull).open("wb") as nothing:
        warnings.simplefilter("ignore")
        stderr = os.dup(2)
        os.dup2(nothing.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def load_pixels(image: Image.Image) -> bool:
    """Load the pixels of an image opened by Pillow. Returns True for a truncated file, which is decoded in part.

    Raises whatever Pillow raises, also where nothing was decoded.
    """
    try:
        image.load()
    except OSError as error:
        if "truncated" not in str(error) and "broken data stream" not in str(error):
            raise
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        try:
            image.load()
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = False
        if not np.asarray(image).any():
            raise
        return True
    return False


def to_grey8(image: Image.Image) -> np.ndarray:
    """Convert an image of more than 8 bits to uint8 (height, width); Pillow's own conversion clips above 255.

    Integers above 255 are read as 16 bits, floats up to 1 as 0..1.
    """
    levels = np.nan_to_num(np.asarray(image).astype(np.float32))
    largest = levels.max()
    scale = 1 / 257 if largest > 255 else 255 if image.mode == "F" and largest <= 1 else 1
    return np.rint(np.clip(levels * scale, 0, 255)).astype(np.uint8)


def check_shape(height: int, width: int) -> None:
    """Raise `SizeError` for a strip that would fill the memory once its shorter side is 256."""
    short, long = sorted((height, width))
    if long > MAX_RATIO * short:
        raise SizeError(
            f"too narrow: {width}x{height} pixels; one side may be {MAX_RATIO} times the other at most"
        )


def too_large_error(height: int, width: int) -> SizeError:
    """Make the error for an image that would fill the memory."""
    return SizeError(f"too large: {width}x{height} pixels are more than {MAX_PIXELS}")


def find_reduction(height: int, width: int, can_reduce: bool) -> int:
    """Find the factor, 1, 2, 4 or 8, to reduce an image by while decoding. Raises `SizeError` if none is enough, or
    `can_reduce` is False: a progressive JPEG keeps all coefficients in memory at any scale."""
    check_shape(height, width)
    for factor in (1, 2, 4, 8) if can_reduce else (1,):
        if -(-height // factor) * -(-width // factor) <= MAX_PIXELS:
            return factor
    raise too_large_error(height, width)


def crop256(pixels: np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
    """Resize the shorter side to 256, crop the central 256x256: uint8 (height, width, 3) to (256, 256, 3), contiguous.

    `size`: height and width of the file, if it was reduced, which define the geometry.

    Torch's antialiased bicubic filter on bytes is Pillow's with its weights rounded to 16 bits: more than three times
    as fast, and equal up to 2 levels (one in all but a few pixels).
    """
    import torch
    from torch.nn.functional import interpolate

    height, width = size or pixels.shape[:2]
    short = min(height, width)
    new_height, new_width = round(height * SIDE / short), round(width * SIDE / short)
    top, left = (new_height - SIDE) // 2, (new_width - SIDE) // 2
    # Channels last. Permuting before the batch axis is added makes torch copy twice.
    images_NCHW = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    resized = interpolate(images_NCHW, (new_height, new_width), mode="bicubic", antialias=True)
    square = resized[0, :, top : top + SIDE, left : left + SIDE].permute(1, 2, 0)
    return np.ascontiguousarray(square.numpy())
