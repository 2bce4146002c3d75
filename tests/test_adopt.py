"""Adoption: shards that the webdataset library wrote give through DALI what that library reads; what the loader would
misread is refused with shard and sample, or converted with --convert, and SRC is never touched."""

import io
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from pipeline.eigenbasis import Eigenbasis
from pipeline.errors import DataError
from pipeline.files import read_json, write_json
from pipeline.loader import decoded_batches, train_loader, val_loader
from pipeline.shards import open_shards
from tests.helpers import Members, files, jpeg, photo, read_tar, refuses, run_ok, tar_of, write, write_foreign
from tools.compute_pca import compute_pca
from tools.packing.adopt import adopt
from tools.packing.verify import verify

IMAGE = jpeg(photo(np.random.default_rng(9)))


@pytest.mark.parametrize(("extension", "newline"), [("jpg", b""), ("JPEG", b"\n"), ("jpeg", b" \r\n")])
def test_dali_reads_what_webdataset_reads(
    tmp_path: Path, plain_basis: Eigenbasis, extension: str, newline: bytes
) -> None:
    """Two splits in one read-only folder: the validation loader hands out the library's images and labels in stored
    order, the training loader the same labels; SRC stays as it was; the names are kept."""
    src, shards = tmp_path / "src", tmp_path / "shards"
    labels = [(7 * number) % 13 + 990 * (number % 2) for number in range(60)]
    write_foreign(src, "imagenet1k-train", labels, 22, extension, newline)
    write_foreign(src, "imagenet1k-validation", labels[:9], 5, extension, newline)
    before = files(src)
    src.chmod(0o555)
    adopt(src, shards, split="train", pattern="imagenet1k-train-{0000..0002}.tar", workers=2)
    adopt(src, shards, split="val", pattern="imagenet1k-validation-*.tar", workers=1)
    src.chmod(0o755)
    assert files(src) == before
    train, val = open_shards(shards, "train"), open_shards(shards, "val")
    assert [Path(tar).name for tar in train.tars] == [f"imagenet1k-train-000{n}.tar" for n in range(3)]
    assert all(Path(tar).is_symlink() and Path(tar).readlink().is_absolute() for tar in train.tars)
    assert len(train.classes) == max(labels) + 1 and train.classes[7].wnid == "000007"

    place: dict[str, Any] = {"rank": 0, "num_ranks": 1, "device": "cpu", "basis": plain_basis}
    tars = [str(path) for path in sorted(src.glob("imagenet1k-validation-*.tar"))]
    expected = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert [int(sample["cls"]) for sample in expected] == labels[:9]
    (batch,) = val_loader(val, batch_size=9, **place)
    assert batch.labels.tolist() == labels[:9]
    for decoded, sample in zip(next(decoded_batches(val, 9)).numpy(), expected, strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(sample[extension.lower()])))
        assert np.abs(decoded.astype(int) - pixels).max() <= 2
    seen = torch.cat([batch.labels for batch in train_loader(train, batch_size=6, seed=1, **place)])
    assert sorted(seen.tolist()) == sorted(labels)


