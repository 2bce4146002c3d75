"""Run slipstream (harvard-visionlab/slipstream) as a contender of `bench peers`, in its own process.

    SLIPSTREAM_PYTHON tools/benchmarks/slipstream_script.py SETTINGS.json

serves batches of JPEGs or with `raw` of pixels, which it has as YUV 4:2:0; with `windows` uint8 crops alone.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer_protocol import serve
from slipstream import DecodeRandomResizedCrop, SlipstreamImageFolder, SlipstreamLoader
from slipstream.decoders import numba_decoder, yuv420_decoder


def draw_windows(widths: np.ndarray, *_: Any) -> np.ndarray:
    """Draw random 224x224 windows of 256x256 images: left, top, width, height."""
    sides = np.full((len(widths), 2), 224)
    return np.hstack([np.random.randint(33, size=sides.shape), sides]).astype(np.int32)


def load_batches(settings: dict[str, Any], folder: Path) -> Iterator[tuple[Any, Any]]:
    """Yield batches forever. Its own crops are around uniform points, then moved into the image: nearly all of these
    would lie at an edge, so uniform ones replace them."""
    for module in (numba_decoder, yuv420_decoder):
        module._generate_random_crop_params_batch = draw_windows
    torch.set_num_threads(1)  # they would spin on cores that decode
    mean, matrix = (torch.tensor(settings[name]) for name in ("mean", "matrix"))
    result = torch.empty(settings["batch_size"], 224, 224 * 3)  # new memory takes longer than the arithmetic

    def flip_and_normalize(windows_NHWC: np.ndarray) -> torch.Tensor:
        """Flip, shift, which slipstream lacks, and normalize, on whole rows; its own transforms take more passes."""
        images = torch.from_numpy(windows_NHWC)
        for number in (torch.rand(len(images)) < 0.5).nonzero():
            images[number] = images[number].flip(2)
        means = mean - torch.randn(len(images), 3) @ matrix.T
        result.copy_(images.flatten(2)).sub_(means.repeat(1, 224)[:, None]).mul_(1 / settings["divisor"])
        return result.view(images.shape)

    crop: Any = DecodeRandomResizedCrop(224, num_threads=settings["workers"])
    images = SlipstreamImageFolder(Path(settings["files"][0][0]).parents[1], cache_dir=folder / "slipstream")
    options = {"image_format": "yuv420" if settings["raw"] else "jpeg", "indices": settings["numbers"]}
    options |= {"pipelines": {"image": [crop] if settings["windows"] else [crop, flip_and_normalize]}}
    loader = SlipstreamLoader(images, settings["batch_size"], exclude_fields=["path", "index"], **options)
    while True:
        for batch in loader:
            yield batch["image"], batch["label"]


if __name__ == "__main__":
    serve(load_batches)
