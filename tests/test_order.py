"""The order of an epoch is an exact, well-mixed permutation that any process computes in any part."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.order import list_blocks, order_blocks, order_global, permute


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 5000), keys=st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=6))
def test_permutation(size: int, keys: list[int]) -> None:
    """Every size and key: each number once; a part is that part of the whole."""
    positions, words = np.arange(size, dtype=np.uint64), np.array(keys, np.uint64)
    order = permute(positions, size, words)
    assert sorted(order.tolist()) == list(range(size))
    assert permute(positions[size // 2 :], size, words).tolist() == order[size // 2 :].tolist()


def test_values_are_pinned() -> None:
    """Runs resume with the order that they began with: these numbers never change."""
    assert order_global(np.array([0, 1, 2, 1281166]), 2012, 3, 1281167).tolist() == GLOBAL
    sizes = np.array([5, 7, 6, 4])
    blocks = list_blocks(2012, 3, 4, 2)
    assert [block.tolist() for block in blocks] == BLOCKS
    assert order_blocks(np.arange(5), 2012, 3, sizes, blocks)[0].tolist() == IN_BLOCKS


GLOBAL = [79314, 1081266, 415089, 947401]
BLOCKS = [[0, 1], [2, 3]]
IN_BLOCKS = [2, 0, 10, 5, 4]


def test_positions_and_samples_are_uncorrelated() -> None:
    """Over 20 epochs of 20,000 samples: position against sample, neighbours against each other, and one epoch against
    the next, within five standard errors (1 / sqrt(20,000))."""
    positions = np.arange(20_000)
    epochs = [order_global(positions, 7, epoch, 20_000) for epoch in range(20)]
    pairs = [(positions, order) for order in epochs] + [(order[1:], order[:-1]) for order in epochs]
    pairs += list(zip(epochs[1:], epochs[:-1], strict=True))
    assert max(abs(np.corrcoef(*pair)[0, 1]) for pair in pairs) < 5 / np.sqrt(20_000)
    assert (
        abs(np.corrcoef(positions, np.sort(epochs[0]))[0, 1]) > 0.9
    )  # what an order without shuffling gives


@pytest.mark.parametrize("block_shards", [1, 3, 20])
def test_blocks(block_shards: int) -> None:
    """Each sample once; a block's positions follow one another and hold the samples of its shards alone; blocks and the
    order in them change with epoch and seed."""
    sizes = np.array([11, 3, 8, 8, 1, 20, 9])
    shard_of = np.repeat(np.arange(7), sizes)
    seen = []
    for seed, epoch in ((1, 0), (1, 1), (2, 0)):
        blocks = list_blocks(seed, epoch, 7, block_shards)
        samples, numbers = order_blocks(np.arange(60), seed, epoch, sizes, blocks)
        assert sorted(samples.tolist()) == list(range(60))
        assert (np.diff(numbers) >= 0).all() and len(blocks) == -(-7 // block_shards)
        for number, block in enumerate(blocks):
            assert set(shard_of[samples[numbers == number]]) == set(block.tolist())
        seen.append(samples.tolist())
    assert seen[0] != seen[1] and seen[0] != seen[2] and seen[1] != seen[2]
