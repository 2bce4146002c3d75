"""Find the loader's fastest settings for this machine and these shards, by measuring.

    python tools/tune_pipeline.py SHARDS --out FILE.yaml
    python -m train.run --config BASE.yaml --config FILE.yaml --data.shards SHARDS --run.dir DIR

A coordinate search from the defaults: one knob after the other takes each of a few values, on top of the best so far;
in the end, in the last two rows, the best has to beat the defaults once more. The real training loader runs, and
something that sleeps `--step-ms` a batch stands for the network. Waiting for batches is what counts: the 99th
percentile first, as one late batch holds up every GPU of a run, then the mean. Each measurement has a seed of its own,
so that none profits from shards that another has just brought into memory.

The p99 of fewer than a hundred batches is about the longest wait: a larger `--seconds` sees more. Knobs that change
what is in a batch (the shuffle buffer, the decode cache) are left alone.
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import yaml
from tqdm import tqdm

from pipeline.files import write_bytes
from pipeline.machine import num_cores
from pipeline.settings import DataConfig, Speed
from pipeline.shards import DataError, open_shards
from train.program import run_program

if TYPE_CHECKING:
    from pipeline.loader import Loader

FIRST_LINE = "# Written by tools/tune_pipeline.py"
SAME_P99, SAME_P99_MS = 0.1, 0.5
"""Waits whose 99th percentiles differ by less than this share, or by less than this, count as equal: one measurement
cannot tell them from noise, and a change has to pay."""
SAME_MEAN, SAME_MEAN_MS = 0.01, 0.05
"""The same for their means."""
WARM_UP, MIN_BATCHES = 3, 3
"""Batches before the clock starts, on top of those that the loader has prepared, and of a measurement at least."""
IN_FLIGHT = 3
"""Batches that training holds at a time on a GPU: the present one and those of the steps that are queued."""


@dataclass(frozen=True)
class Knobs:
    """A candidate; see `pipeline.settings.Speed` and `DataConfig.decode`."""

    threads: int
    prefetch: int = Speed.prefetch
    read_ahead: int = Speed.read_ahead
    hw_decoder_load: float = Speed.hw_decoder_load
    decode: Literal["auto", "cpu"] = "auto"

    def to_settings(self) -> dict[str, Any]:
        """Return the keys of a run's configuration. `decode` is left out where it is `auto`: a run that began with
        `auto` may take other knobs of speed, but no other `decode`."""
        knobs = asdict(self)
        decode = knobs.pop("decode")
        return {"data": ({} if decode == "auto" else {"decode": decode}) | {"speed": knobs}}


class Waits(NamedTuple):
    """Throughput, and the time that a candidate made its consumer wait for a batch."""

    images_per_s: float
    p50_ms: float
    p99_ms: float
    mean_ms: float
    batches: int
    """That were measured; with fewer than a hundred the 99th percentile is about the longest wait."""


class Trial(NamedTuple):
    """One row of the table; `waits` is None where the candidate failed."""

    knobs: Knobs
    waits: Waits | None
    error: str = ""


def tune_pipeline(
    shards: Path, batch_size: int = 128, step_ms: float = 0.0, seconds: float = 5.0, out: Path | None = None
) -> None:
    """Find the fastest settings of the loader for this machine and these shards, in one to three minutes.

    Threads are tried up to 1.5 per core of this process. Where several processes will share the machine, run it with
    the cores that one of them gets: `taskset -c 0-15 python tools/tune_pipeline.py ...`.

    Args:
        shards: Folder written by make_shards and compute_pca.
        batch_size: Images per batch of one process.
        step_ms: Milliseconds that the network takes for a batch; 0: batches are taken as fast as they come. It only
            sleeps: a network that computes on the CPU also takes cores away.
        seconds: Length of one measurement.
        out: YAML file for the settings, a second --config of train.run.
    """
    if batch_size < 1 or not 0 < seconds < math.inf or not 0 <= step_ms < math.inf:
        raise ValueError("--batch-size must be at least 1, --seconds positive, --step-ms not negative")
    if out and out.exists() and (out.is_dir() or not out.read_bytes().startswith(FIRST_LINE.encode())):
        raise ValueError(
            f"--out {out}: expected a new file or one written by this program; give another name"
        )
    from pipeline.eigenbasis import Eigenbasis
    from pipeline.loader import train_loader
    from train.device import keep_freed_memory, pick_device

    keep_freed_memory()  # as the trainer does
    device, train = pick_device("auto"), open_shards(shards, "train")
    basis = Eigenbasis.load(shards / "pca.json", train.manifest_sha256)
    on_gpu, seeds = device.type == "cuda", itertools.count()
    axes, in_flight = list_axes(num_cores(), on_gpu), IN_FLIGHT if on_gpu else 1
    at_most = 3 + sum(map(len, axes))  # the defaults, all changes, the defaults and the best again
    print(
        f"{train.num_samples} images in {len(train.tars)} shards, batch {batch_size}, {num_cores()} cores, on "
        f"{device.type}: at most {at_most} measurements of {seconds:g} s and a start each",
        flush=True,
    )
    with tqdm(desc="measuring", total=at_most, unit="candidate", disable=None, leave=False) as progress:

        def measure(knobs: Knobs) -> Waits:
            progress.update()
            gc.collect()  # a loader that failed still holds memory of the GPU
            data = knobs.to_settings()["data"]
            config = DataConfig(shards, **data | {"speed": Speed(**data["speed"])})
            place = {"rank": 0, "num_ranks": 1, "device": device}
            loader = train_loader(train, basis, config, batch_size=batch_size, seed=next(seeds), **place)
            with contextlib.closing(loader):
                warm_up = WARM_UP + knobs.prefetch + knobs.read_ahead
                return measure_waits(loader, warm_up, batch_size, step_ms, seconds, in_flight)

        trials, best = search(Knobs(Speed().num_threads), axes, measure)
    print(format_table(trials))
    if best.knobs == trials[0].knobs:
        print("the defaults are as good as anything that was tried")
    settings = yaml.safe_dump(best.knobs.to_settings(), sort_keys=False)
    if out:
        place = f"{platform.node()}, {num_cores()} cores, {device.type}; manifest {train.manifest_sha256}"
        origin = f"{FIRST_LINE}\n#   {shlex.join(sys.argv)}\n#   {place}\n"
        out.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(out, f"{origin}{settings}".encode())
    print(f"{settings}\npass {out or 'these settings in a file'} as a second --config to train.run")


def list_axes(cores: int, on_gpu: bool) -> list[list[dict[str, Any]]]:
    """List the changes to try, knob after knob."""
    threads = sorted({1, max(cores // 2, 1), cores, cores * 3 // 2} - {Speed().num_threads})
    axes: list[list[dict[str, Any]]] = [
        [{"threads": number} for number in threads],
        [{"prefetch": batches} for batches in (1, 4, 8)],
        [{"read_ahead": batches} for batches in (2, 4)],
    ]
    if on_gpu:
        axes.append([{"hw_decoder_load": share} for share in (0.0, 0.3, 0.5, 0.8, 1.0)])
        # Decoding on the CPU wants every core, whatever was best for decoding on the GPU.
        axes.append([{"decode": "cpu"}, {"decode": "cpu", "threads": cores + 1}])
    return axes


def search(
    default: Knobs, axes: Sequence[Sequence[dict[str, Any]]], measure: Callable[[Knobs], Waits]
) -> tuple[list[Trial], Trial]:
    """Search coordinate by coordinate.

    The lowest of several noisy figures is too low, so in the end the defaults and the best are measured once more, and
    these two figures decide.

    Args:
        default: The first candidate.
        axes: Per knob the changes to try on the best candidate so far; on `default` as long as none succeeded.
        measure: Measures a candidate; a `RuntimeError` (DALI's and PyTorch's, as of memory) or `MemoryError` means that
            it failed, and the search continues.

    Returns everything that was tried, in order, and the best of it. Raises `DataError` with the first reason when all
    failed.
    """
    trials: list[Trial] = []

    def attempt(knobs: Knobs) -> None:
        try:
            trials.append(Trial(knobs, measure(knobs)))
        except (RuntimeError, MemoryError) as error:
            trials.append(Trial(knobs, None, (str(error) or type(error).__name__).splitlines()[0]))

    attempt(default)
    for axis in axes:
        base = pick_best(trials).knobs if any(trial.waits for trial in trials) else default
        for change in axis:
            knobs = replace(base, **change)
            if all(trial.knobs != knobs for trial in trials):
                attempt(knobs)
    if not any(trial.waits for trial in trials):
        raise DataError(f"no setting works; with the defaults: {trials[0].error}")
    best = pick_best(trials)
    if trials[0].waits and best is not trials[0]:
        attempt(default)
        attempt(best.knobs)
        best = pick_best(trials[-2:]) if any(trial.waits for trial in trials[-2:]) else best
    return trials, best


def pick_best(trials: Sequence[Trial]) -> Trial:
    """Pick the best of the trials that did not fail, of which there must be one.

    Of those whose 99th percentile is about the lowest, those whose mean is about the lowest; of these the one that was
    tried first, for it is nearest to the defaults.
    """

    def about_lowest(figure: str, some: Sequence[Trial], share: float, ms: float) -> list[Trial]:
        lowest = min(getattr(trial.waits, figure) for trial in some)
        return [
            trial for trial in some if getattr(trial.waits, figure) <= max(lowest * (1 + share), lowest + ms)
        ]

    calm = about_lowest("p99_ms", [trial for trial in trials if trial.waits], SAME_P99, SAME_P99_MS)
    return about_lowest("mean_ms", calm, SAME_MEAN, SAME_MEAN_MS)[0]


def measure_waits(
    loader: "Loader", warm_up: int, batch_size: int, step_ms: float, seconds: float, in_flight: int
) -> Waits:
    """Take batches for about `seconds`, `warm_up` of them before, with a consumer that sleeps `step_ms` a batch and
    holds `in_flight` of them.

    Raises `DataError` (a `RuntimeError`) where DALI fails.
    """
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    held: deque[Any] = deque(itertools.islice(batches, warm_up), maxlen=in_flight)
    waits_ms: list[float] = []
    start = perf_counter()
    while len(waits_ms) < MIN_BATCHES or perf_counter() - start < seconds:
        request = perf_counter()
        held.append(next(batches))  # ready when it is there: the loader waits for the device
        waits_ms.append(1e3 * (perf_counter() - request))
        sleep(step_ms / 1e3)
    images_per_s = len(waits_ms) * batch_size / (perf_counter() - start)
    p50_ms, p99_ms = np.percentile(waits_ms, [50, 99])
    return Waits(images_per_s, float(p50_ms), float(p99_ms), float(np.mean(waits_ms)), len(waits_ms))


def format_table(trials: Sequence[Trial]) -> str:
    """Format a row for each trial."""
    names = list(asdict(trials[0].knobs))
    lines = [
        "  ".join([*names, "| images/s", "    p50", "    p99", "   mean", "batches"])
        + "  (wait for a batch, ms)"
    ]
    for trial in trials:
        row = "  ".join(f"{value!s:>{len(name)}}" for name, value in asdict(trial.knobs).items())
        row += "  | " + (
            "{:8.0f}  {:7.2f}  {:7.2f}  {:7.2f}  {:7}".format(*trial.waits) if trial.waits else trial.error
        )
        lines.append(row)
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(tune_pipeline)
