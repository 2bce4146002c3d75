"""Contenders that decode in threads of this process: SPDL, NVIDIA's example of DALI, and ours."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.draws import CROP_SIDE, OFFSETS
from pipeline.lighting import Lighting, relight_arguments
from pipeline.loader import train_loader
from pipeline.reader import decoded_batches
from pipeline.settings import DataConfig, Speed
from tools.benchmarks.contenders.data import Batches, PeerData, Permutations, version_of
from tools.benchmarks.contenders.finish import finish


def spdl_batches(data: PeerData) -> Batches:
    """SPDL: threads that each decode a batch with FFmpeg, and finish it with numpy."""
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    def load(numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        rng, images = np.random.default_rng(), np.empty((len(numbers), CROP_SIDE, CROP_SIDE, 3), np.float32)
        for number, out in zip(numbers, images, strict=True):
            finish(spdl.io.to_numpy(spdl.io.load_image(data.files[number][0])), data.basis, rng, out)
        return torch.from_numpy(images), torch.tensor([data.files[number][1] for number in numbers])

    builder: Any = PipelineBuilder()
    builder = builder.add_source(Permutations(len(data.files))).aggregate(data.batch_size)
    builder = builder.pipe(load, concurrency=data.workers, output_order="input").add_sink(3)
    pipeline = builder.build(num_threads=data.workers)
    with pipeline.auto_stop():
        yield from pipeline.get_iterator()


def spdl_decode(data: PeerData) -> Iterator[np.ndarray]:
    """Files decoded by SPDL."""
    import spdl.io

    return (spdl.io.to_numpy(spdl.io.load_image(path)) for path, _ in data.files)


def spdl_versions(data: PeerData) -> dict[str, str]:
    """Version of SPDL, which looks for FFmpeg's libraries when it is first used."""
    import spdl.io

    spdl.io.load_image(data.files[0][0])
    return version_of("spdl")


def dali_graph(data: PeerData, training: bool) -> Any:
    """A DALI pipeline in the manner of its ImageNet example, on a CPU: file reader, decoder of the part that is
    needed, crop_mirror_normalize. In place of the random resized crop a random window, and lighting in the mean."""
    from nvidia.dali import fn, pipeline_def, types

    paths, labels = (list(column) for column in zip(*data.files, strict=True))

    @pipeline_def(batch_size=data.batch_size, num_threads=data.workers, device_id=None, seed=12)
    def graph() -> Any:
        encoded, label = fn.readers.file(
            files=paths,
            labels=labels,
            random_shuffle=training,
            initial_fill=1024,
            pad_last_batch=True,
            name="Reader",
        )
        if not training:
            return fn.decoders.image(encoded, output_type=types.RGB), label
        places = [k / OFFSETS for k in range(OFFSETS + 1)]
        windows = fn.decoders.image_crop(
            encoded,
            output_type=types.RGB,
            crop=(CROP_SIDE, CROP_SIDE),
            crop_pos_x=fn.random.uniform(values=places),
            crop_pos_y=fn.random.uniform(values=places),
        )
        mean, std = relight_arguments(fn.random.normal(shape=[3]), data.basis, Lighting())
        images = fn.crop_mirror_normalize(
            windows,
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=mean,
            std=[std] * 3,
            mirror=fn.random.coin_flip(probability=0.5),
        )
        return images, label

    return graph()


def dali_batches(data: PeerData) -> Batches:
    """NVIDIA's example graph and its iterator for PyTorch."""
    from nvidia.dali.plugin.pytorch import DALIClassificationIterator

    for (batch,) in DALIClassificationIterator(dali_graph(data, training=True), size=-1):
        yield batch["data"], batch["label"].squeeze(1)


def dali_decode(data: PeerData) -> Iterator[np.ndarray]:
    """Files decoded by DALI."""
    pipe = dali_graph(data, training=False)
    for _ in range(0, len(data.files), data.batch_size):
        images, _ = pipe.run()
        yield from (np.asarray(image) for image in images)


def our_batches(data: PeerData) -> Batches:
    """The trainer's loader."""
    place: dict[str, Any] = {
        "batch_size": data.batch_size,
        "seed": 0,
        "rank": 0,
        "num_ranks": 1,
        "device": "cpu",
    }
    config = DataConfig(
        Path(data.shards.tars[0]).parent, speed=Speed(threads=data.workers + 1)
    )  # as is its default
    loader = train_loader(data.shards, data.basis, config, **place)
    try:
        yield from itertools.chain.from_iterable(itertools.repeat(loader))
    finally:
        loader.close()


def our_decode(data: PeerData) -> Iterator[np.ndarray]:
    """Shards decoded by the pipeline."""
    return (image.numpy() for batch in decoded_batches(data.shards, data.batch_size) for image in batch)
