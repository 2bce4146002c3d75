"""Find the speed knobs of the loader for this machine and these shards, by measuring.

    python tools/tune_pipeline.py SHARDS --out FILE.yaml
    python -m train.run --config BASE.yaml --config FILE.yaml --data.shards SHARDS --run.dir DIR

A coordinate search from the defaults: one knob after the other takes each of a few values, the best of all that was
measured goes on; in the end it has to beat the defaults once more. The real training loader runs, and in the network's
place something that takes `--step-ms` a batch. What counts is how long it would wait: the 99th percentile first, as one
late batch holds up every GPU of a run, then the mean. Each measurement has a seed of its own, so that none profits from
shards that another has just brought into memory.

One measurement a candidate cannot tell differences of some per cent from noise, so a change has to pay to be taken;
more `--seconds` see more. Knobs that change what is in a batch (the shuffle buffer, the decode cache) are left alone.
"""

import contextlib
import gc
import itertools
import math
import platform
import shlex
import sys
import textwrap
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
from pipeline.shards import DataError, ShardSet, open_shards
from tools.benchmarks.measure import processor
from train.device import keep_freed_memory
from train.program import run_program

if TYPE_CHECKING:
    import torch

    from pipeline.eigenbasis import Eigenbasis

WARM_UP = 3
"""Batches before the clock starts, besides those that the loader has prepared ahead."""
MIN_BATCHES = 3
"""Batches of a measurement, however long they take."""
IN_FLIGHT = 3
"""Batches that training holds at a time on a GPU: the present one and those of the steps that are queued."""
SAME_P99, SAME_P99_MS = 0.1, 0.5
"""Waits whose 99th percentiles differ by less than this share, or by less than this, count as equal."""
SAME_MEAN, SAME_MEAN_MS = 0.01, 0.05
"""The same for their means."""
FIRST_LINE = "# Written by tools/tune_pipeline.py"


@dataclass(frozen=True)
class Knobs:
    """A candidate; see `pipeline.settings.Speed` and `DataConfig.decode`."""

    threads: int
    prefetch: int = Speed.prefetch
    affinity: bool = Speed.affinity
    read_ahead: int = Speed.read_ahead
    hw_decoder_load: float = Speed.hw_decoder_load
    decode: Literal["cpu", "gpu"] = "cpu"

    def speed(self) -> dict[str, Any]:
        """What goes under `data.speed`."""
        knobs = {name: value for name, value in asdict(self).items() if name != "decode"}
        if self.decode == "cpu":
            del knobs["hw_decoder_load"]
        return knobs


class Waits(NamedTuple):
    """How one candidate did."""

    images_per_s: float
    p50_ms: float
    p99_ms: float
    mean_ms: float
    """Of the time in which a batch was waited for."""
    batches: int
    """That were measured; with fewer than a hundred the 99th percentile is about the longest wait."""


class Trial(NamedTuple):
    """One row of the table."""

    knobs: Knobs
    waits: Waits | None
    """None where the candidate failed."""
    error: str = ""


