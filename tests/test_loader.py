"""Epochs are exact over any number of ranks, a state continues bit for bit, and failing data is told as such."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.eigenbasis import Eigenbasis
from pipeline.graph import Augmentation
from pipeline.lighting import Lighting
from pipeline.loader import DataConfig, Loader, Speed, train_loader, val_loader
from pipeline.reader import decoded_batches
from pipeline.shards import DataError, ShardSet, open_shards

Make = Callable[[int, int], ShardSet]


def loaders(
    shards: ShardSet, basis: Eigenbasis, num_ranks: int, training: bool, batch_size: int = 8, **changes: Any
) -> list[Loader]:
    """One loader per rank."""
    config = DataConfig(Path(shards.tars[0]).parent.parent, shuffle_buffer=16, **changes)
    place = {"batch_size": batch_size, "num_ranks": num_ranks, "device": "cpu"}
    if training:
        return [train_loader(shards, basis, config, seed=3, rank=rank, **place) for rank in range(num_ranks)]
    return [val_loader(shards, basis, config, rank=rank, **place) for rank in range(num_ranks)]


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
            batch.images.shape == (8, 3, 224, 224) and batch.labels.shape == (8,) for rank in batches for batch in rank
        )
        seen = torch.cat([batch.labels for rank in batches for batch in rank]).tolist()
        assert len(seen) == len(set(seen)) == 131 - ranks[0].dropped_per_epoch and set(seen) <= set(range(131))
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
    """Before `until_epoch` batches are those of a loader whose lighting never ends, from it on those of one that has
    none, bit for bit, labels, windows and flips included; also when resumed before, at and after the edge."""
    shards = numbered_shards(60, 3)

    def epochs(lighting: Lighting, state: Any = None, first: int = 0) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
        (loader,) = loaders(shards, plain_basis, 1, training=True, augmentation=Augmentation(lighting=lighting))
        if state:
            loader.load_state_dict(state)
        return [[(batch.images.clone(), batch.labels.clone()) for batch in loader.epoch(e)] for e in range(first, 4)]

    def same(mine: list[Any], theirs: list[Any]) -> bool:
        pairs = zip(mine, theirs, strict=True)
        return all(torch.equal(a, x) and torch.equal(b, y) for (a, b), (x, y) in pairs)

    ending = Lighting(strength=0.5, until_epoch=2)
    lit, dark, both = epochs(Lighting(strength=0.5)), epochs(Lighting(strength=0.0)), epochs(ending)
    assert [same(both[e], lit[e]) for e in range(4)] == [True, True, False, False]
    assert [same(both[e], dark[e]) for e in range(4)] == [False, False, True, True]

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
    """Validation hands out the stored image minus the mean beside its own label, in channels-last memory, float32."""
    numbered_shards(20, 2)
    val = open_shards(tmp_path, "val")
    stored = np.concatenate(list(decoded_batches(val, 6)))
    assert stored.shape == (20, 256, 256, 3) and stored.dtype == np.uint8
    for images, labels in loaders(val, plain_basis, 1, training=False)[0]:
        assert images.dtype == torch.float32 and images.is_contiguous(memory_format=torch.channels_last)
        for image, label in zip(images.permute(0, 2, 3, 1).numpy(), labels.tolist(), strict=True):
            if label >= 0:
                np.testing.assert_allclose(image, stored[label] - plain_basis.mean, atol=1e-3)


def collect(loader: Loader, epochs: range) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Copies of every batch."""
    return [(batch.images.clone(), batch.labels.clone()) for epoch in epochs for batch in loader.epoch(epoch)]


@pytest.mark.parametrize("stop_at", [0, 5, 16])
def test_state_continues_bit_for_bit(numbered_shards: Make, plain_basis: Eigenbasis, stop_at: int) -> None:
    """From the start, the middle and the end of an epoch: the following batches are those of the undisturbed loader."""
    shards = numbered_shards(131, 4)
    (undisturbed,) = loaders(shards, plain_basis, 1, training=True)
    expected = collect(undisturbed, range(3))
    (first,) = loaders(shards, plain_basis, 1, training=True)
    collect(first, range(1))
    for step, _ in enumerate(first.epoch(1), start=1):
        if step == stop_at:
            break
    state = first.state_dict()
    (second,) = loaders(shards, plain_basis, 1, training=True, speed=Speed(threads=1, prefetch=3))
    second.load_state_dict(state)
    position = first.at_epoch * 16 + first.at_step
    got = collect(second, range(second.at_epoch, 3))
    assert len(got) == len(expected) - position == 48 - position
    for (images, labels), (expected_images, expected_labels) in zip(got, expected[position:], strict=True):
        assert torch.equal(images, expected_images) and torch.equal(labels, expected_labels)


