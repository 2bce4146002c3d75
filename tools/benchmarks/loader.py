"""Benchmark the training loader, the decoders that bound it, and its reader."""

import io
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.eigenbasis import Eigenbasis
from pipeline.lighting import Lighting
from pipeline.machine import num_cores, raise_open_file_limit
from pipeline.settings import Augmentation, Speed
from pipeline.shards import ShardSet, open_shards
from tools.benchmarks import common
from tools.benchmarks.reader import bench_reader, read_with_dali

LIMIT, CROPS = "libjpeg-turbo alone (simplejpeg, whole)", "uint8 crops, as for a GPU (DALI, cpu)"
ROWS, DALI = "uint8 rows of crops, as for a GPU", "uint8 crops by DALI's webdataset reader"
LOADER, NO_LIGHTING = "loader: finished batches", "loader: the same without lighting (strength 0)"
EIGENBASIS = "compute_pca: decode and sum, exact"
MAX_JPEGS, MAX_IMAGES, CHUNK = 2000, 20_000, 16
"""Enough to exceed a core's cache, and for a pass of some seconds; images per task of a thread."""


def bench_loader(
    shards: Path,
    batch_size: int = 128,
    workers: int | None = None,
    seconds: float = 3.0,
    repeats: int = 5,
    out: Path | None = None,
) -> None:
    """Measure the training loader with and without lighting, libjpeg-turbo and DALI alone, and the eigenbasis' sums,
    which all decode the same files; then our reader and DALI's, which decode nothing. Of a pixel store numpy and DALI's
    reader copy windows instead.

    Args:
        shards: Folder written by make_shards and compute_pca.
        batch_size: Images per batch.
        workers: DALI's threads (default: cores + 1) and libjpeg-turbo's (default: cores).
        seconds: Length of one measurement.
        repeats: Measurements of each contender, taken in turns.
        out: File of JSON lines to append one row per contender to.
    """
    import torch

    from pipeline.loader import train_loader
    from tools.benchmarks.peer_loaders import COPY, copy_windows, prefetch_windows
    from train.device import pick_device, tune_malloc

    common.check_options(out, batch_size=batch_size, workers=workers, seconds=seconds, repeats=repeats)
    tune_malloc()  # as the trainer does
    torch.set_num_threads(1)  # as loader and compute_pca do: torch's threads would spin on cores that decode
    train = open_shards(shards, "train")
    basis = Eigenbasis.load(shards / "pca.json", train.manifest_sha256)
    cores, speed, device = workers or num_cores(), Speed(threads=workers), pick_device("auto")
    raise_open_file_limit(6 * len(train.tars))
    few = common.select_first_shards(train, max(MAX_IMAGES, batch_size))
    options: dict[str, Any] = {"batch_size": batch_size, "speed": speed}
    loaders = [
        train_loader(train, basis=basis, device=device, augmentation=Augmentation(lighting=each), **options)
        for each in (Lighting(), Lighting(strength=0))
    ]
    batches, others = (itertools.chain.from_iterable(itertools.repeat(loader)) for loader in loaders)
    crops = prefetch_windows(train, basis=basis, **options)
    images, (_, windows) = next(batches).images, next(crops)
    assert images.shape == (batch_size, 3, 224, 224) and images.isfinite().all(), "loader: wrong batch"
    assert windows.shape[:2] == (batch_size, 224) and windows.dtype == torch.uint8, "crops: wrong batch"
    turns: dict[str, tuple[Callable[[], Any], int]]
    with ThreadPoolExecutor(cores) as pool:
        if train.is_decoded:
            limits = {
                COPY: copy_windows(train, batch_size),
                DALI: read_with_dali(train, batch_size, cores, True),
            }
            turns = {name: (partial(next, each), batch_size) for name, each in limits.items()}
        else:
            jpegs = [jpeg for _, jpeg, _ in itertools.islice(common.read_samples(train), MAX_JPEGS)]
            check_pixels(jpegs[:32])
            turns = {LIMIT: (partial(decode_all, jpegs, pool), len(jpegs))}
        own = {ROWS if train.is_decoded else CROPS: crops, LOADER: batches, NO_LIGHTING: others}
        turns |= {name: (partial(next, each), batch_size) for name, each in own.items()}
        contenders = {name: partial(common.measure, *turn, seconds) for name, turn in turns.items()}
        rates = common.interleave(contenders | {EIGENBASIS: partial(measure_sums, few, cores)}, repeats)
    for open_files in (*loaders, crops):
        open_files.close()
    data = common.describe_shards(train)
    print(f"{data}; batch {batch_size}, finished on {device.type}")
    print(f"{speed.num_threads} threads of DALI, {cores} of libjpeg-turbo, {repeats} repeats")
    context: dict[str, Any] = {"data": data, "shards": train.manifest_sha256, "device": device.type}
    context |= {"batch_size": batch_size, "threads": speed.num_threads}
    common.report_rates("training images", rates, next(iter(rates)), out, **context)
    bench_reader(few, batch_size, seconds, repeats, out, context | {"threads": 1})


def decode_all(jpegs: list[bytes], pool: ThreadPoolExecutor) -> None:
    """Decode in the threads of a pool, as simplejpeg releases the GIL."""
    list(pool.map(decode, [jpegs[start : start + CHUNK] for start in range(0, len(jpegs), CHUNK)]))


def check_pixels(jpegs: list[bytes]) -> None:
    """Assert that simplejpeg decodes Pillow's pixels. `bench peers` checks the loader's."""
    from PIL import Image

    for jpeg, pixels in zip(jpegs, decode(jpegs), strict=True):
        expected = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"), np.int16)
        assert np.abs(pixels - expected).max() <= 1, "libjpeg-turbo: wrong pixels"


def decode(jpegs: list[bytes]) -> list[np.ndarray]:
    """Decode whole images to uint8 RGB."""
    import simplejpeg

    return [simplejpeg.decode_jpeg(jpeg, "RGB") for jpeg in jpegs]


def measure_sums(train: ShardSet, threads: int) -> common.Rate:
    """Measure one pass of compute_pca's sums on the CPU, without the first batch, at which DALI starts."""
    from tools.compute_pca import BATCH_SIZE, sum_batches

    sums = sum_batches(train, BATCH_SIZE, threads)
    next(sums)
    return common.measure_job(lambda: sum(each.moments.num_images for each in sums))
