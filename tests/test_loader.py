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
from pipeline.loader import train_loader
from pipeline.reader import decoded_batches
from pipeline.settings import Augmentation, DataConfig
from pipeline.shards import open_shards
from tests.helpers import Make, collect, loaders


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_training_epochs_are_exact(numbered_shards: Make, plain_basis: Eigenbasis, num_ranks: int) -> None:
    """Over three epochs: no sample twice in an epoch over all ranks, as many dropped as reported and no more than
    needed, equal step counts, another order and another tail every epoch."""
    shards = numbered_shards(131, 4)
    ranks = loaders(shards, plain_basis, num_ranks, training=True)
    epochs, orders = [], []
    for epoch in range(3):
        batches = [list(loader.epoch(epoch)) for loader in ranks]
        assert {len(rank) for rank in batches} == {131 // num_ranks // 8}
        assert all(
            batch.images.shape == (8, 3, 224, 224) and batch.labels.shape == (8,)
            for rank in batches
            for batch in rank
        )
        seen = torch.cat([batch.labels for rank in batches for batch in rank]).tolist()
        assert len(seen) == len(set(seen)) == 131 - ranks[0].dropped_per_epoch and set(seen) <= set(
            range(131)
        )
        epochs.append(frozenset(seen))
        orders.append(seen)
    assert 0 < ranks[0].dropped_per_epoch < 8 * num_ranks + num_ranks
    assert len(set(epochs)) == 3 and orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_validation_counts_every_sample_once(
    numbered_shards: Make, plain_basis: Eigenbasis, num_ranks: int, tmp_path: Path
) -> None:
    """Three passes over all ranks show each sample once; the rest of the fixed batch shape is -1."""
    numbered_shards(131, 4)
    ranks = loaders(open_shards(tmp_path, "val"), plain_basis, num_ranks, training=False)
    for _ in range(3):
        batches = [batch for loader in ranks for batch in loader]
        assert all(batch.images.shape == (8, 3, 256, 256) for batch in batches)
        labels = torch.cat([batch.labels for batch in batches])
        assert sorted(labels[labels >= 0].tolist()) == list(range(131))
        assert (labels == -1).sum() == len(batches) * 8 - 131


def test_lighting_ends_at_its_epoch(numbered_shards: Make, plain_basis: Eigenbasis) -> None:
    """Before `off_epoch` batches are those of a loader whose lighting never ends, from it on those of one that has
    none, bit for bit, labels, windows and flips included; also when resumed before, at and after the edge."""
    shards = numbered_shards(60, 3)

    def epochs(
        lighting: Lighting, state: Any = None, first: int = 0
    ) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
        (loader,) = loaders(
            shards, plain_basis, 1, training=True, augmentation=Augmentation(lighting=lighting)
        )
        if state:
            loader.load_state_dict(state)
        return [
            [(batch.images.clone(), batch.labels.clone()) for batch in loader.epoch(e)]
            for e in range(first, 4)
        ]

    def same(mine: list[Any], theirs: list[Any]) -> bool:
        pairs = zip(mine, theirs, strict=True)
        return all(torch.equal(a, x) and torch.equal(b, y) for (a, b), (x, y) in pairs)

    ending = Lighting(strength=0.5, off_epoch=2)
    with_noise, without, both = epochs(Lighting(strength=0.5)), epochs(Lighting(strength=0.0)), epochs(ending)
    assert [same(both[e], with_noise[e]) for e in range(4)] == [True, True, False, False]
    assert [same(both[e], without[e]) for e in range(4)] == [False, False, True, True]

    (loader,) = loaders(shards, plain_basis, 1, training=True, augmentation=Augmentation(lighting=ending))
    states = []
    for epoch in range(3):
        for step, _ in enumerate(loader.epoch(epoch), 1):
            if step in (2, loader.steps_per_epoch):
                states.append((epoch, step, loader.state_dict()))
    for epoch, step, state in states:
        resumed = epochs(ending, state, epoch)
        assert same(resumed[0], both[epoch][step:])
        assert all(same(mine, theirs) for mine, theirs in zip(resumed[1:], both[epoch + 1 :], strict=True))


def test_images_belong_to_labels(numbered_shards: Make, plain_basis: Eigenbasis, tmp_path: Path) -> None:
    """Validation hands out the stored image minus the mean with its own label, in channels-last memory, float32."""
    numbered_shards(20, 2)
    val = open_shards(tmp_path, "val")
    stored = np.concatenate(list(decoded_batches(val, 6)))
    assert stored.shape == (20, 256, 256, 3) and stored.dtype == np.uint8
    for images, labels in loaders(val, plain_basis, 1, training=False)[0]:
        assert images.dtype == torch.float32 and images.is_contiguous(memory_format=torch.channels_last)
        for image, label in zip(images.permute(0, 2, 3, 1).numpy(), labels.tolist(), strict=True):
            if label >= 0:
                np.testing.assert_allclose(image, stored[label] - plain_basis.mean, atol=1e-3)


def test_mean_image(numbered_shards: Make, plain_basis: Eigenbasis) -> None:
    """With `mean: image` a training window is what it is with `mean: channel`, minus the centre of the mean image and
    plus the mean colour, neither windowed nor flipped, over std and the divisor of lighting; validation images stay as
    they are, for the evaluation to subtract `mean_offset` from their windows."""
    shards = numbered_shards(40, 2)
    image = np.random.default_rng(0).uniform(0, 255, (256, 256, 3)).astype(np.float32)
    basis = replace(plain_basis, mean_image=image)
    augmentations = [
        Augmentation(mean=mean, std=2.0, lighting=Lighting(off_epoch=1)) for mean in ("channel", "image")
    ]
    plain, imaged = (loaders(shards, basis, 1, training=True, augmentation=a)[0] for a in augmentations)
    removed = (image[16:240, 16:240] - basis.mean).transpose(2, 0, 1) / 2
    for epoch, divisor in ((0, 1.1), (1, 1.0)):
        for one, two in zip(
            collect(plain, range(epoch, epoch + 1)), collect(imaged, range(epoch, epoch + 1)), strict=True
        ):
            assert torch.equal(one[1], two[1])
            np.testing.assert_allclose(
                (one[0] - two[0]).numpy(), np.broadcast_to(removed / divisor, one[0].shape), atol=1e-3
            )
    (val,) = loaders(shards, basis, 1, training=False, augmentation=augmentations[1])
    (val_plain,) = loaders(shards, basis, 1, training=False, augmentation=augmentations[0])
    assert torch.equal(next(iter(val)).images, next(iter(val_plain)).images) and val_plain.mean_offset is None
    np.testing.assert_allclose(val.mean_offset, removed, atol=1e-4)
    with pytest.raises(ValueError, match="--mean-image"):
        loaders(shards, plain_basis, 1, training=True, augmentation=augmentations[1])


def test_close_gives_everything_back(numbered_shards: Make, plain_basis: Eigenbasis) -> None:
    """Threads and file handles after many loaders are what they were after the first."""
    shards = numbered_shards(40, 4)

    def use() -> tuple[int, int]:
        (loader,) = loaders(shards, plain_basis, 1, training=True)
        next(iter(loader))
        loader.close()
        gc.collect()
        return threading_count(), len(list(Path("/proc/self/fd").iterdir()))

    first = use()
    assert [use() for _ in range(8)][-1] == first


def threading_count() -> int:
    """Threads of this process, native ones included."""
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.slow
def test_memory_stays_flat(shards: Path, basis: Eigenbasis) -> None:
    """Resident memory does not grow by more than 2 % over 40 epochs, nor over 180 loaders in a row. Medians of
    small batches, as each look sees another number of them ready; the first epochs and loaders fill caches."""
    train = open_shards(shards, "train")

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1])

    (loader,) = loaders(train, basis, 1, training=True, batch_size=4)
    sizes = []
    for epoch in range(40):
        for _ in loader.epoch(epoch):
            pass
        sizes.append(resident())
    loader.close()
    assert np.median(sizes[25:]) <= 1.02 * np.median(sizes[10:25]), sizes
    sizes = []
    for _ in range(180):
        (loader,) = loaders(train, basis, 1, training=True, batch_size=4)
        next(iter(loader))
        loader.close()
        sizes.append(resident())
    assert np.median(sizes[120:]) <= 1.02 * np.median(sizes[60:120]), sizes[::10]


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


