"""Pack raw ImageNet into WebDataset shards with DALI indexes; check, describe and adopt shards.

    python tools/make_shards.py pack RAW SHARDS
    python tools/make_shards.py verify SHARDS
    python tools/make_shards.py stats SHARDS
    python tools/make_shards.py adopt SRC SHARDS --split train --pattern GLOB
    python tools/make_shards.py decode SHARDS OUT
    python tools/make_shards.py index SHARDS [--out DIR]

Shards depend only on the raw images, the options and the seed, not on the number of workers, machines or restarts.
"""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

try:
    from pipeline.shards import classes_json
except ModuleNotFoundError as error:
    sys.stderr.write(
        f"error: this Python has no {error.name}; run `make install` once, then .venv/bin/python tools/make_shards.py\n"
    )
    sys.exit(2)
from pipeline.errors import UserError
from tools.packing.adopt import adopt
from tools.packing.decode import decode
from tools.packing.index import index
from tools.packing.labels import choose_classes, split_off_validation
from tools.packing.layouts import open_raw, verify_md5
from tools.packing.listing import RawImageNet, measure_random_reads, save_listing
from tools.packing.parquet import pack_parquet
from tools.packing.plan import Options, Plan, find_part, make_plan
from tools.packing.pool import check_workers, run_jobs
from tools.packing.verify import stats, verify
from tools.packing.writer import (
    LISTING,
    PackStats,
    claim_output,
    find_unfinished,
    read_sidecars,
    write_manifest,
    write_shard,
)
from train.cli import run_program, sanitize_message

SLOW_READS_PER_S = 500
"""Images per second that one core packs; if random reads are slower, packing waits for the disk."""
WORTH_A_WARNING_S = 600
"""Seconds that all reads have to take for a warning of slow ones."""
VAL_FRACTION = 0.1
"""Part of each class for validation where the source has no validation images."""


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
    classes: Path | None = None,
    labels: Path | None = None,
    part: str | None = None,
    check_md5: bool = False,
) -> None:
    """Pack raw images into shards. The same command resumes an interrupted pack.

    Args:
        raw: Folder of the raw images; nothing is extracted. One of: the three archives of ILSVRC-2012; class folders,
            as train/<class> and val/<class> or as <class> alone; the same folders in train.tar and val.tar, or in one
            tar; a <class>.tar for each class; Kaggle's ILSVRC/Data/CLS-LOC or tiny-imagenet with their labels of val/;
            Hugging Face's parquet files; images in any folders, with --labels. Validation images may come alone.
        shards: Folder to write into; new, empty, or written by the same command.
        store: 256x256 JPEGs, or the files as they are.
        samples_per_shard: Images per shard, at most; shards differ by one image at most.
        workers: Processes; every core by default.
        seed: Seed of the global shuffle.
        quality: JPEG quality of encoded images, 1 to 100.
        on_bad: What to do with an undecodable image: stop, or leave it out and list it in the manifest.
        val_fraction: Part of each class for validation, at least one image, where the source has none (default: a
            tenth; 0 for none; 1: all are validation images).
        classes: Classes to pack, one a line, or the classes.json of other shards, to validate a network trained on
            those (default: all).
        labels: List of image and class, a pair a line, for images that are not in class folders.
        part: Part of this machine as i/n (i from 1, or from 0 to n-1); by default from torchrun's or srun's variables,
            else everything. All parts write into the same folder.
        check_md5: First compare the archives with the published MD5 sums.
    """
    options = Options(store, quality, samples_per_shard, seed, val_fraction or 0.0, on_bad)
    task = find_part(part, os.environ)
    workers = check_workers(workers)
    data, validity = open_raw(raw, shards / LISTING, labels)
    listed = data
    if val_fraction == 1:
        data = split_off_validation(data, 1, seed)
    data = choose_classes(data, classes)
    print_layout(raw, shards, data, sum(map(len, listed.splits.values())))
    if check_md5:
        verify_md5(raw, data.layout)
        print("the archives have the published MD5 sums")
    if val_fraction is None and "val" not in data.splits:
        options = replace(
            options, val_fraction=VAL_FRACTION if len(data.splits["train"]) > len(data.classes) else 0.0
        )
    if 0 < options.val_fraction < 1:
        data = split_off_validation(data, options.val_fraction, seed)
        print(
            f"no validation images: using {len(data.splits['val'])} training images, {options.val_fraction:.3g} of "
            f"each class, at least one (seed {seed}); --val-fraction 0 keeps them"
        )
    elif "train" not in data.splits:
        print("validation images alone: networks can be evaluated on them, not trained")
    elif "val" not in data.splits:
        remedy = (
            "add some" if val_fraction is None else "leave --val-fraction out to use a tenth of each class"
        )
        print(f"no validation images, which training needs; {remedy}")
    plans = [
        make_plan(shards / split, listing, options, data.classes) for split, listing in data.splits.items()
    ]
    if data.sequential and task.world > 1:
        raise UserError(f"--part: expected one part for parquet files, got {task.world}; leave it out")
    if not data.sequential:
        warn_if_slow(raw, data, workers)
    claim_output(shards, classes_json(data.classes), plans)
    if validity:
        save_listing(shards / LISTING, listed, validity)

    started, results = time.perf_counter(), []
    if task.world > 1:
        print(f"part {task.rank + 1} of {task.world}: one shard in {task.world}; run the other parts as well")
    unfinished = [(plan, number) for plan in plans for number in find_unfinished(plan)]
    assigned = [(plan, number) for plan, number in unfinished if number % task.world == task.rank]
    if data.sequential:
        for plan in plans:
            if numbers := [number for owner, number in assigned if owner is plan]:
                results += pack_parquet(plan, numbers, workers)
    else:
        sizes = [size for plan, number in assigned for size in plan.num_images([number])]
        shards_to_write = (plan.shard(number) for plan, number in assigned)
        results = run_jobs(write_shard, shards_to_write, sizes, workers, "packing", "img")
    if not unfinished:
        print("all shards exist; nothing to do")
    print_speed(results, time.perf_counter() - started, workers)
    for plan in plans:
        finish_split(plan, data)


