"""Packing: every raw image once, with its right label, in an order and with bytes that depend on input, options and
seed alone."""

import io
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat

from pipeline.files import read_json
from tests.helpers import files, read_tar, refuses, run_ok, tar_of
from tests.layouts import expected_square, read_shards

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"


def raw_images(raw: Path) -> dict[str, tuple[bytes, str]]:
    """Read the raw archives with tarfile alone: stem -> (file, wnid), the validation labels through meta.mat."""
    found = {}
    for tar, content in read_tar(raw / TRAIN).items():
        for name, data in read_tar(content).items():
            found[Path(name).stem] = data, Path(tar).stem
    devkit, folder = read_tar(raw / DEVKIT), "ILSVRC2012_devkit_t12/data"
    synsets = loadmat(io.BytesIO(devkit[f"{folder}/meta.mat"]), squeeze_me=True)["synsets"]
    wnid = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    labels = devkit[f"{folder}/ILSVRC2012_validation_ground_truth.txt"].split()
    for (name, data), label in zip(sorted(read_tar(raw / VAL).items()), labels, strict=True):
        found[Path(name).stem] = data, wnid[int(label)]
    return found


def test_every_image_once_with_its_label(raw: Path, shards: Path) -> None:
    """The webdataset library reads each raw image exactly once; labels index the sorted wnids; pixels are those of
    the raw file, of every fourth."""
    expected, packed = raw_images(raw), read_shards(shards, "train") + read_shards(shards, "val")
    wnids = sorted({wnid for _, wnid in expected.values()})
    assert Counter(key for key, _, _ in packed) == Counter(expected.keys())
    assert [row["wnid"] for row in read_json(shards / "classes.json")["classes"]] == wnids
    assert all(wnids[label] == expected[key][1] for key, label, _ in packed)
    for key, _, data in packed[::4]:
        pixels = np.asarray(Image.open(io.BytesIO(data))).astype(int)
        assert np.abs(pixels - expected_square(expected[key][0])).mean() < 2.5


def test_manifest_and_index(shards: Path, tmp_path: Path) -> None:
    """The manifest's counts, sizes and notes are true; indexes are those that DALI's own wds2idx writes."""
    for split in ("train", "val"):
        manifest = read_json(shards / split / "manifest.json")
        sizes = [shard["samples"] for shard in manifest["shards"]]
        assert sum(sizes) == manifest["num_samples"] and max(sizes) - min(sizes) <= 1
        tars = sorted((shards / split).glob("*.tar"))
        assert [path.name for path in tars] == [shard["name"] for shard in manifest["shards"]]
        assert [path.stat().st_size for path in tars] == [shard["bytes"] for shard in manifest["shards"]]
        assert not list((shards / split).glob("*-*.json")) and not list((shards / split).glob("*.tmp"))
        wds2idx = Path(sys.executable).with_name("wds2idx")
        subprocess.run([wds2idx, tars[0], tmp_path / "idx"], check=True, capture_output=True)
        assert (tmp_path / "idx").read_text() == tars[0].with_suffix(".idx").read_text()
    found = Counter(row["found"] for row in read_json(shards / "train" / "manifest.json")["repairs"])
    assert found["RGB PNG file"] == 1 and found["CMYK JPEG file"] > 10 and found["grey JPEG"] > 10


def test_bytes_do_not_depend_on_workers_or_restarts(raw: Path, shards: Path, tmp_path: Path) -> None:
    """One worker writes what two wrote; a finished pack has nothing to do, one that lost some shards writes just those
    again, and another seed is refused."""
    command = ("tools/make_shards.py", "pack", raw, tmp_path / "again", "--samples-per-shard", "180")
    expected = {name: data for name, data in files(shards).items() if name != "pca.json"}
    assert len(expected) == 26
    run_ok(*command, "--workers", "1")
    assert files(tmp_path / "again") == expected
    assert "nothing to do" in run_ok(*command)
    assert "got 1; give --seed 2012" in refuses(*command, "--seed", "1")
    (tmp_path / "again" / "val" / "val-000001.tar").unlink()
    (tmp_path / "again" / "train" / "train-000003.tar").write_bytes(b"truncated")
    assert "packed 360 images" in run_ok(*command, "--workers", "1")
    assert files(tmp_path / "again") == expected


def damaged_inner_header(raw: Path) -> bytes:
    """The train archive with one byte of an image's header flipped: tarfile alone would take it for the end."""
    content = bytearray((raw / TRAIN).read_bytes())
    content[content.index(b".JPEG", content.index(b".JPEG") + 512)] ^= 0xFF
    return bytes(content)


def classes_without_images(raw: Path, *more: int) -> bytes:
    """A train archive of every class with no image, and some of them again."""
    names = list(read_tar(raw / TRAIN))
    return tar_of([(name, tar_of({})) for name in [*names, *(names[k] for k in more)]])


@pytest.mark.parametrize(
    ("archive", "content", "message"),
    [
        (TRAIN, classes_without_images, "expected images"),
        (TRAIN, lambda raw: classes_without_images(raw, 3), "holds a file twice"),
        (TRAIN, damaged_inner_header, "damaged header"),
        (TRAIN, tar_of({"n00000099.tar": tar_of({})}), "classes of ILSVRC2012_devkit_t12.tar.gz, got n0"),
        (VAL, None, "not found"),
        (DEVKIT, b"not gzip either", "not the devkit"),
        (VAL, tar_of({"holiday.JPEG": b"x"}), "expected a class in"),
        (VAL, tar_of({}), "expected the 359 images"),
    ],
)
def test_wrong_input_is_one_sentence(
    raw: Path, tmp_path: Path, archive: str, content: object, message: str
) -> None:
    """Exit code 2, one line that names the archive, and nothing written."""
    broken = tmp_path / "raw"
    shutil.copytree(raw, broken)
    if content is None:
        (broken / archive).unlink()
    else:
        (broken / archive).write_bytes(content(raw) if callable(content) else content)  # type: ignore[arg-type]
    error = refuses("tools/make_shards.py", "pack", broken, tmp_path / "shards")
    assert message in error and archive in error
    assert not (tmp_path / "shards").exists()


def test_foreign_output_is_refused(raw: Path, tmp_path: Path) -> None:
    """A directory that holds something else is left alone, and one that cannot be written is named."""
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    assert "expected a new folder" in refuses("tools/make_shards.py", "pack", raw, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]
    assert "/proc/shards" in refuses("tools/make_shards.py", "pack", raw, "/proc/shards")
