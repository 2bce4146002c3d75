"""Implement the contenders of `bench peers`: the same jobs, written with each library as its users would.

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
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from pipeline.augment import CROP_SIDE, OFFSETS
from pipeline.eigenbasis import Eigenbasis
from pipeline.lighting import Lighting
from pipeline.loader import train_loader
from pipeline.settings import Speed
from pipeline.shards import IMAGE_SIDE, NPY_HEADER, ShardSet

Batches = Generator[tuple[Any, Any], None, None]
"""Images, (N, 3, 224, 224) or (N, 224, 224, 3), and labels (N,); from another process, None and None."""


@dataclass(frozen=True)
class PeerData:
    """Input of a contender."""

    shards: ShardSet
    """JPEGs or their pixel store."""
    files: list[tuple[str, int]]
    """(path, class index) of the same JPEGs in the same order: FOLDER/<class index>/<key>.jpg."""
    basis: Eigenbasis
    batch_size: int
    workers: int
    """Processes, or threads where a contender has those."""
    scratch: Path
    """Temporary folder."""
    windows: bool
    """True for uint8 crops alone, as for a GPU."""
    pythons: dict[str, Path | None]
    """The interpreters of the environments of "ffcv" and "slipstream"."""
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


def transform_batch(files: list[tuple[str, int]], basis: Eigenbasis) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode files with Pillow and augment them with torchvision's transforms of tensors."""
    from torchvision.transforms import v2
    from torchvision.transforms.v2.functional import normalize

    matrix, divisor = torch.from_numpy(Lighting().shift_matrix(basis)), [Lighting().divisor] * 3
    uint8 = [v2.PILToTensor(), v2.RandomCrop(CROP_SIDE), v2.RandomHorizontalFlip()]
    transform = v2.Compose([*uint8, v2.ToDtype(torch.float32)])
    images = []
    for path, _ in files:
        mean = torch.from_numpy(basis.mean) - matrix @ torch.randn(3, dtype=matrix.dtype)
        images.append(
            normalize(transform(Image.open(path).convert("RGB")), mean.tolist(), divisor, inplace=True)
        )
    return torch.stack(images), torch.tensor([label for _, label in files])


def yield_permutations(count: int) -> Iterator[int]:
    """Yield the numbers below `count` in random order, reshuffled forever."""
    while True:
        yield from np.random.default_rng().permutation(count).tolist()


def load_with_torch(data: PeerData, read: Callable[..., Any]) -> Batches:
    """Load with torch's DataLoader; its processes are forked from a server, as ours has threads."""
    options: dict[str, Any] = {"num_workers": data.workers, "multiprocessing_context": "forkserver"}
    options |= {"sampler": yield_permutations(len(data.files)), "batch_size": data.batch_size}
    yield from DataLoader(data.files, collate_fn=partial(read, basis=data.basis), **options)  # type: ignore[arg-type]


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


def prefetch_windows(shards: ShardSet, **options: Any) -> Any:
    """Return an iterator of plans and uint8 windows as our loader has them for a GPU: (N, 224, 224, 3), but of a pixel
    store rows at full width, (N, 224, 256, 3), which the GPU cuts."""
    return train_loader(shards, **options, device="cpu")._prefetcher.batches(0)


def load_with_ours(data: PeerData) -> Batches:
    """Load with the trainer's loader. Columns of windows from a pixel store are cut only if batches are checked."""
    options: dict[str, Any] = {"batch_size": data.batch_size, "basis": data.basis}
    options |= {"speed": Speed(threads=data.workers + 1, reader_queue_depth=data.workers)}
    if not data.windows:
        with closing(train_loader(data.shards, **options, device="cpu")) as loader:
            yield from itertools.chain.from_iterable(itertools.repeat(loader))
    with closing(prefetch_windows(data.shards, **options)) as batches:
        for plan, windows in batches:
            if data.show and data.shards.is_decoded:
                pairs = zip(windows, plan.draws.left.tolist(), strict=True)
                windows = torch.stack([rows[:, left : left + CROP_SIDE] for rows, left in pairs])
            yield windows, torch.from_numpy(data.shards.samples["label"][plan.rows].astype(np.int64))


