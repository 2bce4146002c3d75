"""Parquet files are read in their own order, each row group once, and become the shards that any other layout gives."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.files import open_locked, read_json
from tests.helpers import files, start_python, wait_for
from tests.layouts import folders, image_set
from tests.layouts import parquet as write_parquet
from tools.make_shards import pack
from tools.packing import parquet


def pack_here(raw: Path, shards: Path, **options: object) -> tuple[dict[str, bytes], list[Any]]:
    """Pack in this process; returns tars and indexes, and notes and skipped images of both splits."""
    pack(raw, shards, **{"samples_per_shard": 7, "workers": 1, "on_bad": "skip"} | options)  # type: ignore[arg-type]
    manifests = [read_json(shards / split / "manifest.json") for split in ("train", "val")]
    notes = [[row["key"] for row in each[name]] for each in manifests for name in ("repairs", "skipped")]
    return {name: data for name, data in files(shards).items() if name.endswith((".tar", ".idx"))}, notes


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images as class folders and as parquet files of several row groups, 14 for training; one is damaged."""
    place, images = tmp_path_factory.mktemp("place"), image_set(72)
    split, wnid, _ = images["n00000022_22"]
    images["n00000022_22"] = (split, wnid, b"damaged")
    folders(place / "folders", images)
    write_parquet(place / "parquet", images)
    return place


def test_killed_while_reading(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row groups that are packed survive kill -9 and are not read again, but for one that a disk has damaged since. The
    shards are those of the folders, to the byte, notes and skipped images too, and nothing else is left."""
    raw, shards = place / "parquet", tmp_path / "s"
    options = ("--samples-per-shard", "7", "--workers", "1", "--on-bad", "skip")
    process = start_python("tools/make_shards.py", "pack", raw, shards, *options)
    wait_for(lambda: len(list(shards.glob("train/spill-*/*.json"))) >= 3, process)
    process.kill()
    process.communicate()
    groups = sorted(path.with_suffix(".tar") for path in shards.glob("train/spill-*/*.json"))
    with groups[1].open("r+b") as file:
        file.truncate(groups[1].stat().st_size - 5)
    read: list[object] = []
    real = parquet.read_row_group
    monkeypatch.setattr(parquet, "read_row_group", lambda *place: read.append(place) or real(*place))
    monkeypatch.setattr(parquet, "copy_shard", lambda work: pytest.fail("read all row groups first"))
    with pytest.raises(pytest.fail.Exception):
        pack_here(raw, shards)
    assert len(read) == 14 - len(groups) + 1
    monkeypatch.undo()
    expected = pack_here(place / "folders", tmp_path / "folders")
    assert len(expected[0]) == 22 and expected[1][1] == ["n00000022_22"] and len(expected[1][0]) > 2
    assert pack_here(raw, shards, workers=2) == expected
    assert not list(shards.rglob("spill-*"))


def test_it_is_one_machines_work(place: Path, tmp_path: Path) -> None:
    """Each part would read the whole source; that is refused. So is a second process on the same split."""
    raw, shards = place / "parquet", tmp_path / "s"
    with pytest.raises(ValueError, match="expected one part"):
        pack_here(raw, shards, part="1/2")
    assert not shards.exists()
    with pytest.raises(ValueError, match=r"_22\.JPEG"):
        pack_here(raw, shards, on_bad="fail")
    (spill,) = shards.glob("train/spill-*")
    with open_locked(spill / "lock", wait=False), pytest.raises(BlockingIOError):
        pack_here(raw, shards)
