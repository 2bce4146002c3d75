"""Layouts of raw ImageNet: each is recognized, and its images come out once, under their class, with their pixels."""

import csv
import gzip
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
from tests.helpers import jpeg, photo, refuses, tar_of, write
from tests.mutate import pax
from tools.demo_archives import DIGIT_TO_WNID, devkit
from tools.make_shards import pack
from tools.packing.cache import load_listing, save_listing, stamp
from tools.packing.ilsvrc import read_devkit
from tools.packing.listing import Listing
from tools.packing.raw import cut_validation, open_raw

WNIDS = ["n00000011", "n00000022", "n00000033"]
Images = dict[str, tuple[str, str, bytes]]  # stem -> (split, wnid, file)


def image_set() -> Images:
    """24 files with the oddities of the real thing, each of another colour."""
    rng, images = np.random.default_rng(0), {}
    for number in range(24):
        split, wnid = ("val" if number % 4 == 3 else "train"), WNIDS[number % 3]
        pixels = photo(rng, int(rng.integers(90, 200)), int(rng.integers(90, 200)))
        stem = f"ILSVRC2012_val_{number:08d}" if split == "val" else f"{wnid}_{number}"
        data = jpeg(pixels, ["RGB", "L", "CMYK"][number % 3] if number < 6 else "RGB")
        if number == 7:
            out = io.BytesIO()
            Image.fromarray(pixels).save(out, "PNG")
            data = out.getvalue()
        images[stem] = (split, wnid, data)
    return images


def kaggle(raw: Path, images: Images) -> None:
    """Kaggle's download, unzipped."""
    tree = raw / "ILSVRC/Data/CLS-LOC"
    for stem, (split, wnid, data) in images.items():
        write(tree / (f"train/{wnid}" if split == "train" else "val") / f"{stem}.JPEG", data)
    write(tree / "test/ILSVRC2012_test_00000001.JPEG", b"not used")
    with (raw / "LOC_val_solution.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["ImageId", "PredictionString"])
        rows.writerows([stem, f"{wnid} 1 2 3 4 "] for stem, (split, wnid, _) in images.items() if split == "val")
    (raw / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} thing, {wnid[-1]}\n" for wnid in WNIDS))


def folders(raw: Path, images: Images) -> None:
    """Class folders with extensions in any case, nested and linked, among files that are no images."""
    for number, (stem, (split, wnid, data)) in enumerate(images.items()):
        folder = raw / split / wnid / ("deep/er" if number % 5 == 0 else "")
        write(folder / (stem + [".JPEG", ".jpg", ".Jpg", ".JPG"][number % 4]), data)
    for name in (".DS_Store", "._n00000011_0.JPEG", "readme.txt"):
        write(raw / "train" / WNIDS[0] / name, b"no image")
    elsewhere = raw.parent / "elsewhere"  # one class and one file are links to another disk
    (raw / "train" / WNIDS[1]).rename(elsewhere)
    (raw / "train" / WNIDS[1]).symlink_to(elsewhere)
    one = next(path for path in elsewhere.iterdir() if path.is_file())
    one.rename(raw.parent / "one")
    one.symlink_to(raw.parent / "one")


def class_tars(raw: Path, images: Images) -> None:
    """ImageNet-21k's folder of tars; no validation images."""
    raw.mkdir()
    for wnid in WNIDS:
        files = {f"{stem}.JPEG": data for stem, (_, of, data) in images.items() if of == wnid}
        write(raw / f"{wnid}.tar", tar_of(files))


def parquet(raw: Path, images: Images) -> None:
    """Hugging Face's files: several a split, several row groups a file."""
    import pyarrow
    import pyarrow.parquet

    (raw / "data").mkdir(parents=True)
    for split, name in (("train", "train"), ("val", "validation")):
        rows = [
            {"image": {"bytes": data, "path": f"{stem}.JPEG"}, "label": WNIDS.index(wnid)}
            for stem, (of, wnid, data) in images.items()
            if of == split
        ]
        for part in range(2):
            table = pyarrow.Table.from_pylist(rows[part::2])
            path = raw / "data" / f"{name}-{part:05d}-of-00002.parquet"
            pyarrow.parquet.write_table(table, path, row_group_size=4)


IMAGE = {"bytes": b"", "path": "x.JPEG"}


def parquet_of(raw: Path, row: dict[str, object]) -> None:
    """A file of one row."""
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), raw / "train-0.parquet")


