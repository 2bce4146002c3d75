"""Benchmark packing: make_shards, a plain pool with Pillow, and the codec that bounds both.

Every contender except `CODEC` packs all images of RAW, both splits, into a temporary folder. Its time is the whole job:
starting processes, reading, packing, writing. make_shards is timed by its own clock, which excludes the start of Python
and the listing of RAW, as the others' do; its CPU time includes both. The page cache is not dropped: what fits into
memory is read from there.
"""

import io
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.machine import num_cores
from tools.benchmarks import common
from tools.packing.layouts import read_archives
from tools.packing.listing import RawImage

BASELINE, CODEC = "Pool + Pillow + ShardWriter", "decode + encode alone (simplejpeg)"
CROP256, ORIGINAL = "make_shards --store crop256", "make_shards --store original"
SAMPLES_PER_SHARD, QUALITY = 1000, 90
MAX_IN_MEMORY = 2000
"""Images that `CODEC` works on, kept in memory."""
SPAWN = multiprocessing.get_context("spawn")


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

        def measure(work: Callable[[list[RawImage], Path, int], common.Rate]) -> common.Rate:
            with tempfile.TemporaryDirectory(dir=folder) as target:
                os.sync()  # flush the writes of the previous contender
                return work(images, Path(target), workers)

        contenders: dict[str, Callable[[], common.Rate]] = {
            BASELINE: partial(measure, pack_plainly),
            CROP256: partial(measure, partial(run_make_shards, raw, "crop256")),
            CODEC: partial(measure_codec, images[:MAX_IN_MEMORY], workers),
            ORIGINAL: partial(measure, partial(run_make_shards, raw, "original")),
        }
        rates = common.interleave(contenders, repeats)
    num_bytes = sum(image.size for image in images)
    generated = "generated " if (raw / "demo.json").exists() else ""  # by make_demo
    data = f"{len(images)} {generated}images of {num_bytes / len(images) / 1e3:.0f} kB"
    print(f"{data}; {workers} workers, {repeats} repeats")
    rows = common.print_table("packed", rates, BASELINE)
    common.append_rows(out, "pack", rows, data, images=len(images), bytes=num_bytes, workers=workers)


def list_images(raw: Path) -> list[RawImage]:
    """List the images of ILSVRC-2012's archives. Raises `FileNotFoundError` or `ValueError`."""
    return [image for listing in read_archives(raw).splits.values() for image in listing]


def run_make_shards(raw: Path, store: str, images: list[RawImage], shards: Path, workers: int) -> common.Rate:
    """Measure one run of make_shards, by its own clock. Raises `ValueError` with its message when it fails."""
    command = [sys.executable, str(common.ROOT / "tools" / "make_shards.py"), "pack", str(raw), str(shards)]
    command += ["--store", store, "--workers", str(workers), "--samples-per-shard", str(SAMPLES_PER_SHARD)]
    outputs: list[str] = []

    def run() -> int:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        outputs.extend((done.stdout, done.stderr))
        return len(images)

    rate = common.measure_job(run)
    found = re.search(r"^packed (\d+) images in .*\((\d+) images/s", outputs[0], re.MULTILINE)
    if not found:
        raise ValueError(f"{raw}: make_shards failed: {(outputs[1] or outputs[0]).strip()}")
    assert int(found[1]) == len(images), "make_shards: not every image is packed"
    return rate._replace(per_s=float(found[2]))


def pack_plainly(images: list[RawImage], target: Path, workers: int) -> common.Rate:
    """Pack with a process pool that crops images, and a parent that writes them."""
    import webdataset

    def pack() -> int:
        with (
            ProcessPoolExecutor(workers, SPAWN) as pool,
            webdataset.ShardWriter(str(target / "%06d.tar"), maxcount=SAMPLES_PER_SHARD, verbose=0) as writer,
        ):
            jpegs = pool.map(crop_with_pillow, images, chunksize=16)
            for number, (image, jpeg) in enumerate(zip(images, jpegs, strict=True)):
                writer.write({"__key__": f"{number:08d}", "jpg": jpeg, "cls": image.label})
        return len(images)

    return common.measure_job(pack)


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

    squares = [np.asarray(Image.open(io.BytesIO(crop_with_pillow(image)))) for image in images[:32]]
    jpegs = [image.read() for image in images]

    def transcode(number: int) -> bool:
        try:
            simplejpeg.decode_jpeg(jpegs[number], "RGB")
        except ValueError:
            return False
        square = squares[number % len(squares)]
        simplejpeg.encode_jpeg(square, quality=QUALITY, colorspace="RGB", colorsubsampling="420")
        return True

    with ThreadPoolExecutor(workers) as pool:  # simplejpeg releases the GIL
        return common.measure_job(lambda: sum(pool.map(transcode, range(len(jpegs)))))
