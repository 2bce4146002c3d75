"""What a run on 64 GPUs would ask of its machines, on paper: arithmetic on what was measured here.

No speed of a GPU is among that. The images per second that each of them trains are assumed, several rates beside each
other. Where GPUs decode, cores have less to do than the estimate says; where all decoding is on CPUs, one normalizes on
the GPU, which the measured loader does on a core.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from tools.benchmarks.measure import number

GPUS, BATCH_SIZE, SAMPLES = 64, 128, 1_281_167
"""Of all machines; of each GPU; of ILSVRC-2012."""
FLOAT_BYTES = 4
NOT_ON_A_GPU = "GPU rates are assumed: nothing here was measured on a GPU"


class Constants(NamedTuple):
    """What was measured."""

    images_per_core_s: float
    """Decoded and finished by the loader with one thread, by the processor time that it took."""
    image_bytes: float
    """Of a shard, per sample."""
    parameters: int
    """Of the network."""
    process_gb: float | None
    """Memory that a loading process takes with `SAMPLES` samples; None where that was not measured."""


class Estimate(NamedTuple):
    """For one assumed rate; all GPUs together unless it says otherwise."""

    images_per_gpu_s: float
    """Assumed."""
    cores_per_gpu: float
    """That decode for one GPU, where CPUs do all of it."""
    read_gb_per_s: float
    """From disk or network, while the set is not in the page cache."""
    epoch_s: float
    """One pass over the set."""
    allreduce_gb_per_step: float
    """Of gradients that one GPU sends, and receives, in a ring: 2 (n - 1) / n of them all, in float32."""
    allreduce_gb_per_s: float
    """The same by time, at `BATCH_SIZE` images a step."""
    page_cache_gb: float
    """Memory that holds the whole set; of every machine, if each reads all of it."""
    loaders_gb: float | None
    """Memory of the loading processes, one for each GPU."""


TEXTS = {
    "images_per_gpu_s": "images/s of each GPU (assumed)",
    "cores_per_gpu": "cores per GPU that decode",
    "read_gb_per_s": "GB/s read from disk or network, in all",
    "epoch_s": "seconds an epoch",
    "allreduce_gb_per_step": "GB of gradients each GPU sends, per step",
    "allreduce_gb_per_s": "GB/s of gradients each GPU sends",
    "page_cache_gb": "GB of page cache that hold the set",
    "loaders_gb": "GB of memory of all loaders, in all",
}


def estimate(
    images_per_gpu_s: float, constants: Constants, gpus: int = GPUS, batch_size: int = BATCH_SIZE
) -> Estimate:
    """The arithmetic."""
    rate = gpus * images_per_gpu_s
    allreduce_gb = 2 * (gpus - 1) / gpus * FLOAT_BYTES * constants.parameters / 1e9
    return Estimate(
        images_per_gpu_s=images_per_gpu_s,
        cores_per_gpu=images_per_gpu_s / constants.images_per_core_s,
        read_gb_per_s=rate * constants.image_bytes / 1e9,
        epoch_s=SAMPLES / rate,
        allreduce_gb_per_step=allreduce_gb,
        allreduce_gb_per_s=allreduce_gb * images_per_gpu_s / batch_size,
        page_cache_gb=SAMPLES * constants.image_bytes / 1e9,
        loaders_gb=None if constants.process_gb is None else gpus * constants.process_gb,
    )


def estimate_row(constants: Constants, estimates: Sequence[Estimate]) -> dict[str, Any]:
    """The row of the file."""
    assumed = {"gpus": GPUS, "batch_size_per_gpu": BATCH_SIZE, "samples": SAMPLES}
    return {
        "contender": f"{GPUS} GPUs, on paper",
        "note": NOT_ON_A_GPU,
        "measured": constants._asdict(),
        "assumed": assumed,
        "estimates": [each._asdict() for each in estimates],
    }


def show_estimates(constants: Constants, estimates: Sequence[Estimate]) -> None:
    """Print them beside each other."""
    print(f"{GPUS} GPUs, {BATCH_SIZE} images each a step, {SAMPLES} samples, on paper. {NOT_ON_A_GPU}.")
    held = "not measured" if constants.process_gb is None else f"{constants.process_gb:.2f} GB"
    print(
        f"From: {constants.images_per_core_s:.0f} images/s per core, {constants.image_bytes / 1e3:.1f} kB per image, "
        f"{constants.parameters} parameters, memory per loader: {held}"
    )
    for field, text in TEXTS.items():
        values = [getattr(each, field) for each in estimates]
        cells = " ".join(f"{'-' if value is None else number(value):>10}" for value in values)
        print(f"{text:<42} {cells}")
