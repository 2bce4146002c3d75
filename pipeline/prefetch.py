"""Read and decode planned batches ahead of their use, and find the sample that cannot be decoded.

Threads read the samples of the next batches; the thread that takes the batches feeds DALI, so an error comes out
exactly when its batch is due, and later batches are not affected.
"""

import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.augment import CROP_SIDE
from pipeline.errors import DataError
from pipeline.graph import Graph, build_pipeline, feed, wrap_encoded
from pipeline.plan import Plan
from pipeline.reader import Encoded, SampleReader
from pipeline.settings import Speed
from pipeline.shards import IMAGE_SIDE, NPY_HEADER, ShardSet


class ReadBatch(NamedTuple):
    """A batch that is read, but not decoded."""

    plan: Plan
    encoded: Encoded
    tensors: Any
    """Its images as DALI's TensorListCPU, of a pixel store uint8 (N, H, W, C); None for a batch without samples."""


@dataclass(eq=False)
class Prefetcher:
    """Yields decoded batches; has files, threads and DALI's memory only while an iterator of `batches` exists."""

    shards: ShardSet
    graph: Graph
    plan: Callable[[int], Plan]
    """Plans batch 0, 1, ...; threads call it."""
    batch_size: int
    speed: Speed
    device_id: int | None
    shuffle: str = ""
    """"global", "blocks", or "" for the stored order."""
    skip_damaged: bool = False
    skipped: list[str] = field(default_factory=list)
    """Descriptions of the samples that were skipped."""

    def batches(self, first: int) -> Iterator[tuple[Plan, Any]]:
        """Yield the batches from number `first` on, without an end: plan, and its images as `graph` describes them
        (None if it has no samples), of a pixel store on a CPU the rows of crops at full width, which stay as they are
        until the next batch is asked for. Raises `DataError`."""
        in_blocks, numbers = self.shuffle == "blocks", count(first)
        pinned = self.graph.decode == "stored" and self.graph.device == "gpu"
        reader = SampleReader(self.shards, self.shuffle == "global", not in_blocks, pinned)
        # One thread reads samples out of blocks, which are in the page cache: the reader has one for the next block.
        pool = ThreadPoolExecutor(1 if in_blocks else self.speed.reader_queue_depth, "reader")
        reading: deque[Future[ReadBatch]] = deque()
        decoding: deque[ReadBatch | DataError] = deque()

        def read(number: int) -> ReadBatch:
            plan = self.plan(number)
            if plan.shards is not None:
                reader.read_ahead(plan.shards, plan.rows)
            if self.graph.decode == "stored":
                return read_pixels(reader, plan, self.graph.crop)
            encoded = reader.read(plan.rows)
            return ReadBatch(plan, encoded, wrap_encoded(encoded.images) if len(plan.rows) else None)

        pipe = None
        try:
            pipe = self._build_pipeline(self.batch_size)
            while True:
                while len(decoding) <= self.speed.prefetch_queue_depth:
                    while len(reading) <= self.speed.reader_queue_depth:
                        reading.append(pool.submit(read, next(numbers)))
                    try:
                        decoding.append(self._schedule(pipe, reading.popleft().result()))
                    except DataError as error:  # raised when its batch is due
                        decoding.append(error)
                        break
                due = decoding.popleft()
                if isinstance(due, DataError):
                    raise due
                yield self._take_outputs(pipe, due)
                reader.release(due.encoded)
        finally:
            pool.shutdown(cancel_futures=True)
            if pipe is not None:  # a traceback may hold it; and it reads from the reader's buffers
                pipe._shutdown()
            reader.close()

    def _build_pipeline(self, batch_size: int) -> Any:
        """Build DALI's pipeline; None for pixels on a CPU, where nothing is left to it."""
        if self.graph.decode == "stored" and self.graph.device == "cpu":
            return None
        with name_gpu_errors():
            pipe = build_pipeline(self.graph, batch_size, self.speed.num_threads, self.device_id)
            pipe.build()
        return pipe

    def _schedule(self, pipe: Any, batch: ReadBatch) -> ReadBatch:
        """Feed a batch to DALI and start to decode it; returns it."""
        if pipe is not None and batch.tensors is not None:
            feed(pipe, self.graph, batch.tensors, batch.plan)
            pipe.schedule_run()
        return batch

    def _take_outputs(self, pipe: Any, batch: ReadBatch) -> tuple[Plan, Any]:
        """Return the output of a batch that was scheduled, without damaged samples if these are to be skipped."""
        plan = batch.plan
        if pipe is None or batch.tensors is None:
            return plan, batch.tensors
        try:
            return plan, take_output(pipe)
        except DataError:
            raise
        except RuntimeError as error:
            is_stored = self.graph.decode == "stored"
            damaged = [] if is_stored else self._find_damaged(batch, np.arange(len(plan.rows)))
            if not damaged:
                raise DataError(f"DALI failed: {find_dali_reason(error)}") from None
        described = [self._describe(int(plan.rows[n])) for n in damaged]
        if not self.skip_damaged:
            place = Path(self.shards.tars[0]).parents[1]
            raise DataError(
                f"{described[0]} cannot be decoded; tools/make_shards.py verify {place} lists all damage, copy or pack "
                "those shards again; or train.run leaves such images out with --data.on_corrupt skip"
            )
        self.skipped += described
        kept = np.delete(np.arange(len(plan.rows)), damaged)
        return plan.select(kept), self._decode_alone(batch, kept)

    def _find_damaged(self, batch: ReadBatch, numbers: np.ndarray) -> list[int]:
        """List those of some samples of a batch that DALI refuses, by decoding halves. Raises `DataError` for a fault
        of the GPU."""
        try:
            self._decode_alone(batch, numbers)
        except DataError:
            raise
        except RuntimeError:
            if len(numbers) == 1:
                return [int(numbers[0])]
            return [n for half in np.array_split(numbers, 2) for n in self._find_damaged(batch, half)]
        return []

    def _decode_alone(self, batch: ReadBatch, kept: np.ndarray) -> Any:
        """Decode some samples of a batch, in a pipeline of their own; None if there are none."""
        if not len(kept):
            return None
        pipe, images = self._build_pipeline(len(kept)), [batch.encoded.images[n] for n in kept]
        self._schedule(pipe, ReadBatch(batch.plan.select(kept), batch.encoded, wrap_encoded(images)))
        return take_output(pipe)

    def _describe(self, row: int) -> str:
        """Describe a sample by key, offset and shard."""
        sample = self.shards.samples[row]
        key = self.shards.read_key(row) or "a sample"
        return f"{key} at offset {sample['offset']} of {self.shards.tars[sample['shard']]}"


