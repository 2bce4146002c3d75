"""Compute the RGB mean and eigenbasis of the training shards: SHARDS/pca.json.

    python tools/compute_pca.py SHARDS

Pixels come through the pipeline's own decoder, so that statistics and training see the same ones; sums are exact
integers.
"""

from pathlib import Path

from tqdm import tqdm

from pipeline.eigenbasis import Eigenbasis, Moments, write_eigenbasis
from pipeline.shards import open_shards
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

    from pipeline.loader import decoded_batches

    moments = Moments()
    with tqdm(total=train.num_samples, desc="eigenbasis", unit="img", disable=None) as progress:
        for images_NHWC in decoded_batches(train, batch_size, threads):
            moments += Moments.of(images_NHWC)
            progress.update(len(images_NHWC))
    basis = write_eigenbasis(path, moments, train.manifest_sha256, f"DALI {nvidia.dali.__version__} cpu")
    print(f"{path}: {moments.num_images} images")
    print(f"mean (R, G, B)          {basis['mean']}")
    print(f"stddev along the axes   {basis['axis_stddev']}")


if __name__ == "__main__":
    run_program(compute_pca)