def tune(
    shards: Path,
    batch_size: int = 128,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    step_ms: float = 0.0,
    seconds: float = 5.0,
    out: Path | None = None,
) -> None:
    """Find the fastest settings of the loader for this machine and these shards, in one to three minutes.

    Threads are tried up to 1.5 per core of this process. Where several processes will share the machine, run it with
    the cores that one of them gets: `taskset -c 0-15 python tools/tune_pipeline.py ...`.

    Args:
        shards: Folder written by make_shards and compute_pca.
        batch_size: Images per batch of one process.
        device: Where batches end up; auto takes the first GPU if there is one.
        step_ms: Milliseconds that the network takes for a batch; 0: batches are taken as fast as they come. It only
            sleeps: a network that computes on the CPU also takes cores away.
        seconds: Length of one measurement.
        out: YAML file for the settings, a second --config of train.run.
    """
    if batch_size < 1 or not 0 < seconds < math.inf or not 0 <= step_ms < math.inf:
        raise ValueError("--batch-size must be at least 1, --seconds positive, --step-ms not negative")
    if out:
        check_out(out)
    from pipeline.eigenbasis import Eigenbasis
    from train.device import pick_device

    keep_freed_memory()  # as the trainer does
    place = pick_device(device)
    train = open_shards(shards, "train")
    basis = Eigenbasis.load(shards / "pca.json", train.manifest_sha256)
    cores = num_cores()
    start = Knobs(threads=Speed().num_threads, decode="gpu" if place.type == "cuda" else "cpu")
    axes = list_axes(cores, on_gpu=place.type == "cuda")
    at_most = 3 + sum(map(len, axes))  # the defaults, all changes, the defaults and the best again
    seeds = itertools.count()

    def run(knobs: Knobs, length_s: float) -> Waits:
        gc.collect()  # a loader that failed still holds memory of the GPU
        config = DataConfig(shards, decode=knobs.decode, speed=Speed(**knobs.speed()))
        return measure(train, basis, config, batch_size, place, step_ms, length_s, next(seeds))

    started = perf_counter()
    with contextlib.suppress(RuntimeError, MemoryError):  # it is measured again, and then told
        run(start, 0)  # pays for what only the first one has to load; thrown away
    one_s = perf_counter() - started + seconds
    print(
        f"{train.num_samples} images in {len(train.tars)} shards, batch {batch_size}, {cores} cores, on {place.type}: "
        f"at most {at_most} measurements of about {one_s:.1f} s, {at_most * one_s:.0f} s in all",
        flush=True,
    )
    with tqdm(desc="measuring", total=at_most, unit="candidate", disable=None, leave=False) as progress:

        def run_and_count(knobs: Knobs) -> Waits:
            try:
                return run(knobs, seconds)
            finally:
                progress.update()

        trials, best = search(start, axes, run_and_count)
    print(table(trials, best))
    tell(trials, best)

    settings = data_settings(best.knobs, on_gpu=place.type == "cuda")
    if out:
        write_bytes(
            out,
            (header(train, batch_size, place, best.knobs.decode) + yaml.safe_dump(settings, sort_keys=False)).encode(),
        )
        files = f"--config BASE.yaml --config {shlex.quote(str(out))}"
        print(f"{out} is written; use it so, after the run's own configuration:")
    else:
        chosen = {f"data.{name}": value for name, value in settings["data"].items() if name != "speed"}
        chosen |= {f"data.speed.{name}": value for name, value in settings["data"]["speed"].items()}
        files = "--config BASE.yaml " + " ".join(f"--{name} {str(value).lower()}" for name, value in chosen.items())
        print("use the best so (--out FILE.yaml writes it into a file instead):")
    print(f"python -m train.run {files} --data.shards {shlex.quote(str(shards))} --run.dir DIR")
    if "decode" in settings["data"]:
        print("data.decode moves some pixels by a level, so a run that was begun without it cannot go on with it")


