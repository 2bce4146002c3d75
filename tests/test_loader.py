"""Epochs are exact over any number of ranks, batches hold what was packed, and what a loader takes it gives back."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.eigenbasis import Eigenbasis
from pipeline.lighting import Lighting
from pipeline.loader import Loader, train_loader
from pipeline.machine import resident_bytes
from pipeline.loader import decoded_batches
from pipeline.settings import Augmentation, DataConfig
from pipeline.shards import open_shards
from tests.helpers import Make, collect, loaders, same_batches


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_training_epochs_are_exact(numbered_shards: Make, plain_basis: Eigenbasis, num_ranks: int) -> None:
    """Over three epochs: no sample twice in an epoch over all ranks, as many dropped as reported and no more than
    needed, equal step counts, another order and another tail every epoch."""
    ranks = loaders(numbered_shards(131, 4), plain_basis, num_ranks, training=True)
    epochs, orders = set(), set()
    for epoch in range(3):
        batches = [collect(loader, range(epoch, epoch + 1)) for loader in ranks]
        assert {len(rank) for rank in batches} == {131 // num_ranks // 8}
        assert {images.shape for rank in batches for images, _ in rank} == {(8, 3, 224, 224)}
        seen = torch.cat([labels for rank in batches for _, labels in rank]).tolist()
        assert len(seen) == len(set(seen)) == 131 - ranks[0].dropped_per_epoch
        epochs.add(frozenset(seen))
        orders.add(tuple(seen))
    assert 0 < ranks[0].dropped_per_epoch < 8 * num_ranks + num_ranks
    assert len(epochs) == len(orders) == 3 and frozenset().union(*epochs) <= set(range(131))


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_validation_counts_every_sample_once(
    numbered_shards: Make, plain_basis: Eigenbasis, num_ranks: int, tmp_path: Path
) -> None:
    """Twice, each sample once over all ranks: the stored image minus the mean, float32 in channels-last memory; the
    rest of the fixed batch shape is -1."""
    numbered_shards(131, 4)
    val = open_shards(tmp_path, "val")
    stored = np.concatenate(list(decoded_batches(val, 50)))
    ranks = loaders(val, plain_basis, num_ranks, training=False)
    for _ in range(2):
        batches = [batch for loader in ranks for batch in loader]
        labels = torch.cat([batch.labels for batch in batches])
        assert sorted(labels[labels >= 0].tolist()) == list(range(131))
        assert (labels == -1).sum() == len(batches) * 8 - 131
        for images, labels in batches:
            assert images.shape == (8, 3, 256, 256) and images.dtype == torch.float32
            assert images.is_contiguous(memory_format=torch.channels_last)
            valid = labels[labels >= 0].tolist()
            expected = stored[valid] - plain_basis.mean
            got = images[: len(valid)].permute(0, 2, 3, 1)
            np.testing.assert_allclose(got, expected, atol=1e-3)


def test_lighting_ends_at_its_epoch(numbered_shards: Make, plain_basis: Eigenbasis) -> None:
    """Before `off_epoch` batches are those of a loader whose lighting never ends, from it on those of one that has
    none, bit for bit, labels, windows and flips included; also when resumed before, at and after the edge."""
    shards = numbered_shards(60, 3)

    def make(**lighting: Any) -> Loader:
        augmentation = Augmentation(lighting=Lighting(**lighting))
        return loaders(shards, plain_basis, 1, training=True, augmentation=augmentation)[0]

    with_noise, without = (collect(make(strength=each), range(4)) for each in (0.5, 0.0))
    loader, got, states = make(strength=0.5, off_epoch=2), [], []
    for epoch in range(4):
        for images, labels in loader.epoch(epoch):
            got.append((images.clone(), labels))
            states.append(loader.state_dict())
    steps = loader.steps_per_epoch
    assert same_batches(got, with_noise[: 2 * steps] + without[2 * steps :])
    assert not torch.equal(got[0][0], without[0][0])
    for position in (2, steps, steps + 2, 2 * steps, 2 * steps + 2):
        resumed = make(strength=0.5, off_epoch=2)
        resumed.load_state_dict(states[position - 1])
        assert same_batches(collect(resumed, range(resumed.at_epoch, 4)), got[position:])


def test_mean_image(numbered_shards: Make, plain_basis: Eigenbasis) -> None:
    """With `mean: image` a training window is what it is with `mean: channel`, minus the centre of the mean image and
    plus the mean colour, neither windowed nor flipped, over std and the divisor of lighting; validation images stay as
    they are, for the evaluation to subtract `mean_offset` from their windows."""
    shards = numbered_shards(40, 2)
    image = np.random.default_rng(0).uniform(0, 255, (256, 256, 3)).astype(np.float32)

    def make(mean: Any, training: bool, basis: Eigenbasis) -> Loader:
        augmentation = Augmentation(mean=mean, std=2.0, lighting=Lighting(off_epoch=1))
        return loaders(shards, basis, 1, training, augmentation=augmentation)[0]

    basis = replace(plain_basis, mean_image=image)
    removed = (image[16:240, 16:240] - basis.mean).transpose(2, 0, 1) / 2
    plain, imaged = (collect(make(mean, True, basis), range(2)) for mean in ("channel", "image"))
    for n, (one, two) in enumerate(zip(plain, imaged, strict=True)):
        divisor = 1.1 if n < len(plain) // 2 else 1.0
        assert torch.equal(one[1], two[1])
        np.testing.assert_allclose(one[0] - two[0], np.stack([removed / divisor] * 8), atol=1e-3)
    val_plain, val = (make(mean, False, basis) for mean in ("channel", "image"))
    assert same_batches(collect(val, range(1)), collect(val_plain, range(1)))
    assert val_plain.mean_offset is None
    np.testing.assert_allclose(val.mean_offset, removed, atol=1e-4)
    with pytest.raises(ValueError, match="--mean-image"):
        make("image", True, plain_basis)


def test_close_gives_everything_back(numbered_shards: Make, plain_basis: Eigenbasis) -> None:
    """Threads, native ones included, and file handles after many loaders are what they were after the first."""
    shards, used = numbered_shards(40, 4), set()
    for _ in range(8):
        (loader,) = loaders(shards, plain_basis, 1, training=True)
        next(iter(loader))
        loader.close()
        gc.collect()
        used.add(tuple(len(list(Path("/proc/self", kind).iterdir())) for kind in ("task", "fd")))
    assert len(used) == 1


@pytest.mark.slow
def test_memory_stays_flat(shards: Path, basis: Eigenbasis) -> None:
    """Resident memory does not grow by more than 2 % over 40 epochs of one loader, with four others opened and closed
    in each. Medians of small batches, as each look sees another number of them ready; the first rounds fill caches."""
    train, sizes = open_shards(shards, "train"), []
    (loader,) = loaders(train, basis, 1, training=True, batch_size=4)
    for epoch in range(40):
        for _ in loader.epoch(epoch):
            pass
        for _ in range(4):
            (other,) = loaders(train, basis, 1, training=True, batch_size=4)
            next(iter(other))
            other.close()
        gc.collect()
        sizes.append(resident_bytes())
    assert np.median(sizes[25:]) <= 1.02 * np.median(sizes[10:25]), sizes


def test_the_shuffle_buffer_holds_little_more_than_its_files(
    numbered_shards: Make, plain_basis: Eigenbasis
) -> None:
    """1,200 files of a few kB, all of them in the buffer, take some MB each loader, not a MiB for each member."""

    def data_mb() -> float:
        (held,) = (
            row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmData:")
        )
        return int(held.split()[1]) / 1024

    before = data_mb()
    (loader,) = loaders(numbered_shards(1200, 4), plain_basis, 1, training=True, shuffle_buffer=1200)
    next(iter(loader))
    assert data_mb() - before < 500  # 112 here, 2,262 with buffers of a MiB
    loader.close()


def test_memory_is_used_again_only_when_nobody_holds_it(
    numbered_shards: Make, plain_basis: Eigenbasis
) -> None:
    """Batches that are kept, also by a view of them, stay as they are; the memory of others is used again."""
    (loader,) = loaders(numbered_shards(131, 4), plain_basis, 1, training=True)
    kept = [(batch.images[1:, 2], batch.images[1:, 2].clone()) for batch in loader.epoch(0)]
    assert len(kept) == 16 and all(torch.equal(view, copy) for view, copy in kept)
    places = {view.data_ptr() for view, _ in kept}
    del kept
    gc.collect()
    assert {batch.images[1:, 2].data_ptr() for batch in loader.epoch(1)} <= places


def test_refusals(numbered_shards: Make, plain_basis: Eigenbasis, tmp_path: Path) -> None:
    """Skipping an epoch, a batch that cannot be filled, fewer images than processes (in validation, too, where DALI
    would call it damage)."""
    shards = numbered_shards(20, 2)
    (loader,) = loaders(shards, plain_basis, 1, training=True)
    with pytest.raises(ValueError, match="cannot go to epoch 1"):
        next(loader.epoch(1))
    with pytest.raises(ValueError, match="smaller batch size"):
        loaders(shards, plain_basis, 3, training=True)
    for each, training in ((shards, True), (open_shards(tmp_path, "val"), False)):
        with pytest.raises(ValueError, match=rf"^{each.split} has 20 images for 21 processes; start fewer"):
            loaders(each, plain_basis, 21, training, batch_size=1)


@pytest.mark.gpu
@pytest.mark.parametrize("decode", ["cpu", "gpu"])
def test_gpu_backend_agrees_with_the_cpu(shards: Path, basis: Eigenbasis, decode: str) -> None:
    """Equal seeds give equal windows, flips and lights; half precision and another decoder move pixels slightly."""
    train = open_shards(shards, "train")
    place = {"batch_size": 32, "seed": 3, "rank": 0, "num_ranks": 1}
    on_cpu = train_loader(train, basis, DataConfig(shards), device="cpu", **place)
    on_gpu = train_loader(train, basis, DataConfig(shards, decode=decode), device="cuda", **place)  # type: ignore[arg-type]
    for (images, labels), (gpu_images, gpu_labels), _ in zip(
        on_cpu.epoch(0), on_gpu.epoch(0), range(5), strict=False
    ):
        assert gpu_images.dtype == torch.float16 and gpu_images.is_cuda
        assert gpu_images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(labels, gpu_labels.cpu())
        difference = (images - gpu_images.cpu().float()).abs()
        assert difference.mean() < 0.5 and difference.max() < (0.1 if decode == "cpu" else 40)
