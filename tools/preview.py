"""What the network will see: SHARDS/preview.png, a sheet drawn by the training graph itself.

    python tools/preview.py SHARDS

Above one image as it is stored and 24 times as training may show it, below the 24 images with which training begins.
Windows are drawn pixel by pixel. The mean is added back and the divisor of lighting undone; colours that lighting moves
beyond 0..255 are cut in the picture, not in training.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from pipeline.eigenbasis import Eigenbasis
from pipeline.files import check_writable
from pipeline.lighting import Lighting
from pipeline.machine import num_cores, raise_open_files
from pipeline.settings import Augmentation, DataConfig
from pipeline.shards import DataError, ShardSet, open_shards, read_index
from tools.preview_sheet import View, draw_sheet
from train.program import run_program

if TYPE_CHECKING:
    from nvidia.dali.data_node import DataNode

COUNT = 24
"""Images in each half of the sheet."""


class Sample(NamedTuple):
    """One sample as it is stored."""

    key: str
    image: bytes
    """The encoded image."""
    digits: bytes
    """The label in ASCII decimal."""


def preview(
    shards: Path,
    out: Path | None = None,
    image: str | None = None,
    seed: int = 2012,
    strength: float = Lighting.strength,
    convention: Literal["stddev", "eigenvalue"] = "stddev",
) -> None:
    """Draw what the network will see: one image in 24 augmentations, and the 24 images with which training begins.

    Args:
        shards: Folder written by make_shards and compute_pca.
        out: PNG file to write; SHARDS/preview.png by default.
        image: Key of the image that is shown 24 times, such as n01440764_10026; the first one by default.
        seed: Seed of order, windows, flips and lighting; with `train.seed` of a run the lower half is its first images.
        strength: Strength of lighting, as in training; 0 turns it off.
        convention: Convention of lighting, as in training.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed must lie in 0..2^63-1, not {seed}")
    lighting = Lighting(convention, strength)
    train = open_shards(shards, "train")
    basis = Eigenbasis.load(shards / "pca.json", train.manifest_sha256)
    sample = find_sample(train, image)
    augmentation, path = Augmentation(lighting=lighting), out or shards / "preview.png"
    check_writable(path)
    repeated = repeated_views(train, basis, augmentation, seed, sample)
    draw_sheet(path, train, repeated, training_views(train, basis, augmentation, seed), lighting, seed)
    print(f"picture: {path}")


def find_sample(shards: ShardSet, key: str | None) -> Sample:
    """Read the sample with this key, or the first one. Raises `ValueError` where there is none."""
    example = ""
    for tar, index in zip(shards.tars, shards.indexes, strict=True):
        for members in read_index(Path(index)):
            places = {extension: (offset, size, name) for extension, offset, size, name in members}
            if not {"jpg", "cls"} <= places.keys():
                raise DataError(f"{index} lists a sample without .jpg or .cls; pack or adopt the shards again")
            found = key_of(places["jpg"][2])
            if key in (None, found):
                with Path(tar).open("rb") as file:
                    image, digits = (
                        os.pread(file.fileno(), size, offset) for offset, size, _ in (places["jpg"], places["cls"])
                    )
                return Sample(found, image, digits)
            example = example or found
    raise ValueError(f"{Path(shards.tars[0]).parent} holds no image with the key {key}; give one such as {example}")


def key_of(name: str) -> str:
    """The key of a tar's member: its path up to the first dot of the base name, as in the webdataset library."""
    match = re.match(r"((?:.*/|)[^.]+)[.]", name)
    return match[1] if match else name


def training_views(
    shards: ShardSet, basis: Eigenbasis, augmentation: Augmentation, seed: int, count: int = COUNT
) -> list[View]:
    """The images with which training on one rank begins; fewer than `count` where there are no more.

    Raises `DataError` when DALI fails.
    """
    from pipeline.graph import read_graph  # DALI takes seconds, which errors in the input need not wait for

    shuffle_buffer = DataConfig(Path()).shuffle_buffer

    def read() -> "tuple[DataNode, DataNode]":
        return read_graph(shards, True, seed, shuffle_buffer, 0, 1)

    return views(shards, basis, augmentation, seed, 0, min(count, shards.num_samples), read)


