"""Flat folders with tables of labels, choices of classes, validation images alone: every image comes out once, under
its class, with its pixels."""

import shutil
import subprocess
import tarfile
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.files import read_json
from tests.helpers import jpeg, photo, read_tar, refuses, run_ok, tar_of, write
from tests.layouts import (
    SOLUTION,
    WNIDS,
    Images,
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
from tools.packing.layouts import open_raw
from tools.packing.listing import save_listing

PACK = "tools/make_shards.py", "pack"
IMAGE = jpeg(photo(np.random.default_rng(0), 60, 70))
TREE = "ILSVRC/Data/CLS-LOC"


def sorted_kaggle(raw: Path, images: Images) -> None:
    """Kaggle's tree after val/ was sorted into folders, with or without the csv."""
    kaggle(raw, images)
    for stem, (split, wnid, _) in images.items():
        if split == "val":
            (raw / TREE / "val" / wnid).mkdir(exist_ok=True)
            (raw / TREE / "val" / f"{stem}.JPEG").rename(raw / TREE / "val" / wnid / f"{stem}.JPEG")
    (raw / SOLUTION).unlink()


def tiny_imagenet(raw: Path, images: Images) -> None:
    """The tree of tiny-imagenet-200: boxes next to images/, a table in val/."""
    lines = []
    for stem, (split, wnid, data) in images.items():
        write(raw / (f"train/{wnid}" if split == "train" else "val") / "images" / f"{stem}.JPEG", data)
        lines += [f"{stem}.JPEG\t{wnid}\t0\t32\t44\t62\n"] if split == "val" else []
    for wnid in WNIDS:
        write(raw / "train" / wnid / f"{wnid}_boxes.txt", b"x")
    write(raw / "test" / "images" / "test_0.JPEG", IMAGE)
    (raw / "val" / "val_annotations.txt").write_text("".join(lines))
    (raw / "words.txt").write_text("".join(f"n000000{k}{k}\tthing, {k}\n" for k in range(9)))


def valid_folder(raw: Path, images: Images) -> None:
    """Class folders, of which those of validation are in valid/, and one is named as a disk of Apple names it."""
    for stem, (split, wnid, data) in images.items():
        write(raw / ("train" if split == "train" else "valid") / wnid / f"{stem}.jpg", data)


def whole_tar(raw: Path, images: Images) -> None:
    """ImageNet-21k's one tar of class tars."""
    raw.mkdir()
    class_tars(raw / "tars", images)
    (raw / "fall11_whole.tar").write_bytes(tar_of({p.name: p.read_bytes() for p in (raw / "tars").iterdir()}))
    shutil.rmtree(raw / "tars")


def of_train(images: Images) -> Images:
    """The same, all for training."""
    return {key: ("train", *image[1:]) for key, image in images.items()}


@pytest.mark.parametrize("layout", [sorted_kaggle, tiny_imagenet, valid_folder, whole_tar])
def test_trees_of_people(tmp_path: Path, layout: Callable[[Path, Images], None]) -> None:
    """Each gives the images that it was made of."""
    images = image_set()
    layout(tmp_path / "raw", images)
    pack(tmp_path / "raw", tmp_path / "shards", workers=1, quality=97, val_fraction=0)
    check_shards(tmp_path / "shards", of_train(images) if layout is whole_tar else images)
    words = [row["words"] for row in read_json(tmp_path / "shards" / "classes.json")["classes"]]
    has_words = layout in (sorted_kaggle, tiny_imagenet)
    assert words == (["thing, 1", "thing, 2", "thing, 3"] if has_words else WNIDS)


@pytest.mark.parametrize(
    "form", ["{}.jpg,{}", "{}\t{}", "./images/{}.jpg {}", '"/a/path, images/{}.jpg",1, {}']
)
@pytest.mark.parametrize("in_tar", [False, True])
def test_a_list_of_labels(
    tmp_path: Path, form: str, in_tar: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images in one folder or tar, named with or without folders and extension; what is not listed is left out."""
    images = of_train(image_set())
    files = {f"images/{stem}.jpg": data for stem, (_, _, data) in images.items()}
    files |= {"images/other.jpg": IMAGE}
    raw = tmp_path / "a" / "path, images" if form[0] == '"' else tmp_path / "raw"
    for name, data in {"all.tar": tar_of(files)}.items() if in_tar else files.items():
        write(raw / name, data)
    header = {"{": "filename,class\n" if "," in form else "", '"': "path,width,Label\n"}.get(form[0], "")
    lines = [form.format(stem, wnid) for stem, (_, wnid, _) in images.items()]
    if form[0] == '"':
        lines = [
            line.replace("/a/path, images", "all.tar/images" if in_tar else f"{raw}/images") for line in lines
        ]
    write(tmp_path / "list.csv", ("\ufeff" + header + "\n".join(lines)).encode())
    pack(raw, tmp_path / "shards", workers=1, quality=97, val_fraction=0, labels=tmp_path / "list.csv")
    check_shards(tmp_path / "shards", images)
    assert "ignored 1 files" in capsys.readouterr().out


def test_a_list_of_both_splits(tmp_path: Path) -> None:
    """Folders called train and val are the splits."""
    images = image_set()
    for stem, (split, _, data) in images.items():
        write(tmp_path / "raw" / split / f"{stem}.jpg", data)
    lines = [f"{split}/{stem}.jpg {wnid}\n" for stem, (split, wnid, _) in images.items()]
    (tmp_path / "list").write_text("".join(lines))
    pack(tmp_path / "raw", tmp_path / "shards", workers=1, quality=97, labels=tmp_path / "list")
    check_shards(tmp_path / "shards", images)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1.jpg a\n1.png b\n", "got 1 twice"),
        ("1.jpg a\n5.jpg b\n", "got 1, not 5"),
        ("1.jpg\n", "an image and its class"),
        ("1.jpg,\n", "with a class"),
        ("", "an image and its class"),
        (b"\xff\xfe1", "an image and its class"),
        ("4.jpg a\n", "got 0, not 4"),
        ("1.jpg,640,a\n2.jpg,500,b\n", "expected two columns"),
        ("image,label\n", "a line without one"),
        ("1.jpg a\nVal/3.jpg b\n", "Val/3.jpg: expected folders train and val"),
    ],
)
def test_lists_that_are_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    """Each in a sentence, before anything is written."""
    for name in ("1.jpg", "2.jpg", "Val/3.jpg"):
        write(tmp_path / "raw" / name, IMAGE)
    write(tmp_path / "list", text if isinstance(text, bytes) else text.encode())
    error = refuses(*PACK, tmp_path / "raw", tmp_path / "shards", "--labels", tmp_path / "list")
    assert message in error and not (tmp_path / "shards").exists()


@pytest.mark.parametrize("layout", [kaggle, folders, class_tars, split_tars, parquet])
def test_some_classes_of_any_layout(tmp_path: Path, layout: Callable[[Path, Images], None]) -> None:
    """Those that a file lists, in any order; their indexes are among the sorted ones of the list."""
    images, wnids = image_set(), WNIDS[1:]
    layout(tmp_path / "raw", images)
    (tmp_path / "classes.txt").write_text(f"{WNIDS[2]} third\n\n{WNIDS[1]}\n")
    options = {"workers": 1, "quality": 97, "val_fraction": 0.0}
    pack(tmp_path / "raw", tmp_path / "shards", classes=tmp_path / "classes.txt", **options)
    images = of_train(images) if layout is class_tars else images
    check_shards(
        tmp_path / "shards", {key: image for key, image in images.items() if image[1] in wnids}, wnids
    )
    words = [row["words"] for row in read_json(tmp_path / "shards" / "classes.json")["classes"]]
    assert words == [{kaggle: "thing, 2", parquet: "class 1"}.get(layout, WNIDS[1]), "third"]
    (tmp_path / "classes.txt").write_text("n00000099\n")
    error = refuses(*PACK, tmp_path / "raw", tmp_path / "none", "--classes", tmp_path / "classes.txt")
    assert "classes.txt: expected classes of the train images" in error and not (tmp_path / "none").exists()


def test_kaggles_tree_of_some_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Validation images of classes that were removed from train/ are left out and counted, as is test/."""
    images = image_set()
    kaggle(tmp_path / "raw", images)
    shutil.rmtree(tmp_path / "raw" / TREE / "train" / WNIDS[1])
    pack(tmp_path / "raw", tmp_path / "shards", workers=1, quality=97)
    wnids = [WNIDS[0], WNIDS[2]]
    check_shards(
        tmp_path / "shards", {key: image for key, image in images.items() if image[1] in wnids}, wnids
    )
    output = capsys.readouterr().out
    assert "ignored 3 files" in output and "2 labels of classes that train lacks" in output


def test_sorted_kaggle_of_some_classes(tmp_path: Path) -> None:
    """Class folders of validation images whose class was removed from train/ are refused, until --classes lists the
    others; the csv, which is still there, changes nothing."""
    images = image_set()
    sorted_kaggle(tmp_path / "raw", images)
    lines = [f"{stem},{wnid} 1 2 3 4\n" for stem, (split, wnid, _) in images.items() if split == "val"]
    (tmp_path / "raw" / SOLUTION).write_text("".join(["ImageId,PredictionString\n", *lines]))
    shutil.rmtree(tmp_path / "raw" / TREE / "train" / WNIDS[1])
    assert "--classes" in refuses(*PACK, tmp_path / "raw", tmp_path / "shards")
    wnids = [WNIDS[0], WNIDS[2]]
    (tmp_path / "list").write_text("\n".join(wnids))
    pack(tmp_path / "raw", tmp_path / "shards", workers=1, quality=97, classes=tmp_path / "list")
    check_shards(
        tmp_path / "shards", {key: image for key, image in images.items() if image[1] in wnids}, wnids
    )


def test_archives_of_some_classes(raw: Path, tmp_path: Path) -> None:
    """ILSVRC-2012's train archive with three of its tars; without it, the validation images have all classes."""
    shutil.copytree(raw, tmp_path / "raw")
    train = tmp_path / "raw" / "ILSVRC2012_img_train.tar"
    tars = dict(sorted(read_tar(train).items())[4:7])
    train.write_bytes(tar_of(tars))
    pack(tmp_path / "raw", tmp_path / "shards", workers=1)
    pack(raw, tmp_path / "all", workers=1)
    train.unlink()
    pack(tmp_path / "raw", tmp_path / "val", workers=1)
    wnids = [row["wnid"] for row in read_json(tmp_path / "shards" / "classes.json")["classes"]]
    assert wnids == [name.removesuffix(".tar") for name in tars]
    everything = {split: read_shards(tmp_path / "all", split) for split in ("train", "val")}
    for split, samples in everything.items():
        some = [(key, label - 4, data) for key, label, data in samples if label in (4, 5, 6)]
        assert sorted(read_shards(tmp_path / "shards", split)) == sorted(some)
    assert (
        read_shards(tmp_path / "val", "val") == everything["val"]
        and not (tmp_path / "val" / "train").exists()
    )
    assert read_json(tmp_path / "val" / "classes.json") == read_json(tmp_path / "all" / "classes.json")


@pytest.mark.parametrize("names", ["wnids", "numbers"])
@pytest.mark.parametrize("place", ["val/", ""])
def test_validation_images_alone(tmp_path: Path, place: str, names: str) -> None:
    """With the classes of other shards: class folders in val/, or anywhere with --val-fraction 1, named by class or, as
    in ImageNet-V2, by its number. verify and stats take them."""
    images, numbers = image_set(), {wnid: str(2 * k + 1) for k, wnid in enumerate(WNIDS)}
    wnids = sorted([*WNIDS, "n00000001", "n00000021", "n00000032"])
    (tmp_path / "list").write_text("".join(f"{wnid}\n" for wnid in wnids))
    for stem, (_, wnid, data) in images.items():
        write(tmp_path / "raw" / place / (wnid if names == "wnids" else numbers[wnid]) / f"{stem}.jpg", data)
    options = {"workers": 1, "quality": 97, "val_fraction": None if place else 1.0}
    pack(tmp_path / "raw", tmp_path / "first", classes=tmp_path / "list", **options)
    pack(tmp_path / "raw", tmp_path / "shards", classes=tmp_path / "first" / "classes.json", **options)
    of_val = {key: ("val", *image[1:]) for key, image in images.items()}
    check_shards(tmp_path / "first", of_val, wnids)
    check_shards(tmp_path / "shards", of_val, wnids)
    run_ok("tools/make_shards.py", "verify", tmp_path / "shards")
    assert "24" in run_ok("tools/make_shards.py", "stats", tmp_path / "shards")


def test_parquet_of_validation_images_alone(tmp_path: Path) -> None:
    """Their labels are numbers of the classes in a file."""
    images = {key: image for key, image in image_set().items() if image[0] == "val"}
    parquet(tmp_path / "raw", {key: image for key, image in images.items() if image[1] == WNIDS[1]})
    for path in (tmp_path / "raw" / "data").glob("train*"):
        path.unlink()
    (tmp_path / "list").write_text("".join(f"{wnid}\n" for wnid in WNIDS))
    pack(tmp_path / "raw", tmp_path / "shards", workers=1, quality=97, classes=tmp_path / "list")
    check_shards(tmp_path / "shards", {key: image for key, image in images.items() if image[1] == WNIDS[1]})


def test_composed_and_decomposed_names_are_one_class(tmp_path: Path) -> None:
    """As macOS and Linux write an accent: in two splits, and twice in one."""
    names = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    for name, split, stem in ((names[0], "train", "a"), (names[1], "train", "b"), (names[1], "val", "c")):
        write(tmp_path / "raw" / split / name / f"{stem}.jpg", IMAGE)
    pack(tmp_path / "raw", tmp_path / "shards", workers=1)
    images = {"a": ("train", names[0], IMAGE), "b": ("train", names[0], IMAGE), "c": ("val", names[0], IMAGE)}
    check_shards(tmp_path / "shards", images, names[:1])


@pytest.mark.parametrize(
    ("suffix", "mode"), [("tar.gz", "w:gz"), ("tgz", "w:gz"), ("tar", "w:gz"), ("tar.bz2", "w:bz2")]
)
def test_compressed_tars(tmp_path: Path, suffix: str, mode: str) -> None:
    """Are refused, also under the name of a tar; after the command in the sentence they are packed."""
    images = of_train(image_set())
    split_tars(tmp_path / "tars", images)
    (tmp_path / "r aw").mkdir()
    with tarfile.open(tmp_path / "r aw" / f"train.{suffix}", "w:bz2" if "bz2" in suffix else "w:gz") as tar:
        for name, data in read_tar(tmp_path / "tars" / "train.tar").items():
            path = tmp_path / "member"
            path.write_bytes(data)
            tar.add(path, name)
    error = refuses(*PACK, tmp_path / "r aw", tmp_path / "shards")
    assert not (tmp_path / "shards").exists()
    subprocess.run(error.rpartition(" run ")[2].strip(), shell=True, check=True)
    pack(tmp_path / "r aw", tmp_path / "shards", workers=1, quality=97, val_fraction=0)
    check_shards(tmp_path / "shards", images)


@pytest.mark.parametrize(
    ("name", "message"), [("IMG_0.HEIC", "IMG_0.HEIC"), ("cat0", "1 files such as cat0")]
)
def test_files_that_are_no_images_by_name(tmp_path: Path, name: str, message: str) -> None:
    """A class of other files is refused with one of their names."""
    write(tmp_path / "raw" / "train" / "cat" / name, IMAGE)
    write(tmp_path / "raw" / "train" / "dog" / "1.jpg", IMAGE)
    error = refuses(*PACK, tmp_path / "raw", tmp_path / "shards")
    assert message in error and "train/cat" in error
    shutil.rmtree(tmp_path / "raw" / "train" / "dog")
    assert f"1 other files, such as {tmp_path}/raw/train/cat/{name}" in refuses(
        *PACK, tmp_path / "raw", tmp_path / "shards"
    )


def test_numbers_as_class_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Are sorted as text, as by torchvision, which a line of output says."""
    for k in (1, 2, 10):
        write(tmp_path / "raw" / "train" / str(k) / "1.jpg", IMAGE)
    pack(tmp_path / "raw", tmp_path / "shards", workers=1)
    assert "1, 10, 2" in capsys.readouterr().out
    assert [row["wnid"] for row in read_json(tmp_path / "shards" / "classes.json")["classes"]] == [
        "1",
        "10",
        "2",
    ]


def test_a_corrected_table_is_read_again(tmp_path: Path) -> None:
    """The cached listing of archives belongs to one table of labels."""
    images = image_set()
    files = {
        split: {f"{stem}.JPEG": data for stem, (of, _, data) in images.items() if of == split}
        for split in ("train", "val")
    }
    folders_of = {f"{images[name[:-5]][1]}/{name}": data for name, data in files["train"].items()}
    write(tmp_path / "raw" / "train.tar", tar_of(folders_of))
    write(tmp_path / "raw" / "val.tar", tar_of(files["val"]))
    for number in (0, 1):
        rows = {
            stem: WNIDS[(WNIDS.index(wnid) + number) % 3]
            for stem, (split, wnid, _) in images.items()
            if split == "val"
        }
        lines = [f"{stem},{wnid} 1 2 3 4\n" for stem, wnid in rows.items()]
        (tmp_path / "raw" / SOLUTION).write_text("".join(["ImageId,PredictionString\n", *lines]))
        data, validity = open_raw(tmp_path / "raw", tmp_path / "cache")
        assert validity is not None
        save_listing(tmp_path / "cache", data, validity)
        labels = {Path(image.name).stem: data.classes[image.label].wnid for image in data.splits["val"]}
        assert labels == rows


def test_classes_with_spaces_and_numbers_twice(tmp_path: Path) -> None:
    """A line of --classes may be a name with spaces, and words follow a tab; 0 and 00 are no numbers of
    classes, as both would be one."""
    for name in ("hot dog", "cat"):
        write(tmp_path / "raw" / "train" / name / f"{name[:3]}.jpg", IMAGE)
    (tmp_path / "list").write_text("hot dog\tsausage\ncat\n")
    pack(tmp_path / "raw", tmp_path / "shards", workers=1, classes=tmp_path / "list")
    check_shards(
        tmp_path / "shards",
        {"hot": ("train", "hot dog", IMAGE), "cat": ("train", "cat", IMAGE)},
        ["cat", "hot dog"],
    )
    write(tmp_path / "numbers" / "train" / "0" / "1.jpg", IMAGE)
    write(tmp_path / "numbers" / "train" / "00" / "1.jpg", IMAGE)
    error = refuses(*PACK, tmp_path / "numbers", tmp_path / "none", "--classes", tmp_path / "list")
    assert "list: expected classes of the train images" in error
