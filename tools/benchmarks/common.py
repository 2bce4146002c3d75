"""Measure contenders in turns: images per second and per CPU-second, tables, rows of JSON.

Contenders take turns within one run, so that a drift of the machine's speed affects all of them. Every other round is
in reverse order, so that no position is an advantage, and the first round is a warm-up.

CPU time is the user and system time of this process and its descendants, including those that have ended, from /proc,
to 10 ms. Torch and DALI are imported where they are used: workers import this file, and some benchmarks time their
start.
"""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import distributions
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.errors import DataError, UserError
from pipeline.files import check_writable
from pipeline.machine import num_cores
from pipeline.shards import ShardSet

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]
STEPS_ON_A_GPU = 20
"""Steps between two synchronizations, so that the host runs ahead of the GPU."""
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
SETTLE_S = 3.0
"""Longest wait for the queues of the previous contender to fill."""
PACKAGES = ("torch", "nvidia-dali-cuda120", "simplejpeg", "numpy", "pillow", "webdataset", "spdl")
"""Packages whose versions are in a row, if they are installed."""


class Rate(NamedTuple):
    """One measurement."""

    per_s: float
    """Images per second."""
    per_cpu_s: float
    """Images per CPU-second."""


Rates = dict[str, list[Rate]]
"""By contender, one per turn."""


def read_cpu_seconds() -> float:
    """Sum the CPU time of this process and its descendants, including ended ones that were waited for."""
    ticks: dict[int, int] = {}
    children = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # the process has ended
            continue
        pid = int(stat.parent.name)
        ticks[pid] = sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime (man 5 proc)
        children[int(fields[1])].append(pid)
    total, pids = 0, [os.getpid()]
    while pids:
        pid = pids.pop()
        total += ticks.get(pid, 0)
        pids += children[pid]
    return total / TICKS_PER_S


def measure_job(work: Callable[[], int]) -> Rate:
    """Measure a whole job that returns its number of images."""
    cpu_s, started = read_cpu_seconds(), perf_counter()
    images = work()
    seconds, cpu_s = perf_counter() - started, read_cpu_seconds() - cpu_s
    return Rate(images / seconds, images / max(cpu_s, 1 / TICKS_PER_S))


def measure(
    step: Callable[[], Any],
    images: int,
    seconds: float,
    device: "torch.device | None" = None,
    begin: Callable[[], Any] = lambda: None,
) -> Rate:
    """Measure calls of `step`, each of `images`, for about `seconds`, including the work they queue on a GPU.

    A quarter of that time is a warm-up that uses up prefetched batches; then `begin` is called.
    """
    on_gpu = device is not None and device.type == "cuda"

    def run(seconds: float) -> int:
        steps, end = 0, perf_counter() + seconds
        while steps == 0 or perf_counter() < end:
            for _ in range(STEPS_ON_A_GPU if on_gpu else 1):
                step()
                steps += 1
            if on_gpu:
                import torch

                torch.cuda.synchronize(device)
        return steps * images

    run(seconds / 4)
    begin()
    return measure_job(lambda: run(seconds))


def interleave(contenders: Mapping[str, Callable[[], Rate]], repeats: int) -> Rates:
    """Measure each contender `repeats` times, in turns, after a warm-up round."""
    rates: Rates = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name in list(contenders)[:: 1 if turn % 2 else -1]:
            settle()
            rates[name].append(contenders[name]())
    return {name: values[1:] for name, values in rates.items()}


def settle() -> None:
    """Wait, at most `SETTLE_S`, until the previous contender has filled its queues and our processes are idle."""
    end, previous = perf_counter() + SETTLE_S, -1.0
    while perf_counter() < end and (now := read_cpu_seconds()) > previous + 1 / TICKS_PER_S:
        previous = now
        sleep(0.05)


