"""DALI graphs: pure functions from encoded bytes to tensors, and thin pipelines that add the reader.

    reader -> decode -> 224x224 window -> flip -> lighting and normalization    (train_graph)
    reader -> decode the 256x256 image -> normalization                         (val_graph)

On a CPU the graphs end before the flip, as `normalize.py` does the rest faster there.

The same graphs serve CPU and GPU. `decode="gpu"` is DALI's `mixed` decoder on whole images; `decode="cpu"` decodes on
the host, in training only the window, and augments on the GPU if there is one. Without a GPU everything runs on the CPU
with the same result. Pixels are RGB on the 0..255 scale minus the mean. Images come out as HWC, which for PyTorch is
channels-last memory.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvidia.dali import fn, pipeline_def, types

from pipeline.decode import Decoder, decode_crop, decode_image, decode_resize_crop
from pipeline.draws import CROP_SIDE, OFFSETS, AugmentParams, op_seed, sample_params
from pipeline.eigenbasis import Eigenbasis
from pipeline.lighting import lighting_arguments
from pipeline.settings import Augmentation
from pipeline.shards import IMAGE_SIDE, MAX_LABEL_DIGITS, ShardSet

if TYPE_CHECKING:
    from nvidia.dali.data_node import DataNode


def train_graph(
    encoded: "DataNode",
    params: AugmentParams,
    basis: Eigenbasis,
    augmentation: Augmentation,
    decoder: Decoder,
    device: str,
) -> "tuple[DataNode, ...]":
    """Decode and augment images.

    Args:
        encoded: the file's bytes, on the CPU.
        params: from `sample_params`.
        basis: Mean and RGB axes.
        augmentation: Settings of lighting and normalization.
        decoder: Decoder's device and the size of images.
        device: Device of the result, "gpu" or "cpu".

    Returns on a GPU normalized windows, float16 (224, 224, 3) HWC RGB. On a CPU the arguments of `normalize`: uint8
    windows, int32 flags of a flip, and the random numbers of lighting (see `AugmentParams`).
    """
    if device == "cpu":
        return window_graph(encoded, params, decoder, device), params.mirror, params.pca_noise
    window: dict[str, Any] = {"mirror": params.mirror}
    if decoder.device == "cpu" or decoder.any_size:
        images = window_graph(encoded, params, decoder, device).gpu()
    else:
        images = decode_image(encoded, decoder)
        window |= {"crop": (CROP_SIDE, CROP_SIDE), "crop_pos_x": params.crop_x, "crop_pos_y": params.crop_y}
    return (normalize_graph(images, params.pca_noise, basis, augmentation, **window),)


def normalize_graph(
    images: "DataNode",
    pca_noise: "DataNode | None",
    basis: Eigenbasis,
    augmentation: Augmentation,
    **window: Any,
) -> "DataNode":
    """Apply lighting (unless `pca_noise` is None) and normalize uint8 HWC RGB, crop and flip as `window` says; to
    float16."""
    mean, std = lighting_arguments(pca_noise, basis, augmentation.lighting, augmentation.std)
    return fn.crop_mirror_normalize(
        images, mean=mean, std=[std] * 3, dtype=types.FLOAT16, output_layout="HWC", **window
    )


def window_graph(encoded: "DataNode", params: AugmentParams, decoder: Decoder, device: str) -> "DataNode":
    """Decode windows, uint8 (224, 224, 3) HWC RGB; those of 256x256 images are decoded on the CPU and stay there."""
    if decoder.any_size:
        return decode_resize_crop(
            encoded, decoder, CROP_SIDE, params.crop_x * OFFSETS, params.crop_y * OFFSETS, device
        )
    return decode_crop(encoded, CROP_SIDE, params.crop_x, params.crop_y)


def val_graph(
    encoded: "DataNode", basis: Eigenbasis, augmentation: Augmentation, decoder: Decoder, device: str
) -> "tuple[DataNode, ...]":
    """Decode images to 256x256 HWC RGB: on a GPU normalized, in float16; on a CPU in uint8."""
    images = decode_full(encoded, decoder, device)
    if device == "cpu":
        return (images,)
    return (normalize_graph(images.gpu(), None, basis, augmentation),)


def decode_full(encoded: "DataNode", decoder: Decoder, device: str = "cpu") -> "DataNode":
    """Decode images to uint8 (256, 256, 3) HWC RGB; 256x256 ones stay on the decoder's device."""
    if decoder.any_size:
        return decode_resize_crop(encoded, decoder, IMAGE_SIDE, 0.0, 0.0, device)
    return decode_image(encoded, decoder)


