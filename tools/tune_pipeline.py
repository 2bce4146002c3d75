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
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import yaml
from tqdm import tqdm

from pipeline.files import write_bytes
from pipeline.machine import num_cores
from pipeline.settings import DataConfig, Speed
from pipeline.shards import ShardSet, open_shards
from tools.benchmarks.common import processor
from tools.tuning.search import Knobs, Trial, Waits, list_axes, search
from train.program import run_program

if TYPE_CHECKING:
    import torch


FIRST_LINE = "# Written by tools/tune_pipeline.py"


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
    from tools.tuning.measure import measure
    from train.device import keep_freed_memory, pick_device

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
