"""Implement the contenders of `bench peers`: the same job, written with each library as its users would.

A contender is an infinite generator of batches that stops its processes and threads when it is closed. Libraries are
imported where they are used: any of them may be missing.

Shapes: N images, H rows, W columns, C colours.
"""

import itertools
import json
import subprocess
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from pipeline.augment import CROP_SIDE, OFFSETS
from pipeline.eigenbasis import Eigenbasis
from pipeline.lighting import Lighting
from pipeline.loader import train_loader
from pipeline.settings import Speed
from pipeline.shards import ShardSet

Batches = Generator[tuple[Any, Any], None, None]
"""Images, float32 (N, 3, 224, 224) or (N, 224, 224, 3), and labels (N,); from another process, None and None."""


@dataclass(frozen=True)
class PeerData:
    """Input of a contender."""

    shards: ShardSet
    files: list[tuple[str, int]]
    """(path, class index) of the same JPEGs in the same order: FOLDER/<class index>/<key>.jpg."""
    basis: Eigenbasis
    batch_size: int
    workers: int
    """Processes, or threads where a contender has those."""
    scratch: Path
    """Temporary folder."""
    ffcv_python: Path | None
    """The interpreter of FFCV's environment."""
    show: bool = False
    """True while batches are checked: a contender in another process then transfers them."""


def make_batch(samples: list[tuple[np.ndarray, int]], basis: Eigenbasis) -> tuple[torch.Tensor, torch.Tensor]:
    """Crop, flip, shift and normalize in numpy, for contenders without such operations.

    Args:
        samples: Decoded images (256, 256, 3) and class indexes.
        basis: Mean and RGB axes.
    """
    rng, lighting = np.random.default_rng(), Lighting()
    images_NHWC = np.empty((len(samples), CROP_SIDE, CROP_SIDE, 3), np.float32)
    rows = (CROP_SIDE, CROP_SIDE * 3)  # numpy is slow at rows of three
    for (pixels_HWC, _), out_HWC in zip(samples, images_NHWC, strict=True):
        left, top = rng.integers(OFFSETS + 1, size=2)
        window = pixels_HWC[top : top + CROP_SIDE, left : left + CROP_SIDE]
        window = window[:, ::-1] if rng.random() < 0.5 else window
        mean = (basis.mean - lighting.shift_matrix(basis) @ rng.standard_normal(3)).astype(np.float32)
        np.subtract(window.reshape(rows), np.tile(mean, CROP_SIDE), out=out_HWC.reshape(rows))
        out_HWC *= np.float32(1 / lighting.divisor)
    return torch.from_numpy(images_NHWC), torch.tensor([label for _, label in samples])


