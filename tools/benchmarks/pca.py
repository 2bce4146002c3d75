"""How fast the eigenbasis is computed, beside decoding alone."""

from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import torch

from pipeline.eigenbasis import Eigenbasis, Moments
from pipeline.machine import num_cores
from pipeline.reader import decoded_batches
from pipeline.shards import open_shards
from tools.benchmarks.measure import Table, take_turns
from tools.benchmarks.record import check_out, describe, record
from tools.moments import batch_sums
from train.device import pick_device


def bench_pca(
    shards: Path, batch_size: int, threads: int | None, repeats: int, device: str, out: Path | None
) -> None:
    """See `tools/bench.py pca`."""
    if batch_size < 1 or repeats < 1 or (threads is not None and threads < 1):
        raise ValueError("--batch-size, --repeats and --threads must be at least 1")
    train, place = open_shards(shards, "train"), pick_device("cuda") if device == "cuda" else "cpu"
    if train.num_samples <= batch_size:  # the first batch is the start of the pipeline
        raise ValueError(
            f"{shards} holds {train.num_samples} images, no second batch; take a smaller --batch-size"
        )
    check_out(out)
    threads = threads or num_cores()

    def of_pass(counts: Iterator[int]) -> float:
        next(counts)  # the pipeline starts
        started = perf_counter()
        return sum(counts) / (perf_counter() - started)

    def decoding() -> float:
        return of_pass(len(batch) for batch in decoded_batches(train, batch_size, threads, place))

    def summing() -> float:
        return of_pass(sums.moments.num_images for sums in batch_sums(train, batch_size, threads, place))

    def eigenvalues(where: torch.device | str) -> list[float]:
        moments = sum((sums.moments for sums in batch_sums(train, batch_size, threads, where)), Moments())
        return Eigenbasis.of(moments).eigenvalues.tolist()

    decode, whole = f"DALI decode alone ({device})", f"decode + exact moments ({device})"
    measured = take_turns({decode: decoding, whole: summing}, repeats)
    print(f"{describe(train)}; batch {batch_size}, {repeats} repeats")
    table = Table("sums for the eigenbasis", "images/s", measured, decode)
    table.show()
    print(f"the eigenbasis takes {1 / table.ratio(whole):.2f} times as long as decoding alone")
    if device == "cuda":
        pairs = zip(eigenvalues(place), eigenvalues("cpu"), strict=True)
        moved = ", ".join(f"{100 * (of_gpu / of_cpu - 1):+.4f} %" for of_gpu, of_cpu in pairs)
        print(f"the GPU's decoder moves the eigenvalues by {moved}")
    if out:
        settings = {
            "shards": train.manifest_sha256,
            "batch_size": batch_size,
            "threads": threads,
            "device": device,
        }
        record(out, "pca", [table], describe(train), settings)
