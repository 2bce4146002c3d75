"""Raw folders that are hostile, damaged or none: each is refused in a sentence, or packed under safe names, and nothing
is written outside of the output."""

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline.files import read_json
from tests.helpers import jpeg, tar_of, write
from tests.layouts import WNIDS, class_tars, folders, image_set, kaggle, parquet
from tests.mutate import pax
from tools.make_shards import pack

IMAGE = {"bytes": b"", "path": "x.JPEG"}


def parquet_of(raw: Path, row: dict[str, object]) -> None:
    """A file of one row."""
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), raw / "train-0.parquet")


def special(kind: bytes, **fields: object) -> bytes:
    """A tar with one member that is no plain file, or lies about its size."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("n00000011_1.JPEG")
        info.type = kind
        for name, value in fields.items():
            setattr(info, name, value)
        tar.addfile(info)
    return out.getvalue()


def headers(content: bytes) -> list[tarfile.TarInfo]:
    """The members of a tar."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return tar.getmembers()


def hole(content: bytes, member: int) -> bytes:
    """A tar with one header zeroed."""
    offset = headers(content)[member].offset
    return content[:offset] + bytes(512) + content[offset + 512 :]


def backwards(content: bytes) -> bytes:
    """A tar whose second member has a size of -512: Python's tarfile goes round for ever (CVE-2025-8194)."""
    offset = headers(content)[1].offset
    header = bytearray(content[offset : offset + 512])
    header[124:136] = (256**12 - 512).to_bytes(12, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:offset] + bytes(header) + content[offset + 512 :]


def members_end(content: bytes) -> int:
    """Where the last member of a tar ends."""
    last = headers(content)[-1]
    return last.offset_data + -(-last.size // 512) * 512


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (special(tarfile.SYMTYPE, linkname="/etc/passwd"), "a link, a device or a sparse file"),
        (special(tarfile.LNKTYPE, linkname="n00000011_0.JPEG"), "a link, a device or a sparse file"),
        (special(tarfile.CHRTYPE), "a link, a device or a sparse file"),
        (special(tarfile.REGTYPE, size=10 * 2**30), "truncated inside"),
        (lambda tar: pax(b"20 GNU.sparse.size=\n", b"x") + tar, "not a tar archive|damaged at byte"),
        (
            lambda tar: pax(b"20 GNU.sparse.map=a\n", b"x") + tar,
            "not a tar archive|damaged at byte|sparse",
        ),
        (b"", "not a tar archive"),
        (b"\x00" * 10240, "no images found"),
        (lambda tar: backwards(tar), "damaged at byte|negative size"),
        (lambda tar: hole(tar, 3), "damaged header or hole at byte"),
        (lambda tar: tar[: members_end(tar)], "no end mark"),
        (lambda tar: tar + tar, "damaged header or hole at byte"),
        (b"garbage" * 1000, "not a tar archive"),
    ],
)
def test_hostile_tars_are_refused(content: object, message: str, tmp_path: Path) -> None:
    """Also those that tarfile reads up to a hole, a cut or a second archive: one sentence that names the archive, and
    nothing written."""
    raw = tmp_path / "raw"
    class_tars(raw, image_set())
    tar = raw / f"{WNIDS[0]}.tar"
    tar.write_bytes(content(tar.read_bytes()) if callable(content) else content)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message) as error:
        pack(raw, tmp_path / "shards", workers=1)
    assert WNIDS[0] in str(error.value) and "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


