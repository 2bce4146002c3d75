"""Images that a pack takes as they are, leaves out, stops at or dies of."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.files import read_json
from pipeline.shards import open_shards
from tests.helpers import files, jpeg, photo, read_tar, run_ok, run_python, tar_of, write
from tests.layouts import read_shards
from tools import make_shards
from tools.make_shards import pack
from tools.packing.verify import verify


def test_undecodable_images(tmp_path: Path) -> None:
    """One stops the pack with archive, name and key; --on-bad skip leaves it out, lists it, and the counts add up, even
    where nothing is left of a shard; a table that was removed is written again; a split of nothing else is refused."""
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
    verify(shards, workers=1)
    before = files(shards)
    pack(raw, shards, samples_per_shard=1, val_fraction=0, workers=1, on_bad="skip")
    assert files(shards) == before
    (shards / "train" / "samples.npy").unlink()
    pack(raw, shards, samples_per_shard=1, val_fraction=0, workers=1, on_bad="skip")
    assert files(shards) == before
    write(tmp_path / "none" / "n00000011.tar", tar_of(bad))
    with pytest.raises(ValueError, match="train: no image could be decoded"):
        pack(tmp_path / "none", tmp_path / "empty", val_fraction=0, workers=1, on_bad="skip")


def test_an_archive_that_changes_while_it_is_packed(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut short after it was listed: an error that names it; no image of it is skipped as undecodable."""
    for tar in small.glob("*.tar"):
        write(tmp_path / "raw" / tar.name, tar.read_bytes())
    claim, changed = make_shards.claim_output, tmp_path / "raw" / "n00000022.tar"

    def claim_and_cut(*arguments: Any) -> None:
        claim(*arguments)
        changed.write_bytes(changed.read_bytes()[:20000])

    monkeypatch.setattr(make_shards, "claim_output", claim_and_cut)
    with pytest.raises(DataError, match=r"n00000022\.tar: ends inside"):
        pack(tmp_path / "raw", tmp_path / "shards", workers=1, on_bad="skip")
    assert not (tmp_path / "shards" / "train" / "manifest.json").exists()


def test_originals_from_a_slow_source(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every file goes in as it is; of few random reads a second the packer says what they mean in hours."""
    monkeypatch.setattr(make_shards, "measure_random_reads", lambda listing, readers: 0.05)
    pack(small, val_fraction=0, shards=tmp_path / "shards", store="original", samples_per_shard=9, workers=1)
    assert "0 random reads/s, 0.5 hours" in capsys.readouterr().out
    raw = {name: data for path in small.glob("*.tar") for name, data in read_tar(path).items()}
    expected = {name.removesuffix(".JPEG"): data for name, data in raw.items()}
    assert {key: data for key, _, data in read_shards(tmp_path / "shards", "train")} == expected


DEADLY = """
import os, signal, simplejpeg
decode = simplejpeg.decode_jpeg

def deadly(data, *arguments, **named):
    if b"deadly" in data:
        os.kill(os.getpid(), signal.SIGSEGV)
    return decode(data, *arguments, **named)

simplejpeg.decode_jpeg = deadly
"""


def test_deadly_images_are_named(tmp_path: Path) -> None:
    """By pack, adopt and verify, whose workers die of one: exit code 3, and the sentence has its name and the signal,
    but not the images that other workers were at."""
    image = jpeg(photo(np.random.default_rng(0)))
    for k in range(6):
        write(tmp_path / "raw" / "train" / "cat" / f"n{k}.jpg", image + (b"deadly" if k == 4 else b"sound."))
    options = ("--store", "original", "--val-fraction", "0", "--samples-per-shard", "2", "--workers", "2")
    run_ok("tools/make_shards.py", "pack", tmp_path / "raw", tmp_path / "shards", *options)
    write(tmp_path / "site" / "sitecustomize.py", DEADLY.encode())
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    adopted = (tmp_path / "shards" / "train", tmp_path / "adopted", "--split", "train", "--pattern", "*.tar")
    for command in (
        ("pack", tmp_path / "raw", tmp_path / "again", *options),
        ("adopt", *adopted, "--workers", "2"),
        ("verify", tmp_path / "shards", "--workers", "2"),
    ):
        done = run_python("tools/make_shards.py", *command, env=environment)
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 3 and "SIGSEGV" in last, done.stderr
        assert set(re.findall(r"n\d\.jpg", last)) == {"n4.jpg"}
