"""Pack raw ImageNet into WebDataset shards with DALI indexes; check, describe and adopt shards.

    python tools/make_shards.py pack RAW SHARDS
    python tools/make_shards.py verify SHARDS
    python tools/make_shards.py stats SHARDS
    python tools/make_shards.py adopt SRC SHARDS --split train --pattern GLOB

Shards depend on the raw images, the options and the seed alone, not on the number of workers, machines or restarts.
"""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal, NoReturn

try:
    from pipeline.shards import classes_json
except ModuleNotFoundError as error:
    sys.stderr.write(
        f"error: this Python has no {error.name}; run `make install` once, then .venv/bin/python tools/make_shards.py\n"
    )
    sys.exit(2)
from tools.packing.adopt import adopt
from tools.packing.layouts import check_md5, cut_validation, open_raw
from tools.packing.listing import RawImageNet, random_read_rate, save_listing
from tools.packing.parquet import pack_parquet
from tools.packing.plan import Options, Plan, find_part, make_plan
from tools.packing.pool import check_workers
from tools.packing.verify import stats, verify
from tools.packing.writer import (
    LISTING,
    PackStats,
    claim_output,
    find_unfinished,
    read_sidecars,
    run_jobs,
    write_manifest,
    write_shard,
)
from train.program import run_program

SLOW_READS_PER_S = 500
"""Random reads below this keep one core waiting: it packs about as many images a second."""
WORTH_A_WARNING_S = 600
VAL_FRACTION = 0.1
"""Of each class, set aside for validation where no images are given for it."""


def pack(
    raw: Path,
    shards: Path,
    store: Literal["crop256", "original"] = "crop256",
    samples_per_shard: int = 1000,
    workers: int | None = None,
    seed: int = 2012,
    quality: int = 90,
    on_bad: Literal["fail", "skip"] = "fail",
    val_fraction: float | None = None,
    part: str | None = None,
    check_md5: bool = False,
) -> None:
    """Pack raw images into shards.

    Run again after an interruption, it does what is left.

    Args:
        raw: Folder with the raw images, of which nothing is extracted. One of: the three archives of ILSVRC-2012;
            Kaggle's ILSVRC/Data/CLS-LOC and LOC_val_solution.csv; class folders, as train/<class> and val/<class> or
            as <class> alone; the same folders in train.tar and val.tar, or in one tar; a <class>.tar for each class;
            Hugging Face's train-*.parquet and validation-*.parquet.
        shards: Folder to write into; new, empty, or begun by the same command.
        store: 256x256 JPEGs, or the files as they are.
        samples_per_shard: Images per shard, at most; shards differ by one image at most.
        workers: Processes; every core by default.
        seed: Seed of the one global order in which images are packed.
        quality: JPEG quality of what is encoded, 1 to 100.
        on_bad: What to do with an image that cannot be decoded: stop, or leave it out and list it in the manifest.
        val_fraction: Part of each class to set aside for validation, at least one image, where the source has no
            validation images; a tenth by default, 0 for none.
        part: Share of this machine as i/n (i from 1, or from 0 to n-1); by default torchrun's or srun's
            variables, else everything. All parts write into the same folder.
        check_md5: First compare the archives with the published MD5 sums.
    """
    options = Options(store, quality, samples_per_shard, seed, val_fraction or 0.0, on_bad)
    mine = find_part(part, os.environ)
    workers = check_workers(workers)
    data, validity = open_raw(raw, shards / LISTING)
    print_layout(raw, shards, data)
    if check_md5:
        check_archives(raw, data)
    listed = data
    if val_fraction is None and "val" not in data.splits:
        options = replace(
            options, val_fraction=VAL_FRACTION if len(data.splits["train"]) > len(data.classes) else 0.0
        )
    if options.val_fraction:
        data = cut_validation(data, options.val_fraction, seed)
        print(
            f"no validation images: {len(data.splits['val'])} of the training images are set aside, "
            f"{options.val_fraction:.3g} of each class, at least one (seed {seed}); --val-fraction 0 keeps them"
        )
    elif "val" not in data.splits:
        print(
            "no validation images, of which training needs some; a tenth is set aside unless --val-fraction is 0"
        )
    plans = [
        make_plan(shards / split, listing, options, data.classes) for split, listing in data.splits.items()
    ]
    if data.sequential and mine.world > 1:
        raise ValueError("parquet files are read in order, which cannot be shared out; pack them in one part")
    if not data.sequential:
        warn_of_slow_reads(raw, data, workers)
    claim_output(shards, classes_json(data.classes), plans)
    if validity:
        save_listing(shards / LISTING, listed, validity)

    started, done = time.perf_counter(), []
    if mine.world > 1:
        print(
            f"part {mine.rank + 1} of {mine.world}: every {mine.world}th shard; the other parts have to run as well"
        )
    left = [(plan, number) for plan in plans for number in find_unfinished(plan)]
    own = [(plan, number) for plan, number in left if number % mine.world == mine.rank]
    if data.sequential:
        for plan in plans:
            if numbers := [number for owner, number in own if owner is plan]:
                done += pack_parquet(plan, numbers, workers)
    elif own:
        images = sum(last - first for plan, number in own for first, last in [plan.bounds(number)])
        done = run_jobs(write_shard, (plan.shard(number) for plan, number in own), images, workers)
    if not left:
        print("every shard is there already; nothing to do")
    print_speed(done, time.perf_counter() - started, workers)
    for plan in plans:
        finish(plan, data)


