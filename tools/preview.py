"""Draw augmented training images, SHARDS/preview.png, with the training graph, and the eigenbasis, SHARDS/pca.png.

    python tools/preview.py SHARDS

preview.png: above, one stored image and 24 augmentations of it; below, the first 24 training images, of which the upper
one is the most colourful. Normalization is undone; colours that lighting shifts beyond 0..255 are clipped in the
picture, not in training. pca.png shows the axes of pca.json as colours; the numbers of pca.json are printed next to
ImageNet's.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from pipeline.eigenbasis import Eigenbasis, read_eigenbasis
from pipeline.errors import DataError, UserError
from pipeline.files import check_writable
from pipeline.lighting import Lighting
from pipeline.machine import num_cores, raise_open_file_limit
from pipeline.settings import Augmentation, DataConfig
from pipeline.shards import ShardSet, open_shards
from train.cli import run_program

if TYPE_CHECKING:
    from nvidia.dali.data_node import DataNode

COUNT = 24
"""Images in each half of the sheet."""
ROWS, COLUMNS = 3, 9
"""Cells in each half of the sheet."""
CAPTION = 24
"""Characters that fit below a crop."""
IMAGENET = {
    "mean": (127.3, 119.7, 104.9),
    "axis_stddev": (121.78, 37.09, 19.72),
    "eigenvectors": ((0.5635, 0.7126, -0.4180), (0.5762, 0.0235, 0.8170), (0.5920, -0.7012, -0.3973)),
}
"""ILSVRC-2012's training images, shorter side 256, central 256x256, on 0..255 (cuda-convnet2, make-data/input_meta),
with our signs: the largest component of a column is positive."""
MAX_SHIFT = 3
"""Standard deviations by which pca.png shifts the mean colour."""


class View(NamedTuple):
    """One image from the training graph."""

    key: str
    """The stored file's name up to its first dot, without folders."""
    label: int
    jpeg: bytes
    """The stored file."""
    stored: np.ndarray
    """uint8 (256, 256, 3): the image before cropping."""
    pixels: np.ndarray
    """uint8 (224, 224, 3): the crop, normalization undone."""
    left: int
    """Offset of the crop in the image, 0..32."""
    top: int
    mirrored: bool


def preview(
    shards: Path,
    out: Path | None = None,
    seed: int = 2012,
    strength: float = Lighting.strength,
    convention: Literal["stddev", "eigenvalue"] = "stddev",
) -> None:
    """Draw 24 augmentations of one image, the first 24 training images, and the RGB eigenbasis.

    Args:
        shards: Folder written by make_shards and compute_pca.
        out: Folder for preview.png and pca.png; SHARDS by default.
        seed: Seed of order, crops, flips and lighting; with a run's `train.seed` the lower half is its first images.
        strength: Strength of lighting; 0 turns it off.
        convention: Convention of lighting.
    """
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed: expected 0..2^63-1, got {seed}; give another seed")
    train = open_shards(shards, "train")
    content = read_eigenbasis(shards / "pca.json", train.manifest_sha256)
    basis, augmentation = Eigenbasis.from_json(content), Augmentation(lighting=Lighting(convention, strength))
    sheet, axes = ((out or shards) / name for name in ("preview.png", "pca.png"))
    check_writable(sheet)
    training = render_views(train, basis, augmentation, seed)
    colourful = max(training, key=lambda view: np.ptp(view.stored.mean((0, 1))))
    repeated = render_views(train, basis, augmentation, seed, colourful)
    lighting = f"lighting of strength {strength:g}, convention {convention}"
    upper = f"{colourful.key}, as it is stored, and {COUNT} times as training may show it: {lighting}"
    lower = f"The first {len(training)} of {train.num_samples:,} training images, seed {seed}"
    stored = colourful._replace(pixels=colourful.stored)
    cells = [(stored, "stored")] + [
        (view, f"{view.left} right, {view.top} down{', flipped' * view.mirrored}") for view in repeated
    ]
    firsts = [(view, f"{read_class_word(view, train)}\n{view.key[-CAPTION:]}") for view in training]
    draw_sheet(sheet, {upper: cells, lower: firsts})
    print(f"{format_eigenbasis(content)}\n")
    draw_eigenbasis(axes, content)
    print(f"pictures: {sheet}, {axes}")


def render_views(
    shards: ShardSet, basis: Eigenbasis, augmentation: Augmentation, seed: int, repeat: View | None = None
) -> list[View]:
    """Run one batch through the training graph on the CPU.

    Args:
        shards: Training split.
        basis: Mean and RGB axes.
        augmentation: Settings of crop, flip, lighting and mean.
        seed: Seed of order, crops, flips and lighting.
        repeat: Augment this image `COUNT` times; None: the first training images on one rank, at most `COUNT`.

    Raises `DataError` when DALI fails.
    """
    from nvidia.dali import Pipeline, fn  # takes seconds; errors in the input come first

    from pipeline.decode import Decoder
    from pipeline.draws import OFFSETS, sample_params
    from pipeline.graph import decode_full, read_graph, train_graph
    from pipeline.lighting import shifted_means
    from pipeline.reader import check_index, data_errors
    from train.pictures import to_pixels

    raise_open_file_limit(len(shards.tars))
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
        # Another rank's random numbers for the repeated image, so that the halves of the sheet differ.
        params = sample_params(augmentation, seed, 1 if repeat else 0)
        crops, mirrored, noise = train_graph(encoded, params, basis, augmentation, decoder, "cpu")
        source = feed(repeat.key.encode()) if repeat else fn.get_property(encoded, key="source_info")
        squares = decode_full(encoded, decoder)
        places = (params.crop_x, params.crop_y, mirrored)
        pipe.set_outputs(source, digits, encoded, squares, crops, noise, *places)
    with data_errors(shards):
        pipe.build()
        if not repeat:
            check_index(pipe, shards)
        outputs: Any = pipe.run()

    views = []
    for n in range(count):
        source, digits, jpeg, square, crop, noise, x, y, mirror = (np.array(each.at(n)) for each in outputs)
        name = source.tobytes().decode().rpartition(":")[2]  # of TAR:OFFSET:NAME
        mean = shifted_means(noise[None], basis, augmentation.lighting)[0]
        pixels = to_pixels((crop[:, ::-1] if mirror else crop) - mean, basis.mean)
        left, top = (round(float(offset) * OFFSETS) for offset in (x, y))
        key, label = name.rpartition("/")[2].partition(".")[0], int(digits.tobytes().strip(b"\0"))
        views.append(View(key, label, jpeg.tobytes(), square, pixels, left, top, bool(mirror)))
    return views