def test_again_and_half_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A finished adoption has nothing to do, one that was killed is finished with equal bytes, and a folder that
    holds anything else is left alone."""
    src, shards = tmp_path / "src", tmp_path / "shards"
    write_foreign(src, "x", [0, 1, 2, 1, 0], 2)
    command = partial(adopt, src, shards, split="train", workers=1)
    command(pattern="x-*.tar")
    before = files(shards)
    assert len(before) == 3 + 3 + 3
    capsys.readouterr()
    command(pattern="x-*.tar")
    assert "nothing to do" in capsys.readouterr().out
    for name in ("manifest.json", "samples.npy", "x-0001.tar", "x-0002.idx"):
        (shards / "train" / name).unlink()
    command(pattern="x-*.tar")
    assert files(shards) == before
    with pytest.raises(ValueError, match="packed, or adopted from elsewhere"):
        command(pattern="x-000*.tar")
    link = shards / "train" / "x-0000.tar"
    link.unlink()
    link.write_bytes(b"somebody's own")
    with pytest.raises(ValueError, match=r"expected the shards of .*, got x-0000.tar"):
        command(pattern="x-*.tar")
    assert link.read_bytes() == b"somebody's own"


def test_classes(tmp_path: Path) -> None:
    """Names come from a sorted list or a classes.json; an existing classes.json is kept, and labels have to fit it."""
    src, names, shards = tmp_path / "src", tmp_path / "synsets.txt", tmp_path / "named"
    write_foreign(src, "train", [0, 1, 2], 5)
    write_foreign(src, "val", [0, 3], 5)
    adopt_train = partial(adopt, src, split="train", pattern="train-*.tar", workers=1)
    adopt_val = partial(adopt, src, shards, split="val", pattern="val-*.tar", workers=1)
    names.write_text("n01\nn02 tench, Tinca tinca\nn05  goldfish \n")
    adopt_train(shards, classes=names)
    classes = open_shards(shards, "train").classes
    expected = [("n01", "n01"), ("n02", "tench, Tinca tinca"), ("n05", "goldfish")]
    assert [(name.wnid, name.words) for name in classes] == expected
    with pytest.raises(
        ValueError, match=r"classes.json: expected more than 3 classes, .* got 3; adopt the split"
    ):
        adopt_val()
    adopt_train(tmp_path / "b", classes=shards / "classes.json")
    assert open_shards(tmp_path / "b", "train").classes == classes
    for content, message in [
        (b"n02\nn01\nn03\n", "in sorted order"),
        (b"n01\nn02\n", "expected more than 2 classes"),
        (b"n01\nn02 \xff\nn03\n", "lines of a class"),
    ]:
        names.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            adopt_train(tmp_path / "c", classes=names)
    names.write_text("n01\nn02\nn03\nn04\n")
    with pytest.raises(ValueError, match="expected the classes of"):
        adopt_val(classes=names)
    with pytest.raises(FileNotFoundError, match="No such file"):
        adopt_train(tmp_path / "c", classes=tmp_path / "none.txt")
    assert not (tmp_path / "c").exists() and not (shards / "val").exists()


def is_encoded(image: bytes, raw: bytes) -> bool:
    """True for a JPEG like Pillow's of the same pixels at quality 90: a GIF differs from its own by 5 levels."""
    expected = jpeg(pixels_of(raw).astype(np.uint8), quality=90, subsampling=2)
    return image[:2] == b"\xff\xd8" and np.abs(pixels_of(image) - pixels_of(expected)).mean() < 1.2


def pixels_of(image: bytes) -> np.ndarray:
    """RGB pixels, by Pillow."""
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB")).astype(int)


def sample(label: bytes, extension: str = "cls") -> Members:
    """One image with the given text as its label, after a good one."""
    return [("a.jpg", IMAGE), ("a.cls", b"0"), ("b.jpg", IMAGE), (f"b.{extension}", label)]


