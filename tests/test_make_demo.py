"""The demo is a faithful miniature of the raw archives, oddities included, and deterministic."""

import io
import itertools
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat

from tests.helpers import refuses, run_ok
from tools import make_demo
from tools.packing.layouts import read_archives
from tools.photos import AXES, AXIS_STDS, make_photo


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Archives of 40 photograph-like images."""
    path = tmp_path_factory.mktemp("photos") / "raw"
    run_ok("tools/make_demo.py", path, "--photos", "40")
    return path


def test_same_seed_same_bytes(raw: Path, tmp_path: Path) -> None:
    """Rendered again, over what an interrupted run had left, archives have the same bytes; not so with another seed."""
    again = tmp_path / "again"
    again.mkdir()
    (again / "ILSVRC2012_img_train.tar").write_bytes(b"half")
    make_demo.make_demo(again)
    archives = [path.name for path in sorted(raw.glob("ILSVRC*"))]
    assert len(archives) == 3
    assert all((raw / name).read_bytes() == (again / name).read_bytes() for name in archives)
    one, two = (make_demo.render_digit(np.ones((8, 8)), np.random.default_rng(seed)) for seed in (1, 2))
    assert one.size != two.size


def test_archives_have_imagenets_layout_and_oddities(raw: Path) -> None:
    """A tar of class tars; grey, CMYK, progressive, EXIF-turned and PNG files; sides of 260 to 520; 80/20 by class."""
    kinds: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    with tarfile.open(raw / "ILSVRC2012_img_train.tar") as outer:
        for member in outer:
            file = outer.extractfile(member)
            assert file is not None
            with tarfile.open(fileobj=io.BytesIO(file.read())) as inner:
                for image_member in inner:
                    data = inner.extractfile(image_member)
                    assert data is not None and image_member.name.startswith(member.name.removesuffix(".tar"))
                    assert image_member.name.endswith(".JPEG")
                    counts[member.name] += 1
                    with Image.open(data) as image:
                        assert min(image.size) >= 260 and max(image.size) <= 520
                        kinds[f"{image.format} {image.mode}"] += 1
                        kinds["progressive"] += "progressive" in image.info
                        kinds["exif"] += image.getexif().get(0x0112, 1) == 6
    with tarfile.open(raw / "ILSVRC2012_img_val.tar") as val:
        num_val = len(val.getnames())
    assert sum(counts.values()) + num_val == 1797 and num_val == pytest.approx(1797 * 0.2, abs=5)
    assert len(counts) == 10 and min(counts.values()) > 130
    assert kinds["PNG RGB"] == 1
    assert all(kinds[kind] > 10 for kind in ("JPEG L", "JPEG CMYK", "JPEG RGB", "progressive", "exif"))


def test_label_orders_differ(raw: Path) -> None:
    """ILSVRC2012_ID, sorted wnids and digits are three orders, and the hierarchy has inner nodes, as in ImageNet."""
    with tarfile.open(raw / "ILSVRC2012_devkit_t12.tar.gz") as devkit:
        file = devkit.extractfile("ILSVRC2012_devkit_t12/data/meta.mat")
        assert file is not None
        synsets = loadmat(io.BytesIO(file.read()), squeeze_me=True)["synsets"]
    leaves = [row for row in synsets if row["num_children"] == 0]
    assert len(synsets) > len(leaves) == 10
    by_id = [str(row["WNID"]) for row in sorted(leaves, key=lambda row: int(row["ILSVRC2012_ID"]))]
    orders = [by_id, sorted(by_id), [make_demo.DIGIT_TO_WNID[digit] for digit in range(10)]]
    for one, two in itertools.combinations(orders, 2):
        assert sum(a == b for a, b in zip(one, two, strict=True)) <= 2


def test_other_files_are_not_overwritten(raw: Path, tmp_path: Path) -> None:
    """A second run has nothing to do; a folder with something else in it is refused and left alone."""
    assert "nothing to do" in run_ok("tools/make_demo.py", raw)
    (tmp_path / "thesis.tex").write_text("x")
    assert "got other files" in refuses("tools/make_demo.py", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_photos_have_the_labels_they_were_drawn_for(photos: Path) -> None:
    """80/20, ten classes, and the labels of the packer's reader are the classes that the images were drawn for."""
    data = read_archives(photos)
    train, val = list(data.splits["train"]), list(data.splits["val"])
    assert (len(train), len(val), len(data.classes)) == (32, 8, 10)
    assert {image.label for image in train} == set(range(10))
    drawn = {make_photo(number, 2012): make_demo.DIGIT_TO_WNID[number % 10] for number in (0, 5, 14, 19)}
    assert [data.classes[image.label].wnid for image in val[:4]] == [drawn[image.read()] for image in val[:4]]


def test_photos_are_like_photographs(photos: Path) -> None:
    """Bytes a pixel, sizes and colours are those of photographs."""
    files = [image.read() for split in read_archives(photos).splits.values() for image in split]
    images = [Image.open(io.BytesIO(file)) for file in files]
    assert 0.35 < sum(map(len, files)) / sum(image.width * image.height for image in images) < 0.75
    assert (
        sum(max(image.size) == 500 for image in images) > 16 and min(min(each.size) for each in images) >= 96
    )
    assert [image.format for image in images].count("PNG") == 1
    samples = np.concatenate([np.asarray(image.convert("RGB")).reshape(-1, 3)[::97] for image in images])
    variances, axes = np.linalg.eigh(np.cov(samples.T))
    assert np.sqrt(variances[::-1]) == pytest.approx(AXIS_STDS, rel=0.35)
    assert abs(axes[:, -1] @ AXES[0]) > 0.98


def test_photos_same_seed_same_bytes(photos: Path, tmp_path: Path) -> None:
    """Archives depend on the seed alone; digits and photos do not overwrite each other."""
    make_demo.make_demo(tmp_path / "again", photos=40)
    archives = [path.name for path in sorted(photos.glob("ILSVRC*"))]
    assert len(archives) == 3
    assert all((photos / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in archives)
    assert make_photo(3, 2012) == make_photo(3, 2012)
    assert len({make_photo(3, 2012), make_photo(4, 2012), make_photo(3, 1)}) == 3
    assert "nothing to do" in run_ok("tools/make_demo.py", photos, "--photos", "40")
    for other in ((), ("--photos", "41"), ("--photos", "40", "--seed", "1")):
        assert "got other files" in refuses("tools/make_demo.py", photos, *other)
    assert "--photos: expected" in refuses("tools/make_demo.py", tmp_path / "few", "--photos", "19")
    assert not (tmp_path / "few").exists()
