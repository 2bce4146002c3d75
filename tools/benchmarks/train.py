"""Whether the network waits: the loader alone, the network alone on a batch that is there already, and both together as
the trainer runs them."""

import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch.profiler import record_function

from pipeline.loader import Batch
from tools.benchmarks.measure import Table, take_turns, timed
from tools.benchmarks.record import check_out, describe, record
from tools.benchmarks.timeline import STEP, WAIT, WINDOW, Timeline, read_timeline, traced
from tools.benchmarks.utilization import name_of, watched
from train.config import Config, parse_config
from train.device import keep_freed_memory, pick_device, set_arithmetic
from train.meter import StepMeter
from train.placement import Placement
from train.state import TrainState

LOADER, SYNTHETIC, REAL = "loader alone", "network alone, on one batch", "both, as in training"
WAITS, UTILIZATION = ("wait_ms_p50", "wait_ms_p99", "wait_percent"), "gpu_utilization_percent"
UNCOUNTED, PROFILED = 5, 10
"""Steps under the profiler."""


def bench_train(
    shards: Path,
    recipe: Path | None,
    settings: str,
    seconds: float,
    repeats: int,
    profile: bool,
    out: Path | None,
) -> None:
    """See `tools/bench.py train`."""
    if repeats < 1 or seconds <= 0:
        raise ValueError("--repeats must be at least 1, --seconds positive")
    check_out(out)
    with tempfile.TemporaryDirectory() as scratch:  # a run wants a directory; nothing is written there
        recipe = recipe or Path("fast" if torch.cuda.is_available() else "quickstart")
        place = ["--data.shards", str(shards), "--run.dir", scratch]
        whole = parse_config(["--config", str(recipe), *settings.split(), *place])
        state = start(whole)
        batches = itertools.chain.from_iterable(itertools.repeat(state.train_loader))
        turns: list[dict[str, float]] = []
        measured = take_turns(contenders(state, batches, seconds, turns), repeats)
        timeline = profiled(state, batches) if profile else None
        state.close()
    train, batch = state.train_shards, whole.train.batch_size
    print(f"{describe(train)}; batch {batch}, {whole.train.precision}, {repeats} repeats, on {state.device}")
    table = Table("does the network wait?", "images/s", measured, REAL)
    table.show()
    efficiency = statistics.median(
        real / min(loader, synthetic) for loader, synthetic, real in zip(*measured.values(), strict=True)
    )
    figures = {
        name: median_of(turns[1:], name) for name in (*WAITS, UTILIZATION)
    }  # the first turn is thrown away
    p50, p99, percent = (figures[name] for name in WAITS)
    print(f"real / min(loader, network): {efficiency:.2f}; {binding(measured, state.device)} binds")
    print(f"waiting for input: p50 {p50:.2f} ms, p99 {p99:.2f} ms, {percent:.1f} % of the time")
    if state.device.type == "cuda":
        told = figures[UTILIZATION]
        print(f"GPU utilization in training: {'nvidia-smi tells none' if told is None else f'{told:.0f} %'}")
    if timeline:
        timeline.show(PROFILED)
        if state.device.type == "cuda" and "busy_percent" not in timeline.percent:
            print("torch's profiler saw no kernel: CUPTI did not start; another profiler may hold it")
    if out:
        config = {name: section for name, section in whole.to_json().items() if name != "run"}
        about = {"shards": train.manifest_sha256, "config": config, "efficiency": efficiency, **figures}
        about |= {"seconds": seconds, "device": state.device.type}
        record(out, "train", [table], describe(train), about | (timeline.percent if timeline else {}))


def median_of(turns: list[dict[str, float]], name: str) -> float | None:
    """Of a figure over the turns that have it; None where none has."""
    values = [turn[name] for turn in turns if name in turn]
    return statistics.median(values) if values else None


def start(config: Config) -> TrainState:
    """As `train.run` starts a run, in one process."""
    keep_freed_memory()
    set_arithmetic(config.run.deterministic)
    device = pick_device(config.run.device)
    state = TrainState(config, device, Placement(config.parallel, device))
    state.build()
    state.learner.model.train()
    return state


def contenders(
    state: TrainState, batches: Iterator[Batch], seconds: float, turns: list[dict[str, float]]
) -> dict[str, Callable[[], float]]:
    """What takes turns; the last one also adds a turn's figures to `turns`."""
    learner, device, images = state.learner, state.device, state.config.train.batch_size
    kept = Batch(*(tensor.clone() for tensor in next(batches)))
    rates = harmless_rates(state)

    def together() -> float:
        meter = StepMeter(device, state.placement)
        with watched(name_of(device)) as utilizations:
            begin = partial(meter.read, images)  # what the queue held before is no figure of training
            speed = timed(lambda: real_step(state, batches, meter, rates), images, seconds, device, begin)()
        figures = meter.read(images)
        turns.append({name: figures[name] for name in WAITS})
        if utilizations:
            turns[-1][UTILIZATION] = statistics.median(utilizations)
        return speed

    return {
        LOADER: timed(lambda: next(batches), images, seconds, device),
        SYNTHETIC: timed(lambda: learner.step(kept, rates), images, seconds, device),
        REAL: together,
    }


def harmless_rates(state: TrainState) -> dict[str, float]:
    """Of every parameter: the same work, and nothing that could diverge."""
    return dict.fromkeys(state.learner.names, 1e-9)


def real_step(state: TrainState, batches: Iterator[Batch], meter: StepMeter, rates: dict[str, float]) -> None:
    """One step as in training, with the marks of a timeline."""
    with record_function(WAIT):
        batch = next(batches)
    with record_function(STEP):
        meter.start_step()
        loss, correct, _ = state.learner.step(batch, rates)
        meter.end_step(loss, correct, batch)


def profiled(state: TrainState, batches: Iterator[Batch]) -> Timeline:
    """Where the time of real training steps goes, behind some that only fill the queues."""
    meter, rates = StepMeter(state.device, state.placement), harmless_rates(state)

    def steps(number: int) -> None:
        for _ in range(number):
            real_step(state, batches, meter, rates)

    def work() -> None:
        steps(UNCOUNTED)
        with record_function(WINDOW):
            steps(PROFILED)
        if state.device.type == "cuda":
            torch.cuda.synchronize(state.device)

    return read_timeline(traced(work), PROFILED)


def binding(measured: dict[str, list[float]], device: torch.device) -> str:
    """Which of the two is the slower one, and on a CPU, whose cores they share, what both together could reach."""
    loader, synthetic = (statistics.median(measured[name]) for name in (LOADER, SYNTHETIC))
    slower = "the loader" if loader < synthetic else "the network"
    if device.type == "cuda":
        return slower
    shared = 1 / (1 / loader + 1 / synthetic)
    return f"without a GPU both share the cores, which in turns would give {shared:.0f} images/s; {slower}"
