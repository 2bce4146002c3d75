"""A shard directory that is not whole is refused in one sentence that names the file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.files import read_json, sha256, write_json
from pipeline.shards import SAMPLE, open_shards
from tests.helpers import Make
from tools.packing.index import read_index


def edit(path: str, **changes: Any) -> Callable[[Path], None]:
    """Change fields of a JSON file."""
    return lambda shards: write_json(shards / path, {**read_json(shards / path), **changes})


def list_classes(*rows: tuple[str, int]) -> Callable[[Path], None]:
    """Replace the class list by (wnid, index) rows."""
    return edit("classes.json", classes=[{"index": n, "wnid": wnid, "words": "w"} for wnid, n in rows])


def list_shard(name: str) -> Callable[[Path], None]:
    """List one shard of this name."""
    return edit("train/manifest.json", shards=[{"name": name, "samples": 10, "bytes": 1}])


def save_samples(samples: np.ndarray) -> Callable[[Path], None]:
    """Replace the table of samples by another array, under a checksum that fits."""

    def change(shards: Path) -> None:
        np.save(shards / "train/samples.npy", samples)
        edit("train/manifest.json", samples_sha256=sha256((shards / "train/samples.npy").read_bytes()))(
            shards
        )

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "train/manifest.json").unlink(), r"no manifest\.json.*make_shards"),
        (lambda d: (d / "train/train-000001.tar").unlink(), "train-000001.tar is listed"),
        (
            lambda d: (d / "train/samples.npy").unlink(),
            r"samples\.npy: not found; run .*make_shards\.py index",
        ),
        (lambda d: (d / "train/samples.npy").write_bytes(b"x"), r"samples\.npy: expected the SHA-256 of"),
        (edit("train/manifest.json", samples_sha256=None), "expected samples_sha256, got none; run"),
        (edit("train/manifest.json", samples_sha256=[1]), "expected the SHA-256 of"),
        (save_samples(np.zeros(10)), r"expected shape \(10,\) of 20 .*, got \(10,\) of 8; run"),
        (save_samples(np.zeros(9, SAMPLE)), r"expected shape \(10,\) of 20 .*, got \(9,\) of 20; run"),
        (lambda d: (d / "train/train-000001.tar").write_bytes(b"short"), "train-000001.tar has 5 bytes"),
        (lambda d: (d / "train/manifest.json").write_text("{"), "not valid JSON"),
        (lambda d: (d / "train/manifest.json").write_text("[1]"), "not a shard manifest"),
        (edit("train/manifest.json", format_version=9), "format version 9"),
        (edit("train/manifest.json", split="val"), "describes the val split"),
        (edit("train/manifest.json", num_samples=11), "not a shard manifest"),
        *((list_shard(name), "not a shard manifest") for name in ("../x.tar", "/etc/x.tar", "x.tar\n", "")),
        (lambda d: (d / "classes.json").unlink(), "classes.json is missing"),
        (list_classes(("n1", 0), ("n1", 1)), "not a class list"),
        (list_classes(("n1", 0), ("n2", 7)), "not a class list"),
        (list_classes(("n1", 0)), "lists 1 classes"),
    ],
)
def test_damage(numbered_shards: Make, tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    """Each kind of damage has its own sentence; a shard out of its folder is refused before anything is opened."""
    shards = numbered_shards(10, 3)
    assert shards.num_samples == 10 and [name.wnid for name in shards.classes][3] == "n00000003"
    assert [Path(tar).name for tar in shards.tars] == [f"train-00000{k}.tar" for k in range(3)]
    damage(tmp_path)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        open_shards(tmp_path, "train")


@pytest.mark.parametrize("numbers", ["-512 3", f"512 {2**63}", "512 x", "512"])
def test_an_index_of_no_places(tmp_path: Path, numbers: str) -> None:
    """Offsets and sizes that no file has are refused with the index."""
    (tmp_path / "x.idx").write_text(f"v1.2 1\njpg {numbers} a.jpg\n")
    with pytest.raises(ValueError, match=r"x\.idx is damaged or not a DALI index"):
        read_index(tmp_path / "x.idx")
