"""Which sample it was: after DALI failed, whose report does not name it, look for the image that DALI refuses."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from nvidia.dali import fn, pipeline_def, types

from pipeline.machine import share_of_cores
from pipeline.shards import IMAGE_SIDE, ShardSet, read_index

if TYPE_CHECKING:
    from nvidia.dali import Pipeline
    from nvidia.dali.data_node import DataNode

PATIENCE_S = 120
"""Seconds after which the search is given up: a header takes 20 microseconds, an image a millisecond."""
CHUNK = 64
"""Images that are decoded at a time; of those that fail together each is then decoded alone."""
Image = tuple[str, int, int, str]
"""Shard, offset, size and name."""


def locate_corrupt_sample(shards: ShardSet) -> str:
    """Name the first damage that is found in a split: a shard that is gone or cut short, an index that does not fit it,
    an image that DALI refuses, by shard, offset and key. Empty when nothing is found in time.

    DALI itself is the judge, for it takes much that other decoders warn of, and the other way round. It reads all
    headers first: over one that it cannot read, decoding may end the process.
    """
    for tar, index, samples in zip(shards.tars, shards.indexes, shards.samples, strict=True):
        if problem := find_shard_damage(Path(tar), Path(index), samples):
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
    """Name what is wrong with a shard's files; empty if nothing is."""
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
    """The images of a split, some at a time."""
    for tar, index in zip(shards.tars, shards.indexes, strict=True):
        images = [
            (tar, *member[1:])
            for members in read_index(Path(index))
            for member in members
            if member[0] == "jpg"
        ]
        for first in range(0, len(images), CHUNK):
            yield images[first : first + CHUNK]


@pipeline_def
def shape_pipeline() -> "DataNode":
    """Encoded images to int64 height, width and channels, from their headers."""
    return fn.peek_image_shape(fn.external_source(name="encoded"), adjust_orientation=False)


@pipeline_def
def decoded_shape_pipeline() -> "DataNode":
    """The same of images that are decoded as a whole."""
    encoded = fn.external_source(name="encoded")
    return fn.decoders.image(encoded, device="cpu", output_type=types.RGB, adjust_orientation=False).shape()


def read_shapes(pipe: "Pipeline", images: list[Image]) -> Any:
    """Run a pipeline of ours over images; raises `RuntimeError` where DALI does, which a later run need not mind."""
    encoded = []
    for tar, offset, size, _ in images:
        with Path(tar).open("rb") as file:
            file.seek(offset)
            encoded.append(np.frombuffer(file.read(size), np.uint8))
    pipe.feed_input("encoded", encoded)
    return pipe.run()[0].as_array()


def can_read(pipe: "Pipeline", images: list[Image], any_size: bool) -> bool:
    """Return True if DALI reads all of the images, and they have the expected size."""
    try:
        found = read_shapes(pipe, images)
    except RuntimeError:
        return False
    return any_size or bool((found[:, :2] == IMAGE_SIDE).all())


def describe_fault(pipe: "Pipeline", image: Image) -> str:
    """Name what is wrong with an image that does not fit; DALI's own reasons are numbers."""
    tar, offset, _, name = image
    place = f"{name} at offset {offset} of {tar}"
    try:
        ((height, width, _),) = read_shapes(pipe, [image])
    except RuntimeError:
        return f"{place} cannot be decoded"
    return f"{place} is {width}x{height}, not {IMAGE_SIDE}x{IMAGE_SIDE}"
