"""Measure whether the network waits for input: the loader alone, the network alone on one batch, and both as in
training; and break down the time of training steps from a trace of torch's profiler.

The host marks the measured window in the trace, and the waits for input and the steps in it. On a GPU the trace also
has the kernels and copies of the whole process, including DALI's (by CUPTI): the GPU is busy while any of them runs.
The network's kernels are those on the streams of torch's own kernels (`at::native`); DALI uses other streams. They
overlap, so the parts of "busy" may add up to more. nvidia-smi's utilization is the share of its last sample period, a
sixth of a second to a second, in which any kernel ran.
"""

import itertools
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from tools.benchmarks import common

if TYPE_CHECKING:
    import torch

LOADER, SYNTHETIC, REAL = "loader alone", "network alone, on one batch", "both, as in training"
UTILIZATION = "gpu_utilization_percent"
WINDOW, WAIT, STEP = "steps that count", "waiting for input", "step"
"""Names of the host's marks in a trace."""
WARM_UP, TRACED = 5, 10
"""Steps under the profiler."""


def bench_train(
    shards: Path,
    recipe: Path | None = None,
    settings: str = "",
    seconds: float = 10.0,
    repeats: int = 5,
    out: Path | None = None,
) -> None:
    """Measure the loader alone, the network on a batch in memory, and training.

    Also prints which of the two is the bottleneck, how long the network waits, a breakdown of ten steps, and on a GPU
    its busy and idle time.

    Args:
        shards: Folder written by make_shards and compute_pca.
        recipe: YAML file as for train.run (default: fast.yaml on a GPU, quickstart.yaml without).
        settings: Further settings as for train.run: "--train.batch_size 128 --model.fc_dim 64".
        seconds: Length of one measurement.
        repeats: Measurements of each contender, taken in turns.
        out: File of JSON lines to append one row per contender to.
    """
    import torch
    from torch.profiler import record_function

    from pipeline.loader import Batch
    from train.config import parse_config
    from train.device import pick_device, set_arithmetic, tune_malloc
    from train.meter import StepMeter
    from train.placement import Placement
    from train.state import TrainState

    common.check_options(out, seconds=seconds, repeats=repeats)
    with tempfile.TemporaryDirectory() as scratch:  # a config needs a directory; nothing is written there
        recipe = recipe or Path("fast" if torch.cuda.is_available() else "quickstart")
        paths = ["--data.shards", str(shards), "--run.dir", scratch]
        config = parse_config(["--config", str(recipe), *settings.split(), *paths])
        tune_malloc()  # this and the next as train.run does
        set_arithmetic(config.run.deterministic)
        device = pick_device(config.run.device)
        state = TrainState(config, device, Placement(config.parallel, device))
        state.build()
        state.learner.model.train()
    learner, images = state.learner, config.train.batch_size
    batches = itertools.chain.from_iterable(itertools.repeat(state.train_loader))
    batch = Batch(*(tensor.clone() for tensor in next(batches)))
    lr = dict.fromkeys(learner.names, 1e-9)  # the same work, without divergence
    meter = StepMeter(device, state.placement)
    figures: list[dict[str, float]] = []

    def take_step() -> None:
        with record_function(WAIT):
            batch = next(batches)
        with record_function(STEP):
            meter.start_step()
            loss, correct, _ = learner.step(batch, lr)
            meter.end_step(loss, correct, batch)

    def measure_training() -> common.Rate:
        meter.pause()
        with watch_utilization(device) as percents:  # `begin` drops the waits of the warm-up
            rate = common.measure(take_step, images, seconds, device, begin=lambda: meter.read(images))
        figures.append(
            {name: value for name, value in meter.read(images).items() if name.startswith("wait_")}
        )
        figures[-1] |= {UTILIZATION: median(percents)} if percents else {}
        return rate

    turns: dict[str, Callable[[], common.Rate]] = {
        LOADER: partial(common.measure, partial(next, batches), images, seconds, device),
        SYNTHETIC: partial(common.measure, partial(learner.step, batch, lr), images, seconds, device),
        REAL: measure_training,
    }
    rates = common.interleave(turns, repeats)
    step_ms, percent = read_timeline(trace(take_step, device), TRACED)
    state.close()
    data = common.describe_shards(state.train_shards)
    print(f"{data}; batch {images}, {config.train.precision}, {repeats} repeats, on {device}")
    rows = common.print_table("does the network wait?", rates, REAL)
    speeds = zip(*([rate.per_s for rate in values] for values in rates.values()), strict=True)
    efficiency = median(real / min(loader, network) for loader, network, real in speeds)
    loader, network = (median(rate.per_s for rate in rates[name]) for name in (LOADER, SYNTHETIC))
    bottleneck = "loader" if loader < network else "network"
    print(f"real / min(loader, network): {efficiency:.2f}; bottleneck: the {bottleneck}")
    if device.type == "cpu":
        print(
            f"both share the cores: one after the other they would reach {1 / (1 / loader + 1 / network):.0f} images/s"
        )
    figures = figures[1:]  # as `interleave` does
    medians = {name: median(turn[name] for turn in figures if name in turn) for name in figures[0]}
    for name, value in (medians | {"ms_per_step": step_ms} | percent).items():
        print(f"{name:<40} {value:>8.2f}")
    context: dict[str, Any] = medians | percent | {"efficiency": efficiency, "device": device.type}
    context |= {"shards": state.train_shards.manifest_sha256, "config": config.to_json()}
    common.append_rows(out, "train", rows, data, **context)