def take_output(pipe: Any) -> torch.Tensor:
    """Return what DALI made of the oldest batch that was fed, in DALI's memory. Raises `RuntimeError`, for a fault of
    the GPU `DataError`."""
    with name_gpu_errors():
        return torch.from_dlpack(pipe.outputs()[0].as_tensor())


def read_pixels(reader: SampleReader, plan: Plan, crop: bool) -> ReadBatch:
    """Read a batch of a pixel store: of crops only their rows, of whole images all."""
    height, row = (CROP_SIDE if crop else IMAGE_SIDE), 3 * IMAGE_SIDE
    skip = NPY_HEADER + (plan.draws.top * row if crop and plan.draws else 0)
    encoded, count = reader.read(plan.rows, skip, height * row), len(plan.rows)
    pixels = torch.from_numpy(encoded.buffer[: count * height * row]).view(count, height, IMAGE_SIDE, 3)
    return ReadBatch(plan, encoded, pixels if count else None)


@contextmanager
def name_gpu_errors() -> Iterator[None]:
    """Turn DALI's errors of CUDA into `DataError`, as they are not of the data."""
    try:
        yield
    except RuntimeError as error:
        pattern = r".*(CUDA (runtime|driver) API|CUDA allocation|cudaError[A-Z]|CUDA_ERROR_|NVML).*"
        if not (found := re.search(pattern, str(error))):
            raise
        raise DataError(
            f"DALI failed on the GPU: {found[0].strip()}; tools/doctor.py checks driver and GPUs; where memory is "
            "short, take a smaller batch or end other processes"
        ) from None


def find_dali_reason(error: RuntimeError) -> str:
    """Return the reason in a report of DALI: the line after the word "encountered", else the first line."""
    report = str(error)
    lines = [line.strip() for line in report.partition("encountered:")[2].splitlines() if line.strip()]
    return lines[0] if lines else report.partition("\n")[0]