def print_layout(raw: Path, shards: Path, data: RawImageNet) -> None:
    """Say what was found. Raises `ValueError` when the output would lie among the images."""
    if data.in_folders and shards.resolve().is_relative_to(raw.resolve()):
        raise ValueError(
            f"{shards} lies inside {raw}, whose folders are read as images; give a folder elsewhere"
        )
    counts = ", ".join(f"{len(listing)} {split} images" for split, listing in data.splits.items())
    print(f"{raw}: {data.layout}, {len(data.classes)} classes, {counts}", flush=True)
    if others := data.ignored:
        print(
            f"ignored {len(others)} files that are not images by their names or lie outside of class folders, such "
            f"as {others[0]}"
        )
    if len(data.classes) == 1:
        print(
            f"warning: there is one class, {data.classes[0].wnid!r}: nothing can be learned from that; is it meant?"
        )


def finish(plan: Plan, data: RawImageNet) -> None:
    """Write the manifest if this split is whole, and say how it stands."""
    if manifest := write_manifest(plan, len(data.classes), data.layout):
        print(
            f"{plan.directory}: {manifest['num_samples']} images in {len(manifest['shards'])} shards, "
            f"{len(manifest['repairs'])} repaired or noted, {len(manifest['skipped'])} skipped"
        )
    else:
        missing = plan.num_shards - len(read_sidecars(plan))
        print(f"{plan.directory}: {missing} of {plan.num_shards} shards are left to other parts or packers")


def check_archives(raw: Path, data: RawImageNet) -> None:
    """Compare MD5 sums. Raises `ValueError` for other layouts, which have none, and for archives that differ."""
    if "archives" not in data.layout:
        raise ValueError(
            f"--check-md5 is for the archives of ILSVRC-2012; there are no published sums of {data.layout}"
        )
    check_md5(raw)
    print("the archives have the published MD5 sums")


def warn_of_slow_reads(raw: Path, data: RawImageNet, workers: int) -> None:
    """Measure the source for a second; say what a slow one means, and the remedy."""
    images = sum(len(listing) for listing in data.splits.values())
    rate = random_read_rate(data.splits["train"], readers=max(8, workers))
    if rate < SLOW_READS_PER_S and images / rate > WORTH_A_WARNING_S:
        print(
            f"warning: {raw} gives {rate:.0f} images a second when read at random, which is {images / rate / 3600:.1f} "
            "hours for all; copy the archives to an SSD first"
        )


def print_speed(done: list[PackStats], seconds: float, workers: int) -> None:
    """Print the pack's figures."""
    images, read, written = (
        sum(getattr(x, n) for x in done) for n in ("images", "bytes_read", "bytes_written")
    )
    if images:
        print(
            f"packed {images} images in {seconds:.1f} s ({images / seconds:.0f} images/s, {workers} workers, "
            f"{read / 1e6 / seconds:.0f} MB/s read, {written / 1e6 / seconds:.0f} MB/s written)"
        )
    if busy := sum(result.busy for result in done):
        print(f"{busy} shards are being written by another process")


def main() -> NoReturn:
    """The command line."""
    run_program({"pack": pack, "verify": verify, "stats": stats, "adopt": adopt})


if __name__ == "__main__":
    main()
