"""`tools/bench.py plan`: what packing costs before the first image is read, on a generated listing of any size."""

import resource
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter

from pipeline.shards import ClassName
from tools.benchmarks.measure import Table
from tools.benchmarks.record import check_out, record
from tools.packing.cache import load_listing, save_listing
from tools.packing.listing import Listing, RawImageNet
from tools.packing.plan import Options, make_plan

CLASSES = 21_841
"""Of ImageNet-21k, whose 14,197,122 images make the largest pack that people have."""


READ, PLAN, MEMORY = "read the listing", "plan", "memory at most"


def bench_plan(images: int, repeats: int, out: Path | None) -> None:
    """Measure and print; arguments as in `tools.bench.plan`."""
    if min(images, repeats) < 1:
        raise ValueError(f"--images and --repeats must be at least 1, but are {images} and {repeats}")
    check_out(out)
    with (
        tempfile.TemporaryDirectory(prefix="bench-plan-") as folder,
        ProcessPoolExecutor(
            1, get_context("spawn"), max_tasks_per_child=1
        ) as pool,  # each with a peak of its own
    ):
        path = Path(folder) / "listing.jsonl"
        written = pool.submit(write_listing, path, images).result()
        runs = [pool.submit(load_and_plan, path).result() for _ in range(repeats)]
    data = f"{images} made-up names in {min(CLASSES, images)} archives, a listing of {written / 1e6:.0f} MB"
    print(f"{data}; {repeats} repeats")
    loaded, planned, peaks = (list(values) for values in zip(*runs, strict=True))
    tables = [
        Table("before the first image is read", "s", {READ: loaded, PLAN: planned}, READ),
        Table("of the process", "GB", {MEMORY: peaks}, MEMORY),
    ]
    for table in tables:
        table.show()
    if out:
        record(out, "plan", tables, data, {"images": images})


def write_listing(path: Path, images: int) -> int:
    """Write the listing of so many images in per-class tars; returns its bytes."""
    listing, num_classes = Listing(path.parent), min(CLASSES, images)
    classes = tuple(ClassName(f"n{label:08d}", f"class {label}") for label in range(num_classes))
    for label, wnid in enumerate(name.wnid for name in classes):
        listing.files.append(f"{wnid}.tar")
        listing.file_bytes.append(0)
        for number in range(label * images // num_classes, (label + 1) * images // num_classes):
            listing.append(label, f"{wnid}_{number}.JPEG", 512 + number * 110_592, 110_000, label)
    save_listing(path, RawImageNet("per-class tars", classes, {"train": listing}), [])
    return path.stat().st_size


def load_and_plan(path: Path) -> tuple[float, float, float]:
    """Seconds to read the listing and to plan, and the peak of this process' memory in GB."""
    started = perf_counter()
    data = load_listing(path, path.parent, [])
    assert data is not None, "the listing that was just written is sound"
    loaded = perf_counter()
    make_plan(path.parent / "train", data.splits["train"], Options(), data.classes)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return loaded - started, perf_counter() - loaded, peak
