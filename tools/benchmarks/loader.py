"""Benchmark the training loader, and the decoders that bound it."""

import io
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.eigenbasis import Eigenbasis
from pipeline.lighting import Lighting
from pipeline.machine import num_cores, raise_open_files
from pipeline.settings import Augmentation, DataConfig, Speed
from pipeline.shards import ShardSet, open_shards
from tools.benchmarks import common

if TYPE_CHECKING:
    from nvidia.dali import Pipeline

LIMIT, WINDOWS = "libjpeg-turbo alone (simplejpeg, whole)", "uint8 pixels, as for a GPU (DALI, cpu)"
LOADER, NO_LIGHTING = "loader: finished batches", "loader: the same without lighting (strength 0)"
EIGENBASIS = "compute_pca: decode and sum, exact"
MAX_JPEGS, MAX_SUMMED, CHUNK = 2000, 20_000, 16
"""Enough to exceed a core's cache, and for a pass of some seconds; images per task of a thread."""
SUM_BATCH = 64


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
    raise_open_files(4 * len(train.tars))
    settings = DataConfig(shards, speed=speed)
    no_lighting = replace(settings, augmentation=Augmentation(lighting=Lighting(strength=0)))
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "seed": 0,
        "rank": 0,
        "num_ranks": 1,
        "device": device,
    }
    loaders = [train_loader(train, basis, config, **options) for config in (settings, no_lighting)]
    batches, others = (itertools.chain.from_iterable(itertools.repeat(loader)) for loader in loaders)
    windows = decode_windows(train, batch_size, speed.num_threads)
    jpegs = [jpeg for _, jpeg, _ in itertools.islice(common.read_samples(train), MAX_JPEGS)]
    check_work(jpegs, windows, next(batches).images)
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
    rows = common.print_table("training images", rates, LIMIT)
    context: dict[str, Any] = {
        "shards": train.manifest_sha256,
        "batch_size": batch_size,
        "device": device.type,
    }
    common.append_rows(out, "loader", rows, data, threads=speed.num_threads, **context)


def check_work(jpegs: list[bytes], windows: "Pipeline", images: Any) -> None:
    """Assert that contenders decode Pillow's pixels and yield full batches. `bench peers` checks the loader's
    pixels."""
    import simplejpeg
    from PIL import Image

    for jpeg in jpegs[:32]:
        expected = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"), np.int16)
        assert np.abs(simplejpeg.decode_jpeg(jpeg, "RGB") - expected).max() <= 1, (
            "libjpeg-turbo: wrong pixels"
        )
    pixels, _ = windows.run()
    assert len(pixels) == len(images) and np.asarray(pixels[0]).dtype == np.uint8, "DALI: wrong batch"
    assert images.shape[1:] == (3, 224, 224) and images.isfinite().all(), "loader: wrong batch"


def decode_windows(shards: ShardSet, batch_size: int, threads: int) -> "Pipeline":
    """Build the host's part of a pipeline with a GPU: decode training windows, or the pixels that they are resampled
    from, and read labels."""
    from nvidia.dali import pipeline_def

    from pipeline.decode import Decoder, decode_rois, trace_window
    from pipeline.draws import CROP_SIDE, OFFSETS, sample_params
    from pipeline.graph import read_graph, window_graph

    @pipeline_def(batch_size=batch_size, num_threads=threads, device_id=None, seed=0)
    def graph() -> Any:
        encoded, digits = read_graph(shards, True, shuffle_buffer=1024)
        params = sample_params(Augmentation(), 0, 0)
        if not shards.any_size:
            return window_graph(encoded, params, Decoder(), "cpu"), digits
        rois = trace_window(encoded, CROP_SIDE, params.crop_x * OFFSETS, params.crop_y * OFFSETS)
        return decode_rois(encoded, rois), digits

    return graph()


def decode(jpegs: list[bytes]) -> None:
    """Decode whole images to uint8 RGB."""
    import simplejpeg

    for jpeg in jpegs:
        simplejpeg.decode_jpeg(jpeg, "RGB")


def measure_sums(train: ShardSet, threads: int) -> common.Rate:
    """Measure one pass of compute_pca's sums on the CPU, without the first batch, at which DALI starts."""
    from tools.moments import sum_batches

    sums = sum_batches(train, SUM_BATCH, threads)
    next(sums)
    return common.measure_job(lambda: sum(each.moments.num_images for each in sums))
