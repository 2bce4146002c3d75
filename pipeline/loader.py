"""The loader of training and validation batches; the trainer uses DALI only through it.

    loader = train_loader(shards, basis, config, batch_size=128, seed=0, rank=0, num_ranks=1, device="cpu")
    for epoch in range(90):
        for images, labels in loader.epoch(epoch): ...

`images`: (N, 3, 224, 224), in validation (N, 3, 256, 256), in channels-last memory, float16 on a GPU, float32 on a CPU.
`labels`: int64 (N,), -1 = padding. All batches have the same shape. Over all ranks a training epoch has no sample
twice; samples that do not fill a batch on every rank are dropped, others every epoch. In validation every sample counts
exactly once.

`rank` and `num_ranks` count the loaders that share a split. In validation with two towers both processes of a pair load
the same images, so there the number of ranks is half the number of processes. From a state taken after any batch a
loader continues with the next batch, bit for bit.

Shapes: N images, C colours, H rows, W columns.
"""

import base64
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import nvidia.dali
import torch
from nvidia.dali import Pipeline

from pipeline.decode import Decoder
from pipeline.draws import CROP_SIDE, op_seed
from pipeline.eigenbasis import Eigenbasis
from pipeline.errors import UserError
from pipeline.graph import train_pipeline, val_pipeline
from pipeline.lighting import Lighting, shifted_means
from pipeline.machine import raise_open_file_limit, resident_bytes
from pipeline.normalize import BufferPool, normalize
from pipeline.reader import check_index, data_errors, parse_labels, warn_if_memory_is_short
from pipeline.settings import Augmentation, DataConfig
from pipeline.shards import IMAGE_SIDE, ShardSet

PADDING = -1
"""Label of a sample that only fills a batch; use it as the `ignore_index` of a loss."""


