"""Find the sample that DALI failed on, whose name its error lacks: try the images of a split until DALI refuses one."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from nvidia.dali import fn, pipeline_def, types

from pipeline.errors import UserError
from pipeline.machine import share_of_cores
from pipeline.shards import IMAGE_SIDE, ShardSet

if TYPE_CHECKING:
    from nvidia.dali import Pipeline
    from nvidia.dali.data_node import DataNode

PATIENCE_S = 120
"""Seconds after which the search gives up; a header takes 20 microseconds, an image a millisecond."""
CHUNK = 64
"""Images decoded at a time; if that fails, each of them is decoded alone."""
Image = tuple[str, int, int, str]
"""Shard, offset, size and name."""


def locate_corrupt_sample(shards: ShardSet) -> str:
    """Describe the first damage that is found in a split: a shard that is missing or truncated, an index that does not
    fit it, or an image that DALI refuses, by shard, offset and key. Empty if nothing is found in time.

    Images are tried with DALI itself, as other decoders accept and refuse other files. Headers are read first, for all
    images, as decoding an image with an unreadable header may crash the process (`pipeline/decode.py: decode_crop`).
    """
    counts = np.bincount(shards.samples["shard"], minlength=len(shards.tars)).tolist()
    for tar, samples in zip(shards.tars, counts, strict=True):
        if problem := find_shard_damage(Path(tar), Path(tar).with_suffix(".idx"), samples):
            return problem
    deadline = time.monotonic() + PATIENCE_S
    for graph in (shape_pipeline, decoded_shape_pipeline):
        pipe = graph(batch_size=CHUNK, num_threads=share_of_cores(), device_id=None, prefetch_queue_depth=1)
        for images in list_image_chunks(shards):
            if time.monotonic() > deadline:
                return ""
            if not can_read(pipe, images, shards.any_size):
                for image in images:
                    if not can_read(pipe, [image], shards.any_size):
                        return describe_fault(pipe, image)
    return ""


def find_shard_damage(tar: Path, index: Path, samples: int) -> str:
    """Describe what is wrong with a shard's tar and index; empty if nothing is."""
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
                return f"{tar} has {size} bytes, but {name or extension} is at {offset} to {offset + length}"
    return ""


def list_image_chunks(shards: ShardSet) -> Iterator[list[Image]]:
    """Yield the images of a split, up to `CHUNK` at a time."""
    for tar in shards.tars:
        images = [
            (tar, *member[1:])
            for members in read_index(Path(tar).with_suffix(".idx"))
            for member in members
            if member[0] == "jpg"
        ]
        for first in range(0, len(images), CHUNK):
            yield images[first : first + CHUNK]


@pipeline_def
def shape_pipeline() -> "DataNode":
    """Read int64 height, width and channels from the headers of images."""
    return fn.peek_image_shape(fn.external_source(name="encoded"), adjust_orientation=False)


@pipeline_def
def decoded_shape_pipeline() -> "DataNode":
    """Decode whole images and return their int64 height, width and channels."""
    encoded = fn.external_source(name="encoded")
    return fn.decoders.image(encoded, device="cpu", output_type=types.RGB, adjust_orientation=False).shape()


def read_shapes(pipe: "Pipeline", images: list[Image]) -> Any:
    """Run one of the pipelines above over images. Raises DALI's `RuntimeError`, after which it can be run again."""
    encoded = []
    for tar, offset, size, _ in images:
        with Path(tar).open("rb") as file:
            file.seek(offset)
            encoded.append(np.frombuffer(file.read(size), np.uint8))
    pipe.feed_input("encoded", encoded)
    return pipe.run()[0].as_array()


def can_read(pipe: "Pipeline", images: list[Image], any_size: bool) -> bool:
    """Return True if DALI reads all of the images and they have the expected size."""
    try:
        found = read_shapes(pipe, images)
    except RuntimeError:
        return False
    return any_size or bool((found[:, :2] == IMAGE_SIDE).all())


def describe_fault(pipe: "Pipeline", image: Image) -> str:
    """Describe what is wrong with an image that `can_read` refuses, as DALI gives only numbers of errors."""
    tar, offset, _, name = image
    place = f"{name} at offset {offset} of {tar}"
    try:
        ((height, width, _),) = read_shapes(pipe, [image])
    except RuntimeError:
        return f"{place} cannot be decoded"
    return f"{place} is {width}x{height}, not {IMAGE_SIDE}x{IMAGE_SIDE}"


def read_index(path: Path) -> list[list[tuple[str, int, int, str]]]:
    """Parse a DALI index, as `tools/packing/index.py: read_index` does. Raises `UserError` for another file."""
    try:
        header, *lines = path.read_bytes().decode().splitlines()
        rows = [line.split(" ") for line in lines]
        samples = [
            [
                (ext, int(offset), int(size), name)
                for ext, offset, size, name in zip(*[iter(row)] * 4, strict=True)
            ]
            for row in rows
        ]
        if any(not 0 <= number < 2**62 for row in samples for _, *numbers, _ in row for number in numbers):
            raise ValueError
    except ValueError:
        header, samples = "", []
    if header.split() != ["v1.2", str(len(samples))]:
        raise UserError(f"{path} is damaged or not a DALI index of format v1.2; copy it again or pack again")
    return samples