@contextmanager
def watch_utilization(device: "torch.device") -> Iterator[list[float]]:
    """Yield a list that receives, at the end of the block, the GPU's utilization in percent, five per second. It stays
    empty without a GPU and under MIG."""
    import torch

    percents: list[float] = []
    if device.type != "cuda" or not shutil.which("nvidia-smi"):
        yield percents
        return
    gpu = f"GPU-{torch.cuda.get_device_properties(device).uuid}"  # nvidia-smi numbers all GPUs, not the visible ones
    query = f"nvidia-smi --id={gpu} --query-gpu=utilization.gpu --format=csv,noheader,nounits --loop-ms=200"
    with subprocess.Popen(query.split(), stdout=subprocess.PIPE, text=True) as process:
        try:
            yield percents
        finally:
            process.terminate()
        percents += [float(line) for line in process.communicate()[0].split() if line.isdecimal()]


def trace(take_step: Callable[[], None], device: "torch.device") -> list[dict[str, Any]]:
    """Trace training steps after a warm-up. Returns the events of a Chrome trace."""
    import torch
    from torch.profiler import record_function

    with torch.profiler.profile() as profile:
        for _ in range(WARM_UP):
            take_step()
        with record_function(WINDOW):
            for _ in range(TRACED):
                take_step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "trace.json")
        profile.export_chrome_trace(str(file))
        events: list[dict[str, Any]] = json.loads(file.read_text())["traceEvents"]
    return events


def read_timeline(events: list[dict[str, Any]], steps: int) -> tuple[float, dict[str, float]]:
    """Break down the time of the marked window of `steps`; events are in microseconds.

    Returns milliseconds per step by the host's clock, and its parts in percent; those of the GPU only if it ran
    kernels.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    marks = [event for event in complete if event.get("cat") == "user_annotation"]
    (window,) = (event for event in marks if event["name"] == WINDOW)
    first, length = float(window["ts"]), float(window["dur"])

    def share(events: Iterable[dict[str, Any]]) -> float:
        spans = [(float(event["ts"]), float(event["ts"]) + float(event["dur"])) for event in events]
        return 100 * compute_union_length(spans, first, first + length) / length

    wait, step = (share(mark for mark in marks if mark["name"] == name) for name in (WAIT, STEP))
    percent = {"host_wait_percent": wait, "host_step_percent": step, "host_rest_percent": 100 - wait - step}
    kernels = [event for event in complete if event.get("cat") == "kernel"]
    copies = [event for event in complete if event.get("cat") in ("gpu_memcpy", "gpu_memset")]
    if kernels or copies:
        streams = {event["args"]["stream"] for event in kernels if "at::native" in event["name"]}
        busy = share(kernels + copies)
        percent |= {
            "busy_percent": busy,
            "network_kernels_percent": share(
                event for event in kernels if event["args"]["stream"] in streams
            ),
            "input_kernels_percent": share(
                event for event in kernels if event["args"]["stream"] not in streams
            ),
            "copies_percent": share(copies),
            "idle_percent": 100 - busy,
        }
    return length / steps / 1e3, percent


def compute_union_length(spans: Iterable[tuple[float, float]], first: float, last: float) -> float:
    """Compute the length of the union of spans within [first, last]."""
    total, end = 0.0, first
    for start, stop in sorted(spans):
        total += max(0.0, min(stop, last) - max(start, end))
        end = max(end, stop)
    return total