def test_hostile_names_become_safe_keys(tmp_path: Path) -> None:
    """Paths that lead out, repeated names, dots, spaces, newlines and bytes that are no UTF-8: every image is packed
    under a key of its own, the manifest tells which, and nothing is written outside of the output."""
    raw, shards = tmp_path / "a" / "raw", tmp_path / "a" / "shards"
    raw.mkdir(parents=True)
    names = [
        "../../evil.JPEG",
        "/abs/olute.JPEG",
        "x.y.JPEG",
        "sp ace.JPEG",
        "new\nline.JPEG",
        "0_7.JPEG",
        "1_2.JPEG",
    ]
    names += [
        os.fsdecode(b"b\xff\xfe.JPEG"),
        "a" * 150 + ".JPEG",
        "plain.JPEG",
        "d/twice.JPEG",
        "e/twice.JPEG",
    ]
    images = [jpeg(np.full((60, 60, 3), 20 * number, np.uint8)) for number in range(len(names) + 1)]
    names = [f"n00000011/{name}" for name in names]
    write(
        raw / "train.tar",
        tar_of({**dict(zip(names, images, strict=False)), "n00000022/other.JPEG": images[-1]}),
    )
    pack(raw, shards, samples_per_shard=4, workers=1, quality=97, val_fraction=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["raw", "shards"]
    renamed = read_json(shards / "train" / "manifest.json")["renamed"]
    tars = [str(path) for path in sorted((shards / "train").glob("*.tar"))]
    found = {
        s["__key__"]: s["jpg"] for s in webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)
    }
    assert len(found) == len(names) + 1 and {"plain", "evil", "olute", "other"} <= set(found)
    shown = {name: os.fsencode(name).decode("utf-8", "backslashreplace") for name in names}
    key_of = {name: key for key, name in renamed.items()}
    for number, name in enumerate(names):
        key = key_of.get(shown[name], Path(name).stem)
        colour = np.asarray(Image.open(io.BytesIO(found[key]))).astype(int)
        assert np.abs(colour - 20 * number).max() <= 3, name