WORLD = {"rank", "num_ranks", "batch_size"}
"""Fields of a fingerprint that may differ if `allow_world_change` is set."""
GRAPH_VERSION = 4
"""Increase it when operations of the training graph change, as DALI's checkpoints fit only the same operations."""


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
        shards: ShardSet,
        basis: Eigenbasis,
        config: DataConfig,
        *,
        training: bool,
        batch_size: int,
        seed: int,
        rank: int,
        num_ranks: int,
        device: torch.device | str,
    ) -> None:
        if not 0 <= rank < num_ranks:
            raise UserError(f"loader rank: expected 0..{num_ranks - 1}, got {rank}")
        if batch_size < 1:
            raise UserError(f"batch size: expected at least 1, got {batch_size}")
        if shards.num_samples < num_ranks:
            raise UserError(
                f"{shards.split} has {shards.num_samples} images for {num_ranks} processes; start fewer of them"
            )
        if training and batch_size % config.augmentation.images_per_crop:
            raise UserError(
                f"the {batch_size} images that each process loads at a time do not divide by "
                f"data.augmentation.images_per_crop ({config.augmentation.images_per_crop}); take a number that does"
            )
        self._shards, self._basis, self._config, self._training = shards, basis, config, training
        self._batch_size, self._seed, self._rank, self._num_ranks = batch_size, seed, rank, num_ranks
        self.device = torch.device(device)
        self._decode = (
            config.decode if config.decode != "auto" else ("gpu" if self.device.type == "cuda" else "cpu")
        )
        if self._decode == "gpu" and self.device.type != "cuda":
            raise UserError("data.decode gpu: expected a GPU, got none; set --data.decode cpu")
        offset = compute_mean_offset(basis, config.augmentation)
        kind = torch.float16 if self.device.type == "cuda" else torch.float32
        self.mean_offset = None if offset is None else offset.to(self.device, kind)
        """Subtracted from crops after the mean colour, (3, 224, 224); None with `mean: channel`. In training the loader
        subtracts it; in validation the evaluation does, which makes the crops."""
        self._pipe: Pipeline | None = None
        self._opening_bytes = 0
        self._buffers = BufferPool()
        self._checkpoint: bytes | None = None
        """DALI's state after the last batch. It is taken with each batch (0.1 ms, less than a kilobyte), as a pipeline
        that has failed cannot give it."""

        # DALI's rank r of n reads samples r * N // n to (r + 1) * N // n of N.
        first, last = (r * shards.num_samples // num_ranks for r in (rank, rank + 1))
        largest = -(-shards.num_samples // num_ranks)
        self._padded_steps = -(-largest // batch_size)
        self._num_samples = last - first
        self.steps_per_epoch = (
            shards.num_samples // num_ranks // batch_size if training else self._padded_steps
        )
        """Batches per epoch, equal on all ranks."""
        self.dropped_per_epoch = (
            shards.num_samples - self.steps_per_epoch * batch_size * num_ranks if training else 0
        )
        """Number of training samples, over all ranks, that an epoch leaves out; other samples every epoch."""
        if self.steps_per_epoch == 0:
            raise UserError(
                f"{shards.num_samples} images do not fill one batch of {batch_size} on each of {num_ranks} ranks; "
                "take a smaller batch size"
            )
        self.at_epoch, self.at_step = 0, 0
        """Position: `at_step` batches of epoch `at_epoch` have been returned."""
        self._first_epoch = 0
        """First epoch of the present order of images; not 0 if the number of ranks has changed during the run."""

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the rest of an epoch, which must be the present one or, if that is finished, the next."""
        if epoch == self.at_epoch + 1 and self.at_step == self.steps_per_epoch:
            for _ in range(self._padded_steps - self.steps_per_epoch):
                self._run()  # the tail that does not fill a batch on every rank
            self.at_epoch, self.at_step = epoch, 0
            lighting_ended = (
                self._training and self._lighting() != self._config.augmentation.lighting.at_epoch(epoch - 1)
            )
            if self._pipe and lighting_ended:  # the same graph with other constants, from the same state
                self._pipe = self._build(self._checkpoint)
        if epoch != self.at_epoch:
            raise UserError(
                f"the loader is at step {self.at_step} of epoch {self.at_epoch} and cannot go to epoch {epoch}"
            )
        while self.at_step < self.steps_per_epoch:
            images, labels = self._run()
            self.at_step += 1
            valid = self._num_samples - (self.at_step - 1) * self._batch_size
            if valid < self._batch_size:
                labels = labels.clone()
                labels[max(valid, 0) :] = PADDING
            yield Batch(images.permute(0, 3, 1, 2), labels)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rest of the present epoch or, if that is finished, the next one."""
        return self.epoch(self.at_epoch + (self.at_step == self.steps_per_epoch))

    def open(self) -> int:
        """Build the pipeline now rather than at the first batch. Returns the bytes of memory that this took; most are
        DALI's index of all samples, which every process holds. Raises `DataError`."""
        if self._pipe is None:
            with data_errors(self._shards):
                self._pipe = self._build(None)
        return self._opening_bytes

    def _run(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next (N, side, side, 3) images and (N,) labels. Raises `DataError` when DALI fails."""
        with data_errors(self._shards):
            if self._pipe is None:
                self._pipe = self._build(None)
            digits, *outputs = (torch.from_dlpack(output.as_tensor()) for output in self._pipe.run())
            self._checkpoint = self._pipe.checkpoint() if self._training else None
        labels = parse_labels(digits).to(self.device, non_blocking=True)
        augmentation, lighting = self._config.augmentation, self._lighting()
        divisor = augmentation.std * (lighting.divisor if self._training else 1)
        offset_HWC = None  # of levels
        if self._training and self.mean_offset is not None:
            offset_HWC = self.mean_offset.permute(1, 2, 0) * augmentation.std
        if self.device.type == "cuda":
            (images,) = outputs
            return images if offset_HWC is None else images.sub_(
                offset_HWC / divisor
            ), labels  # DALI overwrites them
        windows, *params = outputs
        mirrored, pca_noise = params or (None, torch.zeros(len(windows), 3))
        means = torch.from_numpy(shifted_means(pca_noise.numpy(), self._basis, lighting)).float()
        batch = self._buffers.acquire(tuple(windows.shape))
        normalize(windows, mirrored, means, divisor, offset_HWC, batch)
        return batch, labels

    def _lighting(self) -> Lighting:
        """Return the lighting of the present epoch."""
        return self._config.augmentation.lighting.at_epoch(self.at_epoch)

    def _build(self, checkpoint: bytes | None) -> Pipeline:
        """Build the DALI pipeline, at its start or at one of its checkpoints."""
        raise_open_file_limit(len(self._shards.tars))
        warn_if_memory_is_short(self._shards)
        on_gpu, speed = self.device.type == "cuda", self._config.speed
        common = {
            "batch_size": self._batch_size,
            "num_threads": speed.num_threads,
            "device_id": (self.device.index or 0) if on_gpu else None,
            "prefetch_queue_depth": speed.prefetch_queue_depth,
            "reader_queue_depth": speed.reader_queue_depth,
            "seed": self._seed % (2**31 - 1),
            "shards": self._shards,
            "basis": self._basis,
            "augmentation": replace(self._config.augmentation, lighting=self._lighting()),
            "rank": self._rank,
            "num_ranks": self._num_ranks,
            "decoder": Decoder(self._decode, self._shards.any_size, speed.hw_decoder_load),
            "device": "gpu" if on_gpu else "cpu",
        }
        if self._training:
            shuffling = {"shuffle_buffer": self._config.shuffle_buffer, "data_seed": self._data_seed}
            pipe = train_pipeline(**common, **shuffling, checkpoint=checkpoint)
        else:
            pipe = val_pipeline(**common)
        before = resident_bytes()
        pipe.build()
        self._opening_bytes = resident_bytes() - before
        check_index(pipe, self._shards)
        return pipe

    @property
    def _data_seed(self) -> int:
        """Seed of order and augmentation; a derived one if the number of ranks has changed during the run."""
        if self._first_epoch == 0:
            return self._seed
        return op_seed(self._seed, self._first_epoch, "another world")

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Settings and versions that determine the sequence of batches: not those of speed, nor strength and end of
        lighting."""
        augmentation = asdict(self._config.augmentation)
        del augmentation["lighting"]["strength"], augmentation["lighting"]["off_epoch"]
        return {
            "shards": self._shards.manifest_sha256,
            "seed": self._seed,
            "rank": self._rank,
            "num_ranks": self._num_ranks,
            "batch_size": self._batch_size,
            "shuffle_buffer": self._config.shuffle_buffer,
            "augmentation": augmentation,
            "decode": self._decode,
            "device": self.device.type,
            "dali": nvidia.dali.__version__,
            "graph": GRAPH_VERSION,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch that was returned, in JSON types."""
        assert self._training, "validation always starts at its beginning"
        return {
            "fingerprint": self.fingerprint,
            "first_epoch": self._first_epoch,
            "epoch": self.at_epoch,
            "step": self.at_step,
            "ended": self.at_step == self.steps_per_epoch,
            "pipeline": None if self._checkpoint is None else base64.b64encode(self._checkpoint).decode(),
        }

    def load_state_dict(self, state: dict[str, Any], *, allow_world_change: bool = False) -> None:
        """Go to a saved position.

        Raises `UserError` with the name of the field in which the state belongs to another sequence of batches. With
        `allow_world_change` the ranks and the batch size may differ: the loader then goes to the start of the state's
        epoch, or of the next one if that was finished, and has a new order from there on.
        """
        free = WORLD if allow_world_change else set()
        theirs, mine = state["fingerprint"], self.fingerprint
        differing = [name for name in mine if theirs.get(name) != mine[name]]
        for name in differing:
            if name not in free:
                remedy = (
                    "; --resume.allow_world_change true resumes from the end of an epoch"
                    if name in WORLD
                    else ""
                )
                raise UserError(
                    f"the saved position in the data does not fit: {name} was {theirs.get(name)}, now it is "
                    f"{mine[name]}{remedy}"
                )
        self.close()
        if differing:
            self._first_epoch = self.at_epoch = state["epoch"] + state["ended"]
            return
        self._first_epoch = state["first_epoch"]
        self.at_epoch, self.at_step = state["epoch"], state["step"]
        if state["pipeline"] is not None:
            self._checkpoint = base64.b64decode(state["pipeline"])
            with data_errors(self._shards):
                self._pipe = self._build(self._checkpoint)

    def close(self) -> None:
        """Stop DALI's threads, release its memory, and go back to the start; `state_dict` saves the position before."""
        self._pipe = self._checkpoint = None
        self._buffers = BufferPool()
        self.at_epoch, self.at_step, self._first_epoch = 0, 0, 0


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
    shards: ShardSet,
    basis: Eigenbasis,
    config: DataConfig,
    *,
    batch_size: int,
    seed: int,
    rank: int,
    num_ranks: int,
    device: torch.device | str,
) -> Loader:
    """Make a loader of shuffled, augmented crops; `rank` of `num_ranks` loaders of the split."""
    return Loader(
        shards, basis, config, training=True, batch_size=batch_size, seed=seed, rank=rank, num_ranks=num_ranks,
        device=device,
    )  # fmt: skip


def val_loader(
    shards: ShardSet,
    basis: Eigenbasis,
    config: DataConfig,
    *,
    batch_size: int,
    rank: int,
    num_ranks: int,
    device: torch.device | str,
) -> Loader:
    """Make a loader of whole 256x256 images in stored order; `rank` of `num_ranks` loaders of the split."""
    return Loader(
        shards, basis, config, training=False, batch_size=batch_size, seed=0, rank=rank, num_ranks=num_ranks,
        device=device,
    )  # fmt: skip
