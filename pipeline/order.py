"""The order of training samples: a keyed permutation that is evaluated position by position.

`global` permutes the whole split. `blocks` permutes the shards, cuts them into blocks of `block_shards` and permutes
the samples within each block, so that a slow disk reads whole shards in sequence. Either is a pure function of (seed,
epoch, position): nothing of an epoch's size is held, and any process computes any part.

A Feistel network permutes the numbers below a power of 4; a result that is too large is permuted again until it is
small enough (cycle-walking; Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
"""

import numpy as np

ROUNDS = 6
SHUFFLE, AUGMENT = 0, 1
"""Streams of random words."""


def random_words(seed: int, epoch: int, stream: int, first: int, count: int) -> np.ndarray:
    """Return `count` rows of four random words, uint64 (count, 4), from row `first` on: Philox4x64 (Salmon et al.
    2011), whose counter is the row. Raw words are the same in every version of numpy."""
    counter = (stream << 192) + first
    words = np.random.Philox(key=seed + (epoch << 64), counter=counter).random_raw(4 * count)
    return np.asarray(words, np.uint64).reshape(count, 4)


def permute(positions: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Map positions, uint64 below `size`, one to one to numbers below `size`. `keys`: uint64 (ROUNDS,)."""
    half = np.uint64(max((size - 1).bit_length() + 1, 2) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    result = encrypt(positions.ravel(), half, mask, keys)
    outside = np.flatnonzero(result >= size)
    while outside.size:
        result[outside] = encrypt(result[outside], half, mask, keys)
        outside = outside[result[outside] >= size]
    return result.reshape(positions.shape)


def encrypt(numbers: np.ndarray, half: np.uint64, mask: np.uint64, keys: np.ndarray) -> np.ndarray:
    """Permute the numbers of 2 * `half` bits. The round function is SplitMix64's finalizer (Steele et al. 2014)."""
    left, right = numbers >> half, numbers & mask
    for key in keys:
        mixed = right + key
        mixed ^= mixed >> np.uint64(30)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(27)
        mixed *= np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
        left, right = right, left ^ (mixed & mask)
    return (left << half) | right


def order_global(positions: np.ndarray, seed: int, epoch: int, size: int, order: int = 0) -> np.ndarray:
    """Return the samples, of `size`, at these positions of an epoch, int64. `order`: 0, of a block its number + 1."""
    keys = random_words(seed, epoch, SHUFFLE, 2 * order, 2).ravel()[:ROUNDS]
    return permute(positions.astype(np.uint64), size, keys).astype(np.int64)


def list_blocks(seed: int, epoch: int, num_shards: int, block_shards: int) -> list[np.ndarray]:
    """List the blocks of an epoch in their order, each an array of shards."""
    shards = order_global(np.arange(num_shards), seed, epoch, num_shards)
    return np.split(shards, range(block_shards, num_shards, block_shards))


def order_blocks(
    positions: np.ndarray, seed: int, epoch: int, shard_sizes: np.ndarray, blocks: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the samples at these positions of an epoch and the numbers of their blocks, both int64.

    `shard_sizes`: number of samples of each shard. `blocks`: from `list_blocks`.
    """
    firsts = np.cumsum(shard_sizes) - shard_sizes
    ends = np.cumsum([shard_sizes[block].sum() for block in blocks])
    numbers, samples = np.searchsorted(ends, positions, side="right"), np.empty_like(positions)
    for number in np.unique(numbers).tolist():
        block, members = blocks[number], numbers == number
        sizes = shard_sizes[block]
        start, total = ends[number] - sizes.sum(), int(sizes.sum())
        within = order_global(positions[members] - start, seed, epoch, total, order=number + 1)
        shard = np.searchsorted(np.cumsum(sizes), within, side="right")
        samples[members] = firsts[block[shard]] + within - (np.cumsum(sizes) - sizes)[shard]
    return samples, numbers
