"""Data that is damaged, also under a running loader, is named with its place, or skipped; sound data is not blamed."""

import multiprocessing
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch

from pipeline.eigenbasis import Eigenbasis
from pipeline.errors import DataError
from pipeline.loader import decoded_batches, train_loader, val_loader
from pipeline.prefetch import name_gpu_errors
from pipeline.shards import open_shards
from tests.helpers import Make, collect, jpeg, loaders, photo, same_batches
from tools.packing.index import read_index


@pytest.fixture
def copy(few: Path, tmp_path: Path) -> Path:
    """Shards to be damaged."""
    shutil.copytree(few, tmp_path / "shards")
    return tmp_path / "shards"


def overwrite(tar: Path, change: Callable[[bytes], bytes], number: int = 11) -> str:
    """Change the image of a sample, to as many bytes at most; what names it."""
    _, offset, size, name = read_index(tar.with_suffix(".idx"))[number][0]
    sound = tar.read_bytes()
    changed = change(sound[offset : offset + size])
    assert len(changed) <= size
    tar.write_bytes(sound[:offset] + changed.ljust(size, b"\0") + sound[offset + size :])
    return f"{name.removesuffix('.jpg')} at offset {offset} of {tar}"


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"x" * len(data),
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: jpeg(photo(np.random.default_rng(0), 64, 48), quality=30),
    ],
)
def test_a_corrupt_image_is_named(copy: Path, change: Callable[[bytes], bytes]) -> None:
    """By key, offset and shard; the batches before it come out."""
    place = overwrite(copy / "train" / "train-000001.tar", change)
    batches = decoded_batches(open_shards(copy, "train"), 32)
    for _ in range(191 // 32):
        next(batches)
    with pytest.raises(DataError, match=re.escape(place)):
        next(batches)


def test_the_image_that_dali_refuses_is_named(copy: Path) -> None:
    """Not another before it of which libjpeg warns and which DALI shows."""
    tar = copy / "train" / "train-000000.tar"
    overwrite(tar, lambda data: data.replace(b"JFIF\0\1\1", b"JFIF\0\0\0"), 2)  # revision 0.0
    _, offset, size, name = read_index(tar.with_suffix(".idx"))[2][0]
    with pytest.raises(ValueError, match="JFIF"):
        simplejpeg.decode_jpeg(tar.read_bytes()[offset : offset + size])
    place = overwrite(tar, lambda data: data[:-40], 5)
    with pytest.raises(DataError) as raised:
        list(decoded_batches(open_shards(copy, "train"), 32))
    assert place in str(raised.value) and name not in str(raised.value)


def test_a_truncated_image_has_the_same_verdict_whatever_was_read_before(
    numbered_shards: Make, plain_basis: Eigenbasis
) -> None:
    """An image cut at its end, of which `samples.npy` has the shorter size, is refused in every order, also where the
    memory that it is read into held the whole image before."""
    whole = jpeg(photo(np.random.default_rng(1)))
    shards = numbered_shards(48, 2, whole)
    samples = np.array(shards.samples)
    samples["size"][40] = len(whole) // 2
    cut = shards.__class__(**{**shards.__dict__, "samples": samples})
    verdicts = set()
    for seed in range(6):
        loader = train_loader(
            cut, batch_size=4, seed=seed, device="cpu", basis=plain_basis, on_corrupt="skip"
        )
        labels = [batch.labels for batch in loader.epoch(0)]
        assert 40 not in torch.cat(labels) and len(loader.skipped) == 1
        verdicts.add(loader.skipped[0])
    assert len(verdicts) == 1 and "s40 at offset" in verdicts.pop()


def fail_again_and_again(shards: Path, place: str) -> None:
    """Meet the damage in 12 orders."""
    for seed in range(12):
        loader = train_loader(shards, batch_size=32, seed=seed, device="cpu")
        with pytest.raises(DataError, match=re.escape(place)):
            list(loader.epoch(0)), list(loader.epoch(1))
        loader.close()


def test_a_damaged_header_does_not_end_the_process(copy: Path) -> None:
    """Where a header cannot be read, DALI's decoder used to end the process, now and then."""
    place = overwrite(copy / "train" / "train-000001.tar", lambda data: b"x" * len(data))
    process = multiprocessing.get_context("spawn").Process(target=fail_again_and_again, args=(copy, place))
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize("shuffle", ["global", "blocks"])
def test_a_shard_cut_under_a_running_loader(
    numbered_shards: Make, plain_basis: Eigenbasis, shuffle: str
) -> None:
    """An error that names it, at its batch; no crash."""
    shards = numbered_shards(600, 2)
    (loader,) = loaders(shards, plain_basis, 1, training=True, shuffle=shuffle)
    steps = loader.epoch(0)
    next(steps)
    with Path(shards.tars[1]).open("r+b") as file:
        file.truncate(50_000)
    with pytest.raises(DataError, match=rf"{shards.tars[1]}: .* got a file of 50000 bytes"):
        list(steps)


def test_a_loader_resumes_after_damage(numbered_shards: Make, plain_basis: Eigenbasis) -> None:
    """The error names the image, and the state of a loader that failed is that of the batch before: with the shard
    restored, another one, and it itself, continue from it to the bit."""
    shards = numbered_shards(64, 2)
    tar = Path(shards.tars[1])
    sound = tar.read_bytes()
    place = overwrite(tar, lambda data: bytes([1]) * len(data))
    (loader,) = loaders(shards, plain_basis, 1, training=True)
    for _ in "12":
        with pytest.raises(DataError, match=re.escape(f"{place} cannot be decoded")):
            list(loader.epoch(0))
    state = loader.state_dict()
    tar.write_bytes(sound)
    again, undisturbed = (loaders(shards, plain_basis, 1, training=True)[0] for _ in range(2))
    again.load_state_dict(state)
    expected = collect(undisturbed, range(1))[state["step"] :]
    assert same_batches(collect(again, range(1)), expected)
    assert same_batches(collect(loader, range(1)), expected)


def test_damaged_samples_are_skipped(numbered_shards: Make, plain_basis: Eigenbasis) -> None:
    """With `on_corrupt: skip` a batch holds its other samples, as without damage, first and in order, then padding of
    zeros; each damaged sample is described once. A batch of damage alone is padding alone. In validation, too."""
    shards = numbered_shards(64, 2)
    clean = collect(*loaders(shards, plain_basis, 1, True), range(1))
    lost = [*clean[2][1].tolist(), int(clean[5][1][3])]
    for number in lost:
        tar = Path(shards.tars[number // 32])
        overwrite(tar, lambda data: b"x" * len(data), number % 32)
        val = Path(str(tar).replace("train", "val"))
        overwrite(val, lambda data: b"x" * len(data), number % 32)
    (loader,) = loaders(shards, plain_basis, 1, True, on_corrupt="skip")
    for (images, labels), (expected, numbers) in zip(loader.epoch(0), clean, strict=True):
        kept = [n for n, label in enumerate(numbers.tolist()) if label not in lost]
        assert labels.tolist() == numbers[kept].tolist() + [-1] * (8 - len(kept))
        assert torch.equal(images[: len(kept)], expected[kept]) and not images[len(kept) :].any()
    assert sorted(re.findall(r"\bs(\d+) at", " ".join(loader.skipped))) == sorted(map(str, lost))
    folder = Path(shards.tars[0]).parents[1]
    validation = val_loader(
        open_shards(folder, "val"), batch_size=8, device="cpu", basis=plain_basis, on_corrupt="skip"
    )
    seen = torch.cat([labels for _, labels in validation]).tolist()
    assert sorted(seen) == sorted([-1] * len(lost) + [n for n in range(64) if n not in lost])


@pytest.mark.parametrize(
    ("report", "of_gpu"),
    [
        ("CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory", True),
        ("Error in `fn.decoders.image`,\nencountered:\n\nCUDA_ERROR_NO_DEVICE (100)", True),
        ("Error in readers.webdataset,\nencountered:\n\n/data/CUDA/a.tar: out of memory of it\n", False),
    ],
)
def test_a_gpu_error_is_not_taken_for_damage(report: str, of_gpu: bool) -> None:
    """It is an error of its own; any other, also where a path names CUDA, stays what it is."""
    with pytest.raises(RuntimeError) as error, name_gpu_errors():
        raise RuntimeError(report)
    assert isinstance(error.value, DataError) == of_gpu


@pytest.mark.parametrize("on_corrupt", ["fail", "skip"])
def test_a_gpu_error_in_the_search_for_damage(
    numbered_shards: Make, plain_basis: Eigenbasis, on_corrupt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends the run as what it is: no sample is skipped or blamed."""
    shards = numbered_shards(16, 1)
    overwrite(Path(shards.tars[0]), lambda data: b"x" * len(data), 3)
    (loader,) = loaders(shards, plain_basis, 1, True, on_corrupt=on_corrupt)

    def fail(*_: object) -> None:
        with name_gpu_errors():
            raise RuntimeError("CUDA runtime API error cudaErrorMemoryAllocation (2): out of memory")

    monkeypatch.setattr(loader._prefetcher, "_decode_alone", fail)
    with pytest.raises(DataError, match="failed on the GPU"):
        list(loader)
    assert not loader.skipped