def read_batch(files: list[tuple[str, int]], basis: Eigenbasis) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode files with Pillow and augment them."""
    return make_batch([(np.asarray(Image.open(path).convert("RGB")), label) for path, label in files], basis)


def yield_permutations(count: int) -> Iterator[int]:
    """Yield the numbers below `count` in random order, reshuffled forever."""
    while True:
        yield from np.random.default_rng().permutation(count).tolist()


def load_with_pillow(data: PeerData) -> Batches:
    """Load with a DataLoader, Pillow and numpy, which is faster than torchvision's transforms; its processes are forked
    from a server, as ours has threads."""
    options: dict[str, Any] = {"num_workers": data.workers, "multiprocessing_context": "forkserver"}
    options |= {"sampler": yield_permutations(len(data.files)), "batch_size": data.batch_size}
    yield from DataLoader(data.files, collate_fn=partial(read_batch, basis=data.basis), **options)  # type: ignore[arg-type]


def load_with_webdataset(data: PeerData) -> Batches:
    """Load with webdataset, Pillow and numpy; at most one process per shard, as it distributes shards."""
    import webdataset

    tars = list(data.shards.tars)
    encoded = webdataset.WebDataset(tars, shardshuffle=len(tars)).shuffle(1000)
    samples = encoded.decode("rgb8").to_tuple("jpg", "cls").repeat()
    batches = samples.batched(data.batch_size, collation_fn=partial(make_batch, basis=data.basis))
    workers = min(data.workers, len(tars))
    yield from DataLoader(batches, None, num_workers=workers, multiprocessing_context="forkserver")


def load_with_spdl(data: PeerData) -> Batches:
    """Load with SPDL: threads that decode batches with FFmpeg and augment them with numpy."""
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    def load(numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        files = [data.files[number] for number in numbers]
        images = [(spdl.io.to_numpy(spdl.io.load_image(path)), label) for path, label in files]
        return make_batch(images, data.basis)

    builder: Any = PipelineBuilder()
    builder = builder.add_source(yield_permutations(len(data.files))).aggregate(data.batch_size)
    builder = builder.pipe(load, concurrency=data.workers, output_order="input").add_sink(3)
    pipeline = builder.build(num_threads=data.workers)
    with pipeline.auto_stop():
        yield from pipeline.get_iterator()


def load_with_dali(data: PeerData) -> Batches:
    """Load with DALI as in NVIDIA's ImageNet example, on a CPU: file reader, cropping decoder, crop_mirror_normalize,
    its PyTorch iterator. A random crop replaces the random resized crop; lighting is in the mean."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIClassificationIterator

    paths, labels = (list(column) for column in zip(*data.files, strict=True))
    places, lighting = [k / OFFSETS for k in range(OFFSETS + 1)], Lighting()
    matrix = (-lighting.shift_matrix(data.basis)).ravel().tolist()

    @pipeline_def(batch_size=data.batch_size, num_threads=data.workers, device_id=None, seed=12)
    def graph() -> Any:
        order: dict[str, Any] = {"random_shuffle": True, "initial_fill": 1024, "pad_last_batch": True}
        encoded, label = fn.readers.file(files=paths, labels=labels, name="Reader", **order)
        x, y = fn.random.uniform(values=places), fn.random.uniform(values=places)
        windows = fn.decoders.image_crop(encoded, crop=(CROP_SIDE, CROP_SIDE), crop_pos_x=x, crop_pos_y=y)
        # mean - matrix @ noise as one operation, on a "point": each takes one per cent of a batch's time
        noise = fn.random.normal(shape=[1, 3])
        mean = fn.reshape(fn.coord_transform(noise, M=matrix, T=data.basis.mean.tolist()), shape=[3])
        options = {
            "dtype": types.FLOAT,
            "output_layout": "CHW",
            "mirror": fn.random.coin_flip(probability=0.5),
        }
        return fn.crop_mirror_normalize(windows, mean=mean, std=[lighting.divisor] * 3, **options), label

    for (batch,) in DALIClassificationIterator(graph(), size=-1):
        yield batch["data"], batch["label"].squeeze(1)


def load_with_ours(data: PeerData) -> Batches:
    """Load with the trainer's loader."""
    speed = Speed(threads=data.workers + 1)  # its default
    options: dict[str, Any] = {"batch_size": data.batch_size, "device": "cpu", "basis": data.basis}
    with closing(train_loader(data.shards, **options, speed=speed)) as loader:
        yield from itertools.chain.from_iterable(itertools.repeat(loader))


def load_with_ffcv(data: PeerData) -> Batches:
    """Load with FFCV, in a process with FFCV's Python, which prints a line per batch; only checked batches are
    transferred. Raises `ImportError` without that Python, `RuntimeError` with its output when the process ends."""
    if data.ffcv_python is None:
        raise ImportError("--ffcv-python: expected the Python of an environment with FFCV, got none")
    settings, log = data.scratch / "ffcv.json", data.scratch / "ffcv.log"
    job = {"files": data.files, "batch_size": data.batch_size, "workers": data.workers, "show": data.show}
    job |= {"mean": data.basis.mean.tolist(), "matrix": Lighting().shift_matrix(data.basis).tolist()}
    settings.write_text(json.dumps(job | {"divisor": Lighting().divisor}))
    command: list[Any] = [data.ffcv_python, Path(__file__).with_name("ffcv_script.py"), settings]
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdin=-1, stdout=-1, stderr=errors, text=True, bufsize=1)
    assert process.stdin and process.stdout
    try:
        while process.stdout.readline():  # a line per batch
            if data.show:
                with np.load(settings.with_suffix(".npz"), allow_pickle=False) as batch:
                    yield torch.from_numpy(batch["images"]), torch.from_numpy(batch["labels"])
            else:
                yield None, None
            print(file=process.stdin)
        raise RuntimeError(f"FFCV ended: {log.read_text().strip()}")
    finally:
        process.kill()
        process.communicate()


PEERS: dict[str, tuple[str, Callable[[PeerData], Batches], int]] = {
    "pillow": ("torch DataLoader + Pillow", load_with_pillow, 1),
    "webdataset": ("webdataset + Pillow", load_with_webdataset, 1),
    "spdl": ("SPDL", load_with_spdl, 64),
    "ffcv": ("FFCV", load_with_ffcv, 8),
    "dali": ("DALI, as its ImageNet example", load_with_dali, 1),
    "ours": ("ours", load_with_ours, 1),
}
"""By name: title; generator of infinite batches, each image once per epoch; largest allowed difference of pixels from
Pillow's, in levels of 0..255 (docs/benchmarks/details.md)."""
