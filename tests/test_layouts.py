"""Layouts of raw ImageNet: each is recognized, and its images come out once, under their class, with their pixels."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from pipeline.files import read_json
from tests.helpers import jpeg, photo, tar_of, write
from tests.layouts import (
    SOLUTION,
    WNIDS,
    check_shards,
    class_tars,
    folders,
    image_set,
    kaggle,
    parquet,
    read_shards,
    split_tars,
)
from tools.make_shards import pack
from tools.packing.labels import split_off_validation
from tools.packing.layouts import open_raw
from tools.packing.listing import load_listing, save_listing

IMAGE = jpeg(photo(np.random.default_rng(0), 60, 70))
Listed = dict[str, list[tuple[str, str]]]
"""(class, file name) of each image by split, sorted."""


def class_sizes(shards: Path, split: str) -> list[int]:
    """Number of images by class."""
    return np.bincount([label for _, label, _ in read_shards(shards, split)]).tolist()


def listed(raw: Path) -> Listed:
    """What is read."""
    data, _ = open_raw(raw, raw / "none")
    names = [each.wnid for each in data.classes]
    return {
        split: sorted((names[image.label], Path(image.name).name) for image in listing)
        for split, listing in data.splits.items()
    }


def ignored(raw: Path) -> list[str]:
    """Names of what is ignored."""
    return [path.name for path in open_raw(raw, raw / "none")[0].ignored]


def tree(prefix: str, split: str) -> dict[str, bytes]:
    """Class folders of three images each, whose names hold split and class."""
    return {f"{prefix}{wnid}/{split}_{wnid}_{k}.JPEG": IMAGE for wnid in WNIDS for k in range(3)}


def expected(*splits: str) -> Listed:
    """What `tree` is to be read as."""
    return {
        split: [(wnid, f"{split}_{wnid}_{k}.JPEG") for wnid in WNIDS for k in range(3)] for split in splits
    }


@pytest.mark.parametrize("place", ["", "ILSVRC/Data", "link"])
def test_kaggles_tree_is_found_from_any_level(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RAW may be the download or a folder in it, also by a link or as the present folder."""
    kaggle(tmp_path / "raw", image_set())
    (tmp_path / "raw" / "link").symlink_to("ILSVRC/Data/CLS-LOC")
    data, _ = open_raw(tmp_path / "raw" / place, tmp_path / "none")
    assert SOLUTION in data.layout and len(data.splits["val"]) == 6
    monkeypatch.chdir(tmp_path / "raw" / place)
    assert open_raw(Path(), tmp_path / "none")[0].classes == data.classes


def test_every_image_once_with_its_class_and_pixels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In each layout, in its split, under its class among the sorted wnids; the first line of output names the layout.
    The same images in the same splits become the same bytes."""
    images, found = image_set(), []
    names = ("labelled by LOC_val_solution.csv", "class folders", "parquet", "tars", "per-class tars")
    for layout, name in zip((kaggle, folders, parquet, split_tars, class_tars), names, strict=True):
        raw, shards = tmp_path / layout.__name__ / "raw", tmp_path / layout.__name__ / "shards"
        raw.parent.mkdir()
        layout(raw, images)
        pack(raw, shards, samples_per_shard=5, workers=1, quality=97, val_fraction=0)
        output = capsys.readouterr().out
        assert ("ignored 1 files" in output) == (layout in (folders, kaggle))  # system files are not counted
        assert name in output.splitlines()[0] and "warning" not in output
        of_train = {key: ("train", *image[1:]) for key, image in images.items()}
        check_shards(shards, of_train if layout is class_tars else images)
        found.append({path.name: path.read_bytes() for path in shards.rglob("*-*.*")})
    *same, without_val = found
    assert len(same[0]) == 12 and all(each == same[0] != without_val for each in same)


@pytest.mark.parametrize("place", ["", "images"])
def test_class_folders_without_a_split(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As torchvision's ImageFolder has them, RAW or the only folder in it. A tenth of each class, at least one image,
    is set aside for validation, the same each time and in a tar, and the output says so; 0 keeps all."""
    sizes = {"a": 2, "b": 10, "c": 25}
    numbers = [(name, k) for name, size in sizes.items() for k in range(size)]
    images = {f"{name}/{'deep/' * (k % 3)}{name}{k}.jpg": IMAGE for name, k in numbers}
    for name, data in {**images, "readme.txt": b"x"}.items():
        write(tmp_path / "raw" / place / name, data)
    write(tmp_path / "tar" / "any.tar", tar_of(images))
    for raw, shards, fraction in (("raw", "tenth", None), ("tar", "again", None), ("raw", "none", 0.0)):
        pack(tmp_path / raw, tmp_path / shards, workers=1, val_fraction=fraction)
        assert ("val-fraction 0 keeps" in capsys.readouterr().out) == (fraction is None)
    for split, counts in (("train", [1, 9, 23]), ("val", [1, 1, 2])):
        assert class_sizes(tmp_path / "tenth", split) == counts
        assert read_shards(tmp_path / "tenth", split) == read_shards(tmp_path / "again", split)
    assert class_sizes(tmp_path / "none", "train") == [2, 10, 25] and not (tmp_path / "none" / "val").exists()
    assert [row["wnid"] for row in read_json(tmp_path / "none" / "classes.json")["classes"]] == list(sizes)