def print_layout(raw: Path, shards: Path, data: RawImageNet, num_listed: int) -> None:
    """Print the layout, and what is left out of `num_listed` images. Raises `UserError` when the output would lie among
    the images."""
    if data.in_folders and shards.resolve().is_relative_to(raw.resolve()):
        raise UserError(
            f"{shards}: expected a folder outside of {raw}, whose folders are classes; give another"
        )
    counts = ", ".join(f"{len(listing)} {split} images" for split, listing in data.splits.items())
    print(f"{raw}: {data.layout}, {len(data.classes)} classes, {counts}", flush=True)
    if left_out := num_listed - sum(map(len, data.splits.values())):
        print(f"left out {left_out} images of classes that --classes does not list")
    if others := data.ignored:
        print(sanitize_message(f"ignored {len(others)} files or folders, such as {others[0]}"))
    names = [name.wnid for name in data.classes]
    if all(map(str.isdecimal, names)) and names != sorted(names, key=int):
        print(f"note: class names are sorted as text: {', '.join(names[:3])}, ...")
    if len(data.classes) == 1:
        print(
            f"warning: only one class, {data.classes[0].wnid!r}, from which nothing can be learned; check RAW"
        )


def finish_split(plan: Plan, data: RawImageNet) -> None:
    """Write the manifest if all shards exist, and print the state of the split."""
    if manifest := write_manifest(plan, len(data.classes), data.layout):
        print(
            f"{plan.directory}: {manifest['num_samples']} images in {len(manifest['shards'])} shards, "
            f"{len(manifest['repairs'])} repaired or noted, {len(manifest['skipped'])} skipped"
        )
    else:
        missing = plan.num_shards - len(read_sidecars(plan))
        print(f"{plan.directory}: {missing} of {plan.num_shards} shards are left to other parts or packers")


def warn_if_slow(raw: Path, data: RawImageNet, workers: int) -> None:
    """Measure random reads of the source for a second; warn if they will take most of the time."""
    images = sum(len(listing) for listing in data.splits.values())
    rate = measure_random_reads(max(data.splits.values(), key=len), readers=max(8, workers))
    if rate < SLOW_READS_PER_S and images / rate > WORTH_A_WARNING_S:
        print(
            f"warning: {raw}: {rate:.0f} random reads/s, {images / rate / 3600:.1f} hours for all images; copy the "
            "archives to an SSD first"
        )


def print_speed(results: list[PackStats], seconds: float, workers: int) -> None:
    """Print images and bytes per second."""
    images, read, written = (
        sum(getattr(each, name) for each in results) for name in ("images", "bytes_read", "bytes_written")
    )
    if images:
        print(
            f"packed {images} images in {seconds:.1f} s ({images / seconds:.0f} images/s, {workers} workers, "
            f"{read / 1e6 / seconds:.0f} MB/s read, {written / 1e6 / seconds:.0f} MB/s written)"
        )


if __name__ == "__main__":
    run_program(
        {"pack": pack, "verify": verify, "stats": stats, "adopt": adopt, "decode": decode, "index": index}
    )
