"""One measurement of the real training loader, with something that sleeps in the network's place."""

import itertools
from collections import deque
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.settings import DataConfig
from pipeline.shards import ShardSet
from tools.tuning.search import Waits

if TYPE_CHECKING:
    import torch

    from pipeline.eigenbasis import Eigenbasis

WARM_UP = 3
"""Batches before the clock starts, besides those that the loader has prepared ahead."""
MIN_BATCHES = 3
"""Batches of a measurement, however long they take."""
IN_FLIGHT = 3
"""Batches that training holds at a time on a GPU: the present one and those of the steps that are queued."""


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

    loader = train_loader(
        shards, basis, config, batch_size=batch_size, seed=seed, rank=0, num_ranks=1, device=device
    )
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
