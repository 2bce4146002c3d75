"""Loaders of training and validation batches.

    loader = train_loader("SHARDS", batch_size=256)
    for epoch in range(90):
        for images, labels in loader.epoch(epoch): ...

`images`: (N, 3, 224, 224), in validation (N, 3, 256, 256), in channels-last memory, float16 on a GPU, float32 on a CPU.
`labels`: int64 (N,), -1 = padding. All batches have the same shape.

A batch is a pure function of the shards, the seed, the epoch, the step and the settings. A training epoch is one order
of the split; global batch k of size G holds its positions k * G to (k + 1) * G - 1, of which each of R ranks takes an
R-th part. So any number of ranks sees the same batches with the same augmentation, and a run may resume anywhere on
another number of them. Samples that do not fill a global batch are dropped, others every epoch. In validation every
sample counts once: rank r reads samples r * N // R to (r + 1) * N // R in stored order.

Shapes: N images, C colours, H rows, W columns.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import nvidia.dali
import torch

from pipeline.augment import CROP_SIDE
from pipeline.eigenbasis import Eigenbasis
from pipeline.errors import UserError
from pipeline.files import sha256
from pipeline.graph import Graph
from pipeline.pixel_ops import BufferPool, normalize
from pipeline.plan import Plan, TrainSampler, plan_in_order
from pipeline.prefetch import Prefetcher
from pipeline.settings import Augmentation, DataConfig, Speed
from pipeline.shards import IMAGE_SIDE, ShardSet, open_shards

PADDING = -1
"""Label of a sample that only fills a batch; use it as the `ignore_index` of a loss."""
CONTENT_VERSION = 1
"""Increase it when batches change in content, as states of a loader then no longer fit."""


class Batch(NamedTuple):
    """One batch on the loader's device."""

    images: torch.Tensor
    """(N, 3, side, side), channels-last memory."""
    labels: torch.Tensor
    """int64 (N,), -1 = padding."""