def test_val_fraction_is_stratified_seeded_and_exact(tmp_path: Path) -> None:
    """Every image is on one side, the same images each time."""
    raw = tmp_path / "raw"
    class_tars(raw, {f"{wnid}_{n}": ("train", wnid, b"x") for wnid in WNIDS for n in range(20)})
    data, _ = open_raw(raw, tmp_path / "none")
    cuts = [split_off_validation(data, 0.25, seed).splits for seed in (1, 1, 2)]
    names = [{split: {image.name for image in listing} for split, listing in cut.items()} for cut in cuts]
    assert names[0] == names[1] != names[2]
    assert names[0]["train"] | names[0]["val"] == {image.name for image in data.splits["train"]}
    for fraction, in_val in ((0.25, 5), (0.001, 1), (0.999, 19)):
        cut = split_off_validation(data, fraction, 1).splits
        assert np.bincount(cut["val"].label).tolist() == [in_val] * 3
        assert np.bincount(cut["train"].label).tolist() == [20 - in_val] * 3
    class_tars(tmp_path / "single", {wnid: ("train", wnid, b"x") for wnid in WNIDS})
    with pytest.raises(ValueError, match="expected a class with two images"):
        split_off_validation(open_raw(tmp_path / "single", tmp_path / "none")[0], 0.5, 1)


