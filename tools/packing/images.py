"""What the packer does to one image: decode it strictly, say what was odd, and make it what the shard is to hold.

`crop256`: shorter side to 256 (antialiased bicubic), longer side `round(long * 256 / short)`, central 256x256 from
offset `(long - 256) // 2`, encoded again. `original`: the file's own bytes, unless a JPEG decoder of the pipeline would
stumble over them. EXIF orientation is ignored, as Pillow and torchvision ignore it.

Three verdicts: clean (no note), kept with a note, undecodable (`ValueError`). A libjpeg warning is a note: ImageNet has
such files, and every decoder shows them.
"""

import io
import re
import warnings
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageFile

from tools.packing.jpeg import DAMAGED_EXIF, exif_notes, trailing_bytes, without_exif

SIDE = 256
MAX_PIXELS = 50_000_000
"""Above this a file is refused: with 4 bytes a pixel and its copies in RGB, a process would need more than 1 GB."""
SEPARATOR = "; "


class Form(NamedTuple):
    """What images become."""

    store: str
    """"crop256" or "original"."""
    quality: int
    """JPEG quality, 1 to 100, of what is encoded."""
    subsampling: str
    """"420" or "444", of what is encoded."""
    verify: bool
    """Whether an original JPEG is decoded; if not, its header is looked at alone."""


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
    notes: list[tuple[str, str]]
    """What was found, and what is done about it in a crop256 shard."""
    needs_encoding: bool
    """Whether the file itself cannot go into a shard."""


def pack_image(raw: bytes, form: Form) -> Packed:
    """Turn a raw file, in any format that Pillow knows and whatever its name says, into a shard's image.

    Raises `ValueError` with the decoder's reason when the file cannot be decoded.
    """
    if form.store == "original" and not form.verify and is_plain_jpeg(raw):
        return Packed(raw, "", "")
    pixels, notes, needs_encoding = decode(raw, at_an_eighth=form.store == "original")
    if form.store == "crop256":
        pixels, file = crop256(pixels), None
    else:
        file = raw if not needs_encoding else None
        if file and any(found == DAMAGED_EXIF for found, _ in notes):
            file = without_exif(file)
        notes = [(found, done if file is None or found == DAMAGED_EXIF else "kept as it is") for found, done in notes]
    jpeg = file or simplejpeg.encode_jpeg(
        pixels, quality=form.quality, colorspace="RGB", colorsubsampling=form.subsampling, fastdct=False
    )
    return Packed(jpeg, SEPARATOR.join(found for found, _ in notes), SEPARATOR.join(done for _, done in notes))


def decode(raw: bytes, at_an_eighth: bool = False) -> Decoded:
    """Decode a file. Raises `ValueError` when no decoder takes it.

    Args:
        raw: bytes of any image file.
        at_an_eighth: Pixels are wanted only where the file needs encoding. All of the compressed data is read and
            judged then, but not every pixel computed, which saves a quarter of the time.
    """
    if not raw.startswith(b"\xff\xd8"):
        return decode_with_pillow(raw)
    notes = exif_notes(raw)
    height, width, colorspace = header(raw)
    if colorspace in BY_PILLOW:
        return decode_with_pillow(raw)
    check_size(width, height)
    if colorspace == "Gray":
        notes.append(("grey JPEG", "converted to RGB"))
    if (trailing := trailing_bytes(raw)) > 0:
        notes.append((f"{trailing} bytes after the image's end", "dropped"))
    smallest = {"min_height": 1, "min_width": 1, "min_factor": 8.0} if at_an_eighth else {}
    try:
        return Decoded(simplejpeg.decode_jpeg(raw, "RGB", fastdct=False, fastupsample=False, **smallest), notes, False)
    except ValueError as error:
        warning = str(error)
    try:
        pixels = simplejpeg.decode_jpeg(raw, "RGB", fastdct=False, fastupsample=False, strict=False)
    except ValueError as error:
        raise ValueError(f"not decodable: {error}") from None
    notes.append((f"libjpeg warns: {warning}", "decoded as far as it goes"))
    # Strict readers, DALI among them, refuse a file that ends too early; other damage they decode as libjpeg does.
    return Decoded(pixels, notes, trailing < 0 or "remature end" in warning)


