"""Data that is damaged, also under a running loader, is named with its place; sound shards are not blamed."""

import multiprocessing
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from pipeline.diagnose import locate_corrupt_sample
from pipeline.eigenbasis import Eigenbasis
from pipeline.errors import DataError
from pipeline.files import write_bytes
from pipeline.loader import train_loader
from pipeline.reader import data_errors, decoded_batches
from pipeline.settings import DataConfig
from pipeline.shards import open_shards
from tests.helpers import Make, collect, jpeg, loaders, photo, same_batches
from tools.packing.index import index_text, read_index


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
    return f"{name} at offset {offset} of {tar}"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda data: b"x" * len(data), "cannot be decoded"),
        (lambda data: data[: len(data) // 2], "cannot be decoded"),
        (lambda data: b"", "cannot be decoded"),
        (lambda data: jpeg(photo(np.random.default_rng(0), 64, 48), quality=30), "is 48x64, not 256x256"),
    ],
)
def test_a_corrupt_image_is_named(copy: Path, change: Callable[[bytes], bytes], problem: str) -> None:
    """By key, offset and shard."""
    place = overwrite(copy / "train" / "train-000001.tar", change)
    assert locate_corrupt_sample(open_shards(copy, "train")).startswith(f"{place} {problem}")


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


def fail_again_and_again(shards: Path, place: str) -> None:
    """Meet the damage in 30 orders."""
    train = open_shards(shards, "train")
    basis = Eigenbasis.load(shards / "pca.json", train.manifest_sha256)
    for seed in range(30):
        loader = train_loader(
            train, basis, DataConfig(shards, shuffle_buffer=1), batch_size=32, seed=seed, rank=0, num_ranks=1,
            device="cpu",
        )  # fmt: skip
        with pytest.raises(DataError, match=re.escape(place)):
            list(loader.epoch(0))
        loader.close()


def test_a_damaged_header_does_not_end_the_process(copy: Path) -> None:
    """Where a header cannot be read, DALI's decoder used to end the process, now and then."""
    place = overwrite(copy / "train" / "train-000001.tar", lambda data: b"x" * len(data))
    process = multiprocessing.get_context("spawn").Process(target=fail_again_and_again, args=(copy, place))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_damaged_files_are_named(copy: Path) -> None:
    """A shard that is cut or gone, an index of other samples or none; nothing where all is sound."""
    train = open_shards(copy, "train")
    assert locate_corrupt_sample(train) == ""
    tar = Path(train.tars[0])
    index, content = tar.with_suffix(".idx"), tar.read_bytes()
    tar.write_bytes(content[: len(content) // 2])
    assert f"{tar} has {len(content) // 2} bytes, but" in locate_corrupt_sample(train)
    tar.unlink()
    assert locate_corrupt_sample(train) == f"{tar}: No such file or directory"
    tar.write_bytes(content)
    rows = read_index(index)
    write_bytes(index, index_text(rows[:-1]).encode())
    expected = f"{index} lists {len(rows) - 1} samples, the manifest {len(rows)}"
    assert locate_corrupt_sample(train) == expected
    index.write_text("v1.2 x\n")
    assert "damaged or not a DALI index" in locate_corrupt_sample(train)


def test_a_shard_cut_under_a_running_loader(numbered_shards: Make, plain_basis: Eigenbasis) -> None:
    """It raises an error that says what failed, and does not crash."""
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


def test_a_loader_resumes_after_damage(numbered_shards: Make, plain_basis: Eigenbasis) -> None:
    """The error names the image, and the state of a loader that failed is that of the batch before: with the shard
    restored, another one continues from it to the bit."""
    shards = numbered_shards(60, 2)
    tar = Path(shards.tars[1])
    sound = tar.read_bytes()
    place = overwrite(tar, lambda data: bytes([1]) * len(data))
    (loader,) = loaders(shards, plain_basis, 1, training=True)
    with pytest.raises(DataError, match=re.escape(f"{place} cannot be decoded")):
        list(loader.epoch(0))
    state = loader.state_dict()
    tar.write_bytes(sound)
    again, undisturbed = (loaders(shards, plain_basis, 1, training=True)[0] for _ in range(2))
    again.load_state_dict(state)
    assert same_batches(collect(again, range(1)), collect(undisturbed, range(1))[state["step"] :])


def test_an_index_with_fewer_samples_is_refused(numbered_shards: Make, plain_basis: Eigenbasis) -> None:
    """Before the first batch: epochs would not be exact."""
    shards = numbered_shards(60, 2)
    index = Path(shards.tars[1]).with_suffix(".idx")
    write_bytes(index, index_text(read_index(index)[:-5]).encode())
    (loader,) = loaders(shards, plain_basis, 1, training=True)
    for batches in (loader.epoch(0), decoded_batches(shards, 8)):
        with pytest.raises(DataError, match="list 55 samples, its manifest 60"):
            next(iter(batches))


@pytest.mark.parametrize(
    ("report", "blamed"),
    [
        ("CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory", "doctor"),
        ("Error in `fn.decoders.image`,\nencountered:\n\nCUDA_ERROR_NO_DEVICE (100)", "doctor"),
        ("Error in readers.webdataset,\nencountered:\n\n/data/CUDA/a.tar: out of memory of it\n", "verify"),
    ],
)
def test_a_gpu_error_is_not_taken_for_damage(numbered_shards: Make, report: str, blamed: str) -> None:
    """Shards are neither searched nor blamed, but where a path alone names CUDA."""
    shards = numbered_shards(8, 1)
    Path(shards.tars[0]).write_bytes(b"")
    with pytest.raises(DataError, match=blamed) as error, data_errors(shards):
        raise RuntimeError(report)
    text = str(error.value)
    assert ("verify" in text) == ("has 0 bytes" in text) == (blamed == "verify")
