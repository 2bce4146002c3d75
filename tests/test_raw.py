"""Layouts of raw ImageNet: each is recognized, and its images come out once, under their class, with their pixels."""

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline.files import read_json
from tests.helpers import files, jpeg, photo, tar_of, write
from tests.layouts import WNIDS, Images, class_tars, folders, image_set, kaggle, parquet
from tools.make_shards import pack
from tools.packing.layouts import open_raw, split_off_validation
from tools.packing.listing import Listing, load_listing, save_listing, stamp_archives

IMAGE = jpeg(photo(np.random.default_rng(0), 60, 70))


def expected_square(data: bytes) -> np.ndarray:
    """The 256x256 image by Pillow alone."""
    with Image.open(io.BytesIO(data)) as image:
        rgb = image.convert("RGB")
    width, height = (round(side * 256 / min(rgb.size)) for side in rgb.size)
    left, top = (width - 256) // 2, (height - 256) // 2
    return np.asarray(
        rgb.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 256, top + 256))
    )


@pytest.mark.parametrize("place", ["", "ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC", "link"])
def test_kaggles_tree_from_any_level(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """RAW may be the download or a folder in it, also by a link or as the present folder."""
    kaggle(tmp_path / "raw", image_set())
    (tmp_path / "raw" / "link").symlink_to("ILSVRC/Data/CLS-LOC")
    data, _ = open_raw(tmp_path / "raw" / place, tmp_path / "none")
    assert data.layout == "Kaggle's ILSVRC tree" and len(data.splits["val"]) == 6
    monkeypatch.chdir(tmp_path / "raw" / place)
    assert open_raw(Path(), tmp_path / "none")[0].classes == data.classes


@pytest.mark.parametrize("layout", [kaggle, folders, class_tars, parquet])
def test_layouts(
    layout: Callable[[Path, Images], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every image once, in its split, under its class among the sorted wnids, with Pillow's pixels; the first line of
    output names the layout."""
    images = image_set()
    raw, shards = tmp_path / "raw", tmp_path / "shards"
    layout(raw, images)
    pack(raw, shards, samples_per_shard=5, workers=1, quality=97, val_fraction=0)
    output = capsys.readouterr().out
    assert ("ignored 1 files" in output) == (layout is folders)  # system files are not counted
    named = {kaggle: "Kaggle", folders: "class folders", class_tars: "per-class tars", parquet: "parquet"}[
        layout
    ]
    assert named in output.splitlines()[0]
    assert [row["wnid"] for row in read_json(shards / "classes.json")["classes"]] == WNIDS
    found = {}
    for split in ("train", "val"):
        tars = [str(path) for path in sorted((shards / split).glob("*.tar"))]
        for sample in webdataset.WebDataset(tars, shardshuffle=False, empty_check=False) if tars else ():
            assert sample["__key__"] not in found
            found[sample["__key__"]] = (split, WNIDS[int(sample["cls"])], sample["jpg"])
    assert set(found) == set(images)
    for key, (split, wnid, data) in images.items():
        assert found[key][:2] == ("train" if layout is class_tars else split, wnid)
        pixels = np.asarray(Image.open(io.BytesIO(found[key][2]))).astype(int)
        assert np.abs(pixels - expected_square(data)).mean() < 1.5, key


@pytest.mark.parametrize("place", ["", "images"])
def test_class_folders_without_train(tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As torchvision's ImageFolder has them, RAW or the only folder in it: read as its find_classes does. A tenth of
    each class, at least one image, is set aside for validation, the same each time, and said; 0 keeps all."""
    sizes = {"a": 2, "b": 10, "c": 25}
    for name, size in sizes.items():
        for k in range(size):
            write(tmp_path / "raw" / place / name / f"{name}{k}.jpg", IMAGE)
    write(tmp_path / "raw" / place / "readme.txt", b"x")
    for shards, fraction in (("tenth", None), ("again", None), ("none", 0.0)):
        pack(tmp_path / "raw", tmp_path / shards, workers=1, val_fraction=fraction)
        assert ("val-fraction 0 keeps" in capsys.readouterr().out) == (fraction is None)
    assert files(tmp_path / "tenth") == files(tmp_path / "again")
    labels = {
        split: np.bincount(labels_of(tmp_path / "tenth" / split)).tolist() for split in ("train", "val")
    }
    assert labels == {"train": [1, 9, 23], "val": [1, 1, 2]}
    assert np.bincount(labels_of(tmp_path / "none" / "train")).tolist() == [2, 10, 25]
    assert not (tmp_path / "none" / "val").exists()
    assert [row["wnid"] for row in read_json(tmp_path / "none" / "classes.json")["classes"]] == list(sizes)


def test_the_validation_cut_is_the_same_in_every_layout(tmp_path: Path) -> None:
    """Class folders, nested or not, and the same in a tar become the same shards."""
    names = [f"{wnid}/{'deep/' * (k % 3 == 0)}{wnid}_{k}.jpg" for wnid in WNIDS for k in range(12)]
    for name in names:
        write(tmp_path / "folders" / name, IMAGE)
        write(tmp_path / "flat" / "train" / name.replace("deep/", ""), IMAGE)
    write(tmp_path / "tars" / "train.tar", tar_of(dict.fromkeys(names, IMAGE)))
    shards = []
    for layout in ("folders", "flat", "tars"):
        pack(tmp_path / layout, tmp_path / f"{layout}-shards", workers=1)
        found = {path.name: path.read_bytes() for path in (tmp_path / f"{layout}-shards").rglob("*.tar")}
        shards.append(found)
    assert len(shards[0]) == 2 and shards[0] == shards[1] == shards[2]


def labels_of(split: Path) -> list[int]:
    """The labels of a split's shards, by the webdataset library."""
    tars = [str(path) for path in sorted(split.glob("*.tar"))]
    return [int(sample["cls"]) for sample in webdataset.WebDataset(tars, shardshuffle=False)]


def test_train_in_train(tmp_path: Path) -> None:
    """What an archive of train/ becomes when it is unpacked into train/."""
    images = {
        f"{split}/{split}/{wnid}/{k}.jpg" for split in ("train", "val") for wnid in WNIDS for k in range(2)
    }
    for name in images:
        write(tmp_path / name, IMAGE)
    data, _ = open_raw(tmp_path, tmp_path / "none")
    assert [each.wnid for each in data.classes] == WNIDS
    assert {image.name for listing in data.splits.values() for image in listing} == images


@pytest.mark.parametrize("layout", ["folders", "tar", "raw"])
def test_one_class_is_worth_a_warning(
    layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In any layout; several are not."""
    for name in ("one", "two"):
        raw = tmp_path / name
        for wnid in WNIDS[: 1 if name == "one" else 2]:
            files = {f"{wnid}_{k}.jpg": IMAGE for k in range(2)}
            if layout == "tar":
                write(raw / f"{wnid}.tar", tar_of(files))
            for file, data in files.items() if layout != "tar" else ():
                write(raw / ("train" if layout == "folders" else "") / wnid / file, data)
        pack(raw, tmp_path / f"{name}-shards", workers=1)
        assert ("warning" in capsys.readouterr().out) == (name == "one")


def test_all_layouts_give_the_same_shards(tmp_path: Path) -> None:
    """The same images in Kaggle's tree, in folders and in parquet files become the same bytes."""
    tars = []
    for layout in (kaggle, folders, parquet):
        raw, shards = tmp_path / layout.__name__ / "raw", tmp_path / layout.__name__ / "shards"
        raw.parent.mkdir()
        layout(raw, image_set())
        pack(raw, shards, samples_per_shard=5, workers=1)
        tars.append({path.name: path.read_bytes() for path in shards.rglob("*-*.*")})
    assert len(tars[0]) == 12 and tars[0] == tars[1] == tars[2]


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is named."""
    import sys

    (tmp_path / "raw").mkdir()
    parquet(tmp_path / "raw" / "d", image_set())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        pack(tmp_path / "raw" / "d", tmp_path / "shards", workers=1)


def test_parquet_classes(tmp_path: Path) -> None:
    """Names that Hugging Face keeps in the file's metadata become the words; where file names tell no wnid, classes
    are numbered in the order of the labels."""
    import json

    import pyarrow
    import pyarrow.parquet

    for names, wnids in (
        (["n00000044_1.JPEG", "n00000055_1.JPEG"], ["n00000044", "n00000055"]),
        (["n00000055_1.JPEG", "n00000044_1.JPEG"], ["000000", "000001"]),
        (["a.JPEG", None], ["000000", "000001"]),
    ):
        rows = [{"image": {"bytes": b"x", "path": name}, "label": label} for label, name in enumerate(names)]
        table = pyarrow.Table.from_pylist(rows)
        features = {"info": {"features": {"label": {"names": ["tench, Tinca tinca", "goldfish"]}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        pyarrow.parquet.write_table(table, tmp_path / "train-00000-of-00001.parquet")
        data, _ = open_raw(tmp_path, tmp_path / "none")
        assert [name.wnid for name in data.classes] == wnids
        assert [name.words for name in data.classes] == ["tench, Tinca tinca", "goldfish"]


def test_val_fraction(tmp_path: Path) -> None:
    """The cut is stratified, seeded and exact: every image on one side, the same images each time."""
    raw = tmp_path / "raw"
    class_tars(raw, {f"{wnid}_{n}": ("train", wnid, b"x") for wnid in WNIDS for n in range(20)})
    data, _ = open_raw(raw, tmp_path / "none")
    cuts = [split_off_validation(data, 0.25, seed).splits for seed in (1, 1, 2)]
    names = [{split: {image.name for image in listing} for split, listing in cut.items()} for cut in cuts]
    assert names[0] == names[1] != names[2]
    assert names[0]["train"] | names[0]["val"] == {image.name for image in data.splits["train"]}
    assert np.bincount(cuts[0]["val"].label).tolist() == [5, 5, 5]
    assert np.bincount(cuts[0]["train"].label).tolist() == [15, 15, 15]
    assert np.bincount(split_off_validation(data, 0.001, 1).splits["val"].label).tolist() == [1, 1, 1]
    assert np.bincount(split_off_validation(data, 0.999, 1).splits["train"].label).tolist() == [1, 1, 1]
    class_tars(tmp_path / "single", {wnid: ("train", wnid, b"x") for wnid in WNIDS})
    with pytest.raises(ValueError, match="expected a class with two images"):
        split_off_validation(open_raw(tmp_path / "single", tmp_path / "none")[0], 0.5, 1)


def test_the_listing_is_cached(tmp_path: Path) -> None:
    """A cached listing equals the first; a changed archive, a damaged cache or none list again."""
    raw, cache = tmp_path / "raw", tmp_path / "listing.npz"
    class_tars(raw, image_set())
    (raw / f"{WNIDS[0]}.tar").unlink()
    write(raw / f"{WNIDS[0]}.tar", tar_of({os.fsdecode(b"b\xe4d na\nme.JPEG"): b"x" * 700, "é.JPEG": b"yy"}))
    data, validity = open_raw(raw, cache)
    assert validity is not None
    save_listing(cache, data, validity)
    again, nothing = open_raw(raw, cache)
    assert nothing is None and again.classes == data.classes and again.layout == data.layout
    assert list(again.splits["train"]) == list(data.splits["train"])
    assert again.splits["train"].digest() == data.splits["train"].digest()
    content = cache.read_bytes()
    flipped = bytearray(content)
    flipped[content.index(b"train.offset.npy") + 200] ^= 1
    for damage in (b"", content[: len(content) // 2], b"\xff{", b"\x93NUMPY", bytes(flipped)):
        assert damage != content
        cache.write_bytes(damage)
        assert load_listing(cache, raw, validity) is None
    cache.write_bytes(content)
    os.utime(raw / f"{WNIDS[1]}.tar", (1, 1))
    assert open_raw(raw, cache)[1] is not None
    assert stamp_archives(raw, [raw / f"{WNIDS[1]}.tar"])[0][0] == f"{WNIDS[1]}.tar"


def test_listing_rows(tmp_path: Path) -> None:
    """`take` gives the chosen rows in the order asked for; a file of its own is read from its path."""
    listing = Listing(tmp_path)
    (tmp_path / "sub").mkdir()
    for number in range(5):
        (tmp_path / "sub" / f"{number}.jpg").write_bytes(bytes([number]) * (number + 1))
        listing.append(-1, f"sub/{number}.jpg", 0, number + 1, number)
    taken = listing.take(np.array([4, 0, 2]))
    assert [(image.name, image.read(), image.label) for image in taken] == [
        (f"sub/{number}.jpg", bytes([number]) * (number + 1), number) for number in (4, 0, 2)
    ]


def test_class_tars_are_sorted_by_class(tmp_path: Path) -> None:
    """Not by file name, in which "a-b.tar" comes before "a.tar"."""
    (tmp_path / "raw").mkdir()
    for wnid in ("a", "a-b", "b"):
        write(tmp_path / "raw" / f"{wnid}.tar", tar_of({f"{wnid}_1.jpg": b"x"}))
    data, _ = open_raw(tmp_path / "raw", tmp_path / "none")
    assert [name.wnid for name in data.classes] == ["a", "a-b", "b"]
    assert [image.name for image in data.splits["train"]] == ["a_1.jpg", "a-b_1.jpg", "b_1.jpg"]
