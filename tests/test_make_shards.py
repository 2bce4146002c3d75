"""Packing: every raw image once, with its right label, in an order and with bytes that depend on input, options and
seed alone."""

import io
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from scipy.io import loadmat

from pipeline.files import read_json
from tests.helpers import refuses, run_ok, tar_of
from tools.make_shards import pack


def raw_images(raw: Path) -> dict[str, tuple[bytes, str]]:
    """Read the raw archives with tarfile alone: stem -> (file, wnid), the validation labels through meta.mat."""
    found = {}
    with tarfile.open(raw / "ILSVRC2012_img_train.tar") as outer:
        for member in outer:
            with tarfile.open(fileobj=io.BytesIO(outer.extractfile(member).read())) as inner:  # type: ignore[union-attr]
                for image in inner:
                    found[image.name.removesuffix(".JPEG")] = (
                        inner.extractfile(image).read(),
                        member.name.removesuffix(".tar"),
                    )  # type: ignore[union-attr]
    with tarfile.open(raw / "ILSVRC2012_devkit_t12.tar.gz") as devkit:
        folder = "ILSVRC2012_devkit_t12/data"
        synsets = loadmat(io.BytesIO(devkit.extractfile(f"{folder}/meta.mat").read()), squeeze_me=True)[
            "synsets"
        ]  # type: ignore[union-attr]
        labels = devkit.extractfile(f"{folder}/ILSVRC2012_validation_ground_truth.txt").read().split()  # type: ignore[union-attr]
    wnid = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    with tarfile.open(raw / "ILSVRC2012_img_val.tar") as val:
        for position, image in enumerate(sorted(val, key=lambda member: member.name)):
            found[image.name.removesuffix(".JPEG")] = (
                val.extractfile(image).read(),
                wnid[int(labels[position])],
            )  # type: ignore[union-attr]
    return found


def packed_images(shards: Path) -> list[tuple[str, bytes, int]]:
    """Read all shards with the webdataset library: (key, jpg, class index)."""
    tars = [str(path) for path in sorted(shards.glob("*/*.tar"))]
    samples = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)
    return [(sample["__key__"], sample["jpg"], int(sample["cls"])) for sample in samples]


def test_every_image_once_with_its_label(raw: Path, shards: Path) -> None:
    """The webdataset library reads each raw image exactly once; labels index the sorted wnids; pixels are those of
    the raw file, of every fourth."""
    expected, packed = raw_images(raw), packed_images(shards)
    wnids = sorted({wnid for _, wnid in expected.values()})
    assert Counter(key for key, _, _ in packed) == Counter(expected.keys())
    assert [row["wnid"] for row in read_json(shards / "classes.json")["classes"]] == wnids
    assert all(wnids[label] == expected[key][1] for key, _, label in packed)
    for key, data, _ in packed[::4]:
        with Image.open(io.BytesIO(expected[key][0])) as image:
            rgb = image.convert("RGB")
        short = min(rgb.size)
        rgb = rgb.resize(
            (round(rgb.width * 256 / short), round(rgb.height * 256 / short)), Image.Resampling.BICUBIC
        )
        left, top = (rgb.width - 256) // 2, (rgb.height - 256) // 2
        square = np.asarray(rgb.crop((left, top, left + 256, top + 256))).astype(int)
        assert np.abs(np.asarray(Image.open(io.BytesIO(data))).astype(int) - square).mean() < 2.5


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


def test_classes_are_mixed(shards: Path) -> None:
    """The order is a permutation of the whole split: no shard lacks a class, and neighbours rarely share one."""
    labels = [label for key, _, label in packed_images(shards) if not key.startswith("ILSVRC")]
    assert all(len(set(labels[start : start + 180])) == 10 for start in range(0, 1260, 180))
    assert np.mean(np.array(labels[1:]) == np.array(labels[:-1])) < 0.2


