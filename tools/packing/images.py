"""Decode one raw image, note its anomalies, and produce the JPEG for the shard.

`crop256`: shorter side to 256 (antialiased bicubic), longer side `round(long * 256 / short)`, central 256x256 from
offset `(long - 256) // 2`, encoded again. `original`: the file's own bytes if a shard may hold them, else encoded.
EXIF orientation is ignored, as Pillow and torchvision ignore it.

An image is clean, kept with a note, or undecodable (`UserError`). libjpeg-turbo decodes files for which it has no
warning. Pillow decodes the others, of which ImageNet has some, as viewers show them: what is missing is black or grey,
as Pillow's buffers start as zeros.

Shapes: N images, C colours, H rows, W columns.
"""

import io
import re
import warnings
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageFile, JpegImagePlugin

from pipeline.errors import UserError
from tools.packing.jpeg import MAX_SCANS, SOI, Jpeg, read_jpeg

SIDE = 256
MAX_PIXELS = 50_000_000
"""Larger images are decoded at a reduced scale, or refused: with copies in RGB a process would need more than 1 GB."""
MAX_RATIO = MAX_PIXELS // SIDE**2
"""Longer to shorter side: a longer strip would exceed MAX_PIXELS once its shorter side is 256."""
SEPARATOR = "; "
SAMPLINGS = ("Gray", "444", "422", "420", "440", "411")
"""Chroma samplings that nvJPEG and libjpeg-turbo both decode (nvImageCodec 0.8, extensions/nvjpeg/cuda_decoder.cpp)."""
FAKE_ENDS = b"\xff\xd9" * 2**15
"""End markers, enough for the longest segment, as libjpeg's memory source appends them to a truncated file. With them
Pillow decodes as much of it as libjpeg does."""