def read_graph(
    shards: ShardSet,
    training: bool,
    seed: int = 0,
    shuffle_buffer: int = 1,
    rank: int = 0,
    num_ranks: int = 1,
    reader_queue_depth: int = 1,
) -> "tuple[DataNode, DataNode]":
    """Read (encoded image, label): the bytes of the JPEG, and uint8 (6,), ASCII digits followed by zeros.

    In training the order of shards is permuted every epoch with a seed that all ranks share, as each rank takes its
    part of one permuted list; samples are drawn from a buffer. With `pad_last_batch` epochs are exact over several
    ranks; without it the end of an epoch would be filled with samples of the next one. Without mmap a truncated shard
    raises an error instead of SIGBUS. `tensor_init_bytes` starts a buffer with a page; DALI's default, a MiB for each
    member of each sample in the shuffle buffer, takes gigabytes.
    """
    shuffling: dict[str, Any] = {
        "random_shuffle": True,
        "initial_fill": min(shuffle_buffer, shards.num_samples),
        "shuffle_after_epoch": True,
        "shuffle_after_epoch_seed": op_seed(seed, 0, "shards"),
    }
    outputs: Any = fn.readers.webdataset(
        paths=list(shards.tars),
        index_paths=[str(Path(tar).with_suffix(".idx")) for tar in shards.tars],
        ext=["jpg", "cls"],
        missing_component_behavior="error",
        shard_id=rank,
        num_shards=num_ranks,
        seed=op_seed(seed, rank, "reader"),
        pad_last_batch=True,
        dont_use_mmap=True,
        tensor_init_bytes=4096,
        prefetch_queue_depth=reader_queue_depth,
        stick_to_shard=not training,
        name="reader",
        **(shuffling if training else {}),
    )
    images, digits = outputs
    return images, fn.pad(digits, axes=[0], shape=[MAX_LABEL_DIGITS])


@pipeline_def(enable_checkpointing=True)
def train_pipeline(
    shards: ShardSet,
    basis: Eigenbasis,
    augmentation: Augmentation,
    shuffle_buffer: int,
    data_seed: int,
    rank: int,
    num_ranks: int,
    decoder: Decoder,
    device: str,
    reader_queue_depth: int = 1,
) -> "tuple[DataNode, ...]":
    """Combine `read_graph` for labels and `train_graph` for images."""
    encoded, digits = read_graph(shards, True, data_seed, shuffle_buffer, rank, num_ranks, reader_queue_depth)
    params = sample_params(augmentation, data_seed, rank)
    return digits, *train_graph(encoded, params, basis, augmentation, decoder, device)


@pipeline_def
def val_pipeline(
    shards: ShardSet,
    basis: Eigenbasis,
    augmentation: Augmentation,
    rank: int,
    num_ranks: int,
    decoder: Decoder,
    device: str,
    reader_queue_depth: int = 1,
) -> "tuple[DataNode, ...]":
    """Combine `read_graph` for labels and `val_graph` for images, in stored order."""
    encoded, digits = read_graph(
        shards, False, rank=rank, num_ranks=num_ranks, reader_queue_depth=reader_queue_depth
    )
    return digits, *val_graph(encoded, basis, augmentation, decoder, device)


@pipeline_def
def decode_pipeline(shards: ShardSet, device: str) -> "DataNode":
    """Decode images to uint8 256x256 in stored order."""
    encoded, _ = read_graph(shards, False)
    return decode_full(encoded, Decoder(device, shards.any_size))
