"""How fast batches come: the loader beside what its decoder could do, and beside what one would write without it."""

import itertools
import multiprocessing
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia.dali import pipeline_def
from torch.utils.data import DataLoader, IterableDataset

from pipeline.decode import Decoder, decode_extents, trace_window
from pipeline.draws import CROP_SIDE, OFFSETS, draw
from pipeline.eigenbasis import Eigenbasis
from pipeline.graph import read_graph, window_graph
from pipeline.lighting import Lighting
from pipeline.loader import train_loader
from pipeline.machine import num_cores, raise_open_files
from pipeline.settings import Augmentation, DataConfig, Speed
from pipeline.shards import IMAGE_SIDE, DataError, ShardSet, open_shards
from tools.benchmarks.measure import Table, rate, take_turns
from tools.benchmarks.record import check_out, describe, record
from train.device import keep_freed_memory, pick_device

LIMIT = "libjpeg-turbo alone (simplejpeg, whole)"
MAX_JPEGS = 2000
"""Enough that no file stays in a core's cache."""


def bench_loader(
    shards: Path,
    batch_size: int,
    threads: int | None,
    seconds: float,
    repeats: int,
    device: str,
    out: Path | None,
) -> None:
    """See `tools/bench.py loader`."""
    if batch_size < 1 or repeats < 1 or seconds <= 0 or (threads is not None and threads < 1):
        raise ValueError("--batch-size, --repeats and --threads must be at least 1, --seconds positive")
    check_out(out)
    keep_freed_memory()  # as the trainer does
    train = open_shards(shards, "train")
    basis = Eigenbasis.load(shards / "pca.json", train.manifest_sha256)
    processes, speed = threads or num_cores(), Speed(threads=threads)
    place, config = pick_device(device), DataConfig(shards, speed=speed)
    batches = train_loader(
        train, basis, config, batch_size=batch_size, seed=0, rank=0, num_ranks=1, device=place
    )
    endless = itertools.chain.from_iterable(itertools.repeat(batches))
    raise_open_files(2 * len(train.tars))
    for_gpu = host_pipeline(
        train, batch_size=batch_size, num_threads=speed.num_threads, device_id=None, seed=0
    )
    jpegs = read_jpegs(train)
    peer = DataLoader(
        Windows(jpegs, basis),
        batch_size,
        num_workers=processes,
        persistent_workers=True,
        multiprocessing_context="fork",  # so that the files are not copied to every worker
    )
    peer_batches: Iterator[Any] = iter(peer)

    with ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=keep_jpegs, initargs=(jpegs,)
    ) as pool:
        contenders: dict[str, Callable[[], float]] = {
            LIMIT: lambda: sum(pool.map(decode_rate, [seconds] * processes)),
            "uint8 pixels, as for a GPU (DALI, cpu)": lambda: rate(for_gpu.run, batch_size, seconds),
            f"loader: finished batches (train, on {place.type})": lambda: rate(
                lambda: next(endless), batch_size, seconds
            ),
            "torch DataLoader + Pillow, same batches": lambda: rate(
                lambda: next(peer_batches), batch_size, seconds
            ),
        }
        measured = take_turns(contenders, repeats)
    batches.close()

    print(f"{describe(train)}; batch {batch_size}")
    print(f"{speed.num_threads} threads of DALI, {processes} processes of the others, {repeats} repeats")
    table = Table("training windows", "images/s", measured, LIMIT)
    table.show()
    if out:
        settings = {"shards": train.manifest_sha256, "batch_size": batch_size, "threads": speed.num_threads}
        settings |= {"processes": processes, "seconds": seconds, "device": place.type}
        record(out, "loader", [table], describe(train), settings)


@pipeline_def(enable_checkpointing=True)
def host_pipeline(shards: ShardSet) -> Any:
    """What the host does where a GPU does the rest: decode training windows, or what they are made of, and labels."""
    encoded, digits = read_graph(shards, True, shuffle_buffer=1024)
    draws = draw(Augmentation(), 0, 0)
    if shards.any_size:
        extents = trace_window(encoded, CROP_SIDE, draws.crop_x * OFFSETS, draws.crop_y * OFFSETS)
        return decode_extents(encoded, extents), digits
    return window_graph(encoded, draws, Decoder(), "cpu"), digits


class Windows(IterableDataset):
    """What one writes without DALI: Pillow and numpy in worker processes, endlessly. Files come from memory."""

    def __init__(self, jpegs: list[bytes], basis: Eigenbasis) -> None:
        self.jpegs, self.mean = jpegs, basis.mean.astype(np.float32)
        self.shift_matrix, self.divisor = Lighting().shift_matrix(basis), np.float32(Lighting().divisor)

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        """Yield (224, 224, 3) float32 windows, flipped, relit and normalized, and a label."""
        import io

        from PIL import Image

        rng = np.random.default_rng(torch.initial_seed())
        while True:
            image = Image.open(io.BytesIO(self.jpegs[rng.integers(len(self.jpegs))])).convert("RGB")
            if image.size != (IMAGE_SIDE, IMAGE_SIDE):
                short = min(image.size)
                image = image.resize(
                    (round(image.width * IMAGE_SIDE / short), round(image.height * IMAGE_SIDE / short)),
                    Image.Resampling.BICUBIC,
                )
            left, top = (int(rng.integers(OFFSETS + 1)) + (side - IMAGE_SIDE) // 2 for side in image.size)
            window = np.asarray(image)[top : top + CROP_SIDE, left : left + CROP_SIDE]
            if rng.random() < 0.5:
                window = window[:, ::-1]
            mean = self.mean - (self.shift_matrix @ rng.standard_normal(3)).astype(np.float32)
            yield (window - mean) / self.divisor, 0


JPEGS: list[bytes] = []
"""The files that a worker process decodes."""


def read_jpegs(shards: ShardSet) -> list[bytes]:
    """The first images of a split, read by the webdataset library. Raises `DataError` when there is none."""
    import webdataset

    samples = webdataset.WebDataset(list(shards.tars), shardshuffle=False, empty_check=False)
    try:
        jpegs = [sample["jpg"] for sample in itertools.islice(samples, MAX_JPEGS)]
    except (OSError, ValueError, KeyError, tarfile.TarError) as error:
        raise DataError(
            f"{Path(shards.tars[0]).parent} cannot be read ({error}); pack or copy it again"
        ) from None
    if not jpegs:
        raise DataError(f"{Path(shards.tars[0]).parent} holds no image; pack or copy it again")
    return jpegs


def keep_jpegs(jpegs: list[bytes]) -> None:
    """Start a worker."""
    JPEGS.extend(jpegs)


def decode_rate(seconds: float) -> float:
    """Images per second that one process decodes whole, to uint8 RGB."""
    import simplejpeg

    endless = itertools.cycle(JPEGS)
    return rate(lambda: simplejpeg.decode_jpeg(next(endless), "RGB"), 1, seconds)
