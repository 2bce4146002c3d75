"""What the packer does to one image: decode it strictly, bring it to 256x256 RGB, encode it, and say what was odd.

Geometry (DESIGN of the shards): shorter side to 256 with Pillow's antialiased BICUBIC, longer side `round(long * 256 /
short)`, central 256x256 from offset `(long - 256) // 2`. EXIF orientation is ignored, as Pillow and torchvision ignore
it.
"""

import io
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

SIDE = 256
NOTE_SEPARATOR = "; "


class Packed(NamedTuple):
    """An image as it goes into a shard."""

    jpeg: bytes
    """256x256 baseline JPEG, RGB source."""
    found: str
    """What was odd about the raw file; empty for a plain one."""
    done: str
    """What was done about it."""


def pack_image(raw: bytes, quality: int) -> Packed:
    """Turn a raw file into a shard's image.

    Args:
        raw: bytes of an image file in any format that Pillow knows, whatever its name says.
        quality: JPEG quality, 1 to 100; chroma is subsampled 4:2:0.

    Raises `ValueError` with the decoder's reason when the file cannot be decoded.
    """
    pixels, notes = decode(raw)
    square = np.ascontiguousarray(crop256(Image.fromarray(pixels)))
    jpeg = simplejpeg.encode_jpeg(square, quality=quality, colorspace="RGB", colorsubsampling="420", fastdct=False)
    return Packed(
        jpeg, NOTE_SEPARATOR.join(found for found, _ in notes), NOTE_SEPARATOR.join(done for _, done in notes)
    )


def decode(raw: bytes) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Decode to uint8 (height, width, 3) RGB, with a list of (what was found, what was done).

    Raises `ValueError` when no decoder takes it.
    """
    notes: list[tuple[str, str]] = []
    if not raw.startswith(b"\xff\xd8"):
        return decode_with_pillow(raw, notes)
    orientation = exif_orientation(raw)
    if orientation not in (None, 1):
        notes.append((f"EXIF orientation {orientation}", "tag stripped, pixels as they were"))
    try:
        _, _, colorspace, _ = simplejpeg.decode_jpeg_header(raw)
    except ValueError:  # simplejpeg knows the common subsamplings alone
        return decode_with_pillow(raw, notes)
    if colorspace in ("CMYK", "YCCK"):
        return decode_with_pillow(raw, notes)
    if colorspace == "Gray":
        notes.append(("grey JPEG", "converted to RGB"))
    try:
        return simplejpeg.decode_jpeg(raw, "RGB", fastdct=False, fastupsample=False, strict=True), notes
    except ValueError as error:
        warning = str(error)
    try:
        pixels = simplejpeg.decode_jpeg(raw, "RGB", fastdct=False, fastupsample=False, strict=False)
    except ValueError as error:
        raise ValueError(f"not decodable: {error}") from None
    notes.append((f"libjpeg warns: {warning}", "decoded as far as it goes"))
    return pixels, notes


def decode_with_pillow(raw: bytes, notes: list[tuple[str, str]]) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Decode CMYK JPEGs and other formats; appends to `notes`. Raises `ValueError`."""
    try:
        with Image.open(io.BytesIO(raw)) as image:
            notes.append((f"{image.mode} {image.format} file", "converted to RGB"))
            return np.asarray(image.convert("RGB")), notes
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"not decodable: {error}") from None


def exif_orientation(raw: bytes) -> int | None:
    """The EXIF orientation (1 to 8) of a JPEG, None where there is none or it cannot be read."""
    if b"Exif\0\0" not in raw[:4096]:
        return None
    try:
        with Image.open(io.BytesIO(raw)) as image:
            return image.getexif().get(0x0112)
    except Exception:  # EXIF blocks are damaged in many ways, each with its own exception; the tag is stripped anyway
        return None


def crop256(image: Image.Image) -> Image.Image:
    """Shorter side to 256, then the central 256x256.

    Resampling only what stays (Pillow's `box`) would be faster, but is not the same: on portrait images Pillow then
    runs its two passes in the other order, and what it clips between them differs by up to 20 levels.
    """
    short = min(image.size)
    width, height = (round(side * SIDE / short) for side in image.size)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + SIDE, top + SIDE))
