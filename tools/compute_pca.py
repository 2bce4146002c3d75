"""Compute the RGB mean and eigenbasis of the training shards: SHARDS/pca.json.

    python tools/compute_pca.py SHARDS

Pixels come through the pipeline's own decoder, so that statistics and training see the same ones; sums are exact
integers.
"""

import os
import random
import tempfile
from bisect import bisect_right
from contextlib import ExitStack
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Literal, NoReturn

import numpy as np

from pipeline.eigenbasis import read_eigenbasis, read_mean_image, write_eigenbasis
from pipeline.files import atomic_writer
from pipeline.machine import share_of_cores
from pipeline.shards import DataError, ShardSet, index_text, open_shards, read_index
from tools.packing.parts import find_part
from tools.show_pca import draw, table
from train.launch import Task
from train.program import run_program

if TYPE_CHECKING:
    import torch

    from tools.moments import Sums


def compute_pca(
    shards: Path,
    batch_size: int = 64,
    threads: int | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    sample: int | None = None,
    seed: int = 2012,
    part: str | None = None,
    mean_image: bool = False,
    show: bool = False,
) -> None:
    """Compute mean and eigenbasis of all training images and write SHARDS/pca.json.

    Run again after an interruption, it does what is left.

    Args:
        shards: Folder written by make_shards.
        batch_size: Images decoded at a time; the result does not depend on it.
        threads: Decoding threads; one per core by default.
        device: Where images are decoded and summed. A GPU's decoder may differ by a level in some pixels; pca.json says
            which one it was.
        sample: Take so many images, drawn at random, for a quick estimate; pca.json says so, and a run without it
            replaces it.
        seed: Seed of that draw.
        part: Share of this machine as i/n (i from 1, or from 0 to n-1); by default torchrun's or srun's
            variables tell, or it does everything. Whoever is last writes pca.json.
        mean_image: Write the mean of each pixel as well: mean_image.npy (float32, 256x256x3, RGB, 0..255) and
            mean_image.png to look at.
        show: Print the basis beside ImageNet's and draw pca.png: the axes as colours, and images moved along them.
    """
    if batch_size < 1 or (threads is not None and threads < 1):
        raise ValueError("--batch-size and --threads must be at least 1")
    train, mine = open_shards(shards, "train"), find_part(part, os.environ)
    if sample is not None and not 1 <= sample <= train.num_samples:
        raise ValueError(f"--sample {sample} has to lie in 1..{train.num_samples}, the number of training images")
    if sample is not None and mean_image:
        raise ValueError("--mean-image takes every image, --sample a few; give one of them")
    wanted = None if sample is None else {"images": sample, "seed": seed}

    if is_done(shards, train, wanted, mean_image):
        print(f"{shards / 'pca.json'} fits these shards already; nothing to do")
    elif not count(shards, train, wanted, mean_image, mine, batch_size, threads or share_of_cores(), device):
        return
    if show:
        content = read_eigenbasis(shards / "pca.json", train.manifest_sha256)
        print(table(content))
        draw(shards / "pca.png", train, content)
        print(f"picture: {shards / 'pca.png'}")


def is_done(shards: Path, train: ShardSet, wanted: dict[str, int] | None, mean_image: bool) -> bool:
    """Whether what is wanted is there; the basis of all images is better than any estimate.

    Raises `ValueError` when pca.json is damaged or of other shards.
    """
    if not (shards / "pca.json").exists():
        return False
    content = read_eigenbasis(shards / "pca.json", train.manifest_sha256)
    if mean_image and read_mean_image(shards / "mean_image.npy", content["mean"]) is None:
        return False
    return content.get("sample") in (None, wanted)


