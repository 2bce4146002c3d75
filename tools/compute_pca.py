"""Compute the RGB mean and eigenbasis of the training shards: SHARDS/pca.json.

    python tools/compute_pca.py SHARDS

Images are decoded by the training pipeline's decoder, so statistics and training see the same pixels. Sums are exact
integers, so the file's bytes do not depend on threads and batches. `tools/preview.py` draws the result.
"""

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Literal, NoReturn

import numpy as np
from tqdm import tqdm

from pipeline.eigenbasis import read_eigenbasis, read_mean_image, write_eigenbasis
from pipeline.files import atomic_writer, check_writable
from pipeline.machine import share_of_cores
from pipeline.shards import ShardSet, open_shards
from train.cli import run_program

if TYPE_CHECKING:
    from tools.moments import Sums

BATCH_SIZE = 64


def compute_pca(
    shards: Path, mean_image: bool = False, out: Path | None = None, device: Literal["cpu", "cuda"] = "cpu"
) -> None:
    """Compute mean and eigenbasis of all training images and write SHARDS/pca.json.

    Args:
        shards: Folder written by make_shards.
        mean_image: Also write the mean of each pixel: mean_image.npy (float32, 256x256x3, RGB, 0..255) and
            mean_image.png, next to pca.json.
        out: JSON file to write, for read-only shards; SHARDS/pca.json by default.
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
    check_writable(path)
    total, decoder = sum_split(train, mean_image, device)
    if mean_image:
        write_mean_image(mean_path, total)
    # A run resumes only with its own pca.json; another decoder's may differ in the last digits.
    if not has_basis:
        write_eigenbasis(path, total.moments, train.manifest_sha256, decoder)
    content = read_eigenbasis(path, train.manifest_sha256)
    print(f"{path}: {content['num_images']} images, decoder {content['decoder']}")
    print(f"mean (R, G, B)          {content['mean']}")
    print(f"stddev along the axes   {content['axis_stddev']}")
    if warning := describe_degeneracy(content["eigenvalues"], content["num_images"]):
        print(f"warning: {warning}")


def sum_split(train: ShardSet, mean_image: bool, device: Literal["cpu", "cuda"]) -> tuple["Sums", str]:
    """Decode and sum every training image. Returns the sums and the name of the decoder.

    Raises `DataError` when DALI fails, `ValueError` without a GPU to decode on.
    """
    import nvidia.dali  # takes seconds, as torch does; errors in the input come first

    from tools.moments import Sums, sum_batches
    from train.device import pick_device

    total, threads, start = Sums(), share_of_cores(), perf_counter()
    with tqdm(total=train.num_samples, desc="eigenbasis", unit="img", disable=None) as progress:
        for sums in sum_batches(train, BATCH_SIZE, threads, pick_device(device), mean_image):
            total += sums
            progress.update(sums.moments.num_images)
    seconds = perf_counter() - start
    print(
        f"counted {train.num_samples} images in {seconds:.1f} s ({train.num_samples / seconds:.0f} images/s)"
    )
    return total, f"DALI {nvidia.dali.__version__} {'gpu' if device == 'cuda' else 'cpu'}"


def describe_degeneracy(eigenvalues: list[float], num_images: int) -> str:
    """Describe why a basis is degenerate for lighting; empty if it is not. Eigenvalues in descending order."""
    if eigenvalues[0] == 0:
        return "every pixel has the same colour, lighting has no effect; check the images"
    if eigenvalues[1] <= 1e-9 * eigenvalues[0]:
        return "the images have one axis of colour (they are grey), lighting changes only their brightness"
    return "only one image; the axes are those of its colours" if num_images == 1 else ""


def write_mean_image(path: Path, total: "Sums") -> None:
    """Write the mean image as a float32 `.npy`, and rounded as a `.png`."""
    from PIL import Image

    mean_HWC = np.asarray(total.image / total.moments.num_images)
    with atomic_writer(path.with_suffix(".png")) as file:
        Image.fromarray(np.rint(mean_HWC).astype(np.uint8)).save(file, "PNG")
    with atomic_writer(path) as file:
        np.save(file, mean_HWC.astype(np.float32))


def main() -> NoReturn:
    """Run the command line."""
    run_program(compute_pca)


if __name__ == "__main__":
    main()
