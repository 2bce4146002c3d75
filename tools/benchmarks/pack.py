"""`tools/bench.py pack`: the packer beside the one that everybody writes, and beside what bounds it.

Every contender but `CODEC` works on all images of RAW, both splits, and writes into a folder that is removed again. Its
time is that of the whole job: starting processes, reading, working, writing. make_shards is timed by its own clock,
which leaves out the start of Python and the listing of RAW, as the others' does. The page cache is left as it is:
whatever of RAW fits into memory is read from there.
"""

import contextlib
import functools
import io
import itertools
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from time import perf_counter

import numpy as np
from PIL import Image

from pipeline.machine import num_cores
from tools.benchmarks.measure import Table, take_turns
from tools.benchmarks.record import check_out, images_of, record
from tools.packing.ilsvrc import read_archives
from tools.packing.listing import RawImage

BASELINE, COPY, CODEC = "Pool + Pillow + ShardWriter", "plain copy", "decode + encode alone (simplejpeg)"
CROP256, ORIGINAL = "make_shards --store crop256", "make_shards --store original"
UNVERIFIED = f"{ORIGINAL} --verify false"
SAMPLES_PER_SHARD = 1000
QUALITY = 90
MAX_IN_MEMORY = 2000
"""Images that `CODEC` works on, kept in memory."""


def bench_pack(raw: Path, repeats: int, workers: int | None, scratch: Path | None, out: Path | None) -> None:
    """Measure and print; arguments as in `tools.bench.pack`."""
    if repeats < 1 or (workers is not None and workers < 1):
        raise ValueError("--repeats and --workers must be at least 1")
    source = read_archives(raw)
    check_out(out)
    splits = source.splits
    images = [image for split in splits.values() for image in split]
    random.Random(0).shuffle(images)  # packers shuffle: every contender reads at random places
    num_bytes = sum(image.size for image in images)
    workers = workers or num_cores()
    chunks = [images[start : start + SAMPLES_PER_SHARD] for start in range(0, len(images), SAMPLES_PER_SHARD)]
    slices = [images[:MAX_IN_MEMORY][worker::workers] for worker in range(workers)]
    spawn = multiprocessing.get_context("spawn")

    with (
        tempfile.TemporaryDirectory(prefix="bench-pack-", dir=scratch or raw.resolve().parent) as folder,
        ProcessPoolExecutor(workers, spawn) as executor,
    ):

        def job(work: Callable[[Path], float]) -> Callable[[], float]:
            return functools.partial(in_new_folder, Path(folder), work)

        def copy(target: Path) -> float:
            started = perf_counter()
            paths = [target / f"{number:06d}" for number in range(len(chunks))]
            with ProcessPoolExecutor(workers, spawn) as pool:
                copied = sum(pool.map(copy_images, chunks, paths))
            seconds = perf_counter() - started
            assert copied == num_bytes, "every image is copied"
            return len(images) / seconds

        contenders: dict[str, Callable[[], float]] = {
            BASELINE: job(lambda target: baseline(workers, images, target)),
            CROP256: job(lambda target: pack_once(raw, target, workers, "crop256")),
            CODEC: lambda: sum(executor.map(codec_rate, slices)),
            COPY: job(copy),
            ORIGINAL: job(lambda target: pack_once(raw, target, workers, "original")),
            UNVERIFIED: job(lambda target: pack_once(raw, target, workers, "original", "--verify", "false")),
        }
        measured = take_turns(contenders, repeats)

    data = f"{len(images)} {images_of(source.classes)} of {num_bytes / len(images) / 1e3:.0f} kB"
    print(f"{data}; {workers} workers, {repeats} repeats")

    def table(title: str, names: tuple[str, ...]) -> Table:
        return Table(title, "images/s", {name: measured[name] for name in names}, names[0])

    cropped = table("packed at 256x256", (BASELINE, CROP256, CODEC))
    cropped.show()
    print(f"{CROP256} reaches {cropped._replace(reference=CODEC).ratio(CROP256):.2f} of {CODEC}\n")
    copied = table("packed as they are", (COPY, ORIGINAL, UNVERIFIED))
    copied.show()
    if out:
        settings = {"images": len(images), "bytes": num_bytes, "workers": workers}
        record(out, "pack", [cropped, copied], data, settings)