FORMATS = ("PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "AVIF")
"""Formats, other than JPEG, that Pillow may open. Its others are not of photographs, or run programs: EPS runs
Ghostscript."""
Image.MAX_IMAGE_PIXELS = None  # instead of Pillow's limit MAX_PIXELS applies


class Packed(NamedTuple):
    """An image for a shard."""

    jpeg: bytes
    """A JPEG file, RGB or (original) grey."""
    found: str
    """Anomalies of the raw file; empty for a clean one."""
    done: str
    """How each anomaly was handled."""


class Decoded(NamedTuple):
    """A raw file, decoded."""

    pixels: np.ndarray
    """uint8 (height, width, 3), RGB."""
    size: tuple[int, int]
    """Height and width of the file, before any reduction."""
    notes: list[tuple[str, str]]
    """(found, done): anomalies and how they are handled."""
    is_valid: bool
    """True if a shard may hold the file unchanged."""


class SizeError(UserError):
    """An image that is too large, or too long for its width."""


def pack_image(raw: bytes, store: str, quality: int) -> Packed:
    """Convert a raw file, in any format that Pillow reads, to a shard's JPEG.

    Args:
        raw: The file.
        store: "crop256" or "original".
        quality: JPEG quality, 1 to 100, for images that need encoding.

    Raises `UserError` with the decoder's reason for an undecodable file.
    """
    decoded = decode(raw, check_only=store == "original")
    found = SEPARATOR.join(found for found, _ in decoded.notes)
    if store == "original" and decoded.is_valid:
        return Packed(raw, found, SEPARATOR.join(["kept as it is"] * len(decoded.notes)))
    done = SEPARATOR.join(done for _, done in decoded.notes)
    pixels = crop256(decoded.pixels, decoded.size) if store == "crop256" else decoded.pixels
    jpeg = simplejpeg.encode_jpeg(pixels, quality, "RGB", colorsubsampling="420", fastdct=False)
    return Packed(jpeg, found, done)


def find_fault(raw: bytes) -> str:
    """Find the reason why a shard may not hold a file; empty if it may. Used by pack, adopt and verify.

    A file is valid if its markers are those of an 8-bit baseline or progressive JPEG of a common sampling, from first
    byte to end marker, and libjpeg-turbo decodes all of it without a warning. DALI decodes such files, whole and in
    crops, to libjpeg's pixels.
    """
    try:
        decode_valid(raw, read_jpeg(raw), 8)
    except ValueError as error:
        return str(error)
    return ""


def decode_valid(raw: bytes, jpeg: Jpeg, factor: int) -> tuple[np.ndarray, str]:
    """Decode a file that a shard may hold, at 1/factor (1, 2, 4 or 8): uint8 RGB (height, width, 3), sides rounded up,
    and "Gray" or "YCbCr".

    Raises `UserError` with the reason why a shard may not hold it.
    """
    if jpeg.fault:
        raise UserError(jpeg.fault)
    try:
        height, width, color, sampling = simplejpeg.decode_jpeg_header(raw)
    except KeyError:  # simplejpeg has no name for 4:4:1
        raise UserError("JPEG of unusual chroma sampling") from None
    if color not in ("Gray", "YCbCr") or sampling not in SAMPLINGS:
        raise UserError(f"{color} JPEG, chroma sampling {sampling}")
    find_reduction(height, width, can_reduce=False)
    pixels = simplejpeg.decode_jpeg(
        raw,
        "RGB",
        fastdct=False,
        fastupsample=False,
        min_height=-(-height // factor),
        min_width=-(-width // factor),
        min_factor=float(factor),
    )
    return pixels, color


def decode(raw: bytes, check_only: bool = False) -> Decoded:
    """Decode a file. Raises `UserError` when no decoder can.

    Args:
        raw: bytes of any image file.
        check_only: Decode a valid file at 1/8 scale: all of its data is still checked, in a quarter less time.
    """
    jpeg = read_jpeg(raw)
    if jpeg.num_scans > MAX_SCANS:
        raise SizeError(
            f"too large: {jpeg.num_scans} scans, each of which takes about a second in a large image"
        )
    try:
        pixels, color = decode_valid(raw, jpeg, 8 if check_only else 1)
    except ValueError as error:
        return decode_with_pillow(raw, jpeg, str(error))
    notes = list_exif_notes(jpeg.exif) if jpeg.exif else []
    if color == "Gray":
        notes.append(("grey JPEG", "converted to RGB"))
    if jpeg.end < len(raw):
        notes.append((f"{len(raw) - jpeg.end} bytes after the image's end", "dropped"))
    return Decoded(pixels, pixels.shape[:2], notes, True)


def list_exif_notes(block: bytes) -> list[tuple[str, str]]:
    """List notes on an EXIF block: damaged, or with an orientation other than upright."""
    try:
        with warnings.catch_warnings(action="error", category=UserWarning):
            exif = Image.Exif()
            exif.load(block)
            orientation = exif.get(0x0112, 1)
    except Exception:  # Pillow raises many kinds for damaged EXIF blocks
        return [("damaged EXIF block", "stripped")]
    return (
        [] if orientation == 1 else [(f"EXIF orientation {orientation}", "tag stripped, pixels as they were")]
    )


def decode_with_pillow(raw: bytes, jpeg: Jpeg, fault: str) -> Decoded:
    """Decode damaged and uncommon JPEGs (such as CMYK) and other formats. Raises `UserError`.

    Args:
        raw: The file.
        jpeg: Its structure.
        fault: Reason why a shard may not hold it.
    """
    is_jpeg = raw.startswith(SOI)
    try:
        with warnings.catch_warnings(action="ignore"), open_with_pillow(raw) as image:
            mode, (width, height) = image.mode, image.size
            factor = find_reduction(height, width, jpeg.one_scan)
            if factor > 1:
                image.draft(mode, (width // factor, height // factor))
            is_truncated = load_pixels(image)
            pixels = to_rgb8(image)
    except SizeError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds for damaged files
        reason = re.sub(r" ?<_io\.BytesIO[^>]*>", "", str(error))
        raise UserError(f"not decodable: {reason}") from None
    notes = []
    if not is_jpeg or mode not in ("RGB", "L"):
        notes.append((f"{mode} {image.format} file", "converted to RGB"))
    if factor > 1:
        notes.append((f"{width}x{height} pixels", f"reduced to 1/{factor}"))
    elif is_jpeg and (jpeg.fault or mode in ("RGB", "L")):
        notes.append((fault, "decoded as far as it goes"))
    if is_truncated:
        notes.append(("file ends too early", "decoded as far as it goes"))
    return Decoded(pixels, (height, width), notes, False)


def open_with_pillow(raw: bytes) -> Image.Image:
    """Open an image file. Raises whatever Pillow raises."""
    if raw.startswith(SOI):
        return JpegImagePlugin.JpegImageFile(io.BytesIO(raw + FAKE_ENDS))
    return Image.open(io.BytesIO(raw), formats=FORMATS)


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


def to_rgb8(image: Image.Image) -> np.ndarray:
    """Convert an image to uint8 RGB (height, width, 3). Levels of more than 8 bits, which Pillow would clip at 255, are
    scaled: integers as 16 bits if any is above 255, floats as 0..1 if none is above 1."""
    if image.mode[0] not in "IF":
        return np.array(image.convert("RGB"))
    levels = np.nan_to_num(np.asarray(image).astype(np.float32))
    largest = levels.max()
    scale = 1 / 257 if largest > 255 else 255 if image.mode == "F" and largest <= 1 else 1
    return np.repeat(np.rint(np.clip(levels * scale, 0, 255)).astype(np.uint8)[:, :, None], 3, 2)


def find_reduction(height: int, width: int, can_reduce: bool = True) -> int:
    """Find the factor, 1, 2, 4 or 8, to reduce an image by while decoding.

    Raises `SizeError` for a strip that would fill the memory once its shorter side is 256, and for an image that is too
    large at any factor. `can_reduce`: False for a progressive JPEG, whose coefficients are all in memory at any scale.
    """
    short, long = sorted((height, width))
    if long > MAX_RATIO * short:
        raise SizeError(
            f"too narrow: {width}x{height} pixels; one side may be {MAX_RATIO} times the other at most"
        )
    for factor in (1, 2, 4, 8) if can_reduce else (1,):
        if -(-height // factor) * -(-width // factor) <= MAX_PIXELS:
            return factor
    raise SizeError(f"too large: {width}x{height} pixels are more than {MAX_PIXELS}")


def crop256(pixels: np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
    """Resize the shorter side to 256, crop the central 256x256: uint8 (height, width, 3) to (256, 256, 3), contiguous.

    `size`: height and width of the file, if it was reduced, which define the geometry.

    Torch's antialiased bicubic filter on bytes is Pillow's with its weights rounded to 16 bits: more than three times
    as fast, and equal up to 2 levels (one in all but a few pixels). It always resamples the width first. Pillow 13.0
    begins with the height where that is more than twice the width: noise differs more there, for bytes are clipped
    between the two.
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
