"""Samples are read whole and exactly; a shard that is cut or gone is an error that names it."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline import reader as reader_module
from pipeline.errors import DataError
from pipeline.reader import SampleReader
from pipeline.shards import open_shards
from tests.helpers import read_tar


@pytest.mark.parametrize("system_calls", [True, False])
def test_samples_are_those_of_tarfile(few: Path, system_calls: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any rows in any order, some twice, in more than one system call, by `io_submit` or without it; memory that was
    released is used again, that of a larger batch included."""
    if not system_calls:
        monkeypatch.setattr(reader_module, "SYSCALLS", None)
    shards = open_shards(few, "train")
    images = [
        data for tar in shards.tars for name, data in read_tar(Path(tar)).items() if name.endswith(".jpg")
    ]
    reader, rng, contexts = SampleReader(shards, random=True), np.random.default_rng(0), 0
    for count in (1, 300, 7, 128, 0):
        rows = rng.integers(0, len(images), count)
        encoded = reader.read(rows)
        assert [image.tobytes() for image in encoded.images] == [images[row] for row in rows]
        reader.release(encoded)
        contexts += len(reader._contexts)
    if reader._take_context():  # 0 where the machine, or this test, forbids it
        assert system_calls and contexts
    assert SampleReader.open_files >= len(shards.tars)
    reader.close()


@pytest.mark.parametrize("system_calls", [True, False])
def test_a_damaged_shard_is_named(
    few: Path, tmp_path: Path, system_calls: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut under a running reader, or gone."""
    if not system_calls:
        monkeypatch.setattr(reader_module, "SYSCALLS", None)
    shutil.copytree(few, tmp_path / "shards")
    shards = open_shards(tmp_path / "shards", "train")
    reader, last = SampleReader(shards, random=True), len(shards.samples) - 1
    reader.read(np.array([0, last]))
    os.truncate(shards.tars[-1], 5000)
    with pytest.raises(DataError, match=rf"{shards.tars[-1]}: .* got a file of 5000 bytes"):
        reader.read(np.array([0, last]))
    reader.close()
    Path(shards.tars[0]).unlink()
    with pytest.raises(DataError, match=rf"{shards.tars[0]}: No such file"):
        SampleReader(shards, random=True).read(np.array([0]))


@pytest.mark.slow
def test_a_cold_disk_reads_little_more_than_is_asked(tmp_path: Path, shards: Path) -> None:
    """At most 1.25 times the bytes of random samples, none of whose pages is in memory."""
    shutil.copytree(shards, tmp_path / "shards")
    train = open_shards(tmp_path / "shards", "train")
    for tar in train.tars:
        file = os.open(tar, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)

    def read_bytes() -> int:
        (line,) = (
            row for row in Path("/proc/self/io").read_text().splitlines() if row.startswith("read_bytes")
        )
        return int(line.split()[1])

    rows = np.random.default_rng(0).permutation(len(train.samples))[:300]
    reader, before = SampleReader(train, random=True), read_bytes()
    reader.read(rows)
    pages = {
        (int(row["shard"]), page)
        for row in train.samples[rows]
        for page in range(int(row["offset"]) // 4096, int(row["offset"] + row["size"] - 1) // 4096 + 1)
    }
    device = read_bytes() - before
    if not device:
        pytest.skip("this file system has no device")
    assert device <= 1.25 * 4096 * len(pages)
