"""DALI graphs: pure functions from encoded bytes to tensors, and thin pipelines that add the reader.

    reader -> decode -> 224x224 window -> flip -> relight and normalize        (train_graph)
    reader -> decode the 256x256 image -> normalize                            (val_graph)

One graph serves both backends. `decode="gpu"` is the `mixed` decoder on whole images, `decode="cpu"` decodes on the
host, in training the window alone, and augments on the GPU if there is one; without a GPU everything runs on the CPU
with the same semantics. Pixels are RGB on the 0..255 scale minus the mean. Images leave as HWC: channels-last memory
for PyTorch.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from nvidia.dali import fn, pipeline_def, types

from pipeline.eigenbasis import Eigenbasis
from pipeline.lighting import Lighting, relight_arguments
from pipeline.shards import MAX_LABEL_DIGITS, ShardSet

if TYPE_CHECKING:
    from nvidia.dali.data_node import DataNode

IMAGE_SIDE = 256
"""Side of a stored image (paper, section 2)."""
CROP_SIDE = 224
"""Side of the windows that the network sees (paper, section 4.1)."""
OFFSETS = IMAGE_SIDE - CROP_SIDE
"""A window starts at one of 0..32 in each direction: 33 * 33 * 2 = 2,178 views of an image (the 2012 program; the
paper says 2,048)."""


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training image between its file and the network."""

    crop: Literal["random", "center"] = "random"
    """random: a 224x224 window at offsets drawn evenly from 0..32; center: always the middle one."""
    flip: float = 0.5
    """Probability of a horizontal flip. With 0, evaluation leaves the mirrored views out."""
    lighting: Lighting = field(default_factory=Lighting)
    """Colour shifts along the principal RGB axes."""
    std: float = 1.0
    """What pixels are divided by after the mean is subtracted; the 2012 initialization is made for 1."""
    jpeg_fancy_upsampling: bool = True
    """Interpolate chroma as libjpeg and Pillow do. The CPU decoder always does; off is faster on a GPU."""

    def __post_init__(self) -> None:
        if not 0 <= self.flip <= 1:
            raise ValueError(f"augmentation.flip is a probability, 0 to 1, not {self.flip}")
        if not 0 < self.std < float("inf"):
            raise ValueError(f"augmentation.std must be positive, not {self.std}")


class Draws(NamedTuple):
    """The random numbers behind a batch of training images, one row per image."""

    crop_x: "DataNode"
    """Left offset / 32, float32, one of k/32 for k in 0..32."""
    crop_y: "DataNode"
    """Top offset / 32, likewise."""
    mirror: "DataNode"
    """int32, 1 where the image is flipped."""
    light: "DataNode | None"
    """float32 (3,): standard normal, one per RGB axis. None: a graph without lighting."""


def op_seed(seed: int, loader_rank: int, operator: str) -> int:
    """The seed of one random operator: independent between operators and loader ranks, the same in every run."""
    words = np.frombuffer(operator.encode().ljust(16)[:16], np.uint32).tolist()
    return int(np.random.SeedSequence([seed, loader_rank, *words]).generate_state(1, np.uint32)[0]) % (2**31 - 1)


def draw(augmentation: Augmentation, seed: int, loader_rank: int) -> Draws:
    """Random numbers for one batch.

    Offsets come from a list: `uniform(range=(0, 1))` rounds, and the edges 0 and 32 would get half their share.
    """
    positions = [k / OFFSETS for k in range(OFFSETS + 1)] if augmentation.crop == "random" else [0.5]
    return Draws(
        fn.random.uniform(values=positions, seed=op_seed(seed, loader_rank, "crop_x")),
        fn.random.uniform(values=positions, seed=op_seed(seed, loader_rank, "crop_y")),
        fn.random.coin_flip(probability=augmentation.flip, seed=op_seed(seed, loader_rank, "mirror")),
        fn.random.normal(shape=[3], seed=op_seed(seed, loader_rank, "light")),
    )


def train_graph(
    encoded: "DataNode", draws: Draws, basis: Eigenbasis, augmentation: Augmentation, decode: str, device: str
) -> "DataNode":
    """Encoded 256x256 JPEGs to augmented windows.

    Args:
        encoded: the file's bytes, on the CPU.
        draws: from `draw`.
        basis: Mean and RGB axes.
        augmentation: What to do.
        decode: "gpu" or "cpu".
        device: where images end up, "gpu" or "cpu".

    Returns (224, 224, 3) HWC RGB, float16 on a GPU, float32 on a CPU (half conversion costs more than the decode
    there).
    """
    window = {"crop_pos_x": draws.crop_x, "crop_pos_y": draws.crop_y}
    if decode == "cpu":
        images = fn.decoders.image_crop(
            encoded,
            device="cpu",
            output_type=types.RGB,
            adjust_orientation=False,
            crop=(CROP_SIDE, CROP_SIDE),
            **window,
        )
        window = {}
    else:
        images = decode_graph(encoded, decode, augmentation.jpeg_fancy_upsampling)
    mean, std = relight_arguments(draws.light, basis, augmentation.lighting, augmentation.std)
    return fn.crop_mirror_normalize(
        images.gpu() if device == "gpu" else images,
        crop=(CROP_SIDE, CROP_SIDE),
        mirror=draws.mirror,
        mean=mean,
        std=[std] * 3,
        dtype=types.FLOAT16 if device == "gpu" else types.FLOAT,
        output_layout="HWC",
        **window,
    )


