"""Draw what the network will see: SHARDS/preview.png, a sheet drawn by the training graph itself, and SHARDS/pca.png.

    python tools/preview.py SHARDS

preview.png: above, one image as it is stored and 24 times as training may show it; below, the first 24 images of
training, of which it is the most colourful. The mean is added back and the divisor of
lighting undone; colours that lighting moves beyond 0..255 are clipped in the picture, not in training. pca.png shows
the axes of pca.json as colours, and images moved along them; its numbers are printed next to ImageNet's.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.eigenbasis import Eigenbasis, read_eigenbasis
from pipeline.files import check_writable
from pipeline.lighting import Lighting
from pipeline.machine import num_cores, raise_open_files
from pipeline.settings import Augmentation, DataConfig
from pipeline.shards import ShardSet, open_shards
from tools.preview_sheet import View, draw_eigenbasis, draw_sheet, format_eigenbasis
from train.program import run_program

if TYPE_CHECKING:
    from nvidia.dali.data_node import DataNode

COUNT = 24
"""Images in each half of the sheet."""


def preview(
    shards: Path,
    out: Path | None = None,
    seed: int = 2012,
    strength: float = Lighting.strength,
    convention: Literal["stddev", "eigenvalue"] = "stddev",
) -> None:
    """Draw one image in 24 augmentations, the 24 images with which training begins, and the RGB eigenbasis.

    Args:
        shards: Folder written by make_shards and compute_pca.
        out: Folder for preview.png and pca.png; SHARDS by default.
        seed: Seed of order, windows, flips and lighting; with a run's `train.seed` the lower half is its first images.
        strength: Strength of lighting, as in training; 0 turns it off.
        convention: Convention of lighting, as in training.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed: expected 0..2^63-1, got {seed}; give another seed")
    train = open_shards(shards, "train")
    content = read_eigenbasis(shards / "pca.json", train.manifest_sha256)
    basis, augmentation = Eigenbasis.from_json(content), Augmentation(lighting=Lighting(convention, strength))
    sheet, axes = ((out or shards) / name for name in ("preview.png", "pca.png"))
    check_writable(sheet)

    training = render_views(train, basis, augmentation, seed)
    colourful = max(training, key=lambda view: np.ptp(view.stored.mean((0, 1))))
    repeated = render_views(train, basis, augmentation, seed, colourful)
    draw_sheet(sheet, train, repeated, training, augmentation.lighting, seed)
    print(f"{format_eigenbasis(content)}\n")
    draw_eigenbasis(axes, train, content)
    print(f"pictures: {sheet}, {axes}")


def render_views(
    shards: ShardSet,
    basis: Eigenbasis,
    augmentation: Augmentation,
    seed: int,
    repeat: View | None = None,
) -> list[View]:
    """Run one batch through the training graph on the CPU.

    Args:
        shards: Training split.
        basis: Mean and RGB axes.
        augmentation: What happens to an image.
        seed: Of order, windows, flips and lighting.
        repeat: Show this one `COUNT` times; None: the first images of training on one rank, fewer than `COUNT` where
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
    count = COUNT if repeat else min(COUNT, shards.num_samples)

    def feed(data: bytes) -> "DataNode":
        return fn.external_source(lambda: [np.frombuffer(data, np.uint8)] * count)

    pipe = Pipeline(batch_size=count, num_threads=num_cores(), device_id=None, prefetch_queue_depth=1)
    with pipe:
        if repeat:
            encoded, digits = feed(repeat.jpeg), feed(str(repeat.label).encode())
        else:
            encoded, digits = read_graph(shards, True, seed, DataConfig(Path()).shuffle_buffer, 0, 1)
        # Random numbers of another rank for the repeated image, so that the halves of the sheet differ.
        draws = draw(augmentation, seed, 1 if repeat else 0)
        crops, mirrored, light = train_graph(encoded, draws, basis, augmentation, decoder, "cpu")
        source = [] if repeat else [fn.get_property(encoded, key="source_info")]
        squares = square_graph(encoded, decoder)
        pipe.set_outputs(
            crops, light, squares, encoded, digits, draws.crop_x, draws.crop_y, mirrored, *source
        )
    with data_errors(shards):
        pipe.build()
        if not repeat:
            check_index(pipe, shards)
        outputs: Any = pipe.run()

    views = []
    for n in range(count):
        crop, light, square, jpeg, digits, x, y, mirror, *name = (
            np.array(output.at(n)) for output in outputs
        )
        mean = moved_means(light[None], basis, augmentation.lighting)[0]
        pixels = to_pixels((crop[:, ::-1] if mirror else crop) - mean, basis.mean)
        key = repeat.key if repeat else parse_key(name[0].tobytes().decode(), shards)
        label = int(digits.tobytes().strip(b"\0"))
        left, top = (round(float(offset) * OFFSETS) for offset in (x, y))
        views.append(View(key, label, jpeg.tobytes(), square, pixels, left, top, bool(mirror)))
    return views


def parse_key(source: str, shards: ShardSet) -> str:
    """Take the key from DALI's `TAR:OFFSET:NAME`, whose parts may hold colons themselves: the member's name up to the
    first dot of its base name, as in the webdataset library."""
    tar = next(tar for tar in shards.tars if source.startswith(f"{tar}:"))
    name = source[len(tar) + 1 :].partition(":")[2]
    base = name.rpartition("/")[2]
    return name[: len(name) - len(base)] + base.partition(".")[0]


if __name__ == "__main__":
    run_program(preview)