def test_bytes_do_not_depend_on_workers_or_restarts(raw: Path, shards: Path, tmp_path: Path) -> None:
    """One worker writes what two wrote; a pack that lost some shards and its manifest writes just those again; a
    seed matters."""
    again = tmp_path / "again"
    run_ok("-m", "tools.make_shards", "pack", raw, again, "--samples-per-shard", "180", "--workers", "1")
    files = sorted(
        path.relative_to(shards) for path in shards.rglob("*") if path.is_file() and path.name != "pca.json"
    )
    assert len(files) == 24
    assert all((again / file).read_bytes() == (shards / file).read_bytes() for file in files)
    assert "nothing to do" in run_ok("tools/make_shards.py", "pack", raw, again, "--samples-per-shard", "180")
    changed = ("--samples-per-shard", "180", "--seed", "1")
    assert "got 1; give --seed 2012" in refuses("tools/make_shards.py", "pack", raw, again, *changed)
    assert all((again / file).read_bytes() == (shards / file).read_bytes() for file in files)


def test_a_lost_shard_is_written_again(
    raw: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Running the command again on a directory that lost a shard restores its bytes."""
    again = tmp_path / "again"
    shutil.copytree(shards, again)
    (again / "val" / "val-000001.tar").unlink()
    (again / "train" / "train-000003.tar").write_bytes(b"truncated")
    pack(raw, again, samples_per_shard=180, workers=1)
    assert "packed 360 images" in capsys.readouterr().out
    for name in ("val/val-000001.tar", "train/train-000003.tar"):
        assert (again / name).read_bytes() == (shards / name).read_bytes()
    assert not list(again.rglob("*-*.json"))


def damaged_inner_header(raw: Path) -> bytes:
    """The train archive with one byte of an image's header flipped: tarfile alone would take it for the end."""
    content = bytearray((raw / "ILSVRC2012_img_train.tar").read_bytes())
    with tarfile.open(raw / "ILSVRC2012_img_train.tar") as outer:
        first = outer.getmembers()[0]
        with tarfile.open(fileobj=io.BytesIO(outer.extractfile(first).read())) as inner:  # type: ignore[union-attr]
            content[first.offset_data + inner.getmembers()[10].offset] ^= 0xFF
    return bytes(content)


def classes_without_images(raw: Path, *more: int) -> bytes:
    """A train archive of every class with no image, and some of them again."""
    with tarfile.open(raw / "ILSVRC2012_img_train.tar") as outer:
        names = outer.getnames()
    return tar_of([(name, tar_of({})) for name in [*names, *(names[k] for k in more)]])


@pytest.mark.parametrize(
    ("archive", "content", "message"),
    [
        ("ILSVRC2012_img_train.tar", classes_without_images, "no images of class"),
        (
            "ILSVRC2012_img_train.tar",
            lambda raw: classes_without_images(raw, 3),
            "classes of ILSVRC2012_devkit_t12.tar.gz once",
        ),
        ("ILSVRC2012_img_train.tar", damaged_inner_header, "damaged header"),
        ("ILSVRC2012_img_train.tar", tar_of({"n90000051.tar": tar_of({})}), "they differ in n9"),
        ("ILSVRC2012_img_val.tar", None, "not found"),
        ("ILSVRC2012_img_train.tar", b"this is no tar archive" * 100, "not a tar archive"),
        ("ILSVRC2012_img_train.tar", "cut", "truncated"),
        ("ILSVRC2012_devkit_t12.tar.gz", b"not gzip either", "not the devkit"),
        ("ILSVRC2012_img_val.tar", tar_of({"holiday.JPEG": b"x"}), "the devkit has no label for"),
        ("ILSVRC2012_img_val.tar", tar_of({}), "got 0, 0 distinct"),
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
    elif content == "cut":
        (broken / archive).write_bytes((raw / archive).read_bytes()[:1_000_000])
    else:
        (broken / archive).write_bytes(content(raw) if callable(content) else content)  # type: ignore[arg-type]
    error = refuses("tools/make_shards.py", "pack", broken, tmp_path / "shards")
    assert message in error and archive in error
    assert not (tmp_path / "shards").exists()


def test_foreign_output_is_refused(raw: Path, tmp_path: Path) -> None:
    """A directory that holds something else is left alone."""
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    assert "expected a new folder" in refuses("tools/make_shards.py", "pack", raw, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]
