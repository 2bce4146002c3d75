"""Contenders whose batches come from the worker processes of a torch DataLoader: Pillow, torchvision, webdataset."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from pipeline.draws import CROP_SIDE
from pipeline.eigenbasis import Eigenbasis
from pipeline.lighting import Lighting
from tools.benchmarks.contenders.data import Batches, PeerData, Permutations, version_of
from tools.benchmarks.contenders.finish import finish, pillow_pixels


@functools.cache
def worker_rng() -> np.random.Generator:
    """Random numbers of one worker process of a DataLoader."""
    return np.random.default_rng(torch.initial_seed())


def finished(pixels_HWC: np.ndarray, basis: Eigenbasis) -> np.ndarray:
    """A finished window in memory of its own, in a worker process."""
    out = np.empty((CROP_SIDE, CROP_SIDE, 3), np.float32)
    finish(pixels_HWC, basis, worker_rng(), out)
    return out


class Files(Dataset):
    """Class folders, as torchvision's ImageFolder."""

    def __init__(self, files: list[tuple[str, int]], window: Callable[[str], Any]) -> None:
        self.files, self.window = files, window

    def __getitem__(self, number: int) -> tuple[Any, int]:
        """A finished window, and its class index."""
        path, label = self.files[number]
        return self.window(path), label


def in_workers(dataset: Any, data: PeerData, workers: int, sampler: Permutations | None = None) -> Batches:
    """Batches of a DataLoader; its processes end with the generator. Forked from a process without threads, which ours
    has."""
    yield from DataLoader(
        dataset, data.batch_size, sampler=sampler, num_workers=workers, multiprocessing_context="forkserver"
    )


def pillow_batches(data: PeerData) -> Batches:
    """A DataLoader with Pillow and numpy."""
    return files_batches(data, functools.partial(pillow_window, basis=data.basis))


def files_batches(data: PeerData, window: Callable[[str], Any]) -> Batches:
    """A DataLoader over files."""
    return in_workers(Files(data.files, window), data, data.workers, Permutations(len(data.files)))


def pillow_window(path: str, basis: Eigenbasis) -> np.ndarray:
    """One window, with Pillow and numpy."""
    return finished(pillow_pixels(path), basis)


def pillow_decode(data: PeerData) -> Iterator[np.ndarray]:
    """Files decoded by Pillow."""
    return (pillow_pixels(path) for path, _ in data.files)


OPERATORS: list[torch.library.Library] = []
"""Those that had to be declared for torchvision; they last as long as this."""


def torchvision_transforms() -> Any:
    """`torchvision.transforms.v2`. It needs none of torchvision's compiled operators; but where those do not load (a
    build for CUDA beside a torch without) importing it fails unless the two that it registers something for exist."""
    try:
        from torchvision.transforms import v2
    except RuntimeError:
        OPERATORS.append(torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            OPERATORS[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        from torchvision.transforms import v2
    return v2


@functools.cache
def torchvision_augment() -> Any:
    """Image file to float32 (3, 224, 224): window and flip."""
    v2 = torchvision_transforms()
    steps = [v2.RandomCrop(CROP_SIDE), v2.RandomHorizontalFlip(), v2.PILToTensor(), v2.ToDtype(torch.float32)]
    return v2.Compose(steps)


def torchvision_window(path: str, basis: Eigenbasis) -> Any:
    """One window, by torchvision's transforms, which have no lighting: it goes into the mean."""
    with Image.open(path) as file:
        window = torchvision_augment()(file.convert("RGB"))
    lighting = Lighting()
    mean = basis.mean - lighting.shift_matrix(basis) @ torch.randn(3).numpy()
    normalize = torchvision_transforms().functional.normalize
    return normalize(window, mean.tolist(), [lighting.divisor] * 3, inplace=True)


def torchvision_batches(data: PeerData) -> Batches:
    """A DataLoader with Pillow, as ImageFolder opens files, and torchvision's transforms."""
    return files_batches(data, functools.partial(torchvision_window, basis=data.basis))


def torchvision_versions(_: PeerData) -> dict[str, str]:
    """Version of torchvision, whose transforms have to be there."""
    torchvision_transforms()
    return version_of("torchvision", "pillow")


def webdataset_batches(data: PeerData) -> Batches:
    """webdataset over the shards, with Pillow and numpy; no more processes than shards, which it shares out."""
    import webdataset

    tars = list(data.shards.tars)
    samples = (
        webdataset.WebDataset(tars, shardshuffle=len(tars))
        .shuffle(1000)
        .decode("rgb8")
        .to_tuple("jpg", "cls")
    )
    windows = samples.map(functools.partial(webdataset_window, basis=data.basis)).repeat()
    return in_workers(windows, data, min(data.workers, len(tars)))


def webdataset_window(sample: tuple[np.ndarray, int], basis: Eigenbasis) -> tuple[np.ndarray, int]:
    """One window, and its class index."""
    pixels, label = sample
    return finished(pixels, basis), label


def webdataset_decode(data: PeerData) -> Iterator[np.ndarray]:
    """Shards decoded by webdataset, with Pillow."""
    import webdataset

    samples = webdataset.WebDataset(list(data.shards.tars), shardshuffle=False).decode("rgb8")
    return (sample["jpg"] for sample in samples)
