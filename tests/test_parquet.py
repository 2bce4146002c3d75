"""Parquet files are read in their own order, each row group once, and become the shards that any other layout gives."""

from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from pipeline.files import open_locked, read_json
from tests.helpers import files, jpeg, photo, start_python, wait_for, write
from tests.layouts import WNIDS
from tools.make_shards import pack
from tools.packing import parquet


def pack_here(raw: Path, shards: Path, **options: object) -> dict[str, bytes]:
    """Pack in this process; returns tars and indexes."""
    pack(
        raw, shards, **{"samples_per_shard": 7, "workers": 1, "val_fraction": 0.2, "on_bad": "skip"} | options
    )  # type: ignore[arg-type]
    return {name: data for name, data in files(shards).items() if name.endswith((".tar", ".idx"))}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """60 images as parquet files of several row groups, and what the same as class folders become; one is damaged, one
    is odd."""
    place, rng = tmp_path_factory.mktemp("source"), np.random.default_rng(0)
    modes = ["CMYK" if k == 5 else "RGB" for k in range(60)]
    images = {f"{WNIDS[k % 3]}_{k}": jpeg(photo(rng, 90, 120), mode) for k, mode in enumerate(modes)}
    images[f"{WNIDS[1]}_7"] = b"damaged"
    rows = []
    for name, data in images.items():
        wnid = name.split("_")[0]
        write(place / "folders" / wnid / f"{name}.JPEG", data)
        rows.append({"image": {"bytes": data, "path": f"{name}.JPEG"}, "label": WNIDS.index(wnid)})
    (place / "parquet").mkdir()
    for part in range(2):
        path = place / "parquet" / f"train-{part:05d}-of-00002.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[part::2]), path, row_group_size=4)
    expected = pack_here(place / "folders", place / "shards")
    assert len(expected) == 18
    return place / "parquet", expected


def test_killed_while_reading(
    source: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row groups that are packed survive kill -9 and are not read again, but for one that a disk has damaged since. The
    shards are those of the folders, to the byte, notes and skipped images too, and nothing else is left."""
    options = ("--samples-per-shard", "7", "--workers", "1", "--val-fraction", "0.2", "--on-bad", "skip")
    process = start_python("tools/make_shards.py", "pack", source[0], tmp_path / "s", *options)
    wait_for(lambda: len(list((tmp_path / "s").glob("train/spill-*/*.json"))) >= 3, process)
    process.kill()
    process.communicate()
    groups = sorted(path.with_suffix(".tar") for path in (tmp_path / "s").glob("train/spill-*/*.json"))
    with groups[1].open("r+b") as file:
        file.truncate(groups[1].stat().st_size - 5)
    read: list[object] = []
    real = parquet.read_row_group
    monkeypatch.setattr(parquet, "read_row_group", lambda *place: read.append(place) or real(*place))
    monkeypatch.setattr(parquet, "copy_shard", lambda work: pytest.fail("read all row groups first"))
    with pytest.raises(pytest.fail.Exception):
        pack_here(source[0], tmp_path / "s")
    assert len(read) == 16 - len(groups) + 1
    monkeypatch.undo()
    assert pack_here(source[0], tmp_path / "s", workers=2) == source[1]
    manifests = [read_json(tmp_path / "s" / split / "manifest.json") for split in ("train", "val")]
    assert sum(len(each["skipped"]) for each in manifests) == 1
    assert [row["found"] for each in manifests for row in each["repairs"]] == ["CMYK JPEG file"]
    assert not list((tmp_path / "s").rglob("spill-*"))


def test_it_is_one_machines_work(source: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    """Each part would read the whole source; that is refused. So is a second process on the same split."""
    with pytest.raises(ValueError, match="expected one part"):
        pack_here(source[0], tmp_path / "s", part="1/2")
    assert not (tmp_path / "s").exists()
    with pytest.raises(ValueError, match=r"_7\.JPEG"):
        pack_here(source[0], tmp_path / "s", on_bad="fail")
    (spill,) = (tmp_path / "s").glob("train/spill-*")
    with open_locked(spill / "lock", wait=False), pytest.raises(BlockingIOError):
        pack_here(source[0], tmp_path / "s")
