"""Benchmark packing: make_shards, a plain pool with Pillow, and the codec that bounds both.

Every contender except `CODEC` packs all images of RAW, both splits, into a temporary folder. Its time is the whole job:
starting processes, reading, packing, writing, and for make_shards listing RAW. The page cache is not dropped: what fits
into memory is read from there.
"""

import contextlib
import io
import itertools
import multiprocessing
import os
import random
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from pipeline.machine import num_cores
from tools.benchmarks import common
from tools.make_shards import pack
from tools.packing.layouts import read_archives
from tools.packing.listing import RawImage

BASELINE, CODEC = "Pool + Pillow + ShardWriter", "decode + encode alone (simplejpeg)"
SAMPLES_PER_SHARD, QUALITY = 1000, 90
MAX_IN_MEMORY = 2000
"""Images that `CODEC` works on, kept in memory."""


def bench_pack(
    raw: Path,
    repeats: int = 3,
    workers: int | None = None,
    scratch: Path | None = None,
    out: Path | None = None,
) -> None:
    """Measure make_shards, a pool with Pillow and webdataset's ShardWriter, and the codec alone.

    Args:
        raw: Folder with the archives of ILSVRC-2012, or with what `tools/make_demo.py --photos` writes.
        repeats: Measurements of each contender, taken in turns; each packs all of RAW.
        workers: Processes of each contender (default: one per core).
        scratch: Folder to write into, as large as RAW; emptied again (default: the one that RAW is in).
        out: File of JSON lines to append one row per contender to.
    """
    common.check_options(out, repeats=repeats, workers=workers)
    images = list_images(raw)
    random.Random(0).shuffle(images)  # packers shuffle: every contender reads at random places
    workers = workers or num_cores()
    with tempfile.TemporaryDirectory(prefix="bench-pack-", dir=scratch or raw.resolve().parent) as folder:

        def measure(work: Callable[..., int], *arguments: Any) -> common.Rate:
            with tempfile.TemporaryDirectory(dir=folder) as target:
                os.sync()  # flush the writes of the previous contender
                return common.measure_job(lambda: work(Path(target), workers, *arguments))

        def run_make_shards(target: Path, workers: int, store: Literal["crop256", "original"]) -> int:
            with contextlib.redirect_stdout(io.StringIO()):
                pack(raw, target, store, SAMPLES_PER_SHARD, workers)
            return len(images)

        contenders = {
            BASELINE: partial(measure, pack_plainly, images),
            "make_shards --store crop256": partial(measure, run_make_shards, "crop256"),
            CODEC: partial(measure_codec, images[:MAX_IN_MEMORY], workers),
            "make_shards --store original": partial(measure, run_make_shards, "original"),
        }
        rates = common.interleave(contenders, repeats)
    num_bytes = sum(image.size for image in images)
    generated = "generated " if (raw / "demo.json").exists() else ""  # by make_demo
    data = f"{len(images)} {generated}images of {num_bytes / len(images) / 1e3:.0f} kB"
    print(f"{data}; {workers} workers, {repeats} repeats")
    context = {"data": data, "images": len(images), "bytes": num_bytes, "workers": workers}
    common.report_rates("packed", rates, BASELINE, out, **context)


def list_images(raw: Path) -> list[RawImage]:
    """List the images of ILSVRC-2012's archives. Raises `FileNotFoundError` or `ValueError`."""
    return [image for listing in read_archives(raw).splits.values() for image in listing]


def pack_plainly(target: Path, workers: int, images: list[RawImage]) -> int:
    """Pack with a process pool that crops images, and a parent that writes them."""
    import webdataset

    with (
        ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool,
        webdataset.ShardWriter(str(target / "%06d.tar"), maxcount=SAMPLES_PER_SHARD, verbose=0) as writer,
    ):
        jpegs = pool.map(crop_with_pillow, images, chunksize=16)
        for number, (image, jpeg) in enumerate(zip(images, jpegs, strict=True)):
            writer.write({"__key__": f"{number:08d}", "jpg": jpeg, "cls": image.label})
    return len(images)


def crop_with_pillow(image: RawImage) -> bytes:
    """Read an image, resize and crop it to 256x256; the decoder may reduce it by 2, 4 or 8."""
    out = io.BytesIO()
    with Image.open(io.BytesIO(image.read())) as opened:
        opened.draft("RGB", (256, 256))
        rgb = opened.convert("RGB")
    width, height = (round(side * 256 / min(rgb.size)) for side in rgb.size)
    left, top = (width - 256) // 2, (height - 256) // 2
    resized = rgb.resize((width, height), Image.Resampling.BICUBIC)
    resized.crop((left, top, left + 256, top + 256)).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


def measure_codec(images: list[RawImage], workers: int) -> common.Rate:
    """Measure threads that decode whole images and encode 256x256 ones, without resizing. Files that libjpeg-turbo does
    not decode to RGB (CMYK, PNG) are skipped."""
    import simplejpeg

    def transcode(jpeg: bytes, square: np.ndarray) -> bool:
        try:
            simplejpeg.decode_jpeg(jpeg, "RGB")
        except ValueError:
            return False
        simplejpeg.encode_jpeg(square, quality=QUALITY, colorspace="RGB", colorsubsampling="420")
        return True

    jpegs = [image.read() for image in images]
    squares = [np.asarray(Image.open(io.BytesIO(crop_with_pillow(image)))) for image in images[:32]]
    with ThreadPoolExecutor(workers) as pool:  # simplejpeg releases the GIL
        return common.measure_job(lambda: sum(pool.map(transcode, jpegs, itertools.cycle(squares))))
