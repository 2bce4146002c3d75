"""Which sample it was: after DALI failed, whose report does not name it, look for the damage ourselves."""

import io
import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import Enum, auto
from functools import partial
from pathlib import Path

from PIL import Image

from pipeline.machine import num_cores
from pipeline.shards import IMAGE_SIDE, ShardSet, read_index

PATIENCE_S = 120
"""Seconds after which the search is given up: a header takes 20 microseconds, an image a millisecond."""
CHUNK = 256
"""Samples that a thread looks at between two looks at the clock."""


class Depth(Enum):
    """How far an image is decoded to find damage in it."""

    HEADER = auto()
    PIXELS = auto()
    WARNINGS = auto()
    """Of libjpeg, too."""


def find_damage(shards: ShardSet) -> str:
    """Name the first damage that is found in a split: a shard that is gone or cut short, an index that does not fit it,
    an image that cannot be decoded, by shard, offset and key. Empty when nothing is found in time.

    Headers are looked at first, for every image: they are what stops a decoder. Last come images that libjpeg decodes
    and warns of: of those DALI refuses some, such as cut ones.
    """
    for tar, index, samples in zip(shards.tars, shards.indexes, shards.samples, strict=True):
        if problem := shard_damage(Path(tar), Path(index), samples):
            return problem
    deadline = time.monotonic() + PATIENCE_S
    with ThreadPoolExecutor(num_cores()) as pool:
        for depth in Depth:
            chunks = chunked(shards)
            while time.monotonic() < deadline and (some := list(itertools.islice(chunks, 64))):
                look = partial(image_damage, any_size=shards.any_size, depth=depth)
                for problem in pool.map(look, *zip(*some, strict=True)):
                    if problem:
                        return problem
    return ""


def shard_damage(tar: Path, index: Path, samples: int) -> str:
    """What is wrong with a shard's files; empty if nothing is."""
    try:
        rows = read_index(index)
        size = tar.stat().st_size
    except (OSError, ValueError) as error:
        return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
    if len(rows) != samples:
        return f"{index} lists {len(rows)} samples, the manifest {samples}"
    for members in rows:
        for extension, offset, length, name in members:
            if offset + length > size:
                return f"{tar} has {size} bytes, but {name or extension} lies at {offset} to {offset + length}"
    return ""


def chunked(shards: ShardSet) -> Iterator[tuple[str, list[tuple[int, int, str]]]]:
    """(shard, [(offset, size, name) of some of its images]) over a split."""
    for tar, index in zip(shards.tars, shards.indexes, strict=True):
        images = [member[1:] for members in read_index(Path(index)) for member in members if member[0] == "jpg"]
        for first in range(0, len(images), CHUNK):
            yield tar, images[first : first + CHUNK]


def image_damage(tar: str, images: list[tuple[int, int, str]], any_size: bool, depth: Depth) -> str:
    """What is wrong with the first image of these that cannot be decoded, or is not 256x256 though it should be; empty
    if none is."""
    with Path(tar).open("rb") as file:
        for offset, size, name in images:
            file.seek(offset)
            data = file.read(size)
            try:
                height, width = decode(data, depth)
            except Exception as error:  # whatever a library says of damaged bytes
                reason = str(error).partition("\n")[0]
                verdict = "may be damaged" if depth is Depth.WARNINGS else "cannot be decoded"
                return f"{name} at offset {offset} of {tar} {verdict} ({reason})"
            if not any_size and (height, width) != (IMAGE_SIDE, IMAGE_SIDE):
                return f"{name} at offset {offset} of {tar} is {width}x{height}, not {IMAGE_SIDE}x{IMAGE_SIDE}"
    return ""


def decode(data: bytes, depth: Depth) -> tuple[int, int]:
    """Height and width of an image, decoded as far as `depth` says; raises whatever the libraries raise."""
    import simplejpeg

    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data, strict=False)
        if depth is not Depth.HEADER:
            simplejpeg.decode_jpeg(data, "RGB", strict=False)
    except Exception as error:
        try:  # another format, or colours that this library does not convert
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
                image.load()
        except Exception:  # neither reads it, for whatever reason: the first one's is told
            raise error from None
        return height, width
    if depth is Depth.WARNINGS:
        simplejpeg.decode_jpeg(data, "RGB", strict=True)
    return height, width