def decode_with_pillow(raw: bytes) -> Decoded:
    """Decode CMYK JPEGs and other formats. Raises `ValueError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(raw))
        with image:
            check_size(*image.size)
            kind = f"{image.mode} {image.format} file"
            cut = load(image)
            deep = image.mode[0] in "IF"
            pixels = np.repeat(grey(image)[:, :, None], 3, 2) if deep else np.array(image.convert("RGB"))
    except Exception as error:  # Pillow's decoders of damaged files raise about everything
        reason = re.sub(r" ?<_io\.BytesIO[^>]*>", "", str(error))
        raise ValueError(f"not decodable: {reason.removeprefix('not decodable: ')}") from None
    notes = [(kind, "converted to RGB")]
    return Decoded(pixels, notes + [("file ends too early", "decoded as far as it goes")] * cut, True)


def load(image: Image.Image) -> bool:
    """Decode an image that Pillow has opened, if need be as far as it goes; returns whether that was needed."""
    try:
        image.load()
    except OSError as error:
        if "truncated" not in str(error):
            raise
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        try:
            image.load()
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = False
        return True
    return False


def grey(image: Image.Image) -> np.ndarray:
    """An image of more than 8 bits as uint8 (height, width); Pillow's own conversion cuts off above 255.

    Integers above 255 are taken for 16 bits, floating point numbers up to 1 for 0..1.
    """
    levels = np.nan_to_num(np.asarray(image).astype(np.float32))
    largest = levels.max()
    scale = 1 / 257 if largest > 255 else 255 if image.mode == "F" and largest <= 1 else 1
    return np.rint(np.clip(levels * scale, 0, 255)).astype(np.uint8)


def check_size(width: int, height: int) -> None:
    """Raise `ValueError` for an image whose pixels would fill the memory."""
    if width * height > MAX_PIXELS:
        raise ValueError(f"not decodable: {width}x{height} pixels are more than {MAX_PIXELS}")


def is_plain_jpeg(raw: bytes) -> bool:
    """Whether the header is that of a JPEG whose bytes can go into a shard, as far as a header tells."""
    return header(raw)[2] not in BY_PILLOW and all(found != DAMAGED_EXIF for found, _ in exif_notes(raw))


BY_PILLOW = ("CMYK", "YCCK", "unknown")


def header(raw: bytes) -> tuple[int, int, str]:
    """Height, width and colour space of a JPEG; "unknown" where simplejpeg, which knows the common ones, gives up."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(raw, strict=False)
    except (ValueError, KeyError):
        return 0, 0, "unknown"
    return height, width, colorspace


def crop256(pixels: np.ndarray) -> np.ndarray:
    """Shorter side to 256, then the central 256x256. uint8 (height, width, 3) to uint8 (256, 256, 3), contiguous.

    Torch's antialiased bicubic filter on bytes is Pillow's with its weights rounded to 16 bits: more than three times
    as fast, and equal up to 2 levels (one in all but a few pixels).
    """
    import torch
    from torch.nn.functional import interpolate

    height, width = pixels.shape[:2]
    short = min(height, width)
    new_height, new_width = round(height * SIDE / short), round(width * SIDE / short)
    check_size(new_width, new_height)  # a strip of one pixel in height would grow without bound
    top, left = (new_height - SIDE) // 2, (new_width - SIDE) // 2
    # Channels last in memory; permuted after the batch's axis is added, or torch does not see it and copies twice.
    images_NCHW = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    resized = interpolate(images_NCHW, (new_height, new_width), mode="bicubic", antialias=True)
    square = resized[0, :, top : top + SIDE, left : left + SIDE].permute(1, 2, 0)
    return np.ascontiguousarray(square.numpy())