def expected_square(data: bytes) -> np.ndarray:
    """The 256x256 image by Pillow alone."""
    with Image.open(io.BytesIO(data)) as image:
        rgb = image.convert("RGB")
    width, height = (round(side * 256 / min(rgb.size)) for side in rgb.size)
    left, top = (width - 256) // 2, (height - 256) // 2
    return np.asarray(rgb.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 256, top + 256)))


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
def test_layouts(layout: Callable[[Path, Images], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every image once, in its split, under its class among the sorted wnids, with Pillow's pixels; the first line of
    output names the layout."""
    images = image_set()
    raw, shards = tmp_path / "raw", tmp_path / "shards"
    layout(raw, images)
    pack(raw, shards, samples_per_shard=5, workers=1, quality=97, subsampling="444")
    output = capsys.readouterr().out
    assert ("passed over 1 files" in output) == (layout is folders)  # hidden files are not told of
    named = {kaggle: "Kaggle", folders: "class folders", class_tars: "per-class tars", parquet: "parquet"}[layout]
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
    cuts = [cut_validation(data, 0.25, seed).splits for seed in (1, 1, 2)]
    names = [{split: {image.name for image in listing} for split, listing in cut.items()} for cut in cuts]
    assert names[0] == names[1] != names[2]
    assert names[0]["train"] | names[0]["val"] == {image.name for image in data.splits["train"]}
    assert np.bincount(cuts[0]["val"].label).tolist() == [5, 5, 5]
    assert np.bincount(cuts[0]["train"].label).tolist() == [15, 15, 15]
    with pytest.raises(ValueError, match=r"--val-fraction 0\.001 leaves"):
        cut_validation(data, 0.001, 1)


def test_the_listing_is_cached(tmp_path: Path) -> None:
    """A cached listing equals the first; a changed archive, a damaged cache or none list again."""
    raw, cache = tmp_path / "raw", tmp_path / "listing.jsonl"
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
    others = [content.replace(b'"offset": [', b'"offset": [7,'), content.replace(b'"label": [0', b'"label": [1')]
    for damage in (b"", content[: len(content) // 2], b"\xff{", *others):
        assert damage != content
        cache.write_bytes(damage)
        assert load_listing(cache, raw, validity) is None
    cache.write_bytes(content)
    os.utime(raw / f"{WNIDS[1]}.tar", (1, 1))
    assert open_raw(raw, cache)[1] is not None
    assert stamp(raw, [raw / f"{WNIDS[1]}.tar"])[0][0] == f"{WNIDS[1]}.tar"


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
        (special(tarfile.REGTYPE, size=10 * 2**30), "cut short inside"),
        (lambda tar: pax(b"20 GNU.sparse.size=\n", b"x") + tar, "is not a tar archive|is damaged at byte"),
        (lambda tar: pax(b"20 GNU.sparse.map=a\n", b"x") + tar, "is not a tar archive|is damaged at byte|sparse"),
        (b"", "is not a tar archive"),
        (b"\x00" * 10240, "holds no image"),
        (lambda tar: backwards(tar), "is damaged at byte|a negative size"),
        (lambda tar: hole(tar, 3), "has a damaged header at byte"),
        (lambda tar: tar[: members_end(tar)], "lacks an end mark"),
        (lambda tar: tar + tar, "has a damaged header at byte"),
        (b"garbage" * 1000, "is not a tar archive"),
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
    names = ["../../evil.JPEG", "/abs/olute.JPEG", "x.y.JPEG", "sp ace.JPEG", "new\nline.JPEG", "0_7.JPEG", "1_2.JPEG"]
    names += [os.fsdecode(b"b\xff\xfe.JPEG"), "a" * 150 + ".JPEG", "plain.JPEG", "d/twice.JPEG", "e/twice.JPEG"]
    images = [jpeg(np.full((60, 60, 3), 20 * number, np.uint8)) for number in range(len(names) + 1)]
    write(raw / "n00000011.tar", tar_of(dict(zip(names, images, strict=False))))
    write(raw / "n00000022.tar", tar_of({"other.JPEG": images[-1]}))
    pack(raw, shards, samples_per_shard=4, workers=1, quality=97)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["raw", "shards"]
    renamed = read_json(shards / "train" / "manifest.json")["renamed"]
    tars = [str(path) for path in sorted((shards / "train").glob("*.tar"))]
    found = {s["__key__"]: s["jpg"] for s in webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)}
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

    table = pyarrow.Table.from_pylist([{"label": 0, **row}]).replace_schema_metadata({"huggingface": '{"info": "x"}'})
    pyarrow.parquet.write_table(table, raw / "train-0.parquet")


def test_a_damaged_page_of_parquet(tmp_path: Path) -> None:
    """Is found when its images are read, and told with the file."""
    rng = np.random.default_rng(0)
    rows = [{"image": {"bytes": rng.bytes(5000), "path": f"{k}.JPEG"}, "label": 0} for k in range(9)]
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "raw" / "train-0.parquet"
    path.parent.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, compression="none", use_dictionary=False)
    data = path.read_bytes()
    path.write_bytes(data[:4] + b"\xff" * 40 + data[44:])
    with pytest.raises(ValueError, match=r"train-0\.parquet is damaged in row group 0"):
        pack(tmp_path / "raw", tmp_path / "shards", workers=1)


@pytest.mark.parametrize(("at", "value"), [(384, 0), (428, 1), (500, 1), (652, 128)])
def test_a_devkit_that_ends_scipys_reader(tmp_path: Path, at: int, value: int) -> None:
    """One byte of meta.mat is enough for a segmentation fault (scipy 1.17); it is a sentence here."""
    files = {"meta.mat": b"", "ILSVRC2012_validation_ground_truth.txt": b""}
    with tarfile.open(fileobj=io.BytesIO(devkit(dict.fromkeys(DIGIT_TO_WNID.values(), 1), [1]))) as tar:
        for name in files:
            files[name] = tar.extractfile(f"ILSVRC2012_devkit_t12/data/{name}").read()  # type: ignore[union-attr]
    path = tmp_path / "devkit.tar.gz"
    write_devkit(path, files)
    assert len(read_devkit(path)[0]) == 10
    mat = bytearray(files["meta.mat"])
    mat[at] = value
    write_devkit(path, {**files, "meta.mat": bytes(mat)})
    with pytest.raises(
        ValueError, match=r"devkit.tar.gz is not the devkit .* or is damaged \(its meta.mat cannot be read"
    ):
        read_devkit(path)


def write_devkit(path: Path, files: dict[str, bytes]) -> None:
    """A devkit of these files."""
    tar = tar_of({f"ILSVRC2012_devkit_t12/data/{name}": data for name, data in files.items()})
    path.write_bytes(gzip.compress(tar))


def twice(raw: Path) -> None:
    """Replace a validation image by a copy of another."""
    images = sorted((raw / "ILSVRC/Data/CLS-LOC/val").iterdir())
    images[0].unlink()
    write(images[0].parent / "again" / images[1].name, images[1].read_bytes())


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda raw: None, "holds nothing that can be packed"),
        (lambda raw: (raw / "train").mkdir(), "holds no class folders"),
        (lambda raw: (raw / "train" / "cat").mkdir(parents=True), "holds no image"),
        (lambda raw: (kaggle(raw, image_set()), (raw / "LOC_val_solution.csv").unlink()), "LOC_val_solution.csv"),
        (lambda raw: (kaggle(raw, image_set()), (raw / "LOC_val_solution.csv").write_text("a,b\n1,2\n")), "Kaggle"),
        (lambda raw: (kaggle(raw, image_set()), (raw / "LOC_val_solution.csv").write_bytes(b"\xff\xfea")), "Kaggle"),
        (
            lambda raw: odd_parquet(raw, image={"bytes": "text", "path": "a"}),
            "image.bytes is of type string, not binary",
        ),
        (lambda raw: odd_parquet(raw, image={"bytes": b"", "path": "a"}, label="x"), "labels row 0 as x"),
        (lambda raw: write(raw / "a.tar", tar_of({"1.jpg": b"", "1.cls": b"0"})), "make_shards.py adopt"),
        (lambda raw: (raw / "train-0.parquet").write_bytes(b"PAR1 no"), "no data set of images and labels"),
        (lambda raw: parquet_of(raw, {"picture": b"", "label": 0}), r"it lacks the columns image\.bytes, image\.path"),
        (lambda raw: parquet_of(raw, {"image": IMAGE, "label": -1}), "labels row 0 as -1, which is no class"),
        (lambda raw: write(raw / "val" / "dog" / "1.jpg", b""), "holds nothing that can be packed"),
        (lambda raw: (folders(raw, image_set()), os.mkfifo(raw / "train" / WNIDS[0] / "a.jpg")), "no plain file"),
        (
            lambda raw: (folders(raw, image_set()), (raw / "train" / "n00000011" / "x.jpg").symlink_to("no")),
            "to nothing",
        ),
        (lambda raw: write(raw / "train" / os.fsdecode(b"b\xe4r") / "1.jpg", b""), r"b\\xe4r is no UTF-8"),
        (
            lambda raw: (parquet(raw, image_set()), next(raw.glob("*/train-*1-of*")).unlink()),
            "lacks train-00001-of-00002",
        ),
        (lambda raw: (kaggle(raw, image_set()), twice(raw)), "or one twice"),
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


def test_class_tars_are_sorted_by_class(tmp_path: Path) -> None:
    """Not by file name, in which "a-b.tar" comes before "a.tar"."""
    (tmp_path / "raw").mkdir()
    for wnid in ("a", "a-b", "b"):
        write(tmp_path / "raw" / f"{wnid}.tar", tar_of({f"{wnid}_1.jpg": b"x"}))
    data, _ = open_raw(tmp_path / "raw", tmp_path / "none")
    assert [name.wnid for name in data.classes] == ["a", "a-b", "b"]
    assert [image.name for image in data.splits["train"]] == ["a_1.jpg", "a-b_1.jpg", "b_1.jpg"]


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
    with pytest.raises(ValueError, match="leads in a circle"):
        pack(raw, tmp_path / "shards", workers=1)


def test_an_output_among_the_images_is_refused(tmp_path: Path) -> None:
    """It would be read as images by the next run."""
    folders(tmp_path / "raw", image_set())
    with pytest.raises(ValueError, match="lies inside"):
        pack(tmp_path / "raw", tmp_path / "raw" / "train" / "shards", workers=1)
    assert not (tmp_path / "raw" / "train" / "shards").exists()


def test_md5(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Archives that are not the published ones are refused by name; those with the right sums pass."""
    import hashlib

    from tools.packing import ilsvrc

    told = refuses("tools/make_shards.py", "pack", raw, tmp_path / "shards", "--check-md5")
    assert "ILSVRC2012_img_train.tar has md5" in told
    assert not (tmp_path / "shards").exists()
    sums = {name: hashlib.md5((raw / name).read_bytes()).hexdigest() for name in ilsvrc.ARCHIVES}
    monkeypatch.setattr(ilsvrc, "MD5", sums)
    ilsvrc.check_md5(raw)
