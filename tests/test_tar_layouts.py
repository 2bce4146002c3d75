"""Tars of raw images: what is a class is read where it is clear, and refused in a sentence where it is not."""

from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from pipeline.files import read_json
from pipeline.shards import open_shards
from tests.helpers import jpeg, photo, refuses, run_ok, tar_of, write
from tests.layouts import WNIDS
from tools.make_shards import pack
from tools.packing.layouts import open_raw

IMAGE = jpeg(photo(np.random.default_rng(0), 60, 70))
Listed = dict[str, list[tuple[str, str]]]
"""(class, file name) of each image by split, sorted."""


def tree(prefix: str, split: str, count: int = 3) -> dict[str, bytes]:
    """Class folders with some images each, whose names tell split and class."""
    return {f"{prefix}{wnid}/{split}_{wnid}_{k}.JPEG": IMAGE for wnid in WNIDS for k in range(count)}


def listed(raw: Path) -> Listed:
    """What is read."""
    data, _ = open_raw(raw, raw / "none")
    names = [each.wnid for each in data.classes]
    return {
        split: sorted((names[image.label], Path(image.name).name) for image in listing)
        for split, listing in data.splits.items()
    }


def expected(*splits: str, count: int = 3) -> Listed:
    """What `tree` should be read as."""
    return {
        split: [(wnid, f"{split}_{wnid}_{k}.JPEG") for wnid in WNIDS for k in range(count)]
        for split in splits
    }


@pytest.mark.parametrize("val", ["val", "validation"])
@pytest.mark.parametrize("wrapper", ["", "./", "train/", "imagenet/train/"])
def test_a_tar_for_each_split(tmp_path: Path, val: str, wrapper: str) -> None:
    """Class folders in train.tar and val.tar, whatever folder is around them; test.tar is passed over."""
    write(tmp_path / "train.tar", tar_of(tree(wrapper, "train")))
    write(tmp_path / f"{val}.tar", tar_of(tree("", "val")))
    write(tmp_path / "test.tar", tar_of({"1.JPEG": IMAGE}))
    assert listed(tmp_path) == expected("train", "val")
    assert open_raw(tmp_path, tmp_path / "none")[0].ignored == [tmp_path / "test.tar"]


@pytest.mark.parametrize("wrapper", ["", "imagenet/", "data/imagenet/"])
@pytest.mark.parametrize("inner", ["", "train/"])
def test_one_tar_of_both_splits(tmp_path: Path, wrapper: str, inner: str) -> None:
    """train/<class> and val/<class>, whatever folder is around them, and where train/ is packed with its own name."""
    content = tree(f"{wrapper}train/{inner}", "train") | tree(f"{wrapper}val/", "val")
    write(tmp_path / "imagenet.tar", tar_of(content | {f"{wrapper}test/1.JPEG": IMAGE}))
    assert listed(tmp_path) == expected("train", "val")
    assert len(open_raw(tmp_path, tmp_path / "none")[0].ignored) == 1


def test_one_tar_of_class_folders(tmp_path: Path) -> None:
    """As torchvision's ImageFolder has them, without train/; other files, hidden ones too, are no images."""
    others = {"photos/.DS_Store": b"x", f"photos/{WNIDS[0]}/._a.JPEG": b"x", "__MACOSX/photos/a.JPEG": b"x"}
    write(tmp_path / "photos.tar", tar_of(tree("photos/", "train") | others | {"photos/readme.txt": b"x"}))
    assert listed(tmp_path) == expected("train")


@pytest.mark.parametrize("wrapper", ["", "./", "{}/", "./images/"])
def test_a_tar_for_each_class(tmp_path: Path, wrapper: str) -> None:
    """Flat or with one folder each, beside what systems leave behind; a class may be called train."""
    names = ["car", "train", "plane"]
    for name in names:
        files = {f"{wrapper.format(name)}{name}_{k}.jpg": IMAGE for k in range(2)}
        write(
            tmp_path / f"{name}.tar",
            tar_of({**files, "./._x.jpg": b"x", ".DS_Store": b"x", "Thumbs.db": b"x"}),
        )
    assert listed(tmp_path) == {
        "train": [(name, f"{name}_{k}.jpg") for name in sorted(names) for k in range(2)]
    }
    assert len(open_raw(tmp_path, tmp_path / "none")[0].ignored) == 3


@pytest.mark.parametrize(
    ("tars", "named"),
    [
        (
            {"ILSVRC2012_img_test_v10102019": ["test/ILSVRC2012_test_00000001.JPEG"]},
            "ILSVRC2012_img_test_v10102019.tar",
        ),
        ({"test": ["1.JPEG"]}, "test.tar"),
        ({"val": ["a/1.JPEG", "b/1.JPEG"]}, "val.tar"),
        ({"imagenet": ["imagenet/val/a/1.JPEG", "imagenet/val/b/1.JPEG"]}, "val: expected a class"),
        ({"train": ["1.JPEG"], "val": ["1.JPEG"]}, "train.tar"),
        ({"train": ["a.tar", "b.tar"]}, "train.tar"),
        ({"train": ["a/1.JPEG", "b/1.JPEG"], "val": ["c/1.JPEG"]}, "val.tar"),
        ({"part1": ["a/1.JPEG", "b/1.JPEG"], "part2": ["c/1.JPEG", "d/1.JPEG"]}, "part1.tar"),
        ({"00000": ["0.jpg", "0.json", "0.txt"], "00001": ["1.jpg", "1.json", "1.txt"]}, "00000.tar"),
        ({"00000": ["a/0.jpg", "a/0.cls"]}, "make_shards.py adopt"),
        ({"train": ["a.b/0.jpg", "a.b/0.json"]}, "train.tar"),
        ({"a": ["1.JPEG"], "b": ["2.JPEG"], "val": ["3.JPEG"]}, "val.tar"),
        ({"imagenet": ["Train/a/1.JPEG", "Train/b/1.JPEG", "Val/a/1.JPEG"]}, "Train: expected a class"),
        (
            {"imagenet": ["imagenet/train/a/1.JPEG", "imagenet/val/a/1.JPEG", "docs/logo.png"]},
            "train: expected a class",
        ),
        ({"images": ["1.jpg", "2.jpg"], "labels": ["1.txt", "2.txt"]}, "labels.tar"),
    ],
)
def test_what_is_not_clear(tmp_path: Path, tars: dict[str, list[str]], named: str) -> None:
    """Test images alone, no training images, tars in tars, images outside of classes, shards of WebDataset: refused
    with the tar's name, also with --on-bad skip, and nothing is written."""
    for name, members in tars.items():
        write(tmp_path / "raw" / f"{name}.tar", tar_of(dict.fromkeys(members, IMAGE)))
    options = ("--on-bad", "skip", "--workers", "1")
    told = refuses("tools/make_shards.py", "pack", tmp_path / "raw", tmp_path / "shards", *options)
    assert named in told and not (tmp_path / "shards").exists()


