"""Checks and errors for all DALI pipelines that read shards, and a reader that decodes every image once, in order.

Shapes: N images, H rows, W columns, C colours.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from nvidia.dali import Pipeline

from pipeline.diagnose import locate_corrupt_sample
from pipeline.errors import DataError
from pipeline.graph import decode_pipeline
from pipeline.machine import available_bytes, processes_here, raise_open_file_limit, share_of_cores
from pipeline.shards import ShardSet

INDEX_BYTES = 455
"""Memory of DALI's index per sample, measured with 14.2 million samples (docs/benchmarks/details.md)."""


def decoded_batches(
    shards: ShardSet, batch_size: int, threads: int | None = None, device: torch.device | str = "cpu"
) -> Iterator[torch.Tensor]:
    """Yield every image of a split once as uint8 (n, 256, 256, 3) RGB, in stored order; the last batch is shorter.

    Args:
        shards: The split to read.
        batch_size: Images per batch.
        threads: DALI's CPU threads; one per core by default.
        device: Device that decodes the images, and on which they stay.

    Raises `DataError` when DALI fails.
    """
    raise_open_file_limit(len(shards.tars))
    device = torch.device(device)
    pipe = decode_pipeline(
        shards,
        "gpu" if device.type == "cuda" else "cpu",
        batch_size=batch_size,
        num_threads=threads or share_of_cores(),
        device_id=(device.index or 0) if device.type == "cuda" else None,
        seed=0,
    )
    for first in range(0, shards.num_samples, batch_size):
        with data_errors(shards):
            if first == 0:
                pipe.build()
                check_index(pipe, shards)
            (images,) = pipe.run()
            batch_NHWC = torch.from_dlpack(images.as_tensor())
        yield batch_NHWC[: shards.num_samples - first]


def parse_labels(digits: torch.Tensor) -> torch.Tensor:
    """Parse labels, uint8 (N, 6) of ASCII digits followed by zeros, to int64 (N,)."""
    labels = torch.zeros(len(digits), dtype=torch.int64)
    for column in (digits.long() - ord("0")).unbind(1):
        labels = torch.where(column >= 0, 10 * labels + column, labels)
    return labels


def check_index(pipe: Pipeline, shards: ShardSet) -> None:
    """Raise `DataError` unless the indexes list as many samples as the manifest; else epochs would not be exact."""
    indexed = pipe.reader_meta()["reader"]["epoch_size"]
    if indexed != shards.num_samples:
        place = Path(shards.tars[0]).parent
        raise DataError(
            f"the .idx files of {place} list {indexed} samples, its manifest {shards.num_samples}; copy them again"
        )


@contextmanager
def data_errors(shards: ShardSet) -> Iterator[None]:
    """Turn DALI's `RuntimeError` into a `DataError` of one sentence.

    If decoding or reading failed, the shards are searched for the damaged image, which DALI does not name. Otherwise
    the reason is the line after the word "encountered" in DALI's report.
    """
    try:
        yield
    except DataError:
        raise
    except RuntimeError as error:
        report = str(error)
        lines = [line.strip() for line in report.partition("encountered:")[2].splitlines() if line.strip()]
        if gpu_error := re.search(
            r".*(CUDA (runtime|driver) API|CUDA allocation|cudaError[A-Z]|CUDA_ERROR_|NVML).*", report
        ):
            raise DataError(
                f"DALI failed on the GPU: {gpu_error[0].strip()}; tools/doctor.py checks driver and GPUs; where "
                "memory is short, take a smaller batch or end other processes"
            ) from None
        of_data = any(
            name in report for name in ("decoders", "peek_image_shape", "readers", "webdataset")
        )  # other errors, such as a lack of memory, are not of the data
        reason = (locate_corrupt_sample(shards) if of_data else "") or (
            lines[0] if lines else report.splitlines()[0]
        )
        place = Path(shards.tars[0]).parent
        raise DataError(
            f"reading {place} failed: {reason}; tools/make_shards.py verify {place.parent} lists all damage, copy or "
            "pack those shards again"
        ) from None


def warn_if_memory_is_short(shards: ShardSet) -> None:
    """Print a warning if DALI's index, which every process holds, takes more than a quarter of the free memory."""
    needed = INDEX_BYTES * shards.num_samples
    processes, free = processes_here(), available_bytes()
    if needed * processes > free / 4:
        print(
            f"warning: DALI's index of {shards.num_samples} samples takes about {needed / 1e9:.1f} GB in each of "
            f"{processes} processes on this machine, which has {free / 1e9:.0f} GB free; start fewer processes on it, "
            "or use a machine with more memory"
        )