class Loader:
    """Batches of one split for one rank; `train_loader` and `val_loader` make it."""

    def __init__(
        self,
        shards: Path | str | ShardSet,
        *,
        training: bool,
        batch_size: int,
        seed: int,
        rank: int | None,
        num_ranks: int | None,
        device: torch.device | str | None,
        basis: Eigenbasis | None,
        **settings: Any,
    ) -> None:
        """See `train_loader`. Raises `FileNotFoundError` or `UserError`."""
        if not isinstance(shards, ShardSet):
            shards = open_shards(Path(shards).expanduser(), "train" if training else "val")
        folder = Path(shards.tars[0]).parents[1]
        config = DataConfig(folder, **settings)
        if basis is None:
            identity = (shards if training else open_shards(folder, "train")).manifest_sha256
            with_image = config.augmentation.mean == "image"
            path = Path(config.eigenbasis or folder / "pca.json").expanduser()
            basis = Eigenbasis.load(path, identity, with_mean_image=with_image)
        if rank is None and num_ranks is None:
            joined = torch.distributed.is_available() and torch.distributed.is_initialized()
            if not joined and os.environ.get("WORLD_SIZE", "1") != "1":
                raise UserError("rank and num_ranks: expected them in one of several processes; pass both")
            rank = torch.distributed.get_rank() if joined else 0
            num_ranks = torch.distributed.get_world_size() if joined else 1
        if rank is None or num_ranks is None or not 0 <= rank < num_ranks:
            raise UserError(f"rank: expected 0 to num_ranks - 1, got {rank} of {num_ranks}")
        if batch_size < 1:
            raise UserError(f"batch size: expected at least 1, got {batch_size}")
        if not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise UserError(f"seed: expected 0..2^63-1, got {seed}")
        self._shards, self._basis, self._config, self._training = shards, basis, config, training
        self._pid = os.getpid()
        self._batch_size, self._seed, self._num_ranks = batch_size, seed, num_ranks
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        on_gpu = self.device.type == "cuda"
        if on_gpu and not torch.cuda.is_available():
            raise UserError(f"device: expected cpu, as PyTorch finds no GPU, got {self.device}")
        decode: str = config.decode if config.decode != "auto" else ("gpu" if on_gpu else "cpu")
        if shards.is_decoded:
            decode = "stored"
        elif decode == "gpu" and not on_gpu:
            raise UserError("data.decode gpu: expected a GPU, got none; set --data.decode cpu")
        offset = compute_mean_offset(basis, config.augmentation)
        self._dtype = torch.float16 if on_gpu else torch.float32
        self.mean_offset = None if offset is None else offset.to(self.device, self._dtype)
        """Subtracted from crops after the mean colour, (3, 224, 224); None with `mean: channel`. In training the loader
        subtracts it; in validation the evaluation does, which makes the crops."""
        side = CROP_SIDE if training else IMAGE_SIDE
        self._shape = batch_size, side, side, 3
        self._buffers = BufferPool(self._shape)
        total = shards.num_samples
        plan: Callable[[int], Plan]
        if training:
            plan = TrainSampler(shards, basis, config, batch_size, seed, rank, num_ranks)
            steps = plan.steps
            if not steps:
                raise UserError(
                    f"{total} images do not fill one batch of {batch_size} on each of {num_ranks} ranks; take a "
                    "smaller batch size"
                )
        else:
            first, last = (number * total // num_ranks for number in (rank, rank + 1))
            steps = math.ceil(math.ceil(total / num_ranks) / batch_size)
            stds = np.array(config.augmentation.stds)
            plan = partial(plan_in_order, first, last, batch_size, steps, basis.mean, stds)
        self.steps_per_epoch = steps
        """Batches per epoch, equal on all ranks."""
        self.dropped_per_epoch = total - steps * batch_size * num_ranks if training else 0
        """Number of training samples, over all ranks, that an epoch leaves out; other samples every epoch."""
        self._graph = Graph(
            decode,
            "gpu" if on_gpu else "cpu",
            shards.any_size,
            crop=training,
            normalize=on_gpu,
            hw_decoder_load=config.speed.hw_decoder_load,
        )
        self._prefetcher = Prefetcher(
            shards,
            self._graph,
            plan,
            batch_size=batch_size,
            speed=config.speed,
            device_id=find_gpu(self.device),
            shuffle=config.shuffle if training else "",
            skip_damaged=config.on_corrupt == "skip",
        )
        self.skipped = self._prefetcher.skipped
        """Descriptions of the damaged samples that became padding (`on_corrupt: skip`)."""
        self._batches: Iterator[tuple[Plan, Any]] | None = None
        self.at_epoch, self.at_step = 0, 0
        """`at_step` batches of epoch `at_epoch` have been returned."""

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch from its start; of the present epoch, if it is unfinished, the rest.

        Raises `DataError` when reading or decoding fails; the same batch then comes first again.
        """
        if not isinstance(epoch, int) or epoch < 0:
            raise UserError(f"epoch: expected a number from 0 on, got {epoch}")
        self._check_process()
        self.at_epoch, self.at_step = self._position
        if epoch != self.at_epoch:
            self._go_to(epoch, 0)
        while self.at_step < self.steps_per_epoch:
            self._check_process()
            if self._batches is None:
                self._batches = self._prefetcher.batches(self.at_epoch * self.steps_per_epoch + self.at_step)
            try:
                batch = self._finish(*next(self._batches))
            except BaseException:  # Ctrl-C, too: go on with this batch
                self._go_to(self.at_epoch, self.at_step)
                raise
            self.at_step += 1
            yield batch

    def _check_process(self) -> None:
        """Raise `UserError` in a forked process, which has none of the threads."""
        if os.getpid() != self._pid:
            raise UserError("a loader works only in the process that made it; make one in each process")

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rest of the present epoch or, if that is finished, the next one."""
        return self.epoch(self._position[0])

    @property
    def _position(self) -> tuple[int, int]:
        """Epoch and step of the next batch."""
        return divmod(self.at_epoch * self.steps_per_epoch + self.at_step, self.steps_per_epoch)

    def _finish(self, plan: Plan, pixels: torch.Tensor | None) -> Batch:
        """Make a batch of what was decoded: on a CPU flip and normalize; fill it up; put it in PyTorch's order."""
        count = len(plan.rows)
        offset_HWC = None
        if self._training and self.mean_offset is not None:
            lighting_divisor = plan.stds[0] / self._config.augmentation.stds[0]
            offset_HWC = self.mean_offset.permute(1, 2, 0) / float(lighting_divisor)
        if pixels is None:
            images = torch.zeros(self._shape, dtype=self._dtype, device=self.device)
        elif self.device.type == "cpu":
            images = self._buffers.acquire()
            images.numpy()[count:] = 0
            windows: Sequence[torch.Tensor] | torch.Tensor = pixels
            if plan.draws and self._graph.decode == "stored":  # cut from rows at full width
                lefts = plan.draws.left.tolist()
                windows = [each[:, x : x + CROP_SIDE] for each, x in zip(pixels, lefts, strict=True)]
            mirrored = plan.draws.mirrored if plan.draws else None
            normalize(windows, mirrored, plan.means, plan.stds, offset_HWC, images[:count])
        else:
            if offset_HWC is not None:
                pixels.sub_(offset_HWC)
            missing = self._batch_size - count
            images = torch.cat([pixels, pixels.new_zeros(missing, *self._shape[1:])]) if missing else pixels
        labels = np.full(self._batch_size, PADDING)
        labels[:count] = self._shards.samples["label"][plan.rows]
        return Batch(images.permute(0, 3, 1, 2), torch.from_numpy(labels).to(self.device, non_blocking=True))

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Settings and versions that determine the sequence of global batches: not the number of ranks, nor settings of
        speed, nor strength and end of lighting."""
        augmentation = asdict(self._config.augmentation) | {"std": list(self._config.augmentation.stds)}
        del augmentation["lighting"]["strength"], augmentation["lighting"]["off_epoch"]
        in_blocks = self._config.shuffle == "blocks"
        decoder: dict[str, Any] = {"decode": self._graph.decode}
        if self._graph.decode == "gpu":  # the JPEG engine's pixels differ from those of the other decoder
            decoder["hw_decoder_load"] = self._graph.hw_decoder_load
        return {
            "shards": self._shards.manifest_sha256,
            "seed": self._seed,
            "global batch size": self._batch_size * self._num_ranks,
            "shuffle": f"blocks of {self._config.block_shards} shards" if in_blocks else "global",
            "augmentation": augmentation,
            "eigenbasis": hash_basis(self._basis),
            **decoder,
            "device": self.device.type,
            "DALI": nvidia.dali.__version__,
            "content version": CONTENT_VERSION,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next batch, in JSON types; equal on all ranks."""
        assert self._training, "validation always starts at its beginning"
        epoch, step = self._position
        return {"fingerprint": self.fingerprint, "epoch": epoch, "step": step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position, which may be of another number of ranks.

        Raises `UserError` with the name of the field in which the state belongs to another sequence of batches.
        """
        theirs, mine = state["fingerprint"], self.fingerprint
        for name in sorted(theirs.keys() | mine.keys()):
            if theirs.get(name) != mine.get(name):
                raise UserError(
                    f"the saved position in the data does not fit: {name} was {theirs.get(name)}, now it is "
                    f"{mine.get(name)}"
                )
        epoch, step = state["epoch"], state["step"]
        if not isinstance(epoch, int) or step not in range(self.steps_per_epoch) or epoch < 0:
            raise UserError(f"the saved position in the data does not fit: step {step} of epoch {epoch}")
        self._go_to(epoch, step)

    def close(self) -> None:
        """Stop threads, close files, release memory, and go back to the start; `state_dict` saves the position
        before."""
        self._go_to(0, 0)
        self._buffers = BufferPool(self._shape)

    def _go_to(self, epoch: int, step: int) -> None:
        """Drop the batches ahead and continue from another position."""
        if self._batches is not None:
            self._batches.close()  # type: ignore[attr-defined]
        self._batches, self.at_epoch, self.at_step = None, epoch, step


def hash_basis(basis: Eigenbasis) -> str:
    """Hash mean, axes and mean image to 12 hexadecimal digits."""
    image = b"" if basis.mean_image is None else basis.mean_image.tobytes()
    return sha256(json.dumps(basis.to_json()).encode() + image)[:12]


def find_gpu(device: torch.device) -> int | None:
    """Return the number of a GPU, the current one for "cuda"; None for a CPU."""
    return torch.empty(0, device=device).device.index


def compute_mean_offset(basis: Eigenbasis, augmentation: Augmentation) -> torch.Tensor | None:
    """Compute the centre of the mean image minus the mean colour, divided by `std`, float64 (3, 224, 224). It is not
    cropped at random or flipped, as in the 2012 program. None with `mean: channel`. Raises `UserError` without a mean
    image."""
    if augmentation.mean == "channel":
        return None
    if basis.mean_image is None:
        raise UserError(
            "data.augmentation.mean image: expected mean_image.npy, found none; run tools/compute_pca.py --mean-image"
        )
    first = (IMAGE_SIDE - CROP_SIDE) // 2
    centre_HWC = basis.mean_image[first : first + CROP_SIDE, first : first + CROP_SIDE] - basis.mean
    return torch.from_numpy(centre_HWC / augmentation.std).permute(2, 0, 1)


def train_loader(
    shards: Path | str | ShardSet,
    *,
    batch_size: int,
    seed: int = 0,
    rank: int | None = None,
    num_ranks: int | None = None,
    device: torch.device | str | None = None,
    basis: Eigenbasis | None = None,
    **settings: Any,
) -> Loader:
    """Make a loader of shuffled, augmented crops.

    Args:
        shards: Folder written by tools/make_shards.py and tools/compute_pca.py, or its opened split.
        batch_size: Images per batch of this rank.
        seed: Seed of order, crops, flips and lighting.
        rank: This loader of `num_ranks` that share the split; by default torch.distributed's, or the only one.
        num_ranks: Their number.
        device: Device of the batches; by default a GPU if there is one.
        basis: Mean and colour axes; by default those of SHARDS/pca.json.
        settings: Other fields of `DataConfig` (eigenbasis, augmentation, decode, shuffle, block_shards, on_corrupt,
            speed), such as `augmentation=Augmentation(std=(58.4, 57.1, 57.4))`.
    """
    place: dict[str, Any] = {"seed": seed, "rank": rank, "num_ranks": num_ranks, "device": device}
    return Loader(shards, training=True, batch_size=batch_size, **place, basis=basis, **settings)


def val_loader(
    shards: Path | str | ShardSet,
    *,
    batch_size: int,
    rank: int | None = None,
    num_ranks: int | None = None,
    device: torch.device | str | None = None,
    basis: Eigenbasis | None = None,
    **settings: Any,
) -> Loader:
    """Make a loader of whole 256x256 images in stored order; arguments as for `train_loader`."""
    place: dict[str, Any] = {"seed": 0, "rank": rank, "num_ranks": num_ranks, "device": device}
    return Loader(shards, training=False, batch_size=batch_size, **place, basis=basis, **settings)


def decoded_batches(
    shards: ShardSet, batch_size: int, threads: int | None = None, device: torch.device | str = "cpu"
) -> Iterator[torch.Tensor]:
    """Yield every image of a split once as uint8 (n, 256, 256, 3) RGB, in stored order; the last batch is shorter.
    `threads` as in `Speed`; images stay on the `device` that decodes them. Raises `DataError`."""
    place = torch.device(device)
    kind = "gpu" if place.type == "cuda" else "cpu"
    decode = "stored" if shards.is_decoded else kind
    steps = math.ceil(shards.num_samples / batch_size)
    plan = partial(plan_in_order, 0, shards.num_samples, batch_size, steps, np.zeros(3), np.ones(3))
    prefetcher = Prefetcher(
        shards,
        Graph(decode, kind, shards.any_size, crop=False),
        plan,
        batch_size=batch_size,
        speed=Speed(threads=threads),
        device_id=find_gpu(place),
    )
    for _, pixels in islice(prefetcher.batches(0), steps):
        yield pixels.clone() if shards.is_decoded else pixels
