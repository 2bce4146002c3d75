"""Colour sums over the shards of a split, in pieces that are kept in files: what is counted once is not counted again,
whoever counted it.

A split is cut into at most 32 groups of neighbouring shards. Each group's sums become a file `pca.part-JOB-KK`, whole
or not at all, and whoever finds every group's file adds them up; JOB stands for what is counted, so that nothing else
is mixed in. Sums are integers, so their order does not matter.
"""

import json
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pipeline.eigenbasis import Moments
from pipeline.files import atomic_writer, sha256
from pipeline.reader import decoded_batches
from pipeline.shards import IMAGE_SIDE, ShardSet

MAX_GROUPS = 32
"""So few that a group's end costs nothing, so many that little is lost with a killed process."""


@dataclass(frozen=True)
class Sums:
    """Of some images."""

    moments: Moments = field(default_factory=Moments)
    image: np.ndarray | None = None
    """The sum of the images themselves, int64 (256, 256, 3); None if it is not wanted."""

    def __add__(self, other: "Sums") -> "Sums":
        """Of both sets of images together; the image is added in place, and kept only where both have one."""
        image = None if self.image is None or other.image is None else np.add(self.image, other.image, out=self.image)
        return Sums(self.moments + other.moments, image)


def batch_sums(
    shards: ShardSet,
    batch_size: int,
    threads: int,
    device: torch.device | str = "cpu",
    with_image: bool = False,
    ends: Collection[int] = (),
) -> Iterator[Sums]:
    """Sum a split batch by batch, in stored order, in threads beside DALI's own.

    Batches are cut behind the images whose number, counted from 1, is among `ends`.
    """

    def pieces() -> Iterator[torch.Tensor]:
        position = 0
        for batch_NHWC in decoded_batches(shards, batch_size, threads, device):
            cuts = [end - position for end in ends if 0 < end - position < len(batch_NHWC)]
            yield from batch_NHWC.tensor_split(cuts)
            position += len(batch_NHWC)

    def work(images_NHWC: torch.Tensor) -> Sums:
        moments = Moments.of(images_NHWC, at_a_time=len(images_NHWC) if images_NHWC.is_cuda else 1)
        return Sums(moments, sum_of(images_NHWC).long().cpu().numpy() if with_image else None)

    # Summing takes a quarter of the time of decoding; threads of torch's own would only wait for each other.
    torch.set_num_threads(1)
    summing = max(1, threads // 4)
    pending: deque[Future[Sums]] = deque()
    with ThreadPoolExecutor(summing) as pool:
        for images_NHWC in pieces():
            pending.append(pool.submit(work, images_NHWC))
            if len(pending) > summing:
                yield pending.popleft().result()
        yield from (future.result() for future in pending)


def sum_of(images_NHWC: torch.Tensor) -> torch.Tensor:
    """The sum of uint8 images, int32 (height, width, 3), exact up to 8 million of them.

    One by one: `images_NHWC.sum(0)` takes 10 to 20 times as long on a CPU.
    """
    total = torch.zeros(images_NHWC.shape[1:], dtype=torch.int32, device=images_NHWC.device)
    for image_HWC in images_NHWC:
        total += image_HWC
    return total


@dataclass(frozen=True)
class Tally:
    """The sums of a split, group by group, in files."""

    folder: Path
    """Where the files are."""
    shards: ShardSet
    """What is counted."""
    of: dict[str, Any]
    """What decides the sums, as JSON."""
    with_image: bool
    """Whether the sum of the images is wanted."""

    @property
    def job(self) -> str:
        """Eight digits that stand for what is counted."""
        return sha256(json.dumps([self.of, self.with_image]).encode())[:8]

    @property
    def groups(self) -> list[range]:
        """The shards of each group, by number; groups differ by one shard at most."""
        shards = len(self.shards.tars)
        count = min(shards, MAX_GROUPS)
        return [range(k * shards // count, (k + 1) * shards // count) for k in range(count)]

    def path(self, number: int) -> Path:
        """Where a group's sums are kept."""
        return self.folder / f"pca.part-{self.job}-{number:02d}"

    def write(self, number: int, sums: Sums) -> None:
        """Keep a group's sums."""
        moments = sums.moments
        arrays: dict[str, Any] = {
            "counts": np.array([moments.num_images, moments.num_pixels]),
            "sum": np.array(moments.sum),
            "sum_products": np.array(moments.sum_products),
        }
        if sums.image is not None:
            arrays["image"] = sums.image
        with atomic_writer(self.path(number)) as file:
            np.savez(file, **arrays)

    def read(self, number: int) -> Sums | None:
        """A group's sums; None where there are none, or they are damaged: they are counted again."""
        try:
            with np.load(self.path(number), allow_pickle=False) as arrays:
                counts, sums, products = (arrays[name].tolist() for name in ("counts", "sum", "sum_products"))
                image = arrays["image"] if self.with_image else None
                images = sum(self.shards.samples[shard] for shard in self.groups[number])
                shapes = [arrays[name].shape for name in ("sum", "sum_products")]
            sound = shapes == [(3,), (9,)] and counts == [images, images * IMAGE_SIDE**2]
            sound = sound and all(type(each) is int and each >= 0 for each in (*counts, *sums, *products))
            if image is not None:
                sound = sound and (image.dtype, image.shape) == (np.dtype(np.int64), (IMAGE_SIDE, IMAGE_SIDE, 3))
        except Exception:  # zipfile and numpy raise a dozen kinds of them over damaged bytes
            return None
        return Sums(Moments(counts[0], counts[1], tuple(sums), tuple(products)), image) if sound else None

    def count(self, numbers: Sequence[int], batch_size: int, threads: int, device: torch.device | str) -> int:
        """Count groups and keep their sums; returns how many images were decoded for it."""
        groups = self.groups
        sizes = [sum(self.shards.samples[shard] for shard in groups[number]) for number in numbers]
        if not sum(sizes):
            return 0
        todo = self.shards.only([shard for number in numbers for shard in groups[number]])
        ends = deque(zip(numbers, accumulate(sizes), strict=True))
        done, sums = 0, self.nothing()
        with tqdm(total=sum(sizes), desc="eigenbasis", unit="img", disable=None) as progress:
            for piece in batch_sums(todo, batch_size, threads, device, self.with_image, [end for _, end in ends]):
                sums += piece
                done += piece.moments.num_images
                progress.update(piece.moments.num_images)
                while ends and done == ends[0][1]:
                    self.write(ends.popleft()[0], sums)
                    sums = self.nothing()
        return done

    def missing(self) -> list[int]:
        """The groups that nobody has counted yet."""
        return [number for number in range(len(self.groups)) if not self.path(number).is_file()]

    def total(self) -> Sums | None:
        """The sums of all groups; None while some are missing."""
        total = self.nothing()
        for number in range(len(self.groups)):
            if (sums := self.read(number)) is None:
                return None
            total += sums
        return total

    def nothing(self) -> Sums:
        """Sums of no images."""
        return Sums(image=np.zeros((IMAGE_SIDE, IMAGE_SIDE, 3), np.int64) if self.with_image else None)

    def forget(self) -> None:
        """Remove the files, once their total is written."""
        for number in range(len(self.groups)):
            self.path(number).unlink(missing_ok=True)
