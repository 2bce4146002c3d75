"""What the network will see: SHARDS/preview.png, a sheet drawn by the training graph itself.

    python tools/preview.py SHARDS

Above one image as it is stored and 24 times as training may show it, below the 24 images with which training begins.
Windows are drawn pixel by pixel. The mean is added back and the divisor of lighting undone; colours that lighting moves
beyond 0..255 are cut in the picture, not in training.
"""

import os
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from pipeline.eigenbasis import Eigenbasis
from pipeline.lighting import Lighting
from pipeline.machine import num_cores, raise_open_files
from pipeline.settings import Augmentation, DataConfig
from pipeline.shards import IMAGE_SIDE, DataError, ShardSet, open_shards, read_index
from train.program import run_program

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from nvidia.dali.data_node import DataNode

COUNT, COLUMNS = 24, 8
DPI = 120
"""That of `saved_figure`: a pixel of the figure is one of the file."""
SIDE, CELL = IMAGE_SIDE, 224
"""Pixels of the stored image, whose column also holds the text, and of a window."""
MARGIN, GAP = 28, 14
HEADING, LINE = 38, 21
"""Height of a heading and of a line of a caption, in pixels."""
WRAP = 27
"""Letters in a line of the left column."""


class Sample(NamedTuple):
    """One sample as it is stored."""

    key: str
    image: bytes
    """The encoded image."""
    digits: bytes
    """The label in ASCII decimal."""


class View(NamedTuple):
    """One image as the training graph makes it."""

    key: str
    label: int
    pixels: np.ndarray
    """uint8 (224, 224, 3): the window, normalization undone."""
    stored: np.ndarray
    """uint8 (256, 256, 3): the image that it is cut from."""
    left: int
    """Offset of the window in the image, 0..32."""
    top: int
    mirrored: bool


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

    from pipeline.draws import OFFSETS, draw
    from pipeline.graph import Decoder, square_graph, train_graph
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


def draw_sheet(
    path: Path, shards: ShardSet, repeated: list[View], training: list[View], lighting: Lighting, seed: int
) -> None:
    """Write the sheet: two blocks of windows, each with a column of text and, above, the stored image."""
    from train.charts import saved_figure

    names = [class_words(view, shards) for view in training]
    settings = (
        f"Windows of {CELL}x{CELL} pixels, each flipped with probability 1/2. Lighting: strength "
        f"{lighting.strength:g}, convention {lighting.convention}. Colours beyond 0..255 are cut here, not in training."
    )
    order = (
        f"As training with seed {seed} begins on one rank: from {shards.num_samples:,} images in {len(shards.tars):,} "
        f"shard{'s' * (len(shards.tars) > 1)}, shuffled, augmented as above."
    )
    above = block_height(len(repeated), 1)
    with saved_figure(path) as figure:
        figure.set_dpi(DPI)
        width = 2 * MARGIN + SIDE + COLUMNS * (CELL + GAP) + GAP
        figure.set_size_inches(width / DPI, (3 * MARGIN + above + block_height(len(training), 2)) / DPI)
        one, at = repeated[0], MARGIN
        write(figure, MARGIN, at, width - 2 * MARGIN, f"One image, {len(repeated)} times", size=14, weight="bold")
        paste(figure, MARGIN, at + HEADING, one.stored)
        below = at + HEADING + SIDE + 4
        write(figure, MARGIN, below, SIDE, class_words(one, shards), size=10.5)
        write(figure, MARGIN, below + LINE, SIDE, one.key, keep_end=True, size=9, color="dimgrey")
        write_lines(figure, MARGIN, below + 3 * LINE, settings)
        draw_block(figure, at, repeated, [[place(view)] for view in repeated])

        at += above + MARGIN
        write(
            figure, MARGIN, at, width - 2 * MARGIN, f"The first {len(training)} training images", size=14, weight="bold"
        )
        write_lines(figure, MARGIN, at + HEADING, order)
        draw_block(figure, at, training, [[name, view.key] for name, view in zip(names, training, strict=True)])


def class_words(view: View, shards: ShardSet) -> str:
    """What a person calls the view's class, in short. Raises `DataError` for a label beyond the classes."""
    if view.label >= len(shards.classes):
        raise DataError(
            f"{view.key} has label {view.label}, there are {len(shards.classes)} classes; tools/make_shards.py verify "
            f"{Path(shards.tars[0]).parent.parent} lists all damage"
        )
    return shards.classes[view.label].words.split(",")[0]


def place(view: View) -> str:
    """Where a window lies in the stored image, in words."""
    return f"{view.left} right, {view.top} down{', flipped' * view.mirrored}"


def block_height(count: int, lines: int) -> int:
    """Pixels that so many windows take with captions of so many lines."""
    return HEADING + -(-count // COLUMNS) * (CELL + lines * LINE + GAP)


def window_corner(number: int, lines: int) -> tuple[int, int]:
    """Left and top pixel of a window within its block, whose captions have so many lines."""
    left = MARGIN + SIDE + 2 * GAP + number % COLUMNS * (CELL + GAP)
    return left, HEADING + number // COLUMNS * (CELL + lines * LINE + GAP)


def draw_block(figure: "Figure", top: int, views: list[View], captions: list[list[str]]) -> None:
    """Paste windows with captions below: a line for people, and a key of which the end matters."""
    for number, (view, lines) in enumerate(zip(views, captions, strict=True)):
        x, y = window_corner(number, len(lines))
        paste(figure, x, top + y, view.pixels)
        for row, text in enumerate(lines):
            style = {"size": 9, "color": "dimgrey"} if row or len(lines) == 1 else {"size": 10.5}
            write(figure, x, top + y + CELL + 3 + row * LINE, CELL, text, keep_end=row > 0, **style)


def paste(figure: "Figure", left: int, top: int, pixels_HWC: np.ndarray) -> None:
    """Put an image into the figure, pixel for pixel, by its upper left corner."""
    figure.figimage(pixels_HWC, left, round(figure.bbox.height) - top - len(pixels_HWC), origin="upper")


def write(figure: "Figure", left: int, top: int, width: int, text: str, keep_end: bool = False, **style: Any) -> None:
    """Write one line, cut to `width` pixels; `keep_end` cuts it in front."""
    line = figure.text(
        left / figure.bbox.width, 1 - top / figure.bbox.height, text, va="top", ha="left", parse_math=False, **style
    )
    while line.get_window_extent().width > width and len(text) > 1:
        text = text[1:] if keep_end else text[:-1]
        line.set_text(f"…{text}" if keep_end else f"{text.rstrip()}…")


def write_lines(figure: "Figure", left: int, top: int, text: str) -> None:
    """Write wrapped text of ours in the left column."""
    for row, line in enumerate(textwrap.wrap(text, WRAP)):
        write(figure, left, top + row * LINE, SIDE, line, size=10)


if __name__ == "__main__":
    run_program(preview)
