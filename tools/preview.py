"""Draw what the network will see: SHARDS/preview.png, a sheet drawn by the training graph itself, and SHARDS/pca.png.

    python tools/preview.py SHARDS

preview.png: above, one image as it is stored and 24 times as training may show it; below, the 24 images with which
training begins. Windows are drawn pixel by pixel. The mean is added back and the divisor of lighting undone; colours
that lighting moves beyond 0..255 are clipped in the picture, not in training. pca.png shows the axes of pca.json as
colours, and images moved along them; its numbers are printed next to ImageNet's.
"""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from pipeline.eigenbasis import Eigenbasis, read_eigenbasis
from pipeline.files import check_writable
from pipeline.lighting import Lighting
from pipeline.machine import num_cores, raise_open_files
from pipeline.settings import Augmentation, DataConfig
from pipeline.shards import DataError, ShardSet, open_shards, read_index
from tools.preview_sheet import View, draw_eigenbasis, draw_sheet, format_eigenbasis
from train.program import run_program

if TYPE_CHECKING:
    from nvidia.dali.data_node import DataNode

COUNT = 24
"""Images in each half of the sheet."""


class Sample(NamedTuple):
    """One sample as it is stored."""

    key: str
    jpeg: bytes
    label: bytes
    """ASCII decimal."""


def preview(
    shards: Path,
    out: Path | None = None,
    image: str | None = None,
    seed: int = 2012,
    strength: float = Lighting.strength,
    convention: Literal["stddev", "eigenvalue"] = "stddev",
) -> None:
    """Draw one image in 24 augmentations, the 24 images with which training begins, and the RGB eigenbasis.

    Args:
        shards: Folder written by make_shards and compute_pca.
        out: Folder for preview.png and pca.png; SHARDS by default.
        image: Key of the image that is shown 24 times, such as n01440764_10026; the first one by default.
        seed: Seed of order, windows, flips and lighting; with a run's `train.seed` the lower half is its first images.
        strength: Strength of lighting, as in training; 0 turns it off.
        convention: Convention of lighting, as in training.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed: expected 0..2^63-1, got {seed}; give another seed")
    train = open_shards(shards, "train")
    content = read_eigenbasis(shards / "pca.json", train.manifest_sha256)
    basis, augmentation = Eigenbasis.from_json(content), Augmentation(lighting=Lighting(convention, strength))
    sample = find_sample(train, image)
    sheet, axes = ((out or shards) / name for name in ("preview.png", "pca.png"))
    check_writable(sheet)

    repeated = render_views(train, basis, augmentation, seed, sample)
    draw_sheet(
        sheet, train, repeated, render_views(train, basis, augmentation, seed), augmentation.lighting, seed
    )
    print(f"{format_eigenbasis(content)}\n")
    draw_eigenbasis(axes, train, content)
    print(f"pictures: {sheet}, {axes}")


def find_sample(shards: ShardSet, key: str | None) -> Sample:
    """Read the sample with this key, or the first one. Raises `ValueError` where there is none."""
    first = ""
    for tar, index in zip(shards.tars, shards.indexes, strict=True):
        for entries in read_index(Path(index)):
            members = {extension: (size, offset, name) for extension, offset, size, name in entries}
            if not {"jpg", "cls"} <= members.keys():
                raise DataError(f"{index}: a sample without .jpg or .cls; pack or adopt the shards again")
            found = member_key(members["jpg"][2])
            if key in (None, found):
                with Path(tar).open("rb") as file:
                    return Sample(
                        found, *(os.pread(file.fileno(), *members[kind][:2]) for kind in ("jpg", "cls"))
                    )
            first = first or found
    raise ValueError(f"--image {key}: not in {Path(shards.tars[0]).parent}; give a key such as {first}")


def member_key(name: str) -> str:
    """Cut a tar member's name at the first dot of its base name, as the webdataset library does."""
    match = re.match(r"((?:.*/|)[^.]+)[.]", name)
    return match[1] if match else name


def render_views(
    shards: ShardSet,
    basis: Eigenbasis,
    augmentation: Augmentation,
    seed: int,
    sample: Sample | None = None,
) -> list[View]:
    """Run one batch through the training graph on the CPU.

    Args:
        shards: Training split.
        basis: Mean and RGB axes.
        augmentation: What happens to an image.
        seed: Of order, windows, flips and lighting.
        sample: Show this one `COUNT` times; None: the first images of training on one rank, fewer than `COUNT` where
            the split has no more.

    Raises `DataError` when DALI fails.
    """
    from nvidia.dali import Pipeline, fn  # DALI takes seconds, which errors in the input need not wait for

    from pipeline.decode import Decoder
    from pipeline.draws import OFFSETS, draw
    from pipeline.graph import read_graph, square_graph, train_graph
    from pipeline.lighting import moved_means
    from pipeline.reader import check_index, data_errors
    from train.pictures import to_pixels

    raise_open_files(len(shards.tars))
    decoder = Decoder("cpu", shards.any_size)
    count = COUNT if sample else min(COUNT, shards.num_samples)

    def repeat(data: bytes) -> "DataNode":
        return fn.external_source(lambda: [np.frombuffer(data, np.uint8)] * count)

    pipe = Pipeline(batch_size=count, num_threads=num_cores(), device_id=None, prefetch_queue_depth=1)
    with pipe:
        if sample:
            encoded, digits = repeat(sample.jpeg), repeat(sample.label)
        else:
            encoded, digits = read_graph(shards, True, seed, DataConfig(Path()).shuffle_buffer, 0, 1)
        # Random numbers of another rank for the repeated image, so that the halves of the sheet differ.
        draws = draw(augmentation, seed, 1 if sample else 0)
        crops, mirrored, light = train_graph(encoded, draws, basis, augmentation, decoder, "cpu")
        keys = [] if sample else [fn.get_property(encoded, key="source_info")]
        squares = square_graph(encoded, decoder)
        pipe.set_outputs(crops, light, squares, digits, draws.crop_x, draws.crop_y, mirrored, *keys)
    with data_errors(shards):
        pipe.build()
        if not sample:
            check_index(pipe, shards)
        outputs: Any = pipe.run()

    views = []
    for n in range(count):
        crop, light, square, digits, x, y, mirror, *source = (np.array(output.at(n)) for output in outputs)
        key = sample.key if sample else member_key(parse_source(source[0].tobytes().decode(), shards))
        label = int(digits.tobytes().strip(b"\0"))
        mean = moved_means(light[None], basis, augmentation.lighting)[0]
        pixels = to_pixels((crop[:, ::-1] if mirror else crop) - mean, basis.mean)
        left, top = (round(float(place) * OFFSETS) for place in (x, y))
        views.append(View(key, label, pixels, square, left, top, bool(mirror)))
    return views


def parse_source(source: str, shards: ShardSet) -> str:
    """Take the member's name from DALI's `TAR:OFFSET:NAME`, whose parts may hold colons themselves."""
    tar = next(tar for tar in shards.tars if source.startswith(f"{tar}:"))
    return source[len(tar) + 1 :].partition(":")[2]


if __name__ == "__main__":
    run_program(preview)
