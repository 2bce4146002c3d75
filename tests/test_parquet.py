"""Parquet files are read in their own order, each row group once, and become the shards that any other layout gives."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from pipeline.files import open_locked, read_json
from tests.helpers import files, jpeg, photo, start_python, wait_for
from tests.layouts import folders, image_set, read_shards
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


def write_rows(path: Path, labels: list[Any], images: list[Any] | None = None, **options: Any) -> None:
    """Write a parquet file of such rows, by default with an image each, named by the file."""
    stem = f"{path.parent.name}_{path.stem}"
    rng = np.random.default_rng(list(stem.encode()))
    images = images or [
        {"bytes": jpeg(photo(rng, 40, 40)), "path": f"{stem}_{k}.jpg"} for k in range(len(labels))
    ]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"image": pyarrow.array(images, kind), "label": labels})
    pyarrow.parquet.write_table(table, path, **options)


@pytest.mark.parametrize(
    ("train", "val", "labels"),
    [
        (["train-00000-of-00002-a1b2", "train-00001-of-00002-c3d4"], ["val-00000-of-00001"], [1, 0, 1]),
        (["train/0000"], ["validation/0000"], [1, 0, 0]),
        (["default/train/0000", "default/train/0001"], ["default/validation/0000"], [0, 1, 0]),
        (["plain_text/train-00000-of-00001"], ["plain_text/valid/0000"], ["n02", "n01", "n02"]),
        ([], ["validation/0000"], ["n02", "n01", "n02"]),
        (["train_224"], ["val_224"], ["zebra", "caf\u00e9", "cat"]),
    ],
)
def test_where_files_are(
    tmp_path: Path, train: list[str], val: list[str], labels: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Shards of the files of a split hold what pyarrow reads from them: every image to the byte, under its class, of
    which names are sorted, however their accents are written. Test images and other tables are ignored and counted."""
    raw, classes = tmp_path / "raw", sorted(set(labels))
    (raw / ".cache").mkdir(parents=True)
    first = (train or val)[0]
    test = first.replace("train", "test").replace("validation", "test")
    for name in [*train, *val, test, Path(first).with_name("metadata")]:
        spelled = {"caf\u00e9": "cafe\u0301"} if name in val else {}
        write_rows(raw / f"{name}.parquet", [spelled.get(label, label) for label in labels], row_group_size=2)
    pack(raw, tmp_path / "s", store="original", workers=1)
    assert "ignored 2 files" in capsys.readouterr().out
    names = [row["wnid"] for row in read_json(tmp_path / "s" / "classes.json")["classes"]]
    assert names == (classes if isinstance(labels[0], str) else ["000000", "000001"])
    for split, parts in (("train", train), ("val", val)):
        tables = [pyarrow.parquet.read_table(raw / f"{part}.parquet", columns=["image"]) for part in parts]
        images = [row["image"] for table in tables for row in table.to_pylist()]
        indexes = [classes.index(label) for label in labels * len(parts)]
        found = {key: (label, data) for key, label, data in read_shards(tmp_path / "s", split)}
        expected = zip(images, indexes, strict=True)
        assert found == {Path(image["path"]).stem: (index, image["bytes"]) for image, index in expected}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"train/0000": [0], "train/0002": [0]}, "part 1 of train"),
        ({"train/0001": [0]}, "part 0 of train"),
        ({"train/0000": [0], "data/train-00000-of-00001": [0]}, "expected one push, got also .*/train/0000"),
        ({"default/partial-train/0000": [0]}, "rename this one train"),
        ({"train": ["a", "b"], "val": ["b", "c"]}, "expected training images of c, got none"),
        ({"train": ["a", None]}, "row 1 of .*train.*: expected a class name, got None"),
        ({"train": [0, 1], "val": ["a"]}, "row 0 of .*train.*: expected a class name, got 0"),
        ({"train": [0, None]}, "row 1 of .*train.*: expected a class index, got None"),
    ],
)
def test_files_and_labels_refused(tmp_path: Path, rows: dict[str, list[Any]], message: str) -> None:
    """Parts that are missing, of two pushes or of a part of the data; labels of no training class, or of two kinds."""
    for name, labels in rows.items():
        write_rows(tmp_path / "raw" / f"{name}.parquet", labels)
    with pytest.raises(ValueError, match=message):
        pack(tmp_path / "raw", tmp_path / "s", workers=1)
    assert not (tmp_path / "s").exists()


def test_rows_without_bytes(tmp_path: Path) -> None:
    """A row of a path alone, or of null, is named with what it holds, or listed so where bad images are skipped. A file
    of such rows alone is refused before anything is written."""
    good = [{"bytes": jpeg(photo(np.random.default_rng(k), 40, 40)), "path": f"{k}.jpg"} for k in range(3)]
    bad = [{"bytes": None, "path": "a/x.jpg"}, None, {"bytes": None, "path": None}]
    path = tmp_path / "raw" / "train.parquet"
    write_rows(path, [0] * 6, [*good, *bad])
    with pytest.raises(ValueError, match=r"row 3 of .*: expected image bytes, got only a path \(a/x\.jpg\)"):
        pack(tmp_path / "raw", tmp_path / "s", workers=1, val_fraction=0)
    pack(tmp_path / "raw", tmp_path / "s", workers=1, val_fraction=0, on_bad="skip")
    skipped = read_json(tmp_path / "s" / "train" / "manifest.json")["skipped"]
    found = {row["key"]: row["reason"].removeprefix("expected image bytes, got ") for row in skipped}
    assert found == {"x": "only a path (a/x.jpg)", "train_4": "null", "train_5": "null"}
    assert sorted(key for key, *_ in read_shards(tmp_path / "s", "train")) == ["0", "1", "2"]
    write_rows(path, [0] * 3, bad, row_group_size=1)
    with pytest.raises(ValueError, match=r"row 0 of .*only a path"):
        pack(tmp_path / "raw", tmp_path / "t", workers=1, on_bad="skip")
    assert not (tmp_path / "t").exists()
