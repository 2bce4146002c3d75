"""Raw folders that are damaged, ambiguous or none: each is refused in one sentence that names what is wrong, exit code
2, and nothing is written."""

import gzip
import hashlib
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tests.helpers import jpeg, photo, read_tar, refuses, tar_of, write
from tests.layouts import SOLUTION, WNIDS, class_tars, folders, image_set, kaggle, parquet
from tools.make_demo import DIGIT_TO_WNID, make_devkit
from tools.make_shards import pack
from tools.packing import layouts
from tools.packing.layouts import read_devkit

IMAGE = jpeg(photo(np.random.default_rng(0), 60, 70))


def header(kind: bytes = b"0", **fields: object) -> bytes:
    """The header of a member of this kind."""
    info = tarfile.TarInfo("n00000011_1.JPEG")
    info.type = kind
    for name, value in fields.items():
        setattr(info, name, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def members_of(content: bytes) -> list[tarfile.TarInfo]:
    """The headers of a tar."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return tar.getmembers()


def with_header(content: bytes, member: int, other: bytes) -> bytes:
    """A tar with another header."""
    offset = members_of(content)[member].offset
    return content[:offset] + other + content[offset + 512 :]


def without_end(content: bytes) -> bytes:
    """A tar up to the end of its last member."""
    last = members_of(content)[-1]
    return content[: last.offset_data + -(-last.size // 512) * 512]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(tarfile.SYMTYPE, linkname="/etc/passwd"), "a link, a device or a sparse file"),
        (header(tarfile.LNKTYPE, linkname="1.jpg"), "a link, a device or a sparse file"),
        (header(tarfile.GNUTYPE_SPARSE), "a link, a device or a sparse file"),
        (header(tarfile.REGTYPE, size=10 * 2**30), "truncated inside"),
        (b"", "not a tar archive"),
        # A size of -512: Python's tarfile goes round for ever (CVE-2025-8194).
        (lambda tar: with_header(tar, 1, header(size=-512)), "damaged at byte|negative size"),
        (lambda tar: with_header(tar, 3, bytes(512)), "damaged header or hole at byte"),
        (without_end, "no end mark"),
        (lambda tar: tar + tar, "damaged header or hole at byte"),
        (tar_of([("1.jpg", IMAGE), ("2.jpg", IMAGE), ("1.jpg", IMAGE)]), "holds a file twice"),
    ],
)
def test_damaged_tars(content: object, message: str, tmp_path: Path) -> None:
    """Also those that tarfile reads up to a hole, a cut or a second archive, or that lose a file when unpacked."""
    raw = tmp_path / "raw"
    class_tars(raw, image_set())
    tar = raw / f"{WNIDS[0]}.tar"
    tar.write_bytes(content(tar.read_bytes()) if callable(content) else content)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message) as error:
        pack(raw, tmp_path / "shards", workers=1)
    assert WNIDS[0] in str(error.value) and "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


@pytest.mark.parametrize(
    ("tars", "named"),
    [
        ({"ILSVRC2012_img_test_v10102019": ["test/ILSVRC2012_test_00000001.JPEG"]}, "img_test_v10102019"),
        ({"val": ["1.JPEG", "2.JPEG"]}, "val.tar"),
        ({"train": ["1.JPEG"], "val": ["1.JPEG"]}, "train.tar"),
        ({"train": ["a.tar", "b.tar"]}, "train.tar"),
        (
            {"train": ["a/1.JPEG", "b/1.JPEG"], "val": ["a/1.JPEG", "c/1.JPEG"]},
            "expected training images of c",
        ),
        ({"part1": ["a/1.JPEG", "b/1.JPEG"], "part2": ["c/1.JPEG", "d/1.JPEG"]}, "part1.tar"),
        ({"00000": ["0.jpg", "0.json", "0.txt"], "00001": ["1.jpg", "1.json", "1.txt"]}, "00000.tar"),
        ({"00000": ["a/0.jpg", "a/0.cls"]}, "make_shards.py adopt"),
        ({"a": ["1.JPEG"], "b": ["2.JPEG"], "val": ["3.JPEG"]}, "val.tar"),
        ({"imagenet": ["Train/a/1.JPEG", "Train/b/1.JPEG", "Val/a/1.JPEG"]}, "Train: expected a class"),
        ({"imagenet": ["imagenet/train/a/1.JPEG", "docs/logo.png"]}, "train: expected a class"),
        ({"images": ["1.jpg", "2.jpg"], "labels": ["1.txt", "2.txt"]}, "labels.tar"),
        ({"": ["cat/1.jpg", "dog/1.jpg"], "extra": ["1.jpg"]}, "extra.tar"),
        ({"": ["val/dog/1.jpg", "train.tar.gz"]}, "gunzip"),
        ({"": ["Train/cat/1.jpg", "Train/dog/1.jpg", "Val/cat/1.jpg"]}, "Train: expected a class"),
        ({"": ["ILSVRC2012_img_train/n01/1.jpg", "ILSVRC2012_img_val/1.jpg"]}, "the name of a split"),
        ({"": ["imagenet/train/cat/1.jpg", "docs/1.jpg"]}, "train: expected a class"),
        ({"": ["a/train/cat/1.jpg", "b/train/cat/1.jpg"]}, "train: expected a class"),
        ({"": ["1.jpg", "2.jpg"]}, "no class folders found"),
        (
            {"": ["cat/1.jpg", "dog/1.jpg", "stray.jpg"]},
            "stray.jpg: expected no images next to class folders",
        ),
        (
            {"n01": ["1.jpg"], "n02": ["1.jpg"], "": ["stray.jpg"]},
            "stray.jpg: expected no images next to class",
        ),
        ({"all": ["n01.tar", "n02.tar", "samples/1.jpg"]}, "expected class folders or tars, got both"),
        ({"all": ["train/n01/1.jpg", "train/n02.tar"]}, "expected class folders or tars, got both"),
        ({"all": ["a/n01.tar", "b/n01.tar"]}, "all.tar/a: expected images"),
        ({"n01": ["1.jpg"], "n02": ["1.jpg"], "": ["n03.tar.gz"]}, "gunzip n03.tar.gz"),
        ({"n01": ["1.jpg"], "n02": ["1.jpg"], "": ["n03.TAR"]}, "n03.TAR: expected NAME.tar"),
        ({"all": ["n01.tar", "n02.tar", "n03.tgz"]}, "n03.tgz: expected NAME.tar"),
        ({"": ["train/cat/1.jpg", "val.zip"]}, "unzip val.zip"),
        ({"": ["train/cat/1.jpg", "Val/cat/1.jpg"]}, "Val: expected only train and val"),
        ({"": ["training/cat/1.jpg", "val/cat/1.jpg"]}, "training: expected only train and val"),
        ({"": ["train/cat/1.jpg", "val/cat/1.jpg", "valid/cat/1.jpg"]}, "valid: expected only train and val"),
        ({"": ["train/cat/1.jpg", "bus/1.jpg"]}, "bus: expected only train and val"),
    ],
)
def test_ambiguous_sources(tmp_path: Path, tars: dict[str, list[str]], named: str) -> None:
    """Tars, and folders without a name: test images alone, no training images, tars in tars, shards of WebDataset,
    unusual names of splits: refused also with --on-bad skip."""
    for name, members in tars.items():
        content = dict.fromkeys(members, IMAGE)
        for path, data in {f"{name}.tar": tar_of(content)}.items() if name else content.items():
            write(tmp_path / "raw" / path, data)
    options = ("--on-bad", "skip", "--workers", "1")
    message = refuses("tools/make_shards.py", "pack", tmp_path / "raw", tmp_path / "shards", *options)
    assert named in message and not (tmp_path / "shards").exists()


def write_parquet(path: Path, *rows: dict[str, object], **options: object) -> None:
    """Write a parquet file, with a description that is not a tree."""
    path.parent.mkdir(exist_ok=True)
    table = pyarrow.Table.from_pylist(list(rows)).replace_schema_metadata({"huggingface": '{"info": "x"}'})
    pyarrow.parquet.write_table(table, path, **options)


FILE = {"bytes": b"", "path": "x.JPEG"}


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        (None, lambda raw: raw.mkdir(), "no images found"),
        (None, lambda raw: (raw / "train").mkdir(parents=True), "no images found"),
        (kaggle, lambda raw: (raw / SOLUTION).unlink(), f"CLS-LOC/val: no class folders found.*{SOLUTION}"),
        (kaggle, lambda raw: (raw / SOLUTION).write_text("a,b\n1,2\n"), f"expected a class in .*{SOLUTION}"),
        (kaggle, lambda raw: write(raw / "ILSVRC/Data/CLS-LOC/val/again/ILSVRC2012_val_00000003.JPEG", IMAGE),
         "expected one image ILSVRC2012_val_00000003"),
        (kaggle, lambda raw: write(raw / "ILSVRC/Data/CLS-LOC/val" / WNIDS[0] / "x.JPEG", IMAGE), "got both; sort"),
        (kaggle, lambda raw: next(raw.glob("ILSVRC/Data/CLS-LOC/val/*")).unlink(),
         "expected the 6 images .* got 5, not"),
        (None, lambda raw: write_parquet(raw / "train.parquet", {"image": {"bytes": "text", "path": "a"}, "label": 0}),
         "expected image: struct<bytes: binary.*, got image: struct<bytes: string"),
        (None, lambda raw: write_parquet(raw / "train.parquet", {"image": FILE, "label": -1}), "class index, got -1"),
        (None, lambda raw: write_parquet(raw / "train.parquet", {"picture": b"", "label": 0}),
         "and label, got picture: binary, label: int64"),
        (None, lambda raw: write(raw / "train-0.parquet", b"PAR1 no"), "not a data set of images and labels"),
        (parquet, lambda raw: next(raw.glob("*/train-*1-of*")).unlink(), "part 1 of train: expected a file"),
        (folders, lambda raw: os.mkfifo(raw / "train" / WNIDS[0] / "a.jpg"), "not a regular file"),
        (folders, lambda raw: (raw / "train" / WNIDS[0] / "x.jpg").symlink_to("no"), "broken link"),
        (folders, lambda raw: (raw / "train" / WNIDS[0] / "loop").symlink_to(raw / "train"), "forms a loop"),
        (None, lambda raw: write(raw / "train" / os.fsdecode(b"b\xe4r") / "1.jpg", b""),
         r"b\\xe4r: expected a UTF-8 name"),
    ],
)  # fmt: skip
def test_other_folders(
    layout: Callable[..., None] | None, change: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    """Empty, incomplete, damaged or ambiguous ones."""
    raw = tmp_path / "raw"
    if layout:
        layout(raw, image_set())
    change(raw)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        pack(raw, tmp_path / "shards", workers=1)
    assert "\n" not in str(error.value) and not (tmp_path / "shards").exists()


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00001-a1b2", "train-00000-of-00001-ff00"],
        ["train-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002"],
        ["train-00000-of-00001", "train_small-00000-of-00001"],
        ["validation-00000-of-00001", "val-00000-of-00001", "train-00000-of-00001"],
    ],
)
def test_two_pushes_of_parquet(tmp_path: Path, names: list[str]) -> None:
    """The Hub keeps the files of earlier pushes, under another hash or in another number of parts: every image would be
    packed twice."""
    for name in names:
        row = {"image": {"bytes": IMAGE, "path": "1.jpg"}, "label": 0}
        write_parquet(tmp_path / "raw" / f"{name}.parquet", row)
    command = ("tools/make_shards.py", "pack", tmp_path / "raw", tmp_path / "shards")
    assert "keep the files of one" in refuses(*command) and not (tmp_path / "shards").exists()


def test_a_damaged_page_of_parquet(tmp_path: Path) -> None:
    """Is found when its images are read; the sentence names the file."""
    rng = np.random.default_rng(0)
    rows = [{"image": {"bytes": rng.bytes(5000), "path": f"{k}.JPEG"}, "label": 0} for k in range(9)]
    path = tmp_path / "raw" / "train-0.parquet"
    write_parquet(path, *rows, compression="none", use_dictionary=False)
    data = path.read_bytes()
    path.write_bytes(data[:4] + b"\xff" * 40 + data[44:])
    with pytest.raises(ValueError, match=r"train-0\.parquet: damaged near row 0"):
        pack(tmp_path / "raw", tmp_path / "shards", workers=1)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package to install is named."""
    parquet(tmp_path / "raw", image_set())
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        pack(tmp_path / "raw", tmp_path / "shards", workers=1)


def test_a_folder_that_cannot_be_read_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its images are not lost silently."""
    folders(tmp_path / "raw", image_set())
    real = os.scandir

    def scandir(path: object) -> object:
        if str(path).endswith("er"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError):
        pack(tmp_path / "raw", tmp_path / "shards", workers=1)


def test_an_output_among_the_images(tmp_path: Path) -> None:
    """It would be read as images by the next run."""
    folders(tmp_path / "raw", image_set())
    with pytest.raises(ValueError, match="expected a folder outside of"):
        pack(tmp_path / "raw", tmp_path / "raw" / "train" / "shards", workers=1)
    assert not (tmp_path / "raw" / "train" / "shards").exists()


@pytest.mark.parametrize(("at", "value"), [(384, 0), (652, 128)])
def test_a_devkit_that_crashes_scipys_reader(tmp_path: Path, at: int, value: int) -> None:
    """One byte of meta.mat is enough for a segmentation fault (scipy 1.17); it is a sentence here."""
    member, path = "ILSVRC2012_devkit_t12/data/meta.mat", tmp_path / "devkit.tar.gz"
    path.write_bytes(gzip.compress(make_devkit(dict.fromkeys(DIGIT_TO_WNID.values(), 1), [1])))
    assert len(read_devkit(path)[0]) == 10
    files = read_tar(path)
    mat = bytearray(files[member])
    mat[at] = value
    path.write_bytes(gzip.compress(tar_of({**files, member: bytes(mat)})))
    with pytest.raises(ValueError, match=r"devkit.tar.gz: not the devkit .*\(unreadable meta.mat"):
        read_devkit(path)


def test_md5(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Archives that are not the published ones are refused by name; those with the right sums pass."""
    message = refuses("tools/make_shards.py", "pack", raw, tmp_path / "shards", "--check-md5")
    assert "ILSVRC2012_img_train.tar: expected MD5" in message and not (tmp_path / "shards").exists()
    sums = {name: hashlib.md5((raw / name).read_bytes()).hexdigest() for name in layouts.ARCHIVES}
    monkeypatch.setattr(layouts, "ARCHIVES", sums)
    layouts.verify_md5(raw, "ILSVRC-2012 archives")
