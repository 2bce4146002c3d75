"""Groups of shards hold the sums of their own images, whatever the batches; files that are not ours are counted
again."""

import io
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.eigenbasis import Eigenbasis, Moments
from pipeline.reader import decoded_batches
from pipeline.shards import ShardSet
from tools.moments import MAX_GROUPS, Sums, Tally, batch_sums, sum_of

OF = {"manifest": "m", "decoder": "d", "sample": None}


@pytest.mark.parametrize("num_shards", [1, 31, 32, 33, 100, 1281])
def test_groups_cut_the_split(num_shards: int) -> None:
    """Every shard is in one group, neighbours together, groups of one size give or take one."""
    split = ShardSet("train", ("t",) * num_shards, ("i",) * num_shards, (1,) * num_shards, (), "m", "crop256")
    groups = Tally(Path(), split, OF, False).groups
    assert list(itertools.chain(*groups)) == list(range(num_shards))
    sizes = [len(group) for group in groups]
    assert len(groups) == min(num_shards, MAX_GROUPS) and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_a_group_holds_its_own_images(
    numbered_shards: Callable[[int, int], ShardSet], tmp_path: Path, batch_size: int
) -> None:
    """Groups are counted in any order and in several goes, batches lie across their ends, yet each file has exactly
    the sums of its shards, and the total those of all."""
    split = numbered_shards(47, 5)
    stored = np.concatenate([batch.numpy().copy() for batch in decoded_batches(split, 10)])
    tally = Tally(tmp_path, split, OF, with_image=True)
    assert tally.count([3, 0], batch_size, 1, "cpu") == sum(split.samples[k] for k in (0, 3))
    assert tally.total() is None and tally.read(1) is None
    tally.count([1, 2, 4], batch_size, 2, "cpu")
    ends = np.cumsum(split.samples)
    for number, part in enumerate(np.split(stored, ends[:-1])):
        sums = tally.read(number)
        assert sums is not None and sums.moments == Moments.of(part)
        np.testing.assert_array_equal(sums.image, part.sum(0, dtype=np.int64))
    total = tally.total()
    assert total is not None and total.moments == Moments.of(stored)
    tally.forget()
    assert not list(tmp_path.glob("pca.part*"))


def test_batches_are_cut_at_ends(numbered_shards: Callable[[int, int], ShardSet]) -> None:
    """A batch ends where a group ends, twice in one batch too, and nothing is lost."""
    split = numbered_shards(20, 2)
    pieces = [sums.moments.num_images for sums in batch_sums(split, 8, 1, ends=[1, 3, 8, 13, 20])]
    assert pieces == [1, 2, 5, 5, 3, 4]


def test_files_that_are_not_ours(numbered_shards: Callable[[int, int], ShardSet], tmp_path: Path) -> None:
    """A file of other shards, of another decoder, cut short, empty, or without the image that is wanted is none."""
    split = numbered_shards(6, 2)
    tally = Tally(tmp_path, split, OF, with_image=False)
    tally.count([0], 4, 1, "cpu")
    whole = tally.path(0).read_bytes()
    assert tally.read(0) is not None
    assert Tally(tmp_path, split, {**OF, "decoder": "other"}, False).read(0) is None
    assert Tally(tmp_path, split, OF, with_image=True).read(0) is None
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    for content in (
        b"",
        whole[:-30],
        whole[: len(whole) // 2],
        b"\0" * len(whole),
        b"PK\x03\x04",
        buffer.getvalue(),
    ):
        tally.path(0).write_bytes(content)
        assert tally.read(0) is None, content[:20]


def test_a_billion_white_images(tmp_path: Path) -> None:
    """The largest sums that 10^9 images of 256x256 can have are kept and divided exactly: 10^9 * 256^2 * 255^2 = 4.3e18
    lies below 2^63 = 9.2e18."""
    split = ShardSet("train", ("t",), ("i",), (10**9,), (), "m", "crop256")
    pixels = 10**9 * 256**2
    half = pixels // 2  # white and black, half of each: the largest variance
    moments = Moments(10**9, pixels, (255 * half,) * 3, (255**2 * half,) * 9)
    tally = Tally(tmp_path, split, OF, with_image=False)
    for each in (moments, Moments(10**9, pixels, (255 * pixels,) * 3, (255**2 * pixels,) * 9)):
        tally.write(0, Sums(each))
        assert tally.read(0) == Sums(each)
    basis = Eigenbasis.of(moments)
    np.testing.assert_allclose(basis.mean, 127.5)
    np.testing.assert_allclose(basis.eigenvalues, [3 * 127.5**2, 0, 0])


def test_sum_of_images() -> None:
    """Equal to numpy's, for the brightest images too."""
    images = np.random.default_rng(0).integers(250, 256, (300, 5, 4, 3), dtype=np.uint8)
    np.testing.assert_array_equal(sum_of(torch.from_numpy(images)).numpy(), images.sum(0, dtype=np.int64))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("counts", np.array(5)),
        ("counts", np.array([3, 5])),
        ("counts", np.array([3, 3 * 65536]) * 1.0),
        ("sum", np.array([])),
        ("sum", np.array([1, 2])),
        ("sum", np.array(["a", "b", "c"])),
        ("sum", np.array([np.nan] * 3)),
        ("sum", np.array([-1, 2, 3])),
        ("sum_products", np.zeros((3, 3), int)),
        ("image", np.zeros((2, 2, 3), int)),
        ("image", np.full((256, 256, 3), "x")),
    ],
)
def test_sums_of_another_form(
    numbered_shards: Callable[[int, int], ShardSet], tmp_path: Path, name: str, value: np.ndarray
) -> None:
    """A whole file of ours by its name, whose arrays are not what was counted, is none."""
    tally = Tally(tmp_path, numbered_shards(6, 2), OF, with_image=True)
    tally.write(0, Sums(Moments(3, 3 * 65536, (1,) * 3, (1,) * 9), np.zeros((256, 256, 3), np.int64)))
    assert tally.read(0) is not None
    with np.load(tally.path(0)) as file:
        arrays = dict(file)
    with tally.path(0).open("wb") as stream:
        np.savez(stream, **{**arrays, name: value})
    assert tally.read(0) is None