def odd_parquet(raw: Path, **row: object) -> None:
    """A parquet file of one row, and of a description that is no tree."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([{"label": 0, **row}]).replace_schema_metadata(
        {"huggingface": '{"info": "x"}'}
    )
    pyarrow.parquet.write_table(table, raw / "train-0.parquet")


def test_a_damaged_page_of_parquet(tmp_path: Path) -> None:
    """Is found when its images are read, and told with the file."""
    rng = np.random.default_rng(0)
    rows = [{"image": {"bytes": rng.bytes(5000), "path": f"{k}.JPEG"}, "label": 0} for k in range(9)]
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "raw" / "train-0.parquet"
    path.parent.mkdir()
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), path, compression="none", use_dictionary=False
    )
    data = path.read_bytes()
    path.write_bytes(data[:4] + b"\xff" * 40 + data[44:])
    with pytest.raises(ValueError, match=r"train-0\.parquet: damaged near row 0"):
        pack(tmp_path / "raw", tmp_path / "shards", workers=1)


def trees(raw: Path, *folders: str) -> None:
    """An image in each of these folders."""
    for number, folder in enumerate(folders):
        write(raw / folder / f"{number}.jpg", jpeg(np.full((60, 60, 3), 20 * number, np.uint8)))


def twice(raw: Path) -> None:
    """Replace a validation image by a copy of another."""
    images = sorted((raw / "ILSVRC/Data/CLS-LOC/val").iterdir())
    images[0].unlink()
    write(images[0].parent / "again" / images[1].name, images[1].read_bytes())


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda raw: None, "no images found"),
        (lambda raw: (raw / "train").mkdir(), "no class folders found"),
        (lambda raw: (raw / "train" / "cat").mkdir(parents=True), "no images found"),
        (
            lambda raw: (kaggle(raw, image_set()), (raw / "LOC_val_solution.csv").unlink()),
            "LOC_val_solution.csv",
        ),
        (
            lambda raw: (kaggle(raw, image_set()), (raw / "LOC_val_solution.csv").write_text("a,b\n1,2\n")),
            "Kaggle",
        ),
        (
            lambda raw: (kaggle(raw, image_set()), (raw / "LOC_val_solution.csv").write_bytes(b"\xff\xfea")),
            "Kaggle",
        ),
        (
            lambda raw: odd_parquet(raw, image={"bytes": "text", "path": "a"}),
            "image.bytes: expected binary, got string",
        ),
        (
            lambda raw: odd_parquet(raw, image={"bytes": b"", "path": "a"}, label="x"),
            "expected a class index in row 0, got x",
        ),
        (lambda raw: write(raw / "a.tar", tar_of({"1.jpg": b"", "1.cls": b"0"})), "make_shards.py adopt"),
        (
            lambda raw: (raw / "train-0.parquet").write_bytes(b"PAR1 no"),
            "not a data set of images and labels",
        ),
        (
            lambda raw: parquet_of(raw, {"picture": b"", "label": 0}),
            r"lacks the columns image\.bytes, image\.path",
        ),
        (
            lambda raw: parquet_of(raw, {"image": IMAGE, "label": -1}),
            "expected a class index in row 0, got -1",
        ),
        (lambda raw: write(raw / "val" / "dog" / "1.jpg", b""), "val: expected a class"),
        (
            lambda raw: (folders(raw, image_set()), os.mkfifo(raw / "train" / WNIDS[0] / "a.jpg")),
            "not a regular file",
        ),
        (
            lambda raw: (folders(raw, image_set()), (raw / "train" / "n00000011" / "x.jpg").symlink_to("no")),
            "broken link",
        ),
        (
            lambda raw: write(raw / "train" / os.fsdecode(b"b\xe4r") / "1.jpg", b""),
            r"b\\xe4r: expected a UTF-8 name",
        ),
        (
            lambda raw: (parquet(raw, image_set()), next(raw.glob("*/train-*1-of*")).unlink()),
            "lacks train-00001-of-00002",
        ),
        (lambda raw: (kaggle(raw, image_set()), twice(raw)), r"expected 6 images, .* got 6, \d distinct"),
        (lambda raw: trees(raw, "Train/cat", "Train/dog", "Val/cat"), "Train: expected a class"),
        (lambda raw: trees(raw, "training_set/cat", "test_set/dog"), "got the name of a split"),
        (lambda raw: trees(raw, "ILSVRC2012_img_train/n01", "ILSVRC2012_img_val"), "got the name of a split"),
        (
            lambda raw: trees(raw, "imagenet/train/cat", "imagenet/val/cat", "docs"),
            "train: expected a class",
        ),
        (lambda raw: trees(raw, "a/train/cat", "b/train/cat"), "train: expected a class"),
        (
            lambda raw: (
                trees(raw, "cat", "dog"),
                write(raw / "extra.tar", tar_of({"1.jpg": IMAGE["bytes"]})),
            ),
            "extra.tar",
        ),
    ],
)
def test_other_folders_are_refused(prepare: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    """One sentence that says what is missing, exit code 2, nothing written."""
    raw = tmp_path / "raw"
    raw.mkdir()
    prepare(raw)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        pack(raw, tmp_path / "shards", workers=1)
    assert "\n" not in str(error.value) and not (tmp_path / "shards").exists()


def test_a_folder_that_cannot_be_read_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its images are not lost silently."""
    raw = tmp_path / "raw"
    folders(raw, image_set())
    real = os.scandir

    def scandir(path: object) -> object:
        if str(path).endswith("er"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError):
        pack(raw, tmp_path / "shards", workers=1)


def test_a_circle_of_links_ends(tmp_path: Path) -> None:
    """Links that lead back are found out, not followed for ever."""
    raw = tmp_path / "raw"
    folders(raw, image_set())
    (raw / "train" / WNIDS[0] / "loop").symlink_to(raw / "train")
    with pytest.raises(ValueError, match="forms a loop"):
        pack(raw, tmp_path / "shards", workers=1)


def test_an_output_among_the_images_is_refused(tmp_path: Path) -> None:
    """It would be read as images by the next run."""
    folders(tmp_path / "raw", image_set())
    with pytest.raises(ValueError, match="expected a folder outside of"):
        pack(tmp_path / "raw", tmp_path / "raw" / "train" / "shards", workers=1)
    assert not (tmp_path / "raw" / "train" / "shards").exists()
