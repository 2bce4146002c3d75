"""The table's numbers are those of an independent count with the webdataset library and Pillow."""

import io
import re
from collections import Counter
from pathlib import Path
from statistics import mean, median

import pytest
import webdataset
from PIL import Image

from pipeline.errors import DataError
from pipeline.files import read_json
from tests.helpers import run_here, write_foreign
from tools.packing.adopt import adopt
from tools.packing.verify import stats


def tables(text: str) -> list[dict[str, str]]:
    """One {name: value} per split from what `stats` prints."""
    parts: list[dict[str, str]] = []
    for line in text.splitlines():
        if line.startswith("  "):
            name, _, value = line.strip().partition("  ")
            parts[-1][name] = value.strip()
        else:
            parts.append({"": line})
    return parts


def spread(values: list[int]) -> str:
    """As the table has it."""
    return f"min {min(values):,}, median {median(values):,.0f}, mean {mean(values):,.0f}, max {max(values):,}"


def test_numbers(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every number of the packed demo."""
    stats(shards)
    text = capsys.readouterr().out
    for split, table in zip(("train", "val"), tables(text), strict=True):
        tars = sorted((shards / split).glob("*.tar"))
        samples = list(webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False))
        per_class = list(Counter(int(sample["cls"]) for sample in samples).values())
        manifest = read_json(shards / split / "manifest.json")
        assert table[""] == str(shards / split)
        assert table["samples"] == f"{len(samples):,}" and table["classes"] == "10, 0 without an image"
        assert table["images per class"] == spread(per_class)
        assert table["shards"] == str(len(tars))
        assert table["samples per shard"] == spread([row["samples"] for row in manifest["shards"]])
        assert table["bytes"] == f"{sum(tar.stat().st_size for tar in tars):,}"
        assert table["bytes per shard"] == spread([tar.stat().st_size for tar in tars])
        assert table["bytes per image"] == spread([len(sample["jpg"]) for sample in samples])
        assert {Image.open(io.BytesIO(sample["jpg"])).size for sample in samples} == {(256, 256)}
        assert table["height"] == spread([256]) and table["width"].startswith(spread([256]))
        assert table["repaired or noted"] == str(len(manifest["repairs"])) and table["skipped"] == "0"
        cmyk = sum("CMYK JPEG file" in row["found"] for row in manifest["repairs"])
        assert cmyk > 0 and re.search(rf"^    {cmyk} +CMYK JPEG file$", text, re.MULTILINE)
        assert "store crop256" in table["options"] and "seed 2012" in table["options"]


def test_adopted_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A manifest without versions, seed and plan; a class without an image is counted."""
    write_foreign(tmp_path / "src", "x", [0, 0, 2, 2, 2, 2], 4, newline=b"\n")
    adopt(tmp_path / "src", tmp_path / "shards", split="val", pattern="x-*.tar", workers=1)
    capsys.readouterr()
    stats(tmp_path / "shards")
    (table,) = tables(capsys.readouterr().out)
    assert table["classes"] == "3, 1 without an image" and table["images per class"] == spread([2, 0, 4])
    assert table["options"] == "store adopted" and table["versions"] == "unknown"
    assert table["source"] == f"adopted from {tmp_path / 'src'} with x-*.tar"


def test_damage_is_told(tmp_path: Path) -> None:
    """A label that is none is an error that leads to verify, exit code 3; a foreign folder is exit code 2."""
    write_foreign(tmp_path / "src", "x", [0, 1], 4)
    adopt(tmp_path / "src", tmp_path / "shards", split="val", pattern="x-*.tar", workers=1)
    tar = tmp_path / "src" / "x-0000.tar"
    content = tar.read_bytes()
    tar.write_bytes(content.replace(b"1" + bytes(511), b"?" + bytes(511)))
    with pytest.raises(DataError, match=r"run make_shards\.py verify"):
        stats(tmp_path / "shards")
    for folder, code in ((tmp_path / "shards", 3), (tmp_path / "src", 2)):
        done = run_here("tools/make_shards.py", "stats", folder)
        assert done.returncode == code and len(done.stderr.splitlines()) == 1, done.stderr
