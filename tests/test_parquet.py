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

PACK = {"samples_per_shard": 7, "workers": 1, "val_fraction": 0.2}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same 60 images as class folders and as parquet files of several row groups; one is damaged, one is odd."""
    place, rng = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    images = {
        f"{WNIDS[k % 3]}_{k}": jpeg(photo(rng, 90, 120), "CMYK" if k == 5 else "RGB") for k in range(60)
    }
    images[f"{WNIDS[1]}_7"] = b"damaged"
    for name, data in images.items():
        write(place / "folders" / name.split("_")[0] / f"{name}.JPEG", data)
    rows = [
        {"image": {"bytes": data, "path": f"{name}.JPEG"}, "label": WNIDS.index(name.split("_")[0])}
        for name, data in images.items()
    ]
    (place / "parquet").mkdir()
    for part in range(2):
        path = place / "parquet" / f"train-{part:05d}-of-00002.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[part::2]), path, row_group_size=4)
    return place / "folders", place / "parquet"


def contents(shards: Path) -> dict[str, bytes]:
    """Tars and indexes."""
    return {name: data for name, data in files(shards).items() if name.endswith((".tar", ".idx"))}


@pytest.fixture(scope="module")
def by_folders(sources: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the folders become."""
    shards = tmp_path_factory.mktemp("folders") / "shards"
    pack(sources[0], shards, on_bad="skip", **PACK)  # type: ignore[arg-type]
    assert len(contents(shards)) == 18
    return contents(shards)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_shards(
    sources: tuple[Path, Path], by_folders: dict[str, bytes], tmp_path: Path, workers: int
) -> None:
    """To the byte, notes and skipped images too; nothing is left of what was packed by row groups."""
    pack(sources[1], tmp_path / "s", on_bad="skip", **PACK | {"workers": workers})  # type: ignore[arg-type]
    assert contents(tmp_path / "s") == by_folders
    manifests = [read_json(tmp_path / "s" / split / "manifest.json") for split in ("train", "val")]
    assert sum(len(each["skipped"]) for each in manifests) == 1
    assert [row["found"] for each in manifests for row in each["repairs"]] == ["CMYK JPEG file"]
    assert not list((tmp_path / "s").rglob("spill-*"))


def test_killed_while_reading(
    sources: tuple[Path, Path], by_folders: dict[str, bytes], tmp_path: Path
) -> None:
    """Row groups that are packed survive kill -9; one that a disk has damaged since is packed again."""
    options = ("--samples-per-shard", "7", "--workers", "1", "--val-fraction", "0.2", "--on-bad", "skip")
    process = start_python("tools/make_shards.py", "pack", sources[1], tmp_path / "s", *options)
    wait_for(lambda: len(list((tmp_path / "s").glob("train/spill-*/*.json"))) >= 3, process)
    process.kill()
    process.communicate()
    groups = sorted((tmp_path / "s").glob("train/spill-*/*.tar"))
    with groups[1].open("r+b") as file:
        file.truncate(groups[1].stat().st_size - 5)
    pack(sources[1], tmp_path / "s", on_bad="skip", **PACK)  # type: ignore[arg-type]
    assert contents(tmp_path / "s") == by_folders


def test_finished_row_groups_are_not_read_again(
    sources: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor those of which a split has no image."""
    read: list[int] = []
    real = parquet.read_row_group
    monkeypatch.setattr(parquet, "read_row_group", lambda path, row: read.append(row) or real(path, row))

    def stop(work: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(parquet, "copy_shard", stop)
        pack(sources[1], tmp_path / "s", on_bad="skip", **PACK | {"val_fraction": 0})  # type: ignore[arg-type]
    assert len(read) == 16
    pack(sources[1], tmp_path / "s", on_bad="skip", **PACK | {"val_fraction": 0})  # type: ignore[arg-type]
    assert len(read) == 16


def test_it_is_one_machines_work(sources: tuple[Path, Path], tmp_path: Path) -> None:
    """Each part would read the whole source; that is refused. So is a second process on the same split."""
    with pytest.raises(ValueError, match="expected one part"):
        pack(sources[1], tmp_path / "s", part="1/2", **PACK)  # type: ignore[arg-type]
    assert not (tmp_path / "s").exists()
    with pytest.raises(ValueError, match=r"_7\.JPEG"):  # stops at the damaged image
        pack(sources[1], tmp_path / "s", **PACK)  # type: ignore[arg-type]
    (spill,) = (tmp_path / "s").glob("train/spill-*")
    with open_locked(spill / "lock", wait=False), pytest.raises(BlockingIOError):
        pack(sources[1], tmp_path / "s", on_bad="skip", **PACK)  # type: ignore[arg-type]