def in_new_folder(parent: Path, work: Callable[[Path], float]) -> float:
    """Call `work` with a folder of its own, removed afterwards; nobody pays for what another left to be written."""
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        os.sync()
        return work(Path(folder))


def pack_once(raw: Path, shards: Path, workers: int, store: str, *options: str) -> float:
    """Images per second of one run of make_shards, by its own clock.

    Raises `ValueError` with what it says when it fails.
    """
    root = Path(__file__).resolve().parents[2]
    command = [
        sys.executable,
        str(root / "tools" / "make_shards.py"),
        "pack",
        str(raw),
        str(shards),
        "--store",
        store,
    ]
    command += ["--workers", str(workers), "--samples-per-shard", str(SAMPLES_PER_SHARD), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = re.search(r"^packed \d+ images in .*\((\d+) images/s", done.stdout, re.MULTILINE)
    if done.returncode or not said:
        raise ValueError(f"make_shards failed on {raw}: {done.stderr.strip() or done.stdout.strip()}")
    return float(said[1])


def baseline(workers: int, images: list[RawImage], target: Path) -> float:
    """Images per second of the pack that everybody writes: a pool makes the images, the parent writes them down."""
    import webdataset

    started = perf_counter()
    pattern = str(target / "%06d.tar")
    with (
        ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool,
        webdataset.ShardWriter(pattern, maxcount=SAMPLES_PER_SHARD, start_shard=0, verbose=0) as writer,
    ):
        jpegs = pool.map(crop_with_pillow, images, chunksize=16)
        for number, (image, jpeg) in enumerate(zip(images, jpegs, strict=True)):
            writer.write({"__key__": f"{number:08d}", "jpg": jpeg, "cls": image.label})
    return len(images) / (perf_counter() - started)


def crop_with_pillow(image: RawImage) -> bytes:
    """Read an image and bring it to 256x256; the decoder may shrink it by 2, 4 or 8 on the way."""
    out = io.BytesIO()
    with Image.open(io.BytesIO(image.read())) as opened:
        opened.draft("RGB", (256, 256))
        rgb = opened.convert("RGB")
    width, height = (round(side * 256 / min(rgb.size)) for side in rgb.size)
    left, top = (width - 256) // 2, (height - 256) // 2
    resized = rgb.resize((width, height), Image.Resampling.BICUBIC)
    resized.crop((left, top, left + 256, top + 256)).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


def copy_images(images: list[RawImage], path: Path) -> int:
    """Copy images one after another into a file, to the disk. Returns the bytes written."""
    with path.open("wb") as file:
        written = sum(file.write(image.read()) for image in images)
        file.flush()
        os.fsync(file.fileno())
    return written


def codec_rate(images: list[RawImage]) -> float:
    """Images per second that one process decodes whole and encodes at 256x256, with nothing in between.

    Files that libjpeg-turbo alone does not turn into RGB (CMYK, PNG) are left out.
    """
    import simplejpeg

    decode = functools.partial(simplejpeg.decode_jpeg, colorspace="RGB", fastdct=False, fastupsample=False)
    jpegs, squares = [], []
    for jpeg in map(RawImage.read, images):
        with contextlib.suppress(ValueError):
            decode(jpeg)
            jpegs.append(jpeg)
    for image in images[:32]:
        with Image.open(io.BytesIO(crop_with_pillow(image))) as opened:
            squares.append(np.asarray(opened))
    started = perf_counter()
    for jpeg, square in zip(jpegs, itertools.cycle(squares), strict=False):
        decode(jpeg)
        simplejpeg.encode_jpeg(
            square, quality=QUALITY, colorspace="RGB", colorsubsampling="420", fastdct=False
        )
    return len(jpegs) / (perf_counter() - started)