def draw_sheet(path: Path, halves: dict[str, list[tuple[View, str]]]) -> None:
    """Write preview.png: views with their captions, by the heading of each half."""
    from train.pictures import saved_figure

    with saved_figure(path) as figure:
        figure.set_size_inches(18, 15)  # at 120 dots per inch a crop has about its own size
        subfigures: Any = figure.subfigures(len(halves))
        for half, (heading, cells) in zip(subfigures, halves.items(), strict=True):
            half.suptitle(heading)
            for number, axes in enumerate(half.subplots(ROWS, COLUMNS).flat):
                axes.axis("off")
                for view, caption in cells[number : number + 1]:
                    axes.imshow(view.pixels)
                    axes.set_title(caption, fontsize=8, y=0, va="top", pad=-2)


def read_class_word(view: View, shards: ShardSet) -> str:
    """Return the first word of an image's class. Raises `DataError` for a label out of range."""
    if view.label >= len(shards.classes):
        raise DataError(
            f"{view.key}: expected a label below {len(shards.classes)}, the classes, got {view.label}; "
            f"tools/make_shards.py verify {Path(shards.tars[0]).parent.parent} lists all damage"
        )
    return shards.classes[view.label].words.split(",")[0][:CAPTION]


def format_eigenbasis(content: dict[str, Any]) -> str:
    """Format a table of a `pca.json` next to ImageNet's."""
    basis, published = Eigenbasis.from_json(content), {name: np.array(IMAGENET[name]) for name in IMAGENET}
    vectors, reference = basis.eigenvectors, published["eigenvectors"]
    stddev, known = basis.axis_stddev, published["axis_stddev"]
    angles = np.degrees(np.arccos(np.clip(np.abs((vectors * reference).sum(0)), 0, 1)))
    channel_stddev = np.sqrt(vectors**2 @ stddev**2), np.sqrt(reference**2 @ known**2)
    pairs = {
        "mean": (basis.mean, published["mean"]),
        "standard deviation of channels": channel_stddev,
        "standard deviation of axes": (stddev, known),
        "share of the variance, %": (compute_variance_shares(stddev), compute_variance_shares(known)),
        "red of axes": (vectors[0], reference[0]),
        "green of axes": (vectors[1], reference[1]),
        "blue of axes": (vectors[2], reference[2]),
        "angle of axes, degrees": (angles, np.zeros(3)),
    }
    about = "ImageNet's in brackets; columns are red, green, blue, or axes 1, 2, 3"
    lines = [f"{content['num_images']} images, levels of 0..255 ({about})"]
    for name, (values, imagenet) in pairs.items():
        digits = 4 if name.startswith(("red", "green", "blue")) else 2
        cells = (f"{a:.{digits}f} ({b:.{digits}f})" for a, b in zip(values, imagenet, strict=True))
        lines.append(f"{name:<31}" + "".join(f"{cell:>21}" for cell in cells))
    return "\n".join(lines)


def compute_variance_shares(stddev: np.ndarray) -> np.ndarray:
    """Compute each axis's percentage of the variance; zeros if there is none."""
    return 100 * stddev**2 / ((stddev**2).sum() or 1.0)


def draw_eigenbasis(path: Path, content: dict[str, Any]) -> None:
    """Write pca.png: ramps of the mean colour shifted along each axis."""
    from train.pictures import saved_figure

    basis, steps = Eigenbasis.from_json(content), np.linspace(-MAX_SHIFT, MAX_SHIFT, 601)[:, None]
    with saved_figure(path) as figure:
        figure.set_size_inches(10, 5)
        figure.suptitle(
            f"RGB eigenbasis of {content['num_images']} images: the mean colour shifted along each axis"
        )
        for axis, ramp in enumerate(figure.subplots(3)):
            stddev, share = basis.axis_stddev[axis], compute_variance_shares(basis.axis_stddev)[axis]
            colours = np.rint((basis.mean + steps * stddev * basis.eigenvectors[:, axis]).clip(0, 255))
            ramp.imshow(colours.astype(np.uint8)[None], aspect="auto", extent=(-MAX_SHIFT, MAX_SHIFT, 0, 1))
            ramp.set_yticks([])
            about = f"standard deviations of {stddev:.1f} levels, {share:.1f} % of the variance"
            ramp.set_title(f"axis {axis + 1}: {about}", fontsize=9)


if __name__ == "__main__":
    run_program(preview)
