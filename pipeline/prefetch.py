"""Read and decode planned batches ahead of their use, and find the sample that cannot be decoded.

Threads read the samples of the next batches; the thread that takes the batches feeds DALI, so an error comes out
exactly when its batch is due, and later batches are not affected.
"""

import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.augment import Draws
from pipeline.errors import DataError
from pipeline.graph import Graph, build_pipeline, feed, wrap_encoded
from pipeline.reader import Encoded, SampleReader
from pipeline.settings import Speed
from pipeline.shards import ShardSet

if TYPE_CHECKING:
    from nvidia.dali.tensors import TensorListCPU

Block = tuple[tuple[int, int], np.ndarray]
"""A block of shards: (epoch, number) and the shards."""


class Plan(NamedTuple):
    """One batch of one rank."""

    rows: np.ndarray
    """int64 (n,): samples, as rows of `ShardSet.samples`; may be fewer than a batch."""
    means: np.ndarray
    """float32 (n, 3): colour to subtract."""
    stds: np.ndarray
    """float32 (n, 3): divisors."""
    draws: Draws | None = None
    """Crops, flips and colour noise; None: whole images."""
    blocks: tuple[Block, ...] = ()
    """Blocks of these samples, to be read in sequence first; empty with `shuffle: global`."""
    next_block: Block | None = None
    """Block to read in sequence meanwhile."""

    def select(self, kept: np.ndarray) -> "Plan":
        """Return a plan of some of the samples."""
        draws = self.draws and Draws(*(each[kept] for each in self.draws))
        return self._replace(rows=self.rows[kept], means=self.means[kept], stds=self.stds[kept], draws=draws)


class ReadBatch(NamedTuple):
    """A batch that is read, but not decoded."""

    plan: Plan
    encoded: Encoded
    tensors: "TensorListCPU | None"
    """None for a batch without samples."""


class Prefetcher:
    """Yields decoded batches; has files, threads and DALI's memory only while an iterator of `batches` exists."""

    def __init__(
        self,
        shards: ShardSet,
        graph: Graph,
        plan: Callable[[int], Plan],
        *,
        batch_size: int,
        speed: Speed,
        device_id: int | None,
        shuffle: str = "",
        skip_damaged: bool = False,
    ) -> None:
        """Set up for batches `plan(0)`, `plan(1)`, ..., which threads call. `shuffle`: "global", "blocks", or "" for
        the stored order."""
        self._shards, self._graph, self._plan, self._speed = shards, graph, plan, speed
        self._batch_size, self._device_id = batch_size, device_id
        self._shuffle, self._skip_damaged = shuffle, skip_damaged
        self.skipped: list[str] = []
        """Descriptions of the samples that were skipped."""

    def batches(self, first: int) -> Iterator[tuple[Plan, Any]]:
        """Yield the batches from number `first` on, without an end: plan, and DALI's output of its samples (None if it
        has none). Raises `DataError`."""
        reader = SampleReader(self._shards, random=self._shuffle == "global")
        in_blocks, numbers = self._shuffle == "blocks", count(first)
        # One thread reads samples out of blocks, which are in the page cache, and one reads the next block.
        pool = ThreadPoolExecutor(1 if in_blocks else self._speed.reader_queue_depth, "reader")
        block_pool = ThreadPoolExecutor(1, "block reader") if in_blocks else None
        blocks: dict[tuple[int, int], Future[None]] = {}
        reading: deque[Future[ReadBatch]] = deque()
        decoding: deque[ReadBatch | DataError] = deque()

        def read(number: int) -> ReadBatch:
            plan = self._plan(number)
            if block_pool:
                read_blocks(reader, block_pool, blocks, plan)
            encoded = reader.read(plan.rows)
            return ReadBatch(plan, encoded, wrap_encoded(encoded.images) if len(plan.rows) else None)

        try:
            pipe = self._build_pipeline(self._batch_size)
            while True:
                while len(decoding) <= self._speed.prefetch_queue_depth:
                    while len(reading) <= self._speed.reader_queue_depth:
                        reading.append(pool.submit(read, next(numbers)))
                    try:
                        batch = reading.popleft().result()
                        self._schedule(pipe, batch)
                        decoding.append(batch)
                    except DataError as error:  # raised when its batch is due
                        decoding.append(error)
                        break
                due = decoding.popleft()
                if isinstance(due, DataError):
                    raise due
                outputs = self._take_outputs(pipe, due)
                reader.release(due.encoded)
                yield outputs
        finally:
            for each in (pool, block_pool):
                if each:
                    each.shutdown(cancel_futures=True)
            pipe = None  # before the buffers that it reads from
            reader.close()

    def _build_pipeline(self, batch_size: int) -> Any:
        with name_gpu_errors():
            pipe = build_pipeline(self._graph, batch_size, self._speed.num_threads, self._device_id)
            pipe.build()
        return pipe

    def _schedule(self, pipe: Any, batch: ReadBatch) -> None:
        """Feed a batch to DALI and start to decode it."""
        plan = batch.plan
        if batch.tensors is not None:
            feed(pipe, self._graph, batch.tensors, plan.draws, plan.means, plan.stds)
            pipe.schedule_run()

    def _take_outputs(self, pipe: Any, batch: ReadBatch) -> tuple[Plan, Any]:
        """Return the output of a batch that was scheduled, without damaged samples if these are to be skipped."""
        if batch.tensors is None:
            return batch.plan, None
        try:
            with name_gpu_errors():
                return batch.plan, pipe.outputs()[0]
        except RuntimeError as error:
            if isinstance(error, DataError):
                raise
            damaged = self._find_damaged(batch)
            if not damaged:
                raise DataError(f"DALI failed: {describe_dali_error(error)}") from None
        described = [describe_sample(self._shards, int(batch.plan.rows[n])) for n in damaged]
        if not self._skip_damaged:
            place = Path(self._shards.tars[0]).parent
            raise DataError(
                f"{described[0]} cannot be decoded; tools/make_shards.py verify {place.parent} lists all damage, copy "
                "or pack those shards again, or leave such images out with --data.on_corrupt skip"
            )
        self.skipped += described
        kept = np.delete(np.arange(len(batch.plan.rows)), damaged)
        return batch.plan.select(kept), self._decode_alone(batch, kept)

    def _find_damaged(self, batch: ReadBatch) -> list[int]:
        """List the samples of a batch that DALI refuses."""
        damaged = []
        for n in range(len(batch.plan.rows)):
            try:
                self._decode_alone(batch, np.array([n]))
            except RuntimeError:
                damaged.append(n)
        return damaged

    def _decode_alone(self, batch: ReadBatch, kept: np.ndarray) -> Any:
        """Decode some samples of a batch, in a pipeline of their own; None if there are none."""
        if not len(kept):
            return None
        pipe, images = self._build_pipeline(len(kept)), [batch.encoded.images[n] for n in kept]
        part = ReadBatch(batch.plan.select(kept), batch.encoded, wrap_encoded(images))
        self._schedule(pipe, part)
        return pipe.outputs()[0]


