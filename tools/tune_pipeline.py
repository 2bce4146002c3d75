"""Find the loader's fastest settings for this machine and these shards by measurement.

    python tools/tune_pipeline.py SHARDS --out FILE.yaml
    python -m train.run --config BASE.yaml --config FILE.yaml --data.shards SHARDS --run.dir DIR

A coordinate search from the defaults: one setting after the other, a few values each, on top of the best so far; the
last two rows measure the defaults and the best again, and decide. The training loader runs with a consumer that sleeps
`--step-ms` per batch in place of the network. The criterion is the wait for a batch: the 99th percentile first, as one
late batch delays every GPU of a run, then the mean. Each measurement has its own seed, so that none profits from shards
that another has read into memory.

The p99 of fewer than a hundred batches is about the longest wait: use a larger `--seconds`. Settings that change the
content of batches are not searched.
"""

import contextlib
import gc
import itertools
import math
import platform
import shlex
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import yaml
from tqdm import tqdm

from pipeline.errors import DataError, UserError
from pipeline.files import write_bytes
from pipeline.machine import num_cores
from pipeline.settings import Speed
from pipeline.shards import open_shards
from train.cli import run_program

if TYPE_CHECKING:
    from pipeline.loader import Loader

FIRST_LINE = "# Written by tools/tune_pipeline.py"
SAME_P99, SAME_P99_MS = 0.1, 0.5
"""99th percentiles of waits that differ by less than this fraction, or less than this, count as equal: noise."""
SAME_MEAN, SAME_MEAN_MS = 0.01, 0.05
"""Fraction and milliseconds by which means of waits may differ and count as equal."""
WARM_UP, MIN_BATCHES = 3, 3
"""Batches before a measurement, in addition to prefetched ones, and the least number of batches in it."""
IN_FLIGHT = 3
"""Batches that training holds on a GPU: the current one and those of queued steps."""

Settings = dict[str, Any]
"""A candidate: the fields of `pipeline.settings.Speed`, and `decode` of `DataConfig`."""


class Trial(NamedTuple):
    """A measured candidate: throughput, and its consumer's waits for a batch."""

    settings: Settings
    p99_ms: float = math.inf
    mean_ms: float = math.inf
    p50_ms: float = math.inf
    images_per_s: float = 0.0
    batches: int = 0
    """Measured ones; with fewer than a hundred the 99th percentile is about the longest wait."""
    error: str = ""
    """Reason of a failure."""


def tune_pipeline(
    shards: Path, batch_size: int = 128, step_ms: float = 0.0, seconds: float = 5.0, out: Path | None = None
) -> None:
    """Find the fastest settings of the loader for this machine and these shards, in one to three minutes.

    Tries up to 1.5 threads per core of this process. If several processes will share the machine, run it with the cores
    of one of them: `taskset -c 0-15 python tools/tune_pipeline.py ...`.

    Args:
        shards: Folder written by make_shards and compute_pca.
        batch_size: Images per batch of one process.
        step_ms: Milliseconds per training step, simulated by sleeping; 0: no pause. A network on the CPU also uses
            cores, which this does not simulate.
        seconds: Length of one measurement.
        out: YAML file for the settings, a second --config of train.run.
    """
    if batch_size < 1 or not 0 < seconds < math.inf or not 0 <= step_ms < math.inf:
        got = f"{batch_size}, {seconds:g}, {step_ms:g}"
        raise UserError(f"--batch-size, --seconds, --step-ms: expected >= 1, > 0 and >= 0, got {got}")
    if out and out.exists() and (out.is_dir() or not out.read_bytes().startswith(FIRST_LINE.encode())):
        raise UserError(f"--out {out}: expected a new file or one written by this program; give another name")
    from pipeline.eigenbasis import Eigenbasis
    from pipeline.loader import train_loader
    from train.device import pick_device, tune_malloc

    tune_malloc()  # as the trainer does
    device, train = pick_device("auto"), open_shards(shards, "train")
    basis = Eigenbasis.load(shards / "pca.json", train.manifest_sha256)
    on_gpu, seeds = device.type == "cuda", itertools.count()
    axes, in_flight = list_axes(num_cores(), on_gpu), IN_FLIGHT if on_gpu else 1
    max_trials = 3 + sum(map(len, axes))  # the defaults, all changes, the defaults and the best again
    machine = f"{num_cores()} cores, {device.type}"
    images = f"{train.num_samples} images in {len(train.tars)} shards, batch {batch_size}"
    print(
        f"{images}, {machine}: at most {max_trials} measurements of {seconds:g} s, plus start-up", flush=True
    )
    with tqdm(desc="measuring", total=max_trials, unit="candidate", disable=None, leave=False) as progress:

        def measure(settings: Settings) -> Trial:
            progress.update()
            gc.collect()  # a failed loader still holds GPU memory
            data = to_config(settings)["data"]
            speed = data["speed"] = Speed(**data["speed"])
            options: dict[str, Any] = {"batch_size": batch_size, "seed": next(seeds), "device": device}
            loader = train_loader(train, basis=basis, **options, **data)
            with contextlib.closing(loader):
                warm_up = WARM_UP + speed.prefetch_queue_depth + speed.reader_queue_depth
                waits_ms, total_s = measure_waits(loader, warm_up, step_ms, seconds, in_flight)
            p99_ms, p50_ms = np.percentile(waits_ms, [99, 50]).tolist()
            batches = len(waits_ms)
            return Trial(settings, p99_ms, fmean(waits_ms), p50_ms, batches * batch_size / total_s, batches)

        trials, best = search(default_settings(Speed().num_threads), axes, measure)
    print(format_table(trials))
    if best.settings == trials[0].settings:
        print("nothing was faster than the defaults")
    content = yaml.safe_dump(to_config(best.settings), sort_keys=False)
    if out:
        origin = f"{shlex.join(sys.argv)}\n#   {platform.node()}, {machine}; manifest {train.manifest_sha256}"
        out.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(out, f"{FIRST_LINE}\n#   {origin}\n{content}".encode())
    print(f"{content}\npass {out or 'these settings in a file'} as a second --config to train.run")


