"""Whether the network waits: the loader alone, the network alone on a batch that is there already, and both together as
the trainer runs them."""

import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from pipeline.loader import Batch
from tools.benchmarks.measure import Table, check_out, describe, record, take_turns, timed
from train.config import Config, parse_config
from train.device import keep_freed_memory, pick_device, set_arithmetic
from train.loop import Trainer
from train.meter import StepMeter
from train.placement import Placement

LOADER, SYNTHETIC, REAL = "loader alone", "network alone, on one batch", "both, as in training"


def bench_train(shards: Path, recipe: Path, settings: str, seconds: float, repeats: int, out: Path | None) -> None:
    """See `tools/bench.py train`."""
    if repeats < 1 or seconds <= 0:
        raise ValueError("--repeats must be at least 1, --seconds positive")
    check_out(out)
    with tempfile.TemporaryDirectory() as scratch:  # a run wants a directory; nothing is written there
        place = ["--data.shards", str(shards), "--run.dir", scratch]
        whole = parse_config(["--config", str(recipe), *settings.split(), *place])
        trainer = start(whole)
        waits: dict[str, list[float]] = {"p50": [], "p99": [], "percent": []}
        measured = take_turns(contenders(trainer, seconds, waits), repeats)
        trainer.close()
    train, batch = trainer.train_shards, whole.train.batch_size
    print(f"{describe(train)}; batch {batch}, {whole.train.precision}, {repeats} repeats, on {trainer.device}")
    table = Table("does the network wait?", "images/s", measured, REAL)
    table.show()
    efficiency = statistics.median(
        real / min(loader, synthetic) for loader, synthetic, real in zip(*measured.values(), strict=True)
    )
    p50, p99, percent = (statistics.median(waits[name][1:]) for name in waits)  # the first turn is thrown away
    print(f"real / min(loader, network): {efficiency:.2f}; {binding(measured, trainer.device)} binds")
    print(f"waiting for input: p50 {p50:.2f} ms, p99 {p99:.2f} ms, {percent:.1f} % of the time")
    if out:
        config = {name: section for name, section in whole.to_json().items() if name != "run"}
        about = {"shards": train.manifest_sha256, "config": config, "efficiency": efficiency}
        record(
            out,
            "train",
            [table],
            describe(train),
            about | {"wait_ms_p50": p50, "wait_ms_p99": p99, "wait_percent": percent},
        )


def start(config: Config) -> Trainer:
    """As `train.run` starts a run, in one process."""
    keep_freed_memory()
    set_arithmetic(config.run.deterministic)
    device = pick_device(config.run.device)
    trainer = Trainer(config, device, Placement(config.parallel, device))
    trainer.build()
    trainer.learner.model.train()
    return trainer


def contenders(trainer: Trainer, seconds: float, waits: dict[str, list[float]]) -> dict[str, Callable[[], float]]:
    """What takes turns; the last one also adds to `waits`."""
    learner, device, images = trainer.learner, trainer.device, trainer.config.train.batch_size
    batches: Iterator[Batch] = itertools.chain.from_iterable(itertools.repeat(trainer.train_loader))
    kept = Batch(*(tensor.clone() for tensor in next(batches)))
    rates = dict.fromkeys(learner.names, 1e-9)  # the same work, and nothing that could diverge

    def alone() -> None:
        learner.step(kept, rates)

    def together() -> float:
        meter = StepMeter(device, trainer.placement)

        def step() -> None:
            batch = next(batches)
            meter.start_step()
            loss, correct, _ = learner.step(batch, rates)
            meter.end_step(loss, correct, batch)

        speed = timed(step, images, seconds, device)()
        figures = meter.read(images)
        for name, key in (("p50", "wait_ms_p50"), ("p99", "wait_ms_p99"), ("percent", "wait_percent")):
            waits[name].append(figures[key])
        return speed

    return {
        LOADER: timed(lambda: next(batches), images, seconds, device),
        SYNTHETIC: timed(alone, images, seconds, device),
        REAL: together,
    }


def binding(measured: dict[str, list[float]], device: torch.device) -> str:
    """Which of the two is the slower one, and on a CPU, whose cores they share, what both together could reach."""
    loader, synthetic = (statistics.median(measured[name]) for name in (LOADER, SYNTHETIC))
    slower = "the loader" if loader < synthetic else "the network"
    if device.type == "cuda":
        return slower
    shared = 1 / (1 / loader + 1 / synthetic)
    return f"without a GPU both share the cores, which in turns would give {shared:.0f} images/s; {slower}"
