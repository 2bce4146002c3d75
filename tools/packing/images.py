"""What the packer does to one image: decode it, say what was odd, and make it what the shard is to hold.

`crop256`: shorter side to 256 (antialiased bicubic), longer side `round(long * 256 / short)`, central 256x256 from
offset `(long - 256) // 2`, encoded again. `original`: the file's own bytes if `find_fault` finds none in them. EXIF
orientation is ignored, as Pillow and torchvision ignore it.

Three verdicts: clean (no note), kept with a note, undecodable (`ValueError`). A libjpeg warning is a note: ImageNet has
such files, and every decoder shows them. libjpeg-turbo decodes what it does not warn of, and Pillow all the rest: its
buffers start as zeros, and where it gives up it says so.
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
"""Above this an image is reduced while it is decoded, or refused: with 4 bytes a pixel and its copies in RGB, a process
would need more than 1 GB."""
MAX_RATIO = MAX_PIXELS // SIDE**2
"""Of longer to shorter side; brought to 256 pixels in height, a longer strip would have more than MAX_PIXELS."""
SEPARATOR = "; "
GREY = "grey JPEG"


class Packed(NamedTuple):
    """An image as it goes into a shard."""

    jpeg: bytes
    """A JPEG file, RGB or (original) grey."""
    found: str
    """What was odd about the raw file; empty for a clean one."""
    done: str
    """What was done about it."""


class Decoded(NamedTuple):
    """A raw file, decoded."""

    pixels: np.ndarray
    """uint8 (height, width, 3), RGB."""
    size: tuple[int, int]
    """Height and width of the file, which is more than that of the pixels where it was reduced."""
    notes: list[tuple[str, str]]
    """What was found, and what is done about it."""
    file: bytes | None
    """What may stand in a shard: the file itself, or the same with a header of ours; None if it needs encoding."""


class SizeError(ValueError):
    """An image that is too large, or too long for its width."""


def pack_image(raw: bytes, store: str, quality: int) -> Packed:
    """Turn a raw file, in any format that Pillow knows and whatever its name says, into a shard's image.

    Args:
        raw: The file.
        store: "crop256" or "original".
        quality: JPEG quality, 1 to 100, of what is encoded.

    Raises `ValueError` with the decoder's reason when the file cannot be decoded.
    """
    decoded = decode(raw, at_an_eighth=store == "original")
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
    """Why a file may not stand in a shard as it is; empty if it may. The one rule for packing, adopting and verifying.

    A file may if its markers are those of an 8-bit baseline or progressive JPEG of a common sampling, from its first
    byte to its end marker, and libjpeg-turbo decodes the whole of it without a warning. Such files DALI decodes, whole
    and in windows, to libjpeg's pixels.
    """
    jpeg = read_jpeg(raw)
    if not raw.startswith(b"\xff\xd8"):
        return f"{find_format(raw)}, not a JPEG file"
    if jpeg.oddity:
        return jpeg.oddity
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
    """What kind of image file this is, by Pillow."""
    with contextlib.suppress(Exception), silence(), open_with_pillow(raw) as image:
        return f"{image.format} file"
    return "no image"


def decode(raw: bytes, at_an_eighth: bool = False) -> Decoded:
    """Decode a file. Raises `ValueError` when no decoder takes it.

    Args:
        raw: bytes of any image file.
        at_an_eighth: Pixels are wanted only where the file needs encoding. All of the compressed data is read and
            judged then, but not every pixel computed, which saves a quarter of the time.
    """
    jpeg = read_jpeg(raw)
    if (scans := sum(segment.marker == SOS for segment in jpeg.segments)) > MAX_SCANS:
        raise SizeError(f"too large: {scans} scans, each of which takes a second or so in a large image")
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
    fault = jpeg.oddity
    try:
        pixels = decode_strictly(raw, jpeg, 8 if at_an_eighth and factor == 1 and not fault else factor)
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
    if read_jpeg(file).oddity or factor > 1:
        return Decoded(pixels, size, [*notes, (fault, "decoded")], None)
    return Decoded(pixels, size, [*notes, (fault, "header rewritten")], file)


FAKE_ENDS = b"\xff\xd9" * 2**15
"""End markers, enough for the longest segment: what libjpeg's own memory source gives a decoder that asks for more than
a file holds. With them Pillow, whose source would give up, shows what libjpeg shows of a file that ends too early."""


def decode_strictly(raw: bytes, jpeg: Jpeg, factor: int) -> np.ndarray:
    """Decode a common JPEG at 1/factor (1, 2, 4 or 8) to uint8 RGB (height, width, 3), sides rounded up.

    Raises `ValueError` with libjpeg's first warning or error: after a warning, simplejpeg takes errors for warnings,
    and gives memory that nobody has written to.
    """
    assert jpeg.is_common, (
        "other frames libjpeg-turbo decodes in sizes of its own, beyond the end of the buffer"
    )
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
    """Decode damaged JPEGs, CMYK ones and others that are not common, and other formats. Raises `ValueError`."""
    try:
        with silence(), open_with_pillow(raw) as image:
            width, height = image.size
            factor = find_reduction(height, width, jpeg.one_scan)
            kind = f"{image.mode} {image.format} file"
            if factor > 1:
                image.draft(image.mode, (width // factor, height // factor))
            cut = load_pixels(image)
            deep = image.mode[0] in "IF"
            pixels = np.repeat(to_grey8(image)[:, :, None], 3, 2) if deep else np.array(image.convert("RGB"))
    except SizeError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise SizeError(
            f"too large: more than {MAX_PIXELS} pixels ({str(error).partition(',')[0]})"
        ) from None
    except Exception as error:  # Pillow's decoders of damaged files raise about everything
        reason = re.sub(r" ?<_io\.BytesIO[^>]*>", "", str(error))
        raise ValueError(f"not decodable: {reason}") from None
    notes = [(kind, "converted to RGB")] + [(f"{width}x{height} pixels", f"reduced to 1/{factor}")] * (
        factor > 1
    )
    return Decoded(
        pixels, (height, width), notes + [("file ends too early", "decoded as far as it goes")] * cut, None
    )


def open_with_pillow(raw: bytes) -> Image.Image:
    """Open an image file; raises whatever Pillow raises, in other formats for too many pixels, too."""
    if raw.startswith(b"\xff\xd8"):
        return JpegImagePlugin.JpegImageFile(io.BytesIO(raw))
    warnings.simplefilter("error", Image.DecompressionBombWarning)  # until the end of `silence`
    return Image.open(io.BytesIO(raw), formats=list_raster_formats())


@functools.cache
def list_raster_formats() -> list[str]:
    """Pillow's formats but for EPS: a program, which Ghostscript would run."""
    Image.init()
    return [name for name in Image.ID if name != "EPS"]


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep Pillow's warnings and what libtiff writes to standard error from the screen."""
    with warnings.catch_warnings(), Path(os.devnull).open("wb") as nothing:
        warnings.simplefilter("ignore")
        before = os.dup(2)
        os.dup2(nothing.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)