def test_kept_batches_stay_intact(numbered_shards: Make, plain_basis: Eigenbasis) -> None:
    """The memory of batches is used again, but not that of batches that are kept."""
    (loader,) = loaders(numbered_shards(131, 4), plain_basis, 1, training=True)
    kept = [(batch, batch.images.clone()) for batch in loader.epoch(0)]
    assert len(kept) == 16 and all(torch.equal(batch.images, copy) for batch, copy in kept)


def test_opened_ahead(numbered_shards: Make, plain_basis: Eigenbasis) -> None:
    """It costs memory, once, and no batch."""
    shards = numbered_shards(131, 4)
    ((opened,), (other,)) = (loaders(shards, plain_basis, 1, training=True) for _ in range(2))
    taken = opened.open()
    assert 0 < taken < 2**30 and opened.open() == taken
    for one, two in zip(opened.epoch(0), other.epoch(0), strict=True):
        assert torch.equal(one.images, two.images) and torch.equal(one.labels, two.labels)


def test_epochs_come_in_order(numbered_shards: Make, plain_basis: Eigenbasis) -> None:
    """Skipping an epoch is refused; so is a batch that cannot be filled."""
    shards = numbered_shards(20, 2)
    (loader,) = loaders(shards, plain_basis, 1, training=True)
    with pytest.raises(ValueError, match="cannot go to epoch 1"):
        next(loader.epoch(1))
    with pytest.raises(ValueError, match="smaller batch size"):
        loaders(shards, plain_basis, 3, training=True)


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


def test_fewer_images_than_processes(numbered_shards: Make, plain_basis: Eigenbasis, tmp_path: Path) -> None:
    """Refused in a sentence, in validation too, where DALI would call it damage."""
    train = numbered_shards(2, 1)
    for shards, training in ((train, True), (open_shards(tmp_path, "val"), False)):
        with pytest.raises(ValueError, match=rf"^{shards.split} has 2 images for 3 processes; start fewer"):
            loaders(shards, plain_basis, 3, training, batch_size=1)
