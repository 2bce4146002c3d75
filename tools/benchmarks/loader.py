"""Benchmark the training loader, and the decoders that bound it."""

import io
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.eigenbasis import Eigenbasis
from pipeline.lighting import Lighting
from pipeline.machine import num_cores, raise_open_file_limit
from pipeline.settings import Augmentation, DataConfig, Speed
from pipeline.shards import ShardSet, open_shards
from tools.benchmarks import common

LIMIT, WINDOWS = "libjpeg-turbo alone (simplejpeg, whole)", "uint8 pixels, as for a GPU (DALI, cpu)"
LOADER, NO_LIGHTING = "loader: finished batches", "loader: the same without lighting (strength 0)"
EIGENBASIS = "compute_pca: decode and sum, exact"
MAX_JPEGS, MAX_SUMMED, CHUNK = 2000, 20_000, 16
"""Enough to exceed a core's cache, and for a pass of some seconds; images per task of a thread."""


def bench_loader(
    shards: Path,
    batch_size: int = 128,
    threads: int | None = None,
    seconds: float = 3.0,
    repeats: int = 5,
    out: Path | None = None,
) -> None:
    """Measure the training loader with and without lighting, libjpeg-turbo and DALI alone, and the eigenbasis' sums.

    All decode the same files.

    Args:
        shards: Folder written by make_shards and compute_pca.
        batch_size: Images per batch.
        threads: DALI's threads (default: cores + 1) and libjpeg-turbo's (default: cores).
        seconds: Length of one measurement.
        repeats: Measurements of each contender, taken in turns.
        out: File of JSON lines to append one row per contender to.
    """
    import torch

    from pipeline.loader import train_loader
    from train.device import pick_device, tune_malloc

    common.check_options(out, batch_size=batch_size, threads=threads, seconds=seconds, repeats=repeats)
    tune_malloc()  # as the trainer does
    torch.set_num_threads(1)  # as loader and compute_pca do: torch's threads would spin on cores that decode
    train = open_shards(shards, "train")
    basis = Eigenbasis.load(shards / "pca.json", train.manifest_sha256)
    cores, speed, device = threads or num_cores(), Speed(threads=threads), pick_device("auto")
    raise_open_file_limit(4 * len(train.tars))
    settings = DataConfig(shards, speed=speed)
    no_lighting = replace(settings, augmentation=Augmentation(lighting=Lighting(strength=0)))
    options: dict[str, Any] = {"batch_size": batch_size, "seed": 0, "rank": 0, "num_ranks": 1}
    loaders = [
        train_loader(train, basis, config, **options, device=where)
        for config, where in ((settings, device), (no_lighting, device), (settings, "cpu"))
    ]
    batches, others = (itertools.chain.from_iterable(itertools.repeat(loader)) for loader in loaders[:2])
    next(iter(loaders[2]))
    windows: Any = loaders[2]._pipe  # DALI's part of the loader, which ends with uint8 crops on a CPU
    jpegs = [jpeg for _, jpeg, _ in itertools.islice(common.read_samples(train), MAX_JPEGS)]
    images, (_, crops, *_) = next(batches).images, windows.run()
    assert images.shape == (batch_size, 3, 224, 224) and images.isfinite().all(), "loader: wrong batch"
    assert crops.as_tensor().shape() == [batch_size, 224, 224, 3], "DALI: wrong batch"
    check_pixels(jpegs[:32])
    with ThreadPoolExecutor(cores) as pool:  # simplejpeg releases the GIL

        def decode_all() -> None:
            list(pool.map(decode, [jpegs[start : start + CHUNK] for start in range(0, len(jpegs), CHUNK)]))

        contenders: dict[str, Callable[[], common.Rate]] = {
            LIMIT: partial(common.measure, decode_all, len(jpegs), seconds),
            WINDOWS: partial(common.measure, windows.run, batch_size, seconds),
            LOADER: partial(common.measure, partial(next, batches), batch_size, seconds),
            NO_LIGHTING: partial(common.measure, partial(next, others), batch_size, seconds),
            EIGENBASIS: partial(measure_sums, common.select_first_shards(train, MAX_SUMMED), cores),
        }
        rates = common.interleave(contenders, repeats)
    for loader in loaders:
        loader.close()
    data = common.describe_shards(train)
    print(f"{data}; batch {batch_size}, finished on {device.type}")
    print(f"{speed.num_threads} threads of DALI, {cores} of libjpeg-turbo, {repeats} repeats")
    context: dict[str, Any] = {"data": data, "shards": train.manifest_sha256, "device": device.type}
    context |= {"batch_size": batch_size, "threads": speed.num_threads}
    common.report_rates("training images", rates, LIMIT, out, **context)


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