def copy_windows(shards: ShardSet, batch_size: int) -> Batches:
    """Copy random windows of a pixel store out of memory maps with numpy, in one thread: the reference."""
    maps, shape = [np.memmap(tar, mode="r") for tar in shards.tars], (IMAGE_SIDE, IMAGE_SIDE, 3)
    places = zip(shards.samples["shard"].tolist(), shards.samples["offset"].tolist(), strict=True)
    images = [np.ndarray(shape, np.uint8, maps[shard], offset + NPY_HEADER) for shard, offset in places]
    labels, rng = shards.samples["label"].astype(np.int64), np.random.default_rng()
    numbers = yield_permutations(len(images))
    windows = np.empty((batch_size, CROP_SIDE, CROP_SIDE, 3), np.uint8)
    while True:
        batch = list(itertools.islice(numbers, batch_size))
        corners = rng.integers(OFFSETS + 1, size=(batch_size, 2)).tolist()
        for window, n, (left, top) in zip(windows, batch, corners, strict=True):
            window[:] = images[n][top : top + CROP_SIDE, left : left + CROP_SIDE]
        yield torch.from_numpy(windows), torch.from_numpy(labels[batch])


def load_elsewhere(data: PeerData, library: str) -> Batches:
    """Load with "ffcv" or "slipstream", in a process with its own Python, which prints a line per batch; only checked
    batches are transferred. Raises `ImportError` without that Python, `RuntimeError` with its output when the process
    ends."""
    raw, python = data.shards.is_decoded, data.pythons[library]
    if python is None:
        raise ImportError(f"--{library}-python: expected a Python that has {library}, got none")
    settings = data.scratch / f"{library}-{data.show}-{raw}-{data.windows}.json"
    log = settings.with_suffix(".log")
    job = {"files": data.files, "batch_size": data.batch_size, "workers": data.workers, "show": data.show}
    job |= {"mean": data.basis.mean.tolist(), "matrix": Lighting().shift_matrix(data.basis).tolist()}
    job |= {"divisor": Lighting().divisor, "raw": raw, "windows": data.windows}
    settings.write_text(json.dumps(job))
    command: list[Any] = [python, Path(__file__).with_name(f"{library}_script.py"), settings]
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
        raise RuntimeError(f"{library} ended: {log.read_text().strip()}")
    finally:
        process.kill()
        process.communicate()


class Table(NamedTuple):
    """The contenders that load the same store, finished batches or uint8 windows alone."""

    title: str
    from_pixels: bool
    windows: bool


class Peer(NamedTuple):
    """A contender."""

    table: Table
    title: str
    load: Callable[[PeerData], Batches]
    """Generator of infinite batches, each image once per epoch."""
    levels: int = 1
    """Largest allowed difference of pixels from Pillow's, in levels of 0..255 (docs/benchmarks/details.md)."""


JPEGS = Table("loaders that do the same job", False, False)
PIXELS = Table("the same job, from decoded pixels", True, False)
WINDOWS = Table("uint8 windows, as for a GPU", True, True)
JPEG_WINDOWS = Table("uint8 windows, from JPEGs", False, True)
OURS, COPY, RAW, YUV = "ours", "numpy copies windows of memory maps", "FFCV, raw", "slipstream, YUV 4:2:0"
ffcv, slipstream = (partial(load_elsewhere, library=library) for library in ("ffcv", "slipstream"))
PEERS = {
    "pillow": [Peer(JPEGS, "torch DataLoader + Pillow", partial(load_with_torch, read=read_batch))],
    "torchvision": [
        Peer(JPEGS, "torch DataLoader + torchvision v2", partial(load_with_torch, read=transform_batch))
    ],
    "webdataset": [Peer(JPEGS, "webdataset + Pillow", load_with_webdataset)],
    "spdl": [Peer(JPEGS, "SPDL", load_with_spdl, 64)],
    "ffcv": [Peer(JPEGS, "FFCV", ffcv, 8), *(Peer(table, RAW, ffcv) for table in (PIXELS, WINDOWS))],
    "slipstream": [
        Peer(JPEGS, "slipstream", slipstream, 8),
        *(Peer(table, YUV, slipstream, 64) for table in (PIXELS, WINDOWS)),
    ],
    "dali": [Peer(JPEGS, "DALI, as its ImageNet example", load_with_dali)],
    "numpy": [Peer(WINDOWS, COPY, lambda data: copy_windows(data.shards, data.batch_size))],
    "ours": [Peer(table, OURS, load_with_ours) for table in (JPEGS, PIXELS, WINDOWS, JPEG_WINDOWS)],
}
"""By name, a contender for each of its tables."""
