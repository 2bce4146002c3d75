"""A loader's state continues bit for bit; a state of other settings is refused."""

from typing import Any

import pytest
import torch

from pipeline.eigenbasis import Eigenbasis
from pipeline.lighting import Lighting
from pipeline.settings import Augmentation, Speed
from tests.helpers import Make, collect, loaders, same_batches


@pytest.mark.parametrize(("stop_at", "num_ranks"), [(0, 1), (5, 1), (16, 1), (3, 3)])
def test_state_continues_bit_for_bit(
    numbered_shards: Make, plain_basis: Eigenbasis, stop_at: int, num_ranks: int
) -> None:
    """From the start, the middle and the end of an epoch: the following batches of each rank are those of the
    undisturbed loader."""
    shards = numbered_shards(131, 4)
    ranks = [loaders(shards, plain_basis, num_ranks, training=True) for _ in "12"]
    speed = Speed(threads=1, prefetch_queue_depth=3)
    seconds = loaders(shards, plain_basis, num_ranks, training=True, speed=speed)
    for undisturbed, first, second in zip(*ranks, seconds, strict=True):
        expected = collect(undisturbed, range(3))
        collect(first, range(1))
        for step, _ in enumerate(first.epoch(1), start=1):
            if step == stop_at:
                break
        state = first.state_dict()
        second.load_state_dict(state)
        position = first.at_epoch * first.steps_per_epoch + first.at_step
        assert 0 < position < len(expected)
        assert same_batches(collect(second, range(second.at_epoch, 3)), expected[position:])


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("batch_size", {"batch_size": 4}),
        ("num_ranks", {"num_ranks": 2}),
        ("shuffle_buffer", {"shuffle_buffer": 17}),
        ("augmentation", {"augmentation": Augmentation(flip=0)}),
        ("shards", {}),
        ("seed", {}),
    ],
)
def test_a_state_that_does_not_fit_is_refused(
    numbered_shards: Make, plain_basis: Eigenbasis, field: str, change: dict[str, Any]
) -> None:
    """Each field of the fingerprint is named; speed knobs and the strength of lighting are free."""
    shards = numbered_shards(131, 4)
    place: dict[str, Any] = {"num_ranks": 1, "training": True}
    state = loaders(shards, plain_basis, **place)[0].state_dict()
    free = {"speed": Speed(threads=1), "augmentation": Augmentation(lighting=Lighting(strength=0))}
    loaders(shards, plain_basis, **place, **free)[0].load_state_dict(state)
    if not change:
        state["fingerprint"][field] = "other"
    with pytest.raises(ValueError, match=f"{field} was"):
        loaders(shards, plain_basis, **{**place, **change})[0].load_state_dict(state)


def test_another_world_goes_on_from_an_epochs_edge(numbered_shards: Make, plain_basis: Eigenbasis) -> None:
    """Other ranks and batches are refused, with the way out named, or taken from the edge of the epoch: its samples
    once each over the new ranks, in a new order, which continues bit for bit as any other."""
    shards = numbered_shards(131, 4)
    (old,) = loaders(shards, plain_basis, 1, training=True)
    collect(old, range(1))
    ended = old.state_dict()
    next(old.epoch(1))
    mid_epoch = old.state_dict()
    for state in (ended, mid_epoch):
        ranks = loaders(shards, plain_basis, 2, training=True, batch_size=4)
        with pytest.raises(ValueError, match=r"was 1, now it is 2; --resume\.allow_world_change"):
            ranks[0].load_state_dict({**state, "fingerprint": {**state["fingerprint"], "batch_size": 4}})
        for loader in ranks:
            loader.load_state_dict(state, allow_world_change=True)
            assert (loader.at_epoch, loader.at_step) == (1, 0)
        first = [collect(loader, range(1, 2)) for loader in ranks]
        seen = torch.cat([labels for rank in first for _, labels in rank]).tolist()
        assert len(seen) == len(set(seen)) == 128

        (again, _) = loaders(shards, plain_basis, 2, training=True, batch_size=4)
        again.load_state_dict(ranks[0].state_dict())
        assert same_batches(collect(again, range(2, 3)), collect(ranks[0], range(2, 3)))
        other_seed = ranks[0].state_dict()
        other_seed["fingerprint"]["seed"] = 9
        with pytest.raises(ValueError, match="seed was 9"):
            again.load_state_dict(other_seed, allow_world_change=True)
