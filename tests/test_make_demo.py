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

from tests.helpers import run_ok
from tools import make_demo
from tools.packing.layouts import read_archives
from tools.photos import AXES, AXIS_STDS, make_photo


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Archives of 40 photograph-like images."""
    path = tmp_path_factory.mktemp("photos") / "raw"
    run_ok("tools/make_demo.py", path, "--photos", "40")
    return path


def test_archives_have_imagenets_layout_and_oddities(raw: Path) -> None:
    """A tar of class tars; grey, CMYK, progressive, EXIF-turned and PNG files; sides of 260 to 520; 80/20 by class."""
    kinds: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    with tarfile.open(raw / "ILSVRC2012_img_train.tar") as outer:
        for member in outer:
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                for image_member in inner:
                    assert image_member.name.startswith(member.name.removesuffix(".tar"))
                    assert image_member.name.endswith(".JPEG")
                    counts[member.name] += 1
                    with Image.open(inner.extractfile(image_member)) as image:  # type: ignore[arg-type]
                        assert min(image.size) >= 260 and max(image.size) <= 520
                        kinds[f"{image.format} {image.mode}"] += 1
                        kinds["progressive"] += "progressive" in image.info
                        kinds["exif"] += image.getexif().get(0x0112, 1) == 6
    with tarfile.open(raw / "ILSVRC2012_img_val.tar") as val:
        num_val = len(val.getnames())
    assert counts.total() + num_val == 1797 and num_val == pytest.approx(1797 * 0.2, abs=5)
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


def test_photos_are_like_photographs(photos: Path) -> None:
    """80/20, ten classes; labels are those that images were drawn for; bytes a pixel, sizes and colours are those of
    photographs."""
    data = read_archives(photos)
    train, val = list(data.splits["train"]), list(data.splits["val"])
    assert (len(train), len(val), len(data.classes)) == (32, 8, 10)
    assert {image.label for image in train} == set(range(10))
    drawn = {make_photo(number, 2012): make_demo.DIGIT_TO_WNID[number % 10] for number in (0, 5, 14, 19)}
    assert [data.classes[image.label].wnid for image in val[:4]] == [drawn[image.read()] for image in val[:4]]
    files = [image.read() for image in train + val]
    images = [Image.open(io.BytesIO(file)) for file in files]
    assert 0.35 < sum(map(len, files)) / sum(image.width * image.height for image in images) < 0.75
    assert sum(max(image.size) == 500 for image in images) > 16
    assert min(min(image.size) for image in images) >= 96
    assert [image.format for image in images].count("PNG") == 1
    samples = np.concatenate([np.asarray(image.convert("RGB")).reshape(-1, 3)[::97] for image in images])
    variances, axes = np.linalg.eigh(np.cov(samples.T))
    assert np.sqrt(variances[::-1]) == pytest.approx(AXIS_STDS, rel=0.35)
    assert abs(axes[:, -1] @ AXES[0]) > 0.98
