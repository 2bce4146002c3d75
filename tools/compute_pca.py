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

import numpy as np
from tqdm import tqdm

from pipeline.eigenbasis import Eigenbasis, Moments, write_eigenbasis
from pipeline.files import atomic_writer
from pipeline.shards import ShardSet, open_shards
from train.program import run_program


def compute_pca(shards: Path, batch_size: int = 64, threads: int | None = None, mean_image: bool = False) -> None:
    """Compute mean and eigenbasis of all training images and write SHARDS/pca.json.

    Args:
        shards: Folder written by make_shards.
        batch_size: Images decoded at a time; the result does not depend on it.
        threads: Decoding threads; one per core by default.
        mean_image: Write the mean of each pixel as well: mean_image.npy (float32, 256x256x3, RGB, 0..255) and
            mean_image.png to look at.
    """
    if batch_size < 1 or (threads is not None and threads < 1):
        raise ValueError("--batch-size and --threads must be at least 1")
    train = open_shards(shards, "train")
    path, picture = shards / "pca.json", shards / "mean_image.npy"
    if path.is_file():
        Eigenbasis.load(path, train.manifest_sha256)
        if picture.is_file() or not mean_image:
            print(f"{path} fits these shards already; nothing to do")
            return

    import nvidia.dali  # takes a second, which the errors above need not wait for

    moments = Moments()
    sums = np.zeros((256, 256, 3), np.int64) if mean_image else None
    with tqdm(total=train.num_samples, desc="eigenbasis", unit="img", disable=None) as progress:
        for of_batch, batch_sums in batch_moments(train, batch_size, threads, mean_image):
            moments += of_batch
            if sums is not None and batch_sums is not None:
                sums += batch_sums
            progress.update(of_batch.num_images)
    if sums is not None:
        write_mean_image(picture, sums, moments.num_images)
    basis = write_eigenbasis(path, moments, train.manifest_sha256, f"DALI {nvidia.dali.__version__} cpu")
    print(f"{path}: {moments.num_images} images")
    print(f"mean (R, G, B)          {basis['mean']}")
    print(f"stddev along the axes   {basis['axis_stddev']}")
    if warning := degenerate(basis["eigenvalues"], moments.num_images):
        print(f"warning: {warning}")


def degenerate(eigenvalues: list[float], num_images: int) -> str:
    """What makes a basis a poor one for lighting; empty for a sound one. Eigenvalues in descending order."""
    if eigenvalues[0] == 0:
        return "every pixel has the same colour, lighting will change nothing; are these the right images?"
    if eigenvalues[1] <= 1e-9 * eigenvalues[0]:
        return "the images have one axis of colour (they are grey), lighting will change their brightness alone"
    if num_images == 1:
        return "one image is no data set; the axes are those of its own colours"
    return ""


def write_mean_image(path: Path, sums: np.ndarray, num_images: int) -> None:
    """Write the mean image from exact sums, int64 (256, 256, 3), as float32 `.npy` and, rounded, as `.png`."""
    from PIL import Image

    mean = sums / num_images
    with atomic_writer(path.with_suffix(".png")) as file:
        Image.fromarray(np.rint(mean).astype(np.uint8)).save(file, "PNG")
    with atomic_writer(path) as file:
        np.save(file, mean.astype(np.float32))


def batch_moments(
    shards: ShardSet, batch_size: int, threads: int | None = None, image_sums: bool = False
) -> Iterator[tuple[Moments, np.ndarray | None]]:
    """Sum every batch of a split, in threads beside DALI's own; yields in order the moments and, if asked for, the sum
    over the images, int64 (256, 256, 3)."""
    import torch

    from pipeline.loader import decoded_batches

    def work(images_NHWC: np.ndarray) -> tuple[Moments, np.ndarray | None]:
        sums = torch.from_numpy(images_NHWC).sum(0, dtype=torch.int64).numpy() if image_sums else None
        return Moments.of(images_NHWC), sums

    # Summing takes a quarter of the time of decoding; threads of torch's own would only wait for each other.
    torch.set_num_threads(1)
    summing = max(1, (threads or len(os.sched_getaffinity(0))) // 4)
    pending: deque[Future[tuple[Moments, np.ndarray | None]]] = deque()
    with ThreadPoolExecutor(summing) as pool:
        for images_NHWC in decoded_batches(shards, batch_size, threads):
            pending.append(pool.submit(work, images_NHWC))
            if len(pending) > summing:
                yield pending.popleft().result()
        yield from (future.result() for future in pending)


if __name__ == "__main__":
    run_program(compute_pca)
