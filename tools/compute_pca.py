"""Compute the RGB mean and eigenbasis of the training shards: SHARDS/pca.json.

    python tools/compute_pca.py SHARDS

Images are decoded by the training pipeline's decoder, so statistics and training see the same pixels. Sums are exact
integers, so the file's bytes do not depend on threads and batches. `tools/preview.py` draws the result.

Shapes: N images of a batch, H = W = 256, C = 3 channels (RGB).
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from pipeline.eigenbasis import read_eigenbasis, read_mean_image
from pipeline.errors import UserError
from pipeline.files import atomic_writer, check_writable
from pipeline.machine import share_of_cores
from pipeline.shards import ShardSet, open_shards
from tools.moments import Moments, write_eigenbasis
from train.cli import run_program

if TYPE_CHECKING:
    import torch

BATCH_SIZE = 64


class Sums(NamedTuple):
    """Exact sums over a set of images."""

    moments: Moments
    image: np.ndarray | int
    """Sum of the images, int64 (256, 256, 3); 0 if not requested."""


def compute_pca(
    shards: Path, mean_image: bool = False, out: Path | None = None, device: Literal["cpu", "cuda"] = "cpu"
) -> None:
    """Compute mean and eigenbasis of all training images and write SHARDS/pca.json.

    Args:
        shards: Folder written by make_shards.
        mean_image: Also write the mean of each pixel: mean_image.npy (float32, 256x256x3, RGB, 0..255) and
            mean_image.png, next to pca.json.
        out: JSON file to write, for shards whose folder may not be written, in a folder of its own; SHARDS/pca.json by
            default. train.run takes it as --data.eigenbasis.
        device: Device that decodes and sums. A GPU's decoder may differ by a level in some pixels; pca.json names the
            decoder.
    """
    train, path = open_shards(shards, "train"), out or shards / "pca.json"
    mean_path = path.with_name("mean_image.npy")
    existing = read_eigenbasis(path, train.manifest_sha256) if path.exists() else {}
    has_basis = existing.get("num_images") == train.num_samples
    if has_basis and not (mean_image and read_mean_image(mean_path, existing["mean"]) is None):
        print(f"{path} is up to date; nothing to do")
        return
    try:
        check_writable(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written, {error.strerror}; give another file: --out FILE"
        ) from None
    import nvidia.dali  # takes seconds, as torch does; errors in the input come first

    from train.device import pick_device

    moments, image, start = Moments(), np.zeros(()), perf_counter()
    with tqdm(total=train.num_samples, desc="eigenbasis", unit="img", disable=None) as progress:
        for sums in sum_batches(train, BATCH_SIZE, share_of_cores(), pick_device(device), mean_image):
            moments, image = moments + sums.moments, image + sums.image
            progress.update(sums.moments.num_images)
    seconds = perf_counter() - start
    print(
        f"counted {train.num_samples} images in {seconds:.1f} s ({train.num_samples / seconds:.0f} images/s)"
    )
    if mean_image:
        write_mean_image(mean_path, image / moments.num_images)
    # A run resumes only with its own pca.json; another decoder's may differ in the last digits.
    if not has_basis:
        decoder = f"DALI {nvidia.dali.__version__} {'gpu' if device == 'cuda' else 'cpu'}"
        decoder = "none, stored pixels" if train.is_decoded else decoder
        write_eigenbasis(path, moments, train.manifest_sha256, decoder)
    content = read_eigenbasis(path, train.manifest_sha256)
    print(f"{path}: {content['num_images']} images, decoder {content['decoder']}")
    print(f"mean (R, G, B)          {content['mean']}")
    print(f"stddev along the axes   {content['axis_stddev']}")
    if content["eigenvalues"][1] <= 1e-9 * content["eigenvalues"][0]:
        print(
            "warning: the pixels have one axis of colour (grey) or none: lighting changes only brightness, or nothing"
        )


def sum_batches(
    shards: ShardSet,
    batch_size: int,
    threads: int,
    device: "torch.device | str" = "cpu",
    with_image: bool = False,
) -> Iterator[Sums]:
    """Decode a split in stored order and yield the sums of each batch, computed in threads next to DALI's.

    Raises `DataError` when DALI fails.
    """
    import torch

    from pipeline.loader import decoded_batches

    def sum_batch(images_NHWC: torch.Tensor) -> Sums:
        moments = Moments.of(images_NHWC, at_a_time=len(images_NHWC) if images_NHWC.is_cuda else 1)
        return Sums(moments, sum_images(images_NHWC).long().cpu().numpy() if with_image else 0)

    # Summing takes a quarter of the time of decoding; torch's threads would only wait for each other.
    torch.set_num_threads(1)
    workers = max(1, threads // 4)
    pending: deque[Future[Sums]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for images_NHWC in decoded_batches(shards, batch_size, threads, device):
            pending.append(pool.submit(sum_batch, images_NHWC))
            if len(pending) > workers:
                yield pending.popleft().result()
        yield from (future.result() for future in pending)


def sum_images(images_NHWC: "torch.Tensor") -> "torch.Tensor":
    """Sum uint8 images to int32 (H, W, C), exact up to 8 million of them.

    One by one: `images_NHWC.sum(0)` takes 10 to 20 times as long on a CPU.
    """
    total_HWC = images_NHWC.new_zeros(images_NHWC.shape[1:]).int()
    for image_HWC in images_NHWC:
        total_HWC += image_HWC
    return total_HWC


def write_mean_image(path: Path, mean_HWC: np.ndarray) -> None:
    """Write the mean image as a float32 `.npy`, and rounded as a `.png`."""
    from PIL import Image

    with atomic_writer(path.with_suffix(".png")) as file:
        Image.fromarray(np.rint(mean_HWC).astype(np.uint8)).save(file, "PNG")
    with atomic_writer(path) as file:
        np.save(file, mean_HWC.astype(np.float32))


if __name__ == "__main__":
    run_program(compute_pca)