def test_a_state_that_does_not_fit_is_refused(numbered_shards: Make, plain_basis: Eigenbasis) -> None:
    """Each field of the fingerprint is named; speed knobs and the strength of lighting are free."""
    shards = numbered_shards(131, 4)
    config = DataConfig(Path("x"), shuffle_buffer=16)
    place = {"batch_size": 8, "seed": 3, "rank": 0, "num_ranks": 1, "device": "cpu"}
    state = train_loader(shards, plain_basis, config, **place).state_dict()
    free = replace(config, speed=Speed(threads=1), augmentation=Augmentation(lighting=Lighting(strength=0)))
    train_loader(shards, plain_basis, free, **place).load_state_dict(state)
    for name, changed in [("batch_size", {"batch_size": 4}), ("seed", {"seed": 4}), ("num_ranks", {"num_ranks": 2})]:
        with pytest.raises(ValueError, match=f"{name} was"):
            train_loader(shards, plain_basis, config, **{**place, **changed}).load_state_dict(state)
    with pytest.raises(ValueError, match="augmentation was"):
        train_loader(shards, plain_basis, replace(config, augmentation=Augmentation(flip=0)), **place).load_state_dict(
            state
        )
    with pytest.raises(ValueError, match="shards was"):
        train_loader(replace(shards, manifest_sha256="other"), plain_basis, config, **place).load_state_dict(state)


def test_kept_batches_stay_intact(numbered_shards: Make, plain_basis: Eigenbasis) -> None:
    """Batches are views of DALI's memory; those that are kept are not written over."""
    (loader,) = loaders(numbered_shards(131, 4), plain_basis, 1, training=True)
    kept = [(batch, batch.images.clone()) for batch in loader.epoch(0)]
    assert len(kept) == 16 and all(torch.equal(batch.images, copy) for batch, copy in kept)


def test_epochs_come_in_order(numbered_shards: Make, plain_basis: Eigenbasis) -> None:
    """Skipping an epoch is refused; so is a batch that cannot be filled."""
    shards = numbered_shards(20, 2)
    (loader,) = loaders(shards, plain_basis, 1, training=True)
    with pytest.raises(ValueError, match="cannot go to epoch 1"):
        next(loader.epoch(1))
    with pytest.raises(ValueError, match="smaller batch size"):
        loaders(shards, plain_basis, 3, training=True)


def test_a_shard_cut_under_a_running_loader(numbered_shards: Make, plain_basis: Eigenbasis) -> None:
    """An error that says what failed, not a crash."""
    shards = numbered_shards(600, 2)
    (loader,) = loaders(shards, plain_basis, 1, training=True)
    steps = loader.epoch(0)
    next(steps)
    for tar in shards.tars:
        with Path(tar).open("r+b") as file:
            file.truncate(50_000)
    with pytest.raises(DataError, match=r"reading .*train failed: .*manifest\.json"):
        list(steps)


def test_an_index_that_was_cut(numbered_shards: Make, plain_basis: Eigenbasis) -> None:
    """Fewer samples in the indexes than in the manifest are refused before the first batch."""
    shards = numbered_shards(60, 2)
    index = Path(shards.indexes[1])
    lines = index.read_text().splitlines()
    index.write_text("\n".join([f"v1.2 {len(lines) - 6}", *lines[1:-5]]) + "\n")
    (loader,) = loaders(shards, plain_basis, 1, training=True)
    for batches in (loader.epoch(0), decoded_batches(shards, 8)):
        with pytest.raises(DataError, match="list 55 samples, its manifest 60"):
            next(iter(batches))


@pytest.mark.gpu
@pytest.mark.parametrize("decode", ["cpu", "gpu"])
def test_gpu_backend_agrees_with_the_cpu(shards: Path, basis: Eigenbasis, decode: str) -> None:
    """Equal seeds give equal windows, flips and lights; half precision and another decoder move pixels slightly."""
    train = open_shards(shards, "train")
    place = {"batch_size": 32, "seed": 3, "rank": 0, "num_ranks": 1}
    on_cpu = train_loader(train, basis, DataConfig(shards), device="cpu", **place)
    on_gpu = train_loader(train, basis, DataConfig(shards, decode=decode), device="cuda", **place)  # type: ignore[arg-type]
    for (images, labels), (gpu_images, gpu_labels), _ in zip(on_cpu.epoch(0), on_gpu.epoch(0), range(5), strict=False):
        assert gpu_images.dtype == torch.float16 and gpu_images.is_cuda
        assert gpu_images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(labels, gpu_labels.cpu())
        difference = (images - gpu_images.cpu().float()).abs()
        assert difference.mean() < 0.5 and difference.max() < (0.1 if decode == "cpu" else 40)