def repeated_views(
    shards: ShardSet, basis: Eigenbasis, augmentation: Augmentation, seed: int, sample: Sample, count: int = COUNT
) -> list[View]:
    """One image `count` times, each time augmented anew. Raises `DataError` when DALI fails."""
    from nvidia.dali import fn

    def repeat(data: bytes) -> "DataNode":
        return fn.external_source(lambda: [np.frombuffer(data, np.uint8)] * count)

    def read() -> "tuple[DataNode, DataNode]":
        return repeat(sample.image), repeat(sample.digits)

    # Numbers of another rank, so that both halves of the sheet differ.
    return [
        view._replace(key=sample.key)
        for view in views(shards, basis, augmentation, seed, 1, count, read, indexed=False)
    ]


def views(
    shards: ShardSet,
    basis: Eigenbasis,
    augmentation: Augmentation,
    seed: int,
    rank: int,
    count: int,
    read: "Callable[[], tuple[DataNode, DataNode]]",
    indexed: bool = True,
) -> list[View]:
    """One batch through the training graph on the CPU, and what it was made of.

    Args:
        shards: What is read.
        basis: Mean and RGB axes.
        augmentation: What happens to an image.
        seed: Behind windows, flips and lighting, together with `rank`.
        rank: Of the loader.
        count: Images in the batch.
        read: Gives (encoded image, label digits) within a pipeline.
        indexed: Whether that is the reader of shards; otherwise views have no key.
    """
    from nvidia.dali import Pipeline, fn

    from pipeline.decode import Decoder
    from pipeline.draws import OFFSETS, draw
    from pipeline.graph import square_graph, train_graph
    from pipeline.lighting import moved_means
    from pipeline.reader import check_index, data_errors
    from train.pictures import to_pixels

    raise_open_files(len(shards.tars))
    decoder = Decoder("cpu", shards.any_size)
    pipe = Pipeline(batch_size=count, num_threads=num_cores(), device_id=None, prefetch_queue_depth=1)
    with pipe:
        encoded, digits = read()
        draws = draw(augmentation, seed, rank)
        windows, mirrored, light = train_graph(encoded, draws, basis, augmentation, decoder, "cpu")
        sources = [fn.get_property(encoded, key="source_info")] if indexed else []
        pipe.set_outputs(
            windows,
            light,
            square_graph(encoded, decoder),
            digits,
            draws.crop_x,
            draws.crop_y,
            mirrored,
            *sources,
        )
    with data_errors(shards):
        pipe.build()
        if indexed:
            check_index(pipe, shards)
        outputs: Any = pipe.run()
    found = []
    for n in range(count):
        window, light, stored, digits, x, y, mirror, *source = (np.array(output.at(n)) for output in outputs)
        key = key_of(member_of(source[0].tobytes().decode(), shards)) if source else ""
        left, top = round(float(x) * OFFSETS), round(float(y) * OFFSETS)
        seen = window[:, ::-1] if mirror else window
        mean = moved_means(light[None], basis, augmentation.lighting)[0]
        label = int(digits.tobytes().strip(b"\0"))
        found.append(View(key, label, to_pixels(seen - mean, basis.mean), stored, left, top, bool(mirror)))
    return found


def member_of(source: str, shards: ShardSet) -> str:
    """The member's name in DALI's `TAR:OFFSET:NAME`, whose parts may hold colons themselves."""
    tar = next(tar for tar in shards.tars if source.startswith(f"{tar}:"))
    return source[len(tar) + 1 :].partition(":")[2]


if __name__ == "__main__":
    run_program(preview)