def count(
    shards: Path,
    train: ShardSet,
    wanted: dict[str, int] | None,
    mean_image: bool,
    mine: Task,
    batch_size: int,
    threads: int,
    device: Literal["cpu", "cuda"],
) -> bool:
    """Count our part of the images; when all parts are counted, write and print the results and return True."""
    import nvidia.dali  # it and torch take seconds, which errors in the input need not wait for

    from tools.moments import Tally

    place = cuda_device() if device == "cuda" else "cpu"
    decoder = f"DALI {nvidia.dali.__version__} {'gpu' if device == 'cuda' else 'cpu'}"
    with ExitStack() as stack:
        chosen = train
        if wanted:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="compute_pca-"))
            chosen = draw_sample(train, wanted["images"], wanted["seed"], Path(folder))
        of = {"manifest": train.manifest_sha256, "decoder": decoder, "sample": wanted}
        tally = Tally(shards, chosen, of, mean_image)
        ours = range(mine.rank, len(tally.groups), mine.world)
        if mine.world > 1:
            print(f"part {mine.rank + 1} of {mine.world} (from {mine.source})", flush=True)
        started = perf_counter()
        images = tally.count([k for k in ours if tally.read(k) is None], batch_size, threads, place)
    seconds = perf_counter() - started
    if images:
        print(f"counted {images} images in {seconds:.1f} s ({images / seconds:.0f} images/s)")

    total = tally.total()
    if total is None and not is_done(shards, train, wanted, mean_image):  # else another part was faster
        print(
            f"{shards / 'pca.json'} is left to other parts, at work or to be started with the same options: "
            f"{len(tally.missing())} of {len(tally.groups)} groups of shards are missing"
        )
        return False
    if total is not None:
        write_results(shards, train, wanted, total, decoder)
    tally.forget()
    if others := sorted(path.name for path in shards.glob("pca.part-*")):
        print(f"note: {shards} holds parts of other runs, such as {others[0]}; remove them unless one is at work")
    content = read_eigenbasis(shards / "pca.json", train.manifest_sha256)
    estimate = ", an estimate" if "sample" in content else ""
    print(f"{shards / 'pca.json'}: {content['num_images']} images, decoder {content['decoder']}{estimate}")
    print(f"mean (R, G, B)          {content['mean']}")
    print(f"stddev along the axes   {content['axis_stddev']}")
    if warning := degenerate(content["eigenvalues"], content["num_images"]):
        print(f"warning: {warning}")
    return True


def write_results(shards: Path, train: ShardSet, wanted: dict[str, int] | None, total: "Sums", decoder: str) -> None:
    """Write mean_image.npy, if its sums are there, and pca.json. One of all images is left as it is: runs that began
    with it go on with no other, and another decoder's may differ in the last digits."""
    if total.image is not None:
        write_mean_image(shards / "mean_image.npy", total.image, total.moments.num_images)
    if not is_done(shards, train, wanted, mean_image=False):
        seed = wanted["seed"] if wanted else None
        write_eigenbasis(shards / "pca.json", total.moments, train.manifest_sha256, decoder, seed)


def draw_sample(shards: ShardSet, images: int, seed: int, folder: Path) -> ShardSet:
    """So many random images of a split: the same shards with shorter indexes, which are written to `folder`."""
    ends = list(accumulate(shards.samples))
    rows: dict[int, list[int]] = {}
    for row in sorted(random.Random(seed).sample(range(ends[-1]), images)):
        shard = bisect_right(ends, row)
        rows.setdefault(shard, []).append(row - (ends[shard] - shards.samples[shard]))
    indexes = []
    for shard, chosen in rows.items():
        samples = read_index(Path(shards.indexes[shard]))
        if len(samples) != shards.samples[shard]:
            raise DataError(
                f"{shards.indexes[shard]} lists {len(samples)} samples, the manifest {shards.samples[shard]}; copy it "
                "again or pack again"
            )
        path = folder / f"{shard}.idx"
        path.write_text(index_text([samples[k] for k in chosen]))
        indexes.append(str(path))
    return replace(
        shards.only(list(rows)), indexes=tuple(indexes), samples=tuple(len(chosen) for chosen in rows.values())
    )


def cuda_device() -> "torch.device":
    """The GPU of this process among those of its machine. Raises `ValueError` where there is none."""
    import torch

    from train.device import pick_device
    from train.launch import find_launch

    find_launch(os.environ, torch.cuda.device_count())
    return pick_device("cuda")


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


def main() -> NoReturn:
    """The command line."""
    run_program(compute_pca)


if __name__ == "__main__":
    main()
