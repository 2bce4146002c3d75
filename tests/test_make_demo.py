"""The demo is a faithful miniature of the raw archives, oddities included, and deterministic."""

import io
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from scipy.io import loadmat

from tests.conftest import run_python
from tools import make_demo


def test_same_seed_same_bytes(raw: Path, tmp_path: Path) -> None:
    """A second process writes the same archives; another seed others."""
    again = tmp_path / "again"
    make_demo.make_demo(again)
    archives = [path.name for path in sorted(raw.glob("ILSVRC*"))]
    assert len(archives) == 3
    assert all((raw / name).read_bytes() == (again / name).read_bytes() for name in archives)
    rgb = make_demo.render(make_demo.np.ones((8, 8)), make_demo.np.random.default_rng(1))
    other = make_demo.render(make_demo.np.ones((8, 8)), make_demo.np.random.default_rng(2))
    assert rgb.size != other.size


def test_layout_and_oddities(raw: Path) -> None:
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
    digits = [make_demo.DIGIT_TO_WNID[digit] for digit in range(10)]
    orders = [by_id, sorted(by_id), digits]
    assert all(a != b for a in orders for b in orders if a is not b)
    assert all(
        sum(a == b for a, b in zip(one, two, strict=True)) <= 2
        for one, two in ((by_id, sorted(by_id)), (digits, sorted(digits)))
    )


def test_second_run_and_foreign_folder(raw: Path, tmp_path: Path) -> None:
    """A second run has nothing to do; a folder with something else in it is refused and left alone."""
    again = run_python("tools/make_demo.py", raw)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    interrupted = tmp_path / "interrupted"
    interrupted.mkdir()
    (interrupted / "ILSVRC2012_img_train.tar").write_bytes(b"half")
    make_demo.make_demo(interrupted)
    assert (interrupted / "ILSVRC2012_img_train.tar").read_bytes() == (raw / "ILSVRC2012_img_train.tar").read_bytes()
    tmp_path = tmp_path / "foreign"
    tmp_path.mkdir()
    (tmp_path / "thesis.tex").write_text("x")
    refused = run_python("tools/make_demo.py", tmp_path)
    assert refused.returncode == 2 and "holds something else" in refused.stderr and "Traceback" not in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