def test_one_class_is_worth_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing can be learned from it."""
    write(tmp_path / "raw" / "train" / "train" / "cat" / "1.jpg", IMAGE)
    pack(tmp_path / "raw", tmp_path / "shards", workers=1)
    assert "warning: only one class, 'cat'" in capsys.readouterr().out


@pytest.mark.parametrize(
    "places",
    [
        {"train.tar": {"": "train"}, "validation.tar": {"./": "val"}},
        {"train.tar": {"imagenet/train/": "train"}, "val.tar": {"": "val"}},
        {"imagenet.tar": {"train/": "train", "val/": "val", "test/": "test"}},
        {"imagenet.tar": {"data/imagenet/train/train/": "train", "data/imagenet/val/": "val"}},
        {"": {"train/train/": "train", "val/val/": "val"}},
    ],
)
def test_class_folders_of_both_splits(tmp_path: Path, places: dict[str, dict[str, str]]) -> None:
    """In a tar for each split or in one of both, whatever folder is around them, also where train/ is packed with its
    own name, or was unpacked into train/; the test images are ignored."""
    for archive, prefixes in places.items():
        content: dict[str, bytes] = {}
        for prefix, split in prefixes.items():
            content |= tree(prefix, split)
        if archive:
            write(tmp_path / "raw" / archive, tar_of(content))
        for name, data in content.items() if not archive else ():
            write(tmp_path / "raw" / name, data)
    assert listed(tmp_path / "raw") == expected("train", "val")
    assert ignored(tmp_path / "raw") == ["test"] * ("test/" in places.get("imagenet.tar", ()))


@pytest.mark.parametrize("wrapper", ["", "{}/", "./images/"])
def test_a_tar_for_each_class(tmp_path: Path, wrapper: str) -> None:
    """Flat or with one folder each, next to what systems leave; a class may be called train. Classes are sorted by
    name, not by file, of which "car-b.tar" comes before "car.tar"."""
    names = ["car", "car-b", "plane", "train"]
    for name in names:
        content = {f"{wrapper.format(name)}{name}_{k}.jpg": IMAGE for k in range(2)}
        system = {"./._x.jpg": b"x", ".DS_Store": b"x", "Thumbs.db": b"x", "folder/": b""}
        write(tmp_path / f"{name}.tar", tar_of(content | system))
    assert [name.wnid for name in open_raw(tmp_path, tmp_path / "none")[0].classes] == names
    assert listed(tmp_path) == {"train": [(name, f"{name}_{k}.jpg") for name in names for k in range(2)]}
    assert ignored(tmp_path) == []


def test_what_is_ignored(tmp_path: Path) -> None:
    """Test archives and folders without images next to class tars; hidden and other files among class folders in a tar;
    a tar next to the folder that was extracted from it."""
    class_tars(tmp_path / "classes", image_set())
    write(tmp_path / "classes" / "ILSVRC2012_img_test_v10102019.tar", tar_of({"test/1.JPEG": IMAGE}))
    write(tmp_path / "classes" / "docs" / "readme.txt", b"x")
    system = {".DS_Store": b"x", f"{WNIDS[0]}/._a.JPEG": b"x", "__MACOSX/a.JPEG": b"x"}
    others = {f"{WNIDS[0]}/a.xml": b"<a/>", "stray.txt": b"x"}
    write(tmp_path / "tars" / "train.tar", tar_of(tree("", "train") | system | others))
    write(tmp_path / "tars" / "test.tar", tar_of({"1.JPEG": IMAGE}))
    for name, data in tree("", "train").items():
        write(tmp_path / "both" / "train" / name, data)
    write(tmp_path / "both" / "train" / f"{WNIDS[0]}.tar", tar_of({"n1.JPEG": IMAGE}))
    assert sum(map(len, listed(tmp_path / "classes").values())) == len(image_set())
    assert ignored(tmp_path / "classes") == ["ILSVRC2012_img_test_v10102019.tar", "docs"]
    assert listed(tmp_path / "tars") == listed(tmp_path / "both") == expected("train")
    assert sorted(ignored(tmp_path / "tars")) == ["a.xml", "stray.txt", "test.tar"]
    assert ignored(tmp_path / "both") == [f"{WNIDS[0]}.tar"]


def test_parquet_classes(tmp_path: Path) -> None:
    """Names that Hugging Face keeps in the file's metadata become the words; where file names hold no wnid, classes
    are numbered in the order of the labels."""
    for names, wnids in (
        (["n00000044_1.JPEG", "n00000055_1.JPEG"], ["n00000044", "n00000055"]),
        (["n00000055_1.JPEG", "n00000044_1.JPEG"], ["000000", "000001"]),
        (["a.JPEG", None], ["000000", "000001"]),
    ):
        rows = [{"image": {"bytes": b"x", "path": name}, "label": label} for label, name in enumerate(names)]
        features = {"info": {"features": {"label": {"names": ["tench, Tinca tinca", "goldfish"]}}}}
        table = pyarrow.Table.from_pylist(rows).replace_schema_metadata({"huggingface": json.dumps(features)})
        pyarrow.parquet.write_table(table, tmp_path / "train-00000-of-00001.parquet")
        data, _ = open_raw(tmp_path, tmp_path / "none")
        assert [name.wnid for name in data.classes] == wnids
        assert [name.words for name in data.classes] == ["tench, Tinca tinca", "goldfish"]


def test_hostile_names_become_safe_keys(tmp_path: Path) -> None:
    """Paths that lead out, repeated names, dots, spaces, newlines and bytes that are not UTF-8: every image is packed
    under a key of its own, the manifest maps it back, and nothing is written outside of the output."""
    raw, shards = tmp_path / "a" / "raw", tmp_path / "a" / "shards"
    stems = ["../../evil", "/abs/olute", "x.y", "sp ace", "new\nline", os.fsdecode(b"b\xff\xfe"), "a" * 150]
    stems += ["0_7", "1_2", "plain", "d/twice", "e/twice"]
    names = [f"n00000011/{stem}.JPEG" for stem in stems]
    images = [jpeg(np.full((60, 60, 3), 20 * number, np.uint8)) for number in range(len(names))]
    content = dict(zip(names, images, strict=True)) | {"n00000022/other.JPEG": IMAGE}
    write(raw / "train.tar", tar_of(content))
    pack(raw, shards, samples_per_shard=4, workers=1, quality=97, val_fraction=0)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["raw", "shards"]
    key_of = {name: key for key, name in read_json(shards / "train" / "manifest.json")["renamed"].items()}
    found = {key: data for key, _, data in read_shards(shards, "train")}
    assert len(found) == len(names) + 1 and {"plain", "evil", "olute", "other"} <= set(found)
    for number, name in enumerate(names):
        escaped = os.fsencode(name).decode("utf-8", "backslashreplace")
        colour = np.asarray(Image.open(io.BytesIO(found[key_of.get(escaped, Path(name).stem)]))).astype(int)
        assert np.abs(colour - 20 * number).max() <= 3, name


def test_the_listing_is_cached(tmp_path: Path) -> None:
    """A cached listing equals the first; a changed archive or a damaged cache lists again."""
    raw, cache = tmp_path / "raw", tmp_path / "listing.npz"
    class_tars(raw, image_set())
    write(raw / f"{WNIDS[0]}.tar", tar_of({os.fsdecode(b"b\xe4d na\nme.JPEG"): b"x" * 700, "é.JPEG": b"yy"}))
    data, validity = open_raw(raw, cache)
    assert validity is not None and validity[0][0] == f"{WNIDS[0]}.tar"
    save_listing(cache, data, validity)
    again, nothing = open_raw(raw, cache)
    assert nothing is None and again.classes == data.classes and again.layout == data.layout
    assert list(again.splits["train"]) == list(data.splits["train"])
    assert again.splits["train"].digest() == data.splits["train"].digest()
    content = cache.read_bytes()
    flipped = bytearray(content)
    flipped[content.index(b"train.offset.npy") + 200] ^= 1
    for damage in (b"", content[: len(content) // 2], b"\x93NUMPY", bytes(flipped)):
        cache.write_bytes(damage)
        assert load_listing(cache, raw, validity) is None
    cache.write_bytes(content)
    os.utime(raw / f"{WNIDS[1]}.tar", (1, 1))
    assert open_raw(raw, cache)[1] is not None
