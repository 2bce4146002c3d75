"""Images that a pack takes as they are, leaves out or stops at, and what it prints before it begins."""

import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.files import read_json
from pipeline.shards import open_shards
from tests.helpers import files, jpeg, photo, run_python, tar_of, write
from tests.layouts import read_shards
from tools import make_shards
from tools.make_shards import pack


def test_undecodable_images(tmp_path: Path) -> None:
    """One stops the pack with archive, name and key; --on-bad skip leaves it out, lists it, and the counts add up, even
    where nothing is left of a shard; a split of nothing else is refused."""
    raw, shards = tmp_path / "raw", tmp_path / "shards"
    rng = np.random.default_rng(0)
    good = {f"n00000011_{n}.JPEG": jpeg(photo(rng, 100, 120)) for n in range(6)}
    bad = {"n00000011_bad.JPEG": b"no image", "n00000011_0b.JPEG": b""}
    write(raw / "n00000011.tar", tar_of({**good, **bad}))
    where = r"_(bad|0b)\.JPEG in .*n00000011\.tar \(key n00000011_(bad|0b)\): not decod"
    with pytest.raises(ValueError, match=where):
        pack(raw, shards, samples_per_shard=1, val_fraction=0, workers=1)
    assert not list(shards.rglob("*.tmp")) and not (shards / "train" / "manifest.json").exists()
    pack(raw, shards, samples_per_shard=1, val_fraction=0, workers=1, on_bad="skip")
    manifest = read_json(shards / "train" / "manifest.json")
    assert manifest["num_samples"] == 6 == len(manifest["shards"]) == len(list(shards.rglob("*.tar")))
    assert sorted(row["key"] for row in manifest["skipped"]) == ["n00000011_0b", "n00000011_bad"]
    assert all("not decodable" in row["reason"] for row in manifest["skipped"])
    assert open_shards(shards, "train").num_samples == 6
    before = files(shards)
    pack(raw, shards, samples_per_shard=1, val_fraction=0, workers=1, on_bad="skip")
    assert files(shards) == before
    write(tmp_path / "none" / "n00000011.tar", tar_of(bad))
    with pytest.raises(ValueError, match="train: no image could be decoded"):
        pack(tmp_path / "none", tmp_path / "empty", val_fraction=0, workers=1, on_bad="skip")


CHANGING = """
import sys
from pathlib import Path
import tools.make_shards as make_shards
from train.cli import run_main
raw, shards = map(Path, sys.argv[1:])
real = make_shards.claim_output
def claim(*arguments):
    real(*arguments)
    (raw / "n00000022.tar").write_bytes((raw / "n00000022.tar").read_bytes()[:20000])
make_shards.claim_output = claim
if __name__ == "__main__":
    run_main(lambda: make_shards.pack(raw, shards, workers=1, on_bad="skip"))
"""


def test_an_archive_that_changes_while_it_is_packed(small: Path, tmp_path: Path) -> None:
    """Cut short after it was listed: exit code 3, one sentence; no image of it is skipped as undecodable."""
    for tar in small.glob("*.tar"):
        write(tmp_path / "raw" / tar.name, tar.read_bytes())
    done = run_python("-c", CHANGING, tmp_path / "raw", tmp_path / "shards")
    assert done.returncode == 3 and "n00000022.tar: ends inside" in done.stderr
    assert not (tmp_path / "shards" / "train" / "manifest.json").exists()


def test_originals_from_a_slow_source(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every file goes in as it is; of few random reads a second the packer says what they mean in hours."""
    monkeypatch.setattr(make_shards, "measure_random_reads", lambda listing, readers: 0.05)
    pack(small, val_fraction=0, shards=tmp_path / "shards", store="original", samples_per_shard=9, workers=1)
    assert "0 random reads/s, 0.5 hours" in capsys.readouterr().out
    expected = {}
    for path in small.glob("*.tar"):
        with tarfile.open(path) as tar:
            expected |= {m.name.removesuffix(".JPEG"): tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    assert {key: data for key, _, data in read_shards(tmp_path / "shards", "train")} == expected
