"""A shard directory that is not whole is refused in one sentence that names the file."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.files import read_json, write_json
from pipeline.shards import ShardSet, open_shards, read_index

Make = Callable[[int, int], ShardSet]


def test_open(numbered_shards: Make) -> None:
    """What the manifest says, in its order."""
    shards = numbered_shards(10, 3)
    assert shards.num_samples == 10 and [Path(tar).name for tar in shards.tars] == [
        f"train-00000{k}.tar" for k in range(3)
    ]
    assert [name.wnid for name in shards.classes] == [f"n{k:08d}" for k in range(10)]


def test_no_manifest(tmp_path: Path) -> None:
    """An empty directory is not a data set."""
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json.*make_shards"):
        open_shards(tmp_path, "train")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda d: (d / "train/train-000001.tar").unlink(), FileNotFoundError, "train-000001.tar is listed"),
        (lambda d: (d / "train/train-000000.idx").unlink(), FileNotFoundError, "train-000000.idx is listed"),
        (
            lambda d: (d / "train/train-000001.tar").write_bytes(b"short"),
            ValueError,
            "train-000001.tar has 5 bytes",
        ),
        (lambda d: (d / "train/manifest.json").write_text("{"), ValueError, "not valid JSON"),
        (lambda d: (d / "train/manifest.json").write_text("[1]"), ValueError, "not a shard manifest"),
        (lambda d: (d / "classes.json").unlink(), FileNotFoundError, "classes.json is missing"),
        (lambda d: (d / "classes.json").write_text("{}"), ValueError, "not a class list"),
        (lambda d: two_classes(d, ("n1", 0), ("n1", 1)), ValueError, "not a class list"),
        (lambda d: two_classes(d, ("n1", 0), ("n2", 7)), ValueError, "not a class list"),
        (
            lambda d: write_json(d / "classes.json", {"classes": [{"index": 0, "wnid": "a", "words": "b"}]}),
            ValueError,
            "lists 1 classes",
        ),
        (lambda d: edit(d, format_version=9), ValueError, "format version 9"),
        (lambda d: edit(d, split="val"), ValueError, "describes the val split"),
        (lambda d: edit(d, num_samples=11), ValueError, "not a shard manifest"),
        (
            lambda d: edit(d, shards=[{"name": "../x.tar", "samples": 10, "bytes": 1}]),
            ValueError,
            "not a shard manifest",
        ),
    ],
)
def test_damage(
    numbered_shards: Make,
    tmp_path: Path,
    damage: Callable[[Path], object],
    error: type[Exception],
    message: str,
) -> None:
    """Each kind of damage has its own sentence."""
    numbered_shards(10, 3)
    damage(tmp_path)
    with pytest.raises(error, match=message):
        open_shards(tmp_path, "train")


def two_classes(directory: Path, *rows: tuple[str, int]) -> None:
    """Write a class list of (wnid, index) rows."""
    classes = [{"index": index, "wnid": wnid, "words": "w"} for wnid, index in rows]
    write_json(directory / "classes.json", {"format_version": 1, "classes": classes})


def edit(directory: Path, **changes: object) -> None:
    """Change fields of the train manifest."""
    path = directory / "train" / "manifest.json"
    write_json(path, {**read_json(path), **changes})


@pytest.mark.parametrize("numbers", ["-512 3", "512 -3", f"512 {2**63}", f"{10**30} 3", "512 x", "512"])
def test_an_index_of_no_places(tmp_path: Path, numbers: str) -> None:
    """Offsets and sizes that no file has are refused with the index."""
    (tmp_path / "x.idx").write_text(f"v1.2 1\njpg {numbers} a.jpg\n")
    with pytest.raises(ValueError, match=r"x\.idx is damaged or not a DALI index"):
        read_index(tmp_path / "x.idx")
