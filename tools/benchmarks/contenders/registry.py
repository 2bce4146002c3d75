"""Who takes part in `bench peers`: ours, and the same job written with other libraries.

The job: a 256x256 JPEG, a random 224x224 window of it, flipped or not, minus the mean, relit, divided by 1.1, float32.
Each contender is a generator of batches without end, which frees its processes and threads when it is closed, and one
of decoded images for the check. Libraries are imported where they are used: any of them may be missing.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from tools.benchmarks.contenders.data import Batches, PeerData, version_of
from tools.benchmarks.contenders.ffcv_process import ffcv_batches, ffcv_decode, ffcv_versions
from tools.benchmarks.contenders.threads import (
    dali_batches,
    dali_decode,
    our_batches,
    our_decode,
    spdl_batches,
    spdl_decode,
    spdl_versions,
)
from tools.benchmarks.contenders.workers import (
    pillow_batches,
    pillow_decode,
    torchvision_batches,
    torchvision_versions,
    webdataset_batches,
    webdataset_decode,
)


class Peer(NamedTuple):
    """One contender."""

    title: str
    """Its row in the table."""
    versions: Callable[[PeerData], dict[str, str]]
    """Versions of what it is made of; raises where that cannot be used here."""
    batches: Callable[[PeerData], Batches]
    """Its batches, without end, each image once an epoch."""
    decode: Callable[[PeerData], Iterator[np.ndarray]]
    """Every image in order, uint8 (256, 256, 3)."""
    levels: int = 1
    """How far its pixels may be from Pillow's, in levels of 0..255."""


def versions_of(*packages: str) -> Callable[[PeerData], dict[str, str]]:
    """For contenders that can be used wherever they are installed."""
    return lambda _: version_of(*packages)


PEERS = {
    "pillow": Peer("torch DataLoader + Pillow", versions_of("pillow"), pillow_batches, pillow_decode),
    "torchvision": Peer(
        "torch DataLoader + torchvision v2", torchvision_versions, torchvision_batches, pillow_decode
    ),
    "webdataset": Peer(
        "webdataset + Pillow", versions_of("webdataset"), webdataset_batches, webdataset_decode
    ),
    "spdl": Peer("SPDL", spdl_versions, spdl_batches, spdl_decode, levels=64),
    "ffcv": Peer("FFCV", ffcv_versions, ffcv_batches, ffcv_decode, levels=8),
    "dali": Peer(
        "DALI, as its ImageNet example", versions_of("nvidia-dali-cuda120"), dali_batches, dali_decode
    ),
    "ours": Peer("ours", versions_of("nvidia-dali-cuda120"), our_batches, our_decode),
}
"""Every contender by its name; what is true of FFmpeg's and FFCV's pixels stands in docs/benchmarks/details.md."""
