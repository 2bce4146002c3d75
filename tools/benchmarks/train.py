"""Measure whether the network waits for input: the loader alone, the network alone on one batch, and both as in
training; and break down the time of training steps from a trace of torch's profiler.

The host marks the measured window in the trace, and the waits for input and the steps in it. On a GPU the trace also
has the kernels and copies of the whole process, including DALI's (by CUPTI): the GPU is busy while any of them runs.
The network's kernels are those on the streams of torch's own kernels (`at::native`); DALI uses other streams. They
overlap, so the parts of "busy" may add up to more. Utilization, as nvidia-smi shows it, is the share of the last sample
period of a turn, a sixth of a second to a second, in which any kernel ran.
"""

import itertools
import json
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from tools.benchmarks import common

if TYPE_CHECKING:
    import torch

LOADER, SYNTHETIC, REAL = "loader alone", "network alone, on one batch", "both, as in training"
UTILIZATION = "gpu_utilization_percent"
WINDOW, WAIT, STEP = "measured steps", "waiting for input", "step"
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
    from train.device import pick_device, set_precision, tune_malloc
    from train.distributed import Distributed
    from train.trainer import Trainer

    common.check_options(out, seconds=seconds, repeats=repeats)
    with tempfile.TemporaryDirectory() as scratch:  # a config needs a directory; nothing is written there
        recipe = recipe or Path("fast" if torch.cuda.is_available() else "quickstart")
        paths = ["--data.shards", str(shards), "--run.dir", scratch]
        config = parse_config(["--config", str(recipe), *settings.split(), *paths])
        tune_malloc()  # this and `set_precision` as train.run does
        set_precision(config.run.deterministic)
        device = pick_device(config.run.device)
        trainer = Trainer(config, device, Distributed(config.parallel))
        trainer.build()
    trainer.model.train()
    for group in trainer.optimizer.param_groups:
        group["lr"] = 1e-9  # the same work, without divergence
    meter, images = trainer.meter, config.train.batch_size
    batches = itertools.chain.from_iterable(itertools.repeat(trainer.train_loader))
    batch = Batch(*(tensor.clone() for tensor in next(batches)))
    waits: list[dict[str, float]] = []

    def take_step() -> None:
        with record_function(WAIT):
            batch = next(batches)
        with record_function(STEP):
            meter.start_step()
            loss, correct, skipped, _ = trainer.train_step(batch)
            meter.end_step(loss, correct, batch, skipped=skipped)

    def measure_training() -> common.Rate:
        meter.mark_gap()  # `begin` drops the waits of the warm-up
        rate = common.measure(take_step, images, seconds, device, begin=lambda: meter.read(images))
        figures = read_utilization(device) | meter.read(images)
        waits.append({name: figures[name] for name in figures if name.startswith(("wait_", "gpu_"))})
        return rate

    turns: dict[str, Callable[[], common.Rate]] = {
        LOADER: partial(common.measure, partial(next, batches), images, seconds, device),
        SYNTHETIC: partial(common.measure, partial(trainer.train_step, batch), images, seconds, device),
        REAL: measure_training,
    }
    rates = common.interleave(turns, repeats)
    figures = {name: median(turn[name] for turn in waits[1:]) for name in waits[0]}  # without the warm-up
    figures |= read_timeline(trace(take_step, device), TRACED)
    trainer.train_loader.close()
    speeds = zip(*([rate.per_s for rate in values] for values in rates.values()), strict=True)
    efficiency = median(real / min(loader, network) for loader, network, real in speeds)
    data = common.describe_shards(trainer.train_shards)
    print(f"{data}; batch {images}, {config.train.precision}, {repeats} repeats, on {device}")
    context: dict[str, Any] = {
        "data": data,
        "shards": trainer.train_shards.manifest_sha256,
        "config": config.to_json(),
    }
    context |= figures | {"efficiency": efficiency, "device": device.type}
    common.report_rates("does the network wait?", rates, REAL, out, **context)
    loader, network = (median(rate.per_s for rate in rates[name]) for name in (LOADER, SYNTHETIC))
    bottleneck = "loader" if loader < network else "network"
    print(f"real / min(loader, network): {efficiency:.2f}; bottleneck: the {bottleneck}")
    if device.type == "cpu":
        in_turns = 1 / (1 / loader + 1 / network)
        print(f"both share the cores: one after the other they would reach {in_turns:.0f} images/s")
    for name, value in figures.items():
        print(f"{name:<40} {value:>8.2f}")


def read_utilization(device: "torch.device") -> dict[str, float]:
    """Read NVML's utilization of the GPU in its last sample period, in percent; empty without a GPU and under MIG."""
    if device.type != "cuda":
        return {}
    import pynvml
    import torch

    try:
        return {UTILIZATION: torch.cuda.utilization(device)}
    except pynvml.NVMLError:
        return {}


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
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profile.export_chrome_trace(file.name)
        return list(json.loads(Path(file.name).read_text())["traceEvents"])


def read_timeline(events: list[dict[str, Any]], steps: int) -> dict[str, float]:
    """Break down the time of the marked window of `steps`; events are in microseconds.

    Returns milliseconds per step by the host's clock, and its parts in percent; those of the GPU only if it ran
    kernels.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    marks = [event for event in complete if event.get("cat") == "user_annotation"]
    kernels = [event for event in complete if event.get("cat") == "kernel"]
    copies = [event for event in complete if event.get("cat") in ("gpu_memcpy", "gpu_memset")]
    streams = {event["args"]["stream"] for event in kernels if "at::native" in event["name"]}
    parts = {"host_wait": [mark for mark in marks if mark["name"] == WAIT]}
    parts["host_step"] = [mark for mark in marks if mark["name"] == STEP]
    if kernels or copies:
        parts |= {"busy": kernels + copies, "copies": copies}
        parts["network_kernels"] = [event for event in kernels if event["args"]["stream"] in streams]
        parts["input_kernels"] = [event for event in kernels if event["args"]["stream"] not in streams]
    (window,) = (mark for mark in marks if mark["name"] == WINDOW)
    first, length = float(window["ts"]), float(window["dur"])
    figures = {"ms_per_step": length / steps / 1e3}
    for name, found in parts.items():
        spans = [(float(event["ts"]), float(event["ts"]) + float(event["dur"])) for event in found]
        figures[f"{name}_percent"] = 100 * compute_union_length(spans, first, first + length) / length
    if "busy" in parts:
        figures["idle_percent"] = 100 - figures["busy_percent"]
    return figures


def compute_union_length(spans: Iterable[tuple[float, float]], first: float, last: float) -> float:
    """Compute the length of the union of spans within [first, last]."""
    total, end = 0.0, first
    for start, stop in sorted(spans):
        total += max(0.0, min(stop, last) - max(start, end))
        end = max(end, stop)
    return total