def load_pixels(image: Image.Image) -> bool:
    """Decode an image that Pillow has opened, if need be as far as it goes; returns whether that was needed.

    Raises whatever Pillow raises, also where nothing at all was decoded.
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
    """An image of more than 8 bits as uint8 (height, width); Pillow's own conversion cuts off above 255.

    Integers above 255 are taken for 16 bits, floating point numbers up to 1 for 0..1.
    """
    levels = np.nan_to_num(np.asarray(image).astype(np.float32))
    largest = levels.max()
    scale = 1 / 257 if largest > 255 else 255 if image.mode == "F" and largest <= 1 else 1
    return np.rint(np.clip(levels * scale, 0, 255)).astype(np.uint8)


def check_shape(height: int, width: int) -> None:
    """Raise `SizeError` for a strip that would fill the memory once its shorter side is 256 pixels long."""
    short, long = sorted((height, width))
    if long > MAX_RATIO * short:
        raise SizeError(
            f"too narrow: {width}x{height} pixels; one side may be {MAX_RATIO} times the other at most"
        )


def too_large_error(height: int, width: int) -> SizeError:
    """An image whose pixels would fill the memory."""
    return SizeError(f"too large: {width}x{height} pixels are more than {MAX_PIXELS}")


def find_reduction(height: int, width: int, can_reduce: bool) -> int:
    """By how much an image has to be reduced while it is decoded, 1, 2, 4 or 8; raises `SizeError` if that is not
    enough, or the image cannot be: a progressive JPEG holds all of its coefficients, at any scale."""
    check_shape(height, width)
    for factor in (1, 2, 4, 8) if can_reduce else (1,):
        if -(-height // factor) * -(-width // factor) <= MAX_PIXELS:
            return factor
    raise too_large_error(height, width)


def crop256(pixels: np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
    """Shorter side to 256, then the central 256x256. uint8 (height, width, 3) to uint8 (256, 256, 3), contiguous.

    `size`: height and width of the file where it was reduced; they decide the geometry.

    Torch's antialiased bicubic filter on bytes is Pillow's with its weights rounded to 16 bits: more than three times
    as fast, and equal up to 2 levels (one in all but a few pixels).
    """
    import torch
    from torch.nn.functional import interpolate

    height, width = size or pixels.shape[:2]
    short = min(height, width)
    new_height, new_width = round(height * SIDE / short), round(width * SIDE / short)
    top, left = (new_height - SIDE) // 2, (new_width - SIDE) // 2
    # Channels last in memory; permuted after the batch's axis is added, or torch does not see it and copies twice.
    images_NCHW = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    resized = interpolate(images_NCHW, (new_height, new_width), mode="bicubic", antialias=True)
    square = resized[0, :, top : top + SIDE, left : left + SIDE].permute(1, 2, 0)
    return np.ascontiguousarray(square.numpy())