def read_blocks(
    reader: SampleReader, pool: ThreadPoolExecutor, blocks: dict[tuple[int, int], "Future[None]"], plan: Plan
) -> None:
    """Wait until the blocks of a batch are read in sequence, close older ones, and start with the next one."""
    for key, shards in plan.blocks:
        if key not in blocks:
            blocks[key] = pool.submit(reader.read_through, shards)
        blocks[key].result()
    wanted = dict(plan.blocks) | dict([plan.next_block] if plan.next_block else [])
    reader.keep_open(np.concatenate([*wanted.values()]))
    for key in blocks.keys() - wanted.keys():
        del blocks[key]
    if plan.next_block and plan.next_block[0] not in blocks:
        key, shards = plan.next_block
        blocks[key] = pool.submit(reader.read_through, shards)


def describe_sample(shards: ShardSet, row: int) -> str:
    """Describe a sample by key, offset and shard."""
    sample = shards.samples[row]
    return f"{shards.read_key(row)} at offset {sample['offset']} of {shards.tars[sample['shard']]}"


class name_gpu_errors:  # noqa: N801 (a context manager)
    """Turn DALI's errors of CUDA into `DataError`, as they are not of the data."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        pattern = r".*(CUDA (runtime|driver) API|CUDA allocation|cudaError[A-Z]|CUDA_ERROR_|NVML).*"
        if isinstance(error, RuntimeError) and (found := re.search(pattern, str(error))):
            raise DataError(
                f"DALI failed on the GPU: {found[0].strip()}; tools/doctor.py checks driver and GPUs; where memory is "
                "short, take a smaller batch or end other processes"
            ) from None


def describe_dali_error(error: RuntimeError) -> str:
    """Return the reason in a report of DALI: the line after the word "encountered", else the first line."""
    report = str(error)
    lines = [line.strip() for line in report.partition("encountered:")[2].splitlines() if line.strip()]
    return lines[0] if lines else report.partition("\n")[0]
