"""Sample augmentation parameters: windows (crops), flips and lighting, each from its own random stream."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from nvidia.dali import Pipeline, fn

from pipeline.settings import Augmentation
from pipeline.shards import IMAGE_SIDE

if TYPE_CHECKING:
    from nvidia.dali.data_node import DataNode

CROP_SIDE = 224
"""Side of the windows that the network sees (paper, section 4.1)."""
OFFSETS = IMAGE_SIDE - CROP_SIDE
"""A window starts at one of 0..32 in each direction: 33 * 33 * 2 = 2,178 views of an image (the 2012 program; the
paper says 2,048)."""


class AugmentParams(NamedTuple):
    """Augmentation of a batch of training images, one row per image."""

    crop_x: "DataNode"
    """Left offset of the window / 32, float32, one of k/32 for k in 0..32."""
    crop_y: "DataNode"
    """Top offset / 32, of the same form."""
    mirror: "DataNode"
    """int32, 1 where the image is flipped."""
    pca_noise: "DataNode"
    """float32 (3,): standard normal numbers, one per axis of the eigenbasis."""


def op_seed(seed: int, loader_rank: int, operator: str) -> int:
    """Derive the seed of one random operator: independent between operators and loader ranks, equal in every run."""
    words = np.frombuffer(operator.encode().ljust(16)[:16], np.uint32).tolist()
    return int(np.random.SeedSequence([seed, loader_rank, *words]).generate_state(1, np.uint32)[0]) % (
        2**31 - 1
    )


def sample_params(augmentation: Augmentation, seed: int, loader_rank: int) -> AugmentParams:
    """Sample the parameters of one batch.

    Offsets are drawn from a list: with `uniform(range=(0, 1))`, which DALI rounds, 0 and 32 would come half as often.
    """
    positions = [k / OFFSETS for k in range(OFFSETS + 1)] if augmentation.crop == "random" else [0.5]
    views = (
        fn.random.uniform(values=positions, seed=op_seed(seed, loader_rank, "crop_x")),
        fn.random.uniform(values=positions, seed=op_seed(seed, loader_rank, "crop_y")),
        fn.random.coin_flip(probability=augmentation.flip, seed=op_seed(seed, loader_rank, "mirror")),
    )
    if augmentation.images_per_crop > 1:  # each group takes the parameters of its first image
        first = [k - k % augmentation.images_per_crop for k in range(Pipeline.current().max_batch_size)]
        views = tuple(fn.permute_batch(view, indices=first) for view in views)
    return AugmentParams(*views, fn.random.normal(shape=[3], seed=op_seed(seed, loader_rank, "light")))
