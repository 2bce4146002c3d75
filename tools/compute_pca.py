"""Compute the RGB mean and eigenbasis of the training shards: SHARDS/pca.json.

    python tools/compute_pca.py SHARDS

Pixels come through the pipeline's own decoder, so that statistics and training see the same ones; sums are exact
integers.
"""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from pipeline.eigenbasis import Eigenbasis, Moments, write_eigenbasis
from pipeline.shards import ShardSet, open_shards
from train.program import run_program


def compute_pca(shards: Path, batch_size: int = 64, threads: int | None = None) -> None:
    """Compute mean and eigenbasis of all training images and write SHARDS/pca.json.

    Args:
        shards: Folder written by make_shards.
        batch_size: Images decoded at a time; the result does not depend on it.
        threads: Decoding threads; one per core by default.
    """
    if batch_size < 1 or (threads is not None and threads < 1):
        raise ValueError("--batch-size and --threads must be at least 1")
    train = open_shards(shards, "train")
    path = shards / "pca.json"
    if path.is_file():
        Eigenbasis.load(path, train.manifest_sha256)
        print(f"{path} fits these shards already; nothing to do")
        return

    import nvidia.dali  # takes a second, which the errors above need not wait for

    moments = Moments()
    with tqdm(total=train.num_samples, desc="eigenbasis", unit="img", disable=None) as progress:
        for of_batch in batch_moments(train, batch_size, threads):
            moments += of_batch
            progress.update(of_batch.num_images)
    basis = write_eigenbasis(path, moments, train.manifest_sha256, f"DALI {nvidia.dali.__version__} cpu")
    print(f"{path}: {moments.num_images} images")
    print(f"mean (R, G, B)          {basis['mean']}")
    print(f"stddev along the axes   {basis['axis_stddev']}")


def batch_moments(shards: ShardSet, batch_size: int, threads: int | None = None) -> Iterator[Moments]:
    """Moments of every batch of a split, summed in threads beside DALI's own; yields them in order."""
    import torch

    from pipeline.loader import decoded_batches

    # Summing takes a quarter of the time of decoding; threads of torch's own would only wait for each other.
    torch.set_num_threads(1)
    summing = max(1, (threads or len(os.sched_getaffinity(0))) // 4)
    pending: deque[Future[Moments]] = deque()
    with ThreadPoolExecutor(summing) as pool:
        for images_NHWC in decoded_batches(shards, batch_size, threads):
            pending.append(pool.submit(Moments.of, images_NHWC))
            if len(pending) > summing:
                yield pending.popleft().result()
        yield from (future.result() for future in pending)


if __name__ == "__main__":
    run_program(compute_pca)
