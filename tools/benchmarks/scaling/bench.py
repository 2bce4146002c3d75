"""`tools/bench.py scaling`: how speed and memory grow with threads, processes, samples and epochs."""

from pathlib import Path

import torch

from model.alexnet import AlexNet, AlexNetConfig
from pipeline.eigenbasis import Eigenbasis
from pipeline.machine import num_cores
from pipeline.shards import ShardSet, open_shards
from tools.benchmarks.figure import draw_panels
from tools.benchmarks.record import check_out, describe, record
from tools.benchmarks.scaling.estimate import SAMPLES, Constants, estimate, estimate_row, show_estimates
from tools.benchmarks.scaling.loader import scale_epochs, scale_loader
from tools.benchmarks.scaling.offline import BATCH_SIZE as SUMMED
from tools.benchmarks.scaling.offline import scale_offline
from tools.benchmarks.scaling.part import up_to
from tools.benchmarks.scaling.samples import scale_samples
from tools.packing.ilsvrc import read_archives

SIZES = (10_000, SAMPLES, 14_197_122)
"""Samples: a small set, ILSVRC-2012, ImageNet-21k."""
GPU_RATES = (5000.0, 10_000.0, 20_000.0)


def bench_scaling(
    shards: Path,
    raw: Path | None,
    threads: list[int] | None,
    ranks: list[int] | None,
    samples: list[int] | None,
    epochs: int,
    workers: list[int] | None,
    gpu_rates: list[float] | None,
    batch_size: int,
    seconds: float,
    repeats: int,
    out: Path | None,
) -> None:
    """Measure and print; arguments as in `tools.bench.scaling`."""
    if repeats < 1 or seconds <= 0:
        raise ValueError(
            f"--repeats must be at least 1 and --seconds positive, but are {repeats} and {seconds}"
        )
    if epochs < 2:
        raise ValueError(f"--epochs must be at least 2, to tell whether memory grows, but is {epochs}")
    thread_counts = numbers("--threads", threads, up_to(num_cores(), 2))
    rank_counts = numbers("--ranks", ranks, [1, 2])
    worker_counts = numbers("--workers", workers, up_to(num_cores()))
    rates = [float(rate) for rate in (gpu_rates if gpu_rates is not None else GPU_RATES)]
    if not rates or not all(0 < rate < float("inf") for rate in rates):
        raise ValueError(f"--gpu-rates takes a list of images per second, as in [5000,10000], not {rates}")
    if workers is not None and raw is None:
        raise ValueError("--workers is for packing, which needs --raw RAW; give that as well")
    train = open_shards(shards, "train")
    Eigenbasis.load(shards / "pca.json", train.manifest_sha256)
    check_batch(train, batch_size, max(rank_counts))
    sizes = numbers("--samples", samples, list(SIZES), at_least=batch_size)
    if raw is not None:
        if train.num_samples <= SUMMED:  # the first batch of the sums is the start of their pipeline
            raise ValueError(
                f"{shards} holds {train.num_samples} images, too few to time their sums; leave --raw out"
            )
        read_archives(raw)  # an hour later it would be too late
    check_out(out)

    print(f"{describe(train)}; batch {batch_size}, {repeats} repeats\n", flush=True)
    loading, per_core = scale_loader(shards, batch_size, thread_counts, rank_counts, seconds, repeats)
    loading.show()
    starting, memory = scale_samples(shards, sizes, batch_size, repeats)
    starting.show()
    parts = [loading, starting, scale_epochs(shards, batch_size, epochs)]
    parts[-1].show()
    if raw is not None:
        parts.append(scale_offline(shards, raw, worker_counts, repeats))
        parts[-1].show()
    image_bytes = sum(Path(tar).stat().st_size for tar in train.tars) / train.num_samples
    constants = Constants(per_core, image_bytes, num_parameters(), memory.get(SAMPLES))
    estimates = [estimate(rate, constants) for rate in rates]
    show_estimates(constants, estimates)
    if out:
        settings = {"shards": train.manifest_sha256, "batch_size": batch_size}
        settings |= {"seconds": seconds, "epochs": epochs, "device": "cpu"}
        panels = [panel for part in parts for panel in part.panels]
        record(
            out,
            "scaling",
            [table for part in parts for table in part.tables],
            describe(train),
            settings,
            {name: more for part in parts for name, more in part.each.items()},
            [*(row for part in parts for row in part.missing), estimate_row(constants, estimates)],
            lambda _, path, caption: draw_panels(panels, path, caption),
        )


def numbers(option: str, given: list[int] | None, default: list[int], at_least: int = 1) -> list[int]:
    """An option's numbers, ascending, each once. Raises `ValueError` that names it."""
    chosen = default if given is None else given
    if not chosen or min(chosen) < at_least:
        raise ValueError(
            f"{option} takes a list of numbers from {at_least} on, as in [{at_least},{2 * at_least}]"
        )
    return sorted(set(chosen))


def check_batch(train: ShardSet, batch_size: int, ranks: int) -> None:
    """Raise `ValueError` where an epoch of the largest number of processes is less than a batch for each."""
    if batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, but is {batch_size}")
    if train.num_samples < batch_size * ranks:
        raise ValueError(
            f"{train.num_samples} images are no batch of {batch_size} for each of {ranks} processes; take a smaller "
            "--batch-size, or fewer --ranks"
        )


def num_parameters() -> int:
    """Of AlexNet with 1,000 classes; no memory is taken for them."""
    with torch.device("meta"):
        return sum(weights.numel() for weights in AlexNet(AlexNetConfig()).parameters())
