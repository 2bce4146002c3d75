"""Data that is damaged, also under a running loader, is told as such, with its place."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.eigenbasis import Eigenbasis
from pipeline.errors import DataError
from pipeline.reader import data_errors, decoded_batches
from pipeline.shards import read_index
from tests.helpers import Make, collect, jpeg, loaders


def test_a_shard_cut_under_a_running_loader(numbered_shards: Make, plain_basis: Eigenbasis) -> None:
    """An error that says what failed, not a crash."""
    shards = numbered_shards(600, 2)
    (loader,) = loaders(shards, plain_basis, 1, training=True)
    steps = loader.epoch(0)
    next(steps)
    for tar in shards.tars:
        with Path(tar).open("r+b") as file:
            file.truncate(50_000)
    with pytest.raises(
        DataError, match=r"reading .*train failed: .*train-00000\d\.tar has 50000 bytes, but s\d+\."
    ):
        list(steps)


def test_damage_is_named(numbered_shards: Make, plain_basis: Eigenbasis) -> None:
    """An image that does not decode, or has another size, is named by shard, offset and key; so is a shard that is gone
    before it is opened."""
    shards = numbered_shards(60, 2)
    tar = Path(shards.tars[1])
    sound = tar.read_bytes()
    [(_, offset, size, name), _] = read_index(Path(shards.indexes[1]))[7]
    smaller = jpeg(np.zeros((64, 64, 3), np.uint8))
    for content, told in (
        (bytes([1]) * size, "cannot be decoded"),
        (smaller + bytes(size - len(smaller)), "64x64, not"),
    ):
        tar.write_bytes(sound[:offset] + content + sound[offset + size :])
        (loader,) = loaders(shards, plain_basis, 1, training=True)
        with pytest.raises(DataError, match=re.escape(f"{name} at offset {offset} of {tar}") + f".*{told}"):
            list(loader.epoch(0))
    state = loader.state_dict()  # of the batch before the damage; the loader that failed is not needed for it
    tar.write_bytes(sound)
    (again,) = loaders(shards, plain_basis, 1, training=True)
    again.load_state_dict(state)
    (undisturbed,) = loaders(shards, plain_basis, 1, training=True)
    got, expected = collect(again, range(1)), collect(undisturbed, range(1))[state["step"] :]
    assert all(torch.equal(a, x) and torch.equal(b, y) for (a, b), (x, y) in zip(got, expected, strict=True))

    tar.unlink()
    (loader,) = loaders(shards, plain_basis, 1, training=True)
    with pytest.raises(DataError, match=re.escape(f"{tar}: No such file")):
        list(loader.epoch(0))


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


@pytest.mark.parametrize(
    "report",
    [
        "Critical error in pipeline:\nError in GPU operator `fn.decoders.image`,\nencountered:\n\n{}\nC++ context",
        "{}",
    ],
)
@pytest.mark.parametrize(
    "cause",
    [
        "CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory",
        "CUDA driver API error CUDA_ERROR_NO_DEVICE (100):",
    ],
)
def test_a_gpus_error_is_not_taken_for_damage(numbered_shards: Make, report: str, cause: str) -> None:
    """Shards are not searched and not blamed; DALI's own words are in the sentence."""
    with pytest.raises(DataError, match="CUDA") as error, data_errors(numbered_shards(8, 1)):
        raise RuntimeError(report.format(cause))
    assert "doctor" in str(error.value) and "verify" not in str(error.value)


def test_a_path_that_names_cuda_is_no_gpus_error(numbered_shards: Make) -> None:
    """Nor is any other text of a report: shards are searched as ever."""
    shards = numbered_shards(8, 1)
    Path(shards.tars[0]).write_bytes(b"")
    with pytest.raises(DataError, match="verify"), data_errors(shards):
        raise RuntimeError(
            "Error in readers.webdataset,\nencountered:\n\n/data/CUDA/a.tar: out of memory of it\n"
        )