def val_graph(
    encoded: "DataNode", basis: Eigenbasis, augmentation: Augmentation, decode: str, device: str
) -> "DataNode":
    """Encoded 256x256 JPEGs to normalized whole images, (256, 256, 3) HWC RGB, float16 on a GPU, float32 on a CPU."""
    images = decode_graph(encoded, decode, augmentation.jpeg_fancy_upsampling)
    return fn.crop_mirror_normalize(
        images.gpu() if device == "gpu" else images,
        mean=basis.mean.astype(np.float32).tolist(),
        std=[augmentation.std] * 3,
        dtype=types.FLOAT16 if device == "gpu" else types.FLOAT,
        output_layout="HWC",
    )


def decode_graph(encoded: "DataNode", decode: str, jpeg_fancy_upsampling: bool = True) -> "DataNode":
    """Encoded JPEGs to uint8 HWC RGB, on the GPU with `decode="gpu"`, else on the CPU. EXIF orientation is ignored."""
    if decode == "cpu":
        return fn.decoders.image(encoded, device="cpu", output_type=types.RGB, adjust_orientation=False)
    return fn.decoders.image(
        encoded,
        device="mixed",
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=jpeg_fancy_upsampling,
    )


def label_graph(digits: "DataNode") -> "DataNode":
    """ASCII decimal of 1 to 6 digits (uint8, variable length) to an int64 scalar.

    The text is cut to six characters from its end, filled with "0" on the left, and weighed with powers of ten.
    """
    start = digits.shape(dtype=types.INT32) - MAX_LABEL_DIGITS
    padded = fn.slice(
        digits, start=start, shape=[MAX_LABEL_DIGITS], axes=[0], out_of_bounds_policy="pad", fill_values=ord("0")
    )
    powers = types.Constant(np.array([10**k for k in range(MAX_LABEL_DIGITS)][::-1], np.int64))
    return fn.reductions.sum((fn.cast(padded, dtype=types.INT64) - ord("0")) * powers, axes=0)


def read_graph(
    shards: ShardSet, training: bool, seed: int, shuffle_buffer: int, rank: int, num_ranks: int
) -> "tuple[DataNode, DataNode]":
    """Read (encoded image, label digits).

    In training the order of shards is permuted every epoch by a seed that all ranks share (they cut one permuted list),
    and samples are drawn from a buffer. `pad_last_batch` is what makes epochs exact over several ranks: without it the
    tail of one epoch takes from the head of the next. Without mmap a truncated shard is an error, not a SIGBUS.
    """
    shuffling: dict[str, Any] = {
        "random_shuffle": True,
        "initial_fill": min(shuffle_buffer, shards.num_samples),
        "shuffle_after_epoch": True,
        "shuffle_after_epoch_seed": op_seed(seed, 0, "shards"),
    }
    outputs: Any = fn.readers.webdataset(
        paths=list(shards.tars),
        index_paths=list(shards.indexes),
        ext=["jpg", "cls"],
        missing_component_behavior="error",
        shard_id=rank,
        num_shards=num_ranks,
        seed=op_seed(seed, rank, "reader"),
        pad_last_batch=True,
        dont_use_mmap=True,
        name="reader",
        **(shuffling if training else {"stick_to_shard": True}),
    )
    images, digits = outputs
    return images, digits


@pipeline_def(enable_checkpointing=True)
def train_pipeline(
    shards: ShardSet,
    basis: Eigenbasis,
    augmentation: Augmentation,
    shuffle_buffer: int,
    data_seed: int,
    rank: int,
    num_ranks: int,
    decode: str,
    device: str,
    lit: bool = True,
) -> "tuple[DataNode, DataNode]":
    """Augmented training windows and int64 labels; `lit=False` leaves lighting out, to measure what it costs."""
    encoded, digits = read_graph(shards, True, data_seed, shuffle_buffer, rank, num_ranks)
    draws = draw(augmentation, data_seed, rank)
    draws = draws if lit else draws._replace(light=None)
    images = train_graph(encoded, draws, basis, augmentation, decode, device)
    labels = label_graph(digits)
    return images, labels.gpu() if device == "gpu" else labels


@pipeline_def
def val_pipeline(
    shards: ShardSet, basis: Eigenbasis, augmentation: Augmentation, rank: int, num_ranks: int, decode: str, device: str
) -> "tuple[DataNode, DataNode]":
    """Normalized 256x256 images in stored order and int64 labels."""
    encoded, digits = read_graph(shards, False, 0, 0, rank, num_ranks)
    labels = label_graph(digits)
    return val_graph(encoded, basis, augmentation, decode, device), labels.gpu() if device == "gpu" else labels


@pipeline_def
def decode_pipeline(shards: ShardSet, decode: str) -> "DataNode":
    """Decoded uint8 images in stored order."""
    encoded, _ = read_graph(shards, False, 0, 0, 0, 1)
    return decode_graph(encoded, decode)