GOOD = tar_of(sample(b"1"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tar_of(sample(b"-1")), r"sample b at byte \d+: expected a class index.* in b.cls, got '-1'"),
        (tar_of(sample(b"7.0")), r"'7.0'"),
        (tar_of(sample(b"")), r"got ''"),
        (tar_of(sample(b"1234567")), "expected a class index"),
        (tar_of([("a.jpg", IMAGE), ("a.txt", b"0")]), "one .cls or .json with the label, got a.jpg, a.txt"),
        (tar_of([("a.jpg", IMAGE), ("a.jpeg", IMAGE), ("a.cls", b"0")]), "got a.jpg, a.jpeg"),
        (tar_of([("a.cls", b"0"), ("a.png", b"x")]), "one .jpg or .jpeg, got a.cls, a.png; --convert"),
        (tar_of([("a.jpg", IMAGE), ("b.jpg", IMAGE), ("a.cls", b"0")]), "got a.jpg; download or make"),
        (
            tar_of(sample(b'{"label": -1}', "json")),
            "sample b at .*a class index.* in b.json, got '-1'; download",
        ),
        (tar_of(sample(b'{"label": true}', "json")), "got 'True'"),
        (
            tar_of(sample(b'{"label": "n07"}', "json")),
            "a name that --classes FILE lists, in b.json, got 'n07'",
        ),
        (tar_of(sample(b'{"url": 1, "cap": "cat"}', "json")), "without labels: .* got url, cap; download"),
        (tar_of(sample(b"[[[[", "json")), r"a JSON object in b.json, got b'\[\[\[\['"),
        (tar_of([("a.jpg", b""), ("a.cls", b"0")]), r"\(empty\)"),
        (tar_of([("notes", b"x")]), "no sample found"),
        (GOOD[: len(IMAGE) // 2], "truncated inside 'a.jpg'"),
        (b"", "not a tar archive"),
    ],
)
def test_bad_shards_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    """One sentence with the shard's path; nothing is written. The undamaged tar alone is taken. With --convert the
    same, unless the remedy is --convert."""
    src, shards = tmp_path / "src", tmp_path / "shards"
    src.mkdir()
    (src / "a.tar").write_bytes(GOOD)
    (src / "b.tar").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        adopt(src, shards, split="train", pattern="*.tar", workers=1)
    assert f"{src}/b.tar: " in str(caught.value) and "\n" not in str(caught.value)
    assert not shards.exists()
    with pytest.raises(ValueError, match="not decodable" if "--convert" in message else message):
        adopt(src, tmp_path / "converted", split="train", pattern="b.tar", convert=True, workers=1)
    adopt(src, shards, split="train", pattern="a.tar", workers=1)


@pytest.mark.parametrize("kind", ["GIF", "AVIF", "TGA", "CMYK", "stray", "warns", "lossless"])
def test_images_that_others_would_misread(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other formats under a JPEG's name, CMYK, stray bytes and damage are refused by key, or left out of the index and
    listed; what is left verifies, and DALI reads it whole. What Pillow decodes, --convert encodes."""
    out, pixels, shards = io.BytesIO(), photo(np.random.default_rng(1)), tmp_path / "shards"
    odd = {"CMYK": jpeg(pixels, "CMYK"), "stray": IMAGE[:20] + bytes(11) + IMAGE[20:]}
    odd |= {"warns": IMAGE[:-2] + bytes(40) + IMAGE[-2:], "lossless": IMAGE.replace(b"\xff\xc0", b"\xff\xc3")}
    if kind not in odd:
        Image.fromarray(pixels).save(out, kind)
    members = []
    for k in range(6):
        members += [(f"k{k}.jpg", IMAGE), (f"k{k}.cls", b"%d" % (k % 2))]
    members[6] = ("k3.jpg", odd.get(kind, out.getvalue()))
    write(tmp_path / "src" / "a-0.tar", tar_of(members))
    options = ("--split", "train", "--pattern", "a-*.tar", "--workers", "1")
    command = ("tools/make_shards.py", "adopt", tmp_path / "src", shards, *options)
    message = refuses(*command)
    assert "a-0.tar: k3.jpg at byte" in message and "--on-bad skip" in message and not shards.exists()
    assert ("--convert" in message) == (kind not in ("TGA", "lossless")), message
    if "--convert" in message:
        assert kind in message or kind in ("stray", "warns")
        converted = tmp_path / "converted"
        run_ok("tools/make_shards.py", "adopt", tmp_path / "src", converted, *options, "--convert")
        verify(converted, workers=1)
        found = read_tar(converted / "train" / "a-0.tar")
        assert list(found) == [name for name, _ in members] and found["k2.jpg"] == IMAGE
        assert is_encoded(found["k3.jpg"], dict(members)["k3.jpg"])
    output = run_ok(*command, "--on-bad", "skip")
    assert "5 images in 1 shards" in output and "2 classes (numbered" in output
    path = shards / "train" / "manifest.json"
    manifest = read_json(path)
    assert manifest["num_samples"] == 5 and [row["key"] for row in manifest["skipped"]] == ["k3"]
    verify(shards, workers=1)
    assert sum(len(batch) for batch in decoded_batches(open_shards(shards, "train"), 4)) == 5
    write_json(path, manifest | {"skipped": []})
    with pytest.raises(DataError):
        verify(shards, workers=1)
    assert "k3.jpg" in capsys.readouterr().out


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_unusual_names(tmp_path: Path, plain_basis: Eigenbasis, format: int) -> None:
    """Folders, long names, spaces, other scripts, several dots, notes and directories: DALI reads the right labels."""
    keys = ["x/sp ace"]
    if format != tarfile.USTAR_FORMAT:
        keys += ["d" * 60 + "/" + "k" * 90, "b/sp ace", "ü" * 20]
    members = [("__meta__", b"x"), ("README", b"x"), (".hidden", b"x")]
    for number, key in enumerate(keys):
        members += [(f"{key}.seg.png", b"x"), (f"{key}.cls", b"%d" % (number + 3)), (f"{key}.JPG", IMAGE)]
    write(tmp_path / "src" / "a.tar", tar_of(members, format))
    adopt(tmp_path / "src", tmp_path / "out", split="val", pattern="a.tar", workers=1)
    place: dict[str, Any] = {"rank": 0, "num_ranks": 1, "device": "cpu", "batch_size": len(keys)}
    (batch,) = val_loader(open_shards(tmp_path / "out", "val"), basis=plain_basis, **place)
    assert batch.labels.tolist() == list(range(3, 3 + len(keys)))


@pytest.mark.parametrize(
    ("pattern", "change", "message"),
    [
        ("x-{0000..0002}.tar", None, "x-0002.tar: not found"),
        ("x-{0000", None, "close every brace"),
        ("../*.tar", None, "expected names relative"),
        ("{0..999999999}.tar", None, "at most 100000 names"),
        ("/x.tar", None, "expected names relative"),
        ("*.tar", lambda src: write(src / "a b.tar", GOOD), "expected NAME.tar"),
        ("**/*.tar", lambda src: write(src / "more" / "x-0000.tar", GOOD), "the same name as"),
    ],
)
def test_bad_patterns(
    tmp_path: Path, pattern: str, change: Callable[[Path], object] | None, message: str
) -> None:
    """A missing shard, a pattern that leads out of SRC, and names that no manifest takes are refused by name."""
    write_foreign(tmp_path / "src", "x", [0, 1], 1)
    if change:
        change(tmp_path / "src")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        adopt(tmp_path / "src", tmp_path / "shards", split="train", pattern=pattern, workers=1)
    assert not (tmp_path / "shards").exists()
    with pytest.raises(ValueError, match="which is only read"):
        adopt(tmp_path / "src", tmp_path / "src" / "out", split="train", pattern="*0000.tar", workers=1)
    with pytest.raises(FileNotFoundError, match="not a directory"):
        adopt(tmp_path / "none", tmp_path / "shards", split="train", pattern="*.tar", workers=1)


def test_labels_that_are_not_classes(tmp_path: Path) -> None:
    """A label far beyond the number of images is refused with it, not taken for a million classes; from a worker, too,
    one sentence."""
    src, shards = tmp_path / "src", tmp_path / "shards"
    write_foreign(src, "x", [0, 1, 2], 2)
    (src / "x-0001.tar").write_bytes(tar_of([("k.jpg", IMAGE), ("k.cls", b"999999")]))
    command = ("tools/make_shards.py", "adopt", src, shards, "--split", "train", "--pattern", "x-*.tar")
    assert "999999" in refuses(*command, "--workers", "2")
    assert not (shards / "train" / "manifest.json").exists()
    (src / "x-0001.tar").write_bytes(tar_of(sample(b"?")))
    assert "x-0001.tar: sample b at byte" in refuses(*command, "--workers", "2")


def encode(kind: str, seed: int) -> bytes:
    """An image of its own size in any of Pillow's formats."""
    out = io.BytesIO()
    Image.fromarray(photo(np.random.default_rng(seed), 100 + seed, 150)).save(out, kind)
    return out.getvalue()


def test_converted_shards(tmp_path: Path, plain_basis: Eigenbasis) -> None:
    """PNG, WebP and labels in json, as numbers, digits or names: the webdataset library reads the source's keys, order,
    labels and images from the converted shards, a sound JPEG byte for byte; verify, compute_pca and the loader, too."""
    src, shards, names = tmp_path / "src", tmp_path / "shards", tmp_path / "classes.txt"
    names.write_text("n01\nn02 tench\nn03\n")
    labels = [2, 0, 1, 1, 2, 0, 1]
    members = [
        [("x/sp ace.png", encode("PNG", 0)), ("x/sp ace.json", b'{"label": 2, "cls": 0}')],
        [("k1.webp", encode("WEBP", 1)), ("k1.cls", b" 0\n"), ("k1.json", b'{"label": 9}')],
        [("k2.JPEG", encode("JPEG", 2)), ("k2.png", b"a mask"), ("k2.json", b'{"cls": "n02", "a": [1]}')],
        [("k3.txt", b"a cat"), ("k3.jpg", encode("TIFF", 3)), ("k3.json", b'{"label": "1"}')],
        [(f"{'d' * 60}/{'k' * 120}.bmp", encode("BMP", 4)), (f"{'d' * 60}/{'k' * 120}.cls", b"n03")],
        [("\u00fc.gif", encode("GIF", 5)), ("\u00fc.cls", b"0")],
        [("k6.jpg", IMAGE), ("k6.cls", b"1")],
    ]
    write(src / "t-0.tar", tar_of([each for group in members[:4] for each in group], tarfile.PAX_FORMAT))
    write(src / "t-1.tar", tar_of([each for group in members[4:] for each in group], tarfile.PAX_FORMAT))
    before = files(src)
    options = ("adopt", src, shards, "--split", "train", "--pattern", "t-*.tar", "--workers")
    command = ("tools/make_shards.py", *options, "1", "--classes", names)
    assert "t-0.tar: sample x/sp_ace at byte" in (message := refuses(*command)) and "--convert" in message
    assert "7 images in 2 shards, 0 skipped, 5 converted" in run_ok(*command, "--convert", "--workers", "2")
    assert files(src) == before and not any(path.is_symlink() for path in (shards / "train").iterdir())
    train = open_shards(shards, "train")
    found = list(webdataset.WebDataset([*train.tars], shardshuffle=False))
    assert [each["__key__"] for each in found] == [group[0][0].rpartition(".")[0] for group in members]
    assert [int(each["cls"]) for each in found] == labels
    assert found[2]["jpg"] == members[2][0][1] and found[6]["jpg"] == IMAGE
    for group, each in zip(members, found, strict=True):
        image = next(data for name, data in group if name.split(".")[1] not in ("cls", "json", "txt"))
        assert each["jpg"] == image or is_encoded(each["jpg"], image)
    verify(shards, workers=1)
    compute_pca(shards)
    place: dict[str, Any] = {"rank": 0, "num_ranks": 1, "device": "cpu", "basis": plain_basis}
    (batch,) = train_loader(train, batch_size=7, seed=1, **place)
    assert sorted(batch.labels.tolist()) == sorted(labels) and train.samples["label"].tolist() == labels
    with pytest.raises(ValueError, match="packed, or adopted from elsewhere"):
        adopt(src, shards, split="train", pattern="t-*.tar", classes=names, workers=1)


def test_a_stopped_conversion_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stopped at an undecodable image, killed before a record of a shard or of the split: the same command with
    --on-bad skip keeps finished shards and ends with the bytes of an uninterrupted one. Tars of others stay."""
    src, shards = tmp_path / "src", tmp_path / "shards"
    for number, image in enumerate([encode("PNG", 1), encode("WEBP", 2), b"damaged"]):
        odd = {f"k{number}.png": image, f"k{number}.json": b'{"label":1}'}
        write(src / f"x-{number}.tar", tar_of({"k.jpg": IMAGE, "k.cls": b"0", **odd}))
    command = partial(adopt, src, split="train", pattern="x-*.tar", convert=True, workers=1)
    with pytest.raises(ValueError, match=r"k2.png in .*x-2.tar \(key k2\): not decodable.* --on-bad skip"):
        command(shards)
    assert {path.name for path in (shards / "train").glob("*.tar")} == {"x-0.tar", "x-1.tar"}
    whole = tmp_path / "whole"
    command(whole, on_bad="skip")
    manifest = read_json(whole / "train" / "manifest.json")
    assert [row["key"] for row in manifest["skipped"]] == ["k2"] and manifest["num_samples"] == 5
    repairs = {row["key"]: row["found"] for row in manifest["repairs"]}
    assert repairs == {"k0": "RGB PNG file", "k1": "RGB WEBP file"}
    verify(whole, workers=1)
    (shards / "train" / "x-1.json").unlink()
    inode = (shards / "train" / "x-0.tar").stat().st_ino
    command(shards, on_bad="skip")
    assert files(shards) == files(whole) and (shards / "train" / "x-0.tar").stat().st_ino == inode
    write_json(shards / "train" / "x-1.json", {})
    capsys.readouterr()
    command(shards)
    assert "nothing to do" in capsys.readouterr().out and files(shards) == files(whole)
    write(tmp_path / "other" / "train" / "x-1.tar", b"somebody's own")
    with pytest.raises(ValueError, match=r"expected the shards of .*, got x-1.tar"):
        command(tmp_path / "other")
    assert len(files(tmp_path / "other")) == 1


def test_files_of_systems_are_passed_over(tmp_path: Path) -> None:
    """Those that macOS and Windows put next to the members of a tar."""
    content = {"./d/._0.jpg": b"x", "./d/0.jpg": IMAGE, "./d/.DS_Store": b"x", "./d/0.cls": b"0"}
    content |= {
        "__MACOSX/d/1.jpg": b"x",
        "d/Thumbs.db": b"x",
        "d/1.jpg": IMAGE,
        "d/._1.cls": b"x",
        "d/1.cls": b"0",
    }
    write(tmp_path / "src" / "a.tar", tar_of(content))
    adopt(tmp_path / "src", tmp_path / "shards", split="train", pattern="a.tar", workers=1)
    assert open_shards(tmp_path / "shards", "train").num_samples == 2
    verify(tmp_path / "shards", workers=1)


def test_numbers_in_cls_are_indexes(tmp_path: Path) -> None:
    """Also where the classes are called by other numbers; in json text that may be either is refused."""
    (tmp_path / "list").write_text("0\n1\n10\n2\n")
    for extension, label, good in (
        ("cls", b"2", True),
        ("json", b'{"label": 2}', True),
        ("json", b'{"label": "2"}', False),
    ):
        write(tmp_path / "src" / "a.tar", tar_of({"0.png": IMAGE, f"0.{extension}": label}))
        convert = partial(adopt, tmp_path / "src", pattern="a.tar", split="train", convert=True, workers=1)
        shards = tmp_path / f"{extension}{good}"
        if good:
            convert(shards, classes=tmp_path / "list")
            assert open_shards(shards, "train").samples["label"].tolist() == [2]
        else:
            with pytest.raises(ValueError, match="which may be both"):
                convert(shards, classes=tmp_path / "list")