def default_settings(threads: int) -> Settings:
    """Return the candidate of the defaults."""
    names = ("prefetch_queue_depth", "reader_queue_depth", "hw_decoder_load")
    return {"threads": threads, **{name: getattr(Speed, name) for name in names}, "decode": "auto"}


def to_config(settings: Settings) -> dict[str, Any]:
    """Return the keys of a run's configuration, without `decode: auto`: a run that began with `auto` may resume with
    other speed settings, but not with another `decode`."""
    speed = {name: value for name, value in settings.items() if name != "decode"}
    decode = {} if settings["decode"] == "auto" else {"decode": settings["decode"]}
    return {"data": decode | {"speed": speed}}


def list_axes(cores: int, on_gpu: bool) -> list[list[Settings]]:
    """List the changes to try, per setting."""
    threads = sorted({1, max(cores // 2, 1), cores, cores * 3 // 2} - {Speed().num_threads})
    axes: list[list[Settings]] = [
        [{"threads": number} for number in threads],
        [{"prefetch_queue_depth": batches} for batches in (1, 4, 8)],
        [{"reader_queue_depth": threads} for threads in (1, 8, 16)],
    ]
    if on_gpu:
        axes.append([{"hw_decoder_load": share} for share in (0.0, 0.3, 0.5, 0.8, 1.0)])
        # Decoding on the CPU needs every core, whatever was best for decoding on the GPU.
        axes.append([{"decode": "cpu"}, {"decode": "cpu", "threads": cores + 1}])
    return axes


def search(
    default: Settings, axes: Sequence[Sequence[Settings]], measure: Callable[[Settings], Trial]
) -> tuple[list[Trial], Trial]:
    """Search coordinate by coordinate.

    The lowest of several noisy measurements is biased, so the defaults and the best are measured again at the end, and
    these two decide.

    Args:
        default: The first candidate.
        axes: Changes to try on the best candidate so far; on `default` as long as none succeeded.
        measure: Measures a candidate; after a `RuntimeError` (from DALI or PyTorch, such as out of memory) or
            `MemoryError` the search continues.

    Returns all trials in order, and the best. Raises `DataError` with the first reason when all failed.
    """
    trials: list[Trial] = []

    def attempt(settings: Settings) -> None:
        try:
            trials.append(measure(settings))
        except (RuntimeError, MemoryError) as error:
            trials.append(Trial(settings, error=(str(error) or type(error).__name__).splitlines()[0]))

    attempt(default)
    for axis in axes:
        base = pick_best(trials).settings
        for settings in (base | change for change in axis):
            if all(trial.settings != settings for trial in trials):
                attempt(settings)
    best = pick_best(trials)
    if best.error:
        raise DataError(f"all settings failed; with the defaults: {trials[0].error}")
    if best is not trials[0]:
        attempt(default)
        attempt(best.settings)
        best = pick_best(trials[-2:])
    return trials, best


def pick_best(trials: Sequence[Trial]) -> Trial:
    """Pick the first trial, as it is nearest to the defaults, of those with about the lowest mean, of those with about
    the lowest 99th percentile."""
    p99_ms = min(trial.p99_ms for trial in trials)
    p99_ms = max(p99_ms * (1 + SAME_P99), p99_ms + SAME_P99_MS)
    candidates = [trial for trial in trials if trial.p99_ms <= p99_ms]
    mean_ms = min(trial.mean_ms for trial in candidates)
    mean_ms = max(mean_ms * (1 + SAME_MEAN), mean_ms + SAME_MEAN_MS)
    return next(trial for trial in candidates if trial.mean_ms <= mean_ms)


def measure_waits(
    loader: "Loader", warm_up: int, step_ms: float, seconds: float, in_flight: int
) -> tuple[list[float], float]:
    """Load batches for about `seconds`, after `warm_up` of them, with a consumer that sleeps `step_ms` per batch and
    holds `in_flight` of them. Returns milliseconds waited for each, and seconds in all.

    Raises `DataError` (a `RuntimeError`) when DALI fails.
    """
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    current: deque[Any] = deque(itertools.islice(batches, warm_up), maxlen=in_flight)
    waits_ms: list[float] = []
    start = perf_counter()
    while len(waits_ms) < MIN_BATCHES or perf_counter() - start < seconds:
        request = perf_counter()
        current.append(next(batches))  # synchronous: the loader waits for the device
        waits_ms.append(1e3 * (perf_counter() - request))
        sleep(step_ms / 1e3)
    return waits_ms, perf_counter() - start


def format_table(trials: Sequence[Trial]) -> str:
    """Format a row per trial."""
    names = list(trials[0].settings)
    lines = ["  ".join([*names, "| images/s", "    p50", "    p99", "   mean ms waited", "batches"])]
    for each in trials:
        row = "  ".join(f"{each.settings[name]!s:>{len(name)}}" for name in names)
        waits = f"{each.p50_ms:7.2f}  {each.p99_ms:7.2f}  {each.mean_ms:7.2f}"
        lines.append(
            f"{row}  | {each.error or f'{each.images_per_s:8.0f}  {waits}           {each.batches:7}'}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(tune_pipeline)