def list_axes(cores: int, on_gpu: bool) -> list[list[dict[str, Any]]]:
    """What is tried besides the defaults, knob after knob: changes to the best candidate so far."""
    threads = sorted({1, max(cores // 2, 1), cores, cores * 3 // 2} - {Speed().num_threads})
    axes: list[list[dict[str, Any]]] = [
        [{"threads": number} for number in threads],
        [{"prefetch": batches} for batches in (1, 4, 8)],
        [{"affinity": True}],
        [{"read_ahead": batches} for batches in (2, 4)],
    ]
    if on_gpu:
        axes.append([{"hw_decoder_load": share} for share in (0.0, 0.3, 0.5, 0.8, 1.0)])
        # Decoding on the CPU wants every core, whatever was best for decoding on the GPU.
        axes.append([{"decode": "cpu"}, {"decode": "cpu", "threads": cores + 1}])
    return axes


def search(
    start: Knobs, axes: Sequence[Sequence[dict[str, Any]]], measure: Callable[[Knobs], Waits]
) -> tuple[list[Trial], Trial]:
    """Coordinate search.

    The lowest of several noisy figures is too low, so in the end the defaults and the best are measured once more, and
    these two figures decide.

    Args:
        start: The first candidate, the defaults.
        axes: Per knob the changes to try on the best candidate so far; on `start` as long as none succeeded.
        measure: Measures a candidate; a `RuntimeError` (DALI's and PyTorch's, as of memory) or `MemoryError` means that
            it failed, and the search goes on.

    Returns everything that was tried, in order, and the best of it. Raises `DataError` with the first reason when all
    failed.
    """
    trials: list[Trial] = []

    def attempt(knobs: Knobs) -> None:
        try:
            trials.append(Trial(knobs, measure(knobs)))
        except (RuntimeError, MemoryError) as error:
            trials.append(Trial(knobs, None, (str(error) or type(error).__name__).splitlines()[0]))

    attempt(start)
    for axis in axes:
        base = pick(trials).knobs if any(trial.waits for trial in trials) else start
        for change in axis:
            knobs = replace(base, **change)
            if all(trial.knobs != knobs for trial in trials):
                attempt(knobs)
    if not any(trial.waits for trial in trials):
        raise DataError(f"no setting works; with the defaults: {trials[0].error}")
    best = pick(trials)
    if trials[0].waits and best is not trials[0]:
        attempt(start)
        attempt(best.knobs)
        if any(trial.waits for trial in trials[-2:]):
            best = pick(trials[-2:])
    return trials, best


def pick(trials: Sequence[Trial]) -> Trial:
    """The best of those that did not fail, of which there must be one.

    Of those whose 99th percentile is about the lowest, those whose mean is about the lowest; of these the one that was
    tried first, for it is nearest to the defaults.
    """
    done = [(trial, trial.waits) for trial in trials if trial.waits]
    lowest = min(waits.p99_ms for _, waits in done)
    calm = [
        (trial, waits) for trial, waits in done if waits.p99_ms <= max(lowest * (1 + SAME_P99), lowest + SAME_P99_MS)
    ]
    mean = min(waits.mean_ms for _, waits in calm)
    return next(trial for trial, waits in calm if waits.mean_ms <= max(mean * (1 + SAME_MEAN), mean + SAME_MEAN_MS))


def measure(
    shards: ShardSet,
    basis: "Eigenbasis",
    config: DataConfig,
    batch_size: int,
    device: "torch.device",
    step_ms: float,
    seconds: float,
    seed: int,
) -> Waits:
    """Run the training loader for about `seconds`, with a consumer that sleeps `step_ms` a batch.

    Raises `ValueError` where the images do not fill a batch, `DataError` (a `RuntimeError`) where DALI fails.
    """
    from pipeline.loader import train_loader

    loader = train_loader(shards, basis, config, batch_size=batch_size, seed=seed, rank=0, num_ranks=1, device=device)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    held: deque[Any] = deque(maxlen=IN_FLIGHT if device.type == "cuda" else 1)
    waits_s: list[float] = []
    started = 0.0
    try:
        for number in itertools.count(-WARM_UP - config.speed.prefetch - config.speed.read_ahead):
            asked = perf_counter()
            if number <= 0:
                started = asked
            held.append(next(batches))  # ready when it is there: the loader waits for the device
            if number >= 0:
                waits_s.append(perf_counter() - asked)
            sleep(step_ms / 1e3)
            elapsed_s = perf_counter() - started
            if number + 1 >= MIN_BATCHES and elapsed_s >= seconds:
                break
    finally:
        held.clear()
        loader.close()
    waits_ms = 1e3 * np.array(waits_s)
    p50_ms, p99_ms = np.percentile(waits_ms, [50, 99])
    rate = len(waits_s) * batch_size / elapsed_s
    return Waits(rate, float(p50_ms), float(p99_ms), float(waits_ms.mean()), len(waits_s))


def table(trials: Sequence[Trial], best: Trial) -> str:
    """Everything that was tried, a row each, the best one marked with a star."""
    on_gpu = any(trial.knobs.decode == "gpu" for trial in trials)
    names = ["threads", "prefetch", "affinity", "read_ahead", *(["hw_decoder_load", "decode"] if on_gpu else [])]
    figures = ["images/s", "p50 ms", "p99 ms", "mean ms", "batches"]
    lines = ["  " + "  ".join(names) + "  | " + "  ".join(f"{name:>8}" for name in figures) + "  (wait for a batch)"]
    for trial in trials:
        knobs = asdict(trial.knobs)
        if trial.knobs.decode == "cpu":
            knobs["hw_decoder_load"] = "-"
        row = "  ".join(f"{str(knobs[name]).lower():>{len(name)}}" for name in names)
        if waits := trial.waits:
            told = f"{waits.images_per_s:>8.0f}  " + "  ".join(f"{value:>8.2f}" for value in waits[1:4])
            told += f"  {waits.batches:>8}"
        else:
            told = f"failed: {trial.error}"
        lines.append(f"{'*' if trial is best else ' '} {row}  | {told}")
    return "\n".join(lines)


def tell(trials: Sequence[Trial], best: Trial) -> None:
    """Say what the best one gains, and how far that can be trusted."""
    default = next(trial for trial in reversed(trials) if trial.knobs == trials[0].knobs)
    if best.knobs == default.knobs:
        print("the defaults are as good as anything that was tried (*)")
    elif best.waits and default.waits:
        print(
            f"the best (*) gives {best.waits.images_per_s / default.waits.images_per_s:.2f} times the images/s of the "
            f"defaults and a p99 wait of {best.waits.p99_ms:.2f} instead of {default.waits.p99_ms:.2f} ms, by the last "
            "two rows"
        )
    else:
        print("the defaults failed; the best is marked (*)")
    if (fewest := min(trial.waits.batches for trial in trials if trial.waits)) < 100:
        print(
            f"some were measured on {fewest} batches alone, whose p99 is about the longest wait; --seconds takes more"
        )


def data_settings(knobs: Knobs, on_gpu: bool) -> dict[str, Any]:
    """A candidate as keys of a run's configuration. `decode` is left out where it is what `auto` does: a run that was
    begun with `auto` may take other knobs of speed, but no other `decode`."""
    decode = {"decode": "cpu"} if on_gpu and knobs.decode == "cpu" else {}
    return {"data": {**decode, "speed": knobs.speed()}}


def header(train: ShardSet, batch_size: int, device: "torch.device", decode: str) -> str:
    """Where and how the settings were found, as YAML comments."""
    import torch

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    about = {
        "machine": f"{platform.node()}, {processor()}",
        "cores": num_cores(),
        "gpu": gpu,
        "images are decoded on the": decode,
        "shards": f"{train.manifest_sha256} (SHA-256 of train/manifest.json)",
        "batch size": batch_size,
        "command": shlex.join(["python", "tools/tune_pipeline.py", *sys.argv[1:]]),
    }
    lines = "\n".join(f"{name}: {value}" for name, value in about.items())
    return f"{FIRST_LINE}\n{textwrap.indent(lines, '#   ', lambda line: True)}\n"


def check_out(out: Path) -> None:
    """Make the folder of the YAML file. Raises `ValueError`, before anything is measured, where something else would be
    overwritten."""
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; give a file, such as {out / 'speed.yaml'}")
    if out.exists() and not out.read_bytes().startswith(FIRST_LINE.encode()):
        raise ValueError(f"--out {out} exists and was not written by this program; give another name or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)


if __name__ == "__main__":
    run_program(tune)
