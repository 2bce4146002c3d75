"""Data that is damaged, also under a running loader, is named with its place; sound shards are not blamed."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch

from pipeline.diagnose import locate_corrupt_sample
from pipeline.eigenbasis import Eigenbasis
from pipeline.errors import DataError
from pipeline.reader import data_errors, decoded_batches
from pipeline.shards import open_shards, read_index
from tests.helpers import Make, collect, jpeg, loaders, photo, run_python


@pytest.fixture
def copy(few: Path, tmp_path: Path) -> Path:
    """Shards to be damaged."""
    shutil.copytree(few, tmp_path / "shards")
    return tmp_path / "shards"


def overwrite(tar: Path, change: Callable[[bytes], bytes]) -> str:
    """Change the image of the 12th sample, to as many bytes at most; what names it."""
    _, offset, size, name = read_index(tar.with_suffix(".idx"))[11][0]
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
        (lambda data: data[:100], "cannot be decoded"),
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
    for number, stray in ((2, b"JFIF\0\0\0"), (5, None)):
        _, offset, size, _ = read_index(tar.with_suffix(".idx"))[number][0]
        content = tar.read_bytes()
        image = content[offset : offset + size]
        if stray:  # JFIF revision 0.0
            image = image.replace(b"JFIF\0\1\1", stray)
            with pytest.raises(ValueError, match="JFIF"):
                simplejpeg.decode_jpeg(image)
        else:
            image = image[:-40] + bytes(40)
        tar.write_bytes(content[:offset] + image + content[offset + size :])
    warned, place = (read_index(tar.with_suffix(".idx"))[number][0][3] for number in (2, 5))
    with pytest.raises(DataError) as raised:
        list(decoded_batches(open_shards(copy, "train"), 32))
    assert f"{place} at offset" in str(raised.value) and warned not in str(raised.value)


AGAIN_AND_AGAIN = """
import sys
from pathlib import Path
from pipeline.eigenbasis import Eigenbasis
from pipeline.loader import train_loader
from pipeline.settings import DataConfig
from pipeline.errors import DataError
from pipeline.shards import open_shards
folder = Path(sys.argv[1])
train = open_shards(folder, "train")
basis = Eigenbasis.load(folder / "pca.json", train.manifest_sha256)
config = DataConfig(folder, shuffle_buffer=1)
for seed in range(30):
    loader = train_loader(train, basis, config, batch_size=32, seed=seed, rank=0, num_ranks=1, device="cpu")
    try:
        list(loader.epoch(0))
    except DataError as error:
        assert sys.argv[2] in str(error), error
    else:
        sys.exit("no error")
    loader.close()
"""


def test_a_damaged_header_does_not_end_the_process(copy: Path) -> None:
    """Where a header cannot be read, DALI's decoder used to end the process, now and then."""
    place = overwrite(copy / "train" / "train-000001.tar", lambda data: b"x" * len(data))
    done = run_python("-c", AGAIN_AND_AGAIN, copy, place)
    assert done.returncode == 0, (done.returncode, done.stderr)


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
    lines = index.read_text().splitlines()
    index.write_text("\n".join([f"v1.2 {len(lines) - 2}", *lines[1:-1]]) + "\n")
    assert (
        locate_corrupt_sample(train)
        == f"{index} lists {len(lines) - 2} samples, the manifest {len(lines) - 1}"
    )
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
    restored, another one continues from it to the bit. A shard that is gone is named, too."""
    shards = numbered_shards(60, 2)
    tar = Path(shards.tars[1])
    sound = tar.read_bytes()
    [(_, offset, size, name), _] = read_index(Path(shards.indexes[1]))[7]
    tar.write_bytes(sound[:offset] + bytes([1]) * size + sound[offset + size :])
    (loader,) = loaders(shards, plain_basis, 1, training=True)
    with pytest.raises(DataError, match=re.escape(f"{name} at offset {offset} of {tar} cannot be decoded")):
        list(loader.epoch(0))
    state = loader.state_dict()
    tar.write_bytes(sound)
    again, undisturbed = (loaders(shards, plain_basis, 1, training=True)[0] for _ in range(2))
    again.load_state_dict(state)
    got, expected = collect(again, range(1)), collect(undisturbed, range(1))[state["step"] :]
    assert all(torch.equal(a, x) and torch.equal(b, y) for (a, b), (x, y) in zip(got, expected, strict=True))
    tar.unlink()
    (loader,) = loaders(shards, plain_basis, 1, training=True)
    with pytest.raises(DataError, match=re.escape(f"{tar}: No such file")):
        list(loader.epoch(0))


def test_an_index_with_fewer_samples_is_refused(numbered_shards: Make, plain_basis: Eigenbasis) -> None:
    """Before the first batch: epochs would not be exact."""
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
def test_a_gpu_error_is_not_taken_for_damage(numbered_shards: Make, report: str, cause: str) -> None:
    """Shards are not searched and not blamed; DALI's own words are in the sentence."""
    with pytest.raises(DataError, match="CUDA") as error, data_errors(numbered_shards(8, 1)):
        raise RuntimeError(report.format(cause))
    assert "doctor" in str(error.value) and "verify" not in str(error.value)


def test_a_path_that_names_cuda_is_not_a_gpu_error(numbered_shards: Make) -> None:
    """Nor is any other text of a report: shards are searched as ever."""
    shards = numbered_shards(8, 1)
    Path(shards.tars[0]).write_bytes(b"")
    with pytest.raises(DataError, match="verify"), data_errors(shards):
        raise RuntimeError(
            "Error in readers.webdataset,\nencountered:\n\n/data/CUDA/a.tar: out of memory of it\n"
        )