def report_rates(title: str, rates: Rates, reference: str, out: Path | None, **context: Any) -> None:
    """Print medians, ranges and ratios to the reference, turn by turn, and append them to `out`, a row each."""
    width, rows = max(40, len(title), *map(len, rates)), []
    print(f"{title:<{width}} images/s      min      max  ratio  images/CPU-s  ratio")
    for name, values in rates.items():
        per_s, per_cpu_s = ([value[field] for value in values] for field in (0, 1))
        pairs = np.array(values) / np.array(rates[reference])
        ratio, ratio_per_cpu_s = np.median(pairs, axis=0).tolist()
        numbers = [f(per_s) for f in (median, min, max)]
        text = " ".join(f"{number:>8.{0 if number >= 100 else 2}f}" for number in numbers)
        print(f"{name:<{width}} {text} {ratio:>6.2f} {median(per_cpu_s):>13.1f} {ratio_per_cpu_s:>6.2f}")
        row: dict[str, Any] = {"contender": name, "table": title, "unit": "images/s", "reference": reference}
        row |= {"ratio": ratio, "median": numbers[0], "values": per_s, "values_per_cpu_s": per_cpu_s}
        rows.append(row | {"ratio_per_cpu_s": ratio_per_cpu_s, "median_per_cpu_s": median(per_cpu_s)})
    append_rows(out, rows, **context)


def append_rows(out: Path | None, rows: list[dict[str, Any]], **context: Any) -> None:
    """Append a line of JSON per row, with `context` and the environment to repeat the measurement."""
    if out:
        environment = describe_environment()
        with out.open("a") as file:
            file.writelines(json.dumps(row | environment | context) + "\n" for row in rows)


def check_options(out: Path | None, **numbers: float | None) -> None:
    """Raise `UserError` or `OSError` for a number that is not positive, or an `out` that cannot be written."""
    for name, value in numbers.items():
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')}: expected a number above 0, got {value:g}")
    if out and out.suffix != ".jsonl":
        raise UserError(f"--out: expected a file of JSON lines, NAME.jsonl, got {out}")
    if out:
        check_writable(out)


def describe_shards(shards: ShardSet) -> str:
    """Describe the data: "1600 generated images, 32 kB each, in 2 shards of store crop256"."""
    kilobytes = sum(Path(tar).stat().st_size for tar in shards.tars) / shards.num_samples / 1000
    generated = all(name.wnid.startswith("n9") for name in shards.classes)  # make_demo's; WordNet has n0, n1
    images = f"{shards.num_samples} {'generated ' if generated else ''}images, {kilobytes:.0f} kB each"
    return f"{images}, in {len(shards.tars)} shards of store {shards.store}"


def read_samples(shards: ShardSet) -> Iterator[tuple[str, bytes, int]]:
    """Yield key, image's file and class index of every sample, in stored order, by webdataset. Raises `DataError`."""
    import webdataset

    extension = "npy" if shards.is_decoded else "jpg"
    try:
        for sample in webdataset.WebDataset(list(shards.tars), shardshuffle=False, empty_check=False):
            yield sample["__key__"], sample[extension], int(sample["cls"])
    except (OSError, ValueError, KeyError, tarfile.TarError) as error:
        place = Path(shards.tars[0]).parent
        raise DataError(f"{place}: damaged shard ({error}); copy or pack it again") from None


def select_first_shards(shards: ShardSet, images: int) -> ShardSet:
    """Select the first shards that together hold at least `images`, or all."""
    starts = shards.find_starts()
    return shards.only([k for k in range(len(shards.tars)) if starts[k] < images])


def describe_environment() -> dict[str, Any]:
    """Collect commit ("-dirty" with uncommitted changes), command, hardware and versions."""
    import torch

    git = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    cpu = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    module = Path("/proc/driver/nvidia/version")
    driver = re.search(r"Module\s.*?(\d+\.[\d.]+)", module.read_text()) if module.exists() else None
    versions = {each.name.lower(): each.version for each in distributions() if each.name.lower() in PACKAGES}
    return {
        "benchmark": next(iter(sys.argv[1:]), ""),
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
        "command": shlex.join(["python", "tools/bench.py", *sys.argv[1:]]),
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": num_cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "driver": driver[1] if driver else None,
        "versions": {"python": platform.python_version()} | versions,
    }
