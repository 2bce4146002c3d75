"""Plan batches: which samples, with which crop, flip, mean and divisor, as pure functions of a batch's number."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from pipeline.augment import Draws, sample_draws
from pipeline.eigenbasis import Eigenbasis
from pipeline.lighting import shifted_means
from pipeline.order import list_blocks, order_blocks, order_global
from pipeline.settings import DataConfig
from pipeline.shards import ShardSet

CHUNK = 4096
"""Samples whose order and augmentation are computed at a time, as numpy's calls take longer than a batch's numbers."""


class Plan(NamedTuple):
    """One batch of one rank."""

    rows: np.ndarray
    """int64 (n,): samples, as rows of `ShardSet.samples`; may be fewer than a batch."""
    means: np.ndarray
    """float32 (n, 3): colour to subtract."""
    stds: np.ndarray
    """float64 (3,): divisors of R, G and B."""
    draws: Draws | None = None
    """Crops, flips and colour noise; None: whole images."""
    shards: np.ndarray | None = None
    """With `shuffle: blocks`: the shards of these samples' blocks, and of the next one if they are of one block."""

    def select(self, kept: np.ndarray) -> "Plan":
        """Return a plan of some of the samples."""
        draws = self.draws and Draws(*(each[kept] for each in self.draws))
        return self._replace(rows=self.rows[kept], means=self.means[kept], draws=draws)


@dataclass(eq=False)
class TrainSampler:
    """Plans training batches of one of `num_ranks` ranks, numbered through all epochs."""

    shards: ShardSet
    basis: Eigenbasis
    config: DataConfig
    batch_size: int
    seed: int
    rank: int
    num_ranks: int

    def __post_init__(self) -> None:
        self._global_batch = self.batch_size * self.num_ranks
        self._shard_sizes = np.diff(self.shards.find_starts()) if self.config.shuffle == "blocks" else None
        self.steps = self.shards.num_samples // self._global_batch
        """Batches per epoch."""
        self._chunk_steps = max(1, CHUNK // self.batch_size)
        self._cached_chunk = lru_cache(4)(self._plan_chunk)

    def __call__(self, number: int) -> Plan:
        """Plan a batch; safe to call by several threads."""
        epoch, step = divmod(number, self.steps)
        n = step % self._chunk_steps
        return self._cached_chunk(epoch, step - n)[n]

    def _plan_chunk(self, epoch: int, first: int) -> list[Plan]:
        """Plan the batches of one epoch from step `first` on, `_chunk_steps` at most."""
        augmentation, size = self.config.augmentation, self.batch_size
        steps = range(first, min(first + self._chunk_steps, self.steps))
        firsts = [step * self._global_batch + self.rank * size for step in steps]
        draws = sample_draws(firsts, size, self.seed, epoch, augmentation)
        lighting = augmentation.lighting.at_epoch(epoch)
        means = shifted_means(draws.noise.reshape(-1, 3), self.basis, lighting).astype(np.float32)
        stds = np.array(augmentation.stds) * lighting.divisor
        positions = np.add.outer(firsts, np.arange(size))
        shards: list[np.ndarray | None] = [None] * len(firsts)
        if self._shard_sizes is None:
            rows = order_global(positions, self.seed, epoch, self.shards.num_samples)
        else:
            blocks, following = (
                list_blocks(self.seed, each, len(self.shards.tars), self.config.block_shards)
                for each in (epoch, epoch + 1)
            )
            rows, numbers = order_blocks(positions, self.seed, epoch, self._shard_sizes, blocks)
            blocks += following
            shards = [np.concatenate(blocks[row[0] : max(row[-1] + 1, row[0] + 2)]) for row in numbers]
        means = means.reshape(-1, size, 3)
        return [
            Plan(rows[n], means[n], stds, Draws(*(each[n] for each in draws)), shards[n])
            for n in range(len(firsts))
        ]


def plan_in_order(
    first: int, last: int, batch_size: int, steps: int, mean: np.ndarray, stds: np.ndarray, number: int
) -> Plan:
    """Plan a batch of the whole images `first` to `last` - 1 in stored order, again and again every `steps` batches. It
    may be short or empty."""
    start = first + number % steps * batch_size
    rows = np.arange(start, min(start + batch_size, last))
    return Plan(rows, np.tile(mean.astype(np.float32), (len(rows), 1)), stds)