def test_what_is_ignored(tmp_path: Path) -> None:
    """Test archives beside class tars; annotations beside images in class folders; and a file that is there twice is
    refused, as only the last one counts when it is unpacked."""
    for name in ("n1", "n2"):
        write(tmp_path / "classes" / f"{name}.tar", tar_of({f"{name}.JPEG": IMAGE}))
    write(tmp_path / "classes" / "ILSVRC2012_img_test_v10102019.tar", tar_of({"test/1.JPEG": IMAGE}))
    assert listed(tmp_path / "classes") == {"train": [("n1", "n1.JPEG"), ("n2", "n2.JPEG")]}
    write(
        tmp_path / "xml" / "train.tar",
        tar_of({**tree("", "train"), f"{WNIDS[0]}/train_{WNIDS[0]}_0.xml": b"<a/>"}),
    )
    assert listed(tmp_path / "xml") == expected("train")
    assert len(open_raw(tmp_path / "xml", tmp_path / "none")[0].ignored) == 1
    write(
        tmp_path / "twice" / "train.tar", tar_of([("a/1.jpg", IMAGE), ("b/1.jpg", IMAGE), ("a/1.jpg", IMAGE)])
    )
    with pytest.raises(ValueError, match=r"train\.tar: holds a file twice"):
        listed(tmp_path / "twice")


def test_tars_among_other_things(tmp_path: Path) -> None:
    """Class tars are read next to folders without images and a stray image; a tar next to the folder that it was
    extracted to is not read, and named."""
    for name in ("n1", "n2"):
        write(tmp_path / "tars" / f"{name}.tar", tar_of({f"{name}.JPEG": IMAGE}))
        write(tmp_path / "both" / "train" / name / f"{name}.JPEG", IMAGE)
    write(tmp_path / "tars" / "docs" / "readme.txt", b"x")
    write(tmp_path / "tars" / "sample.jpg", IMAGE)
    write(tmp_path / "both" / "train" / "n1.tar", tar_of({"n1.JPEG": IMAGE}))
    for folder, names in (("tars", ["docs", "sample.jpg"]), ("both", ["n1.tar"])):
        assert listed(tmp_path / folder) == {"train": [("n1", "n1.JPEG"), ("n2", "n2.JPEG")]}
        ignored = open_raw(tmp_path / folder, tmp_path / "none")[0].ignored
        assert [path.name for path in ignored] == names


def test_packed_from_tars(tmp_path: Path) -> None:
    """The listing that is cached beside the shards is that of the splits: packed again, there is nothing to do."""
    write(tmp_path / "raw" / "train.tar", tar_of(tree("", "train")))
    write(tmp_path / "raw" / "val.tar", tar_of(tree("", "val", 1)))
    for _ in range(2):
        pack(tmp_path / "raw", tmp_path / "shards", workers=1)
        assert [open_shards(tmp_path / "shards", split).num_samples for split in ("train", "val")] == [9, 3]
    classes = read_json(tmp_path / "shards" / "classes.json")["classes"]
    assert [row["wnid"] for row in classes] == WNIDS


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00001-a1b2", "train-00000-of-00001-ff00"],
        ["train-00000-of-00001", "train-00000-of-00001-a1b2"],
        ["train-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002"],
        ["train-00000-of-00001", "train"],
        ["train-00000-of-00001", "train_small-00000-of-00001"],
        ["train-00000-of-00001", "validation-00000-of-00001", "val-00000-of-00001"],
    ],
)
def test_two_pushes_of_parquet(tmp_path: Path, names: list[str]) -> None:
    """The Hub keeps the files of earlier pushes, under another hash or in another number of parts: every image would be
    packed twice. One set alone is packed."""
    rows = [{"image": {"bytes": IMAGE, "path": f"{k}.jpg"}, "label": k % 2} for k in range(4)]
    table = pyarrow.Table.from_pylist(rows)
    for name in names:
        (tmp_path / "raw").mkdir(exist_ok=True)
        pyarrow.parquet.write_table(table, tmp_path / "raw" / f"{name}.parquet")
    told = refuses("tools/make_shards.py", "pack", tmp_path / "raw", tmp_path / "shards")
    assert "keep the files of one" in told and not (tmp_path / "shards").exists()
    for name in names[1:]:
        (tmp_path / "raw" / f"{name}.parquet").unlink()
    if "of-00001" in names[0]:
        run_ok("tools/make_shards.py", "pack", tmp_path / "raw", tmp_path / "shards", "--val-fraction", "0")
        assert open_shards(tmp_path / "shards", "train").num_samples == 4
