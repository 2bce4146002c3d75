"""Verification: sound shards pass, and each kind of damage is reported with its place; the numbers of `stats` are those
of an independent count with the webdataset library and Pillow."""

import io
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline.errors import DataError
from pipeline.files import read_json, sha256, write_json
from tests.helpers import jpeg, photo, refuses, run_here, run_ok, tar_of, write_foreign
from tools.packing.adopt import adopt
from tools.packing.index import read_index, write_samples
from tools.packing.verify import MAX_PROBLEMS, stats, verify


@pytest.fixture
def copy(few: Path, tmp_path: Path) -> Path:
    """Some shards of the packed demo, to be damaged."""
    return Path(shutil.copytree(few, tmp_path / "copy"))


def faults(shards: Path, capsys: pytest.CaptureFixture[str], fast: bool = False) -> list[str]:
    """The lines that `verify` prints about shards that it has to refuse."""
    capsys.readouterr()
    with pytest.raises(DataError, match=r"problem\(s\), see above; "):
        verify(shards, fast=fast, workers=1)
    return capsys.readouterr().out.splitlines()


Change = Callable[[bytes], bytes]


def rewrite(path: Path, change: Change) -> None:
    """Replace a file's content."""
    path.write_bytes(change(path.read_bytes()))


def change_json(path: Path, **changes: object) -> None:
    """Replace fields of a JSON file."""
    write_json(path, read_json(path) | changes)


def test_sound_shards_pass(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In full and fast; files that no manifest lists, in a split and next to it, are noted and are no fault."""
    count = sum(read_json(copy / split / "manifest.json")["num_samples"] for split in ("train", "val"))
    verify(copy, workers=1)
    assert capsys.readouterr().out.startswith(f"{copy}: {count} images in 4 shards, all valid (")
    for name in ("train/train-000003.tar.tmp", "val/val-000000.json", "holiday.jpg"):
        (copy / name).write_bytes(b"x")
    verify(copy, fast=True)
    assert capsys.readouterr().out.splitlines() == [
        "train: note: train-000003.tar.tmp is not in the manifest",
        "val: note: val-000000.json is not in the manifest",
        f"{copy}: note: holiday.jpg is not part of the shards",
        f"{copy}: {count} images in 4 shards, all valid (images not read)",
    ]


def test_a_damaged_image(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reported with the member's name and offset, next to the checksum; the full check alone sees it."""
    tar = copy / "train" / "train-000002.tar"
    (_, offset, size, name), _ = read_index(tar.with_suffix(".idx"))[5]
    start = offset + size // 2
    rewrite(tar, lambda content: content[:start] + b"\xff\xff\x00" * 100 + content[start + 300 :])
    checksum, image = sorted(faults(copy, capsys), key=lambda line: "SHA-256" not in line)
    assert checksum == "train/train-000002.tar: SHA-256 differs from the manifest's"
    assert image.startswith(f"train/train-000002.tar: {name} at byte {offset}: ")
    verify(copy, fast=True)


def swap_two_lines(content: bytes) -> bytes:
    """Two samples of an index change places."""
    header, first, second, *rest = content.splitlines(keepends=True)
    return b"".join([header, second, first, *rest])


@pytest.mark.parametrize(
    ("suffix", "change", "message", "in_fast"),
    [
        (".tar", lambda content: content[:700_000], "truncated inside", True),
        (".tar", lambda content: b"", "not a tar archive", True),
        (".tar", lambda content: bytes(len(content)), "expected 180 samples, got 0 readable ones", False),
        (".tar", lambda content: content[7:] + content[:7], "not a tar archive", False),
        (".idx", lambda content: b"\xfe\xff garbage \0" * 99, "expected a DALI index in its .idx", True),
        (".idx", lambda content: content[:-200], "expected a DALI index in its .idx", True),
        (".idx", lambda content: b"v1.2 0\n", "expected 180 samples in its .idx, got 0", True),
        (".idx", lambda content: content.replace(b" 512 ", b" 51200000 "), "line 2 of its .idx points out", True),
        (".idx", lambda content: content.replace(b" 512 ", b" 1024 "), "line 2 of its .idx does not match n", False),
        (".idx", swap_two_lines, "line 2 of its .idx does not match n", False),
    ],
)  # fmt: skip
def test_a_damaged_file(
    copy: Path, capsys: pytest.CaptureFixture[str], suffix: str, change: Change, message: str, in_fast: bool
) -> None:
    """A tar that is cut, emptied, zeroed or garbage, an index that does not parse, count or lie within the tar, or is
    wrong: reported without a crash, the other shards are not accused; in fast, what needs no reading of the tar."""
    rewrite((copy / "train" / "train-000002.tar").with_suffix(suffix), change)
    lines = faults(copy, capsys)
    assert all(line.startswith("train/train-000002.tar: ") for line in lines)
    assert any(message in line for line in lines)
    assert ("train/train-000002.tar: SHA-256 differs from the manifest's" in lines) == (suffix == ".tar")
    if in_fast:
        assert faults(copy, capsys, fast=True)
    else:
        verify(copy, fast=True)


@pytest.mark.parametrize("content", [b"garbage", b"[]", b'{"format_version": 2, "shards": []}'])
def test_missing_files(copy: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    """Shards and indexes that are gone or are links that lead nowhere; a manifest that is none is a fault of its split,
    and the other is checked all the same."""
    (copy / "train" / "train-000000.idx").unlink()
    for number in (1, 2):
        (copy / "train" / f"train-00000{number}.tar").unlink()
    (copy / "train" / "train-000002.tar").symlink_to("/nowhere.tar")
    (copy / "val" / "manifest.json").write_bytes(content)
    for fast in (True, False):
        *shards, split = faults(copy, capsys, fast)
        assert [line for line in shards if "000000" not in line] == [
            f"train/train-00000{n}.tar: unreadable (No such file or directory)" for n in (1, 2)
        ]
        assert "train/train-000000.tar: unreadable .idx (No such file or directory)" in shards
        assert split.startswith("val: ") and "manifest.json" in split


def test_half_a_pack(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A split whose pack was not finished, one with the other's manifest, and a list of classes that is short or
    damaged."""
    classes = read_json(copy / "classes.json")["classes"]
    change_json(copy / "classes.json", classes=classes[:-1])
    assert "train: classes.json: expected 10, got 9" in faults(copy, capsys, fast=True)
    change_json(copy / "classes.json", classes=classes)
    (copy / "val" / "manifest.json").unlink()
    assert faults(copy, capsys, fast=True) == ["val: no manifest.json: its pack is unfinished"]
    shutil.copy(copy / "train" / "manifest.json", copy / "val")
    assert "val: expected split val, got train" in faults(copy, capsys, fast=True)
    (copy / "classes.json").write_text("[]")
    lines = faults(copy, capsys, fast=True)
    assert all("classes.json" in line for line in lines if line.startswith("train: "))


def test_doubled_samples(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A shard that is there twice under two names: its keys repeat."""
    manifest = read_json(copy / "train" / "manifest.json")
    for suffix in (".tar", ".idx"):
        shutil.copy(copy / "train" / f"train-000001{suffix}", copy / "train" / f"train-000003{suffix}")
    row = {**manifest["shards"][1], "name": "train-000003.tar"}
    count = manifest["num_samples"] + row["samples"]
    samples = np.load(copy / "train" / "samples.npy")
    checksum = write_samples(copy / "train", [samples[samples["shard"] == shard] for shard in (0, 1, 2, 1)])
    changes = {"num_samples": count, "samples_sha256": checksum}
    change_json(copy / "train" / "manifest.json", shards=[*manifest["shards"], row], **changes)
    assert faults(copy, capsys) == [
        f"train: {row['samples']} samples have a duplicate key, the first is number 1 of train/train-000003.tar"
    ]


def test_samples_that_were_packed_wrong(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels of another form, which DALI would misread silently, those beyond the classes and images of another size,
    under a manifest and a checksum that fit: every one is reported, and a long list is cut and counted in full."""
    image, number = photo(np.random.default_rng(0)), MAX_PROBLEMS + 5
    samples = [
        ("a", image, b"7.0"),
        ("b", image[:100], b"1"),
        *((f"c{k}", image, b"10") for k in range(number)),
    ]
    members = []
    for key, pixels, label in samples:
        members += [(f"{key}.jpg", jpeg(pixels)), (f"{key}.cls", label)]
    content = tar_of(members)
    (copy / "val" / "val-000000.tar").write_bytes(content)
    row = {
        "name": "val-000000.tar",
        "samples": len(samples),
        "bytes": len(content),
        "sha256": sha256(content),
    }
    change_json(copy / "val" / "manifest.json", shards=[row], num_samples=len(samples))
    assert "val: " in (table := faults(copy, capsys)[-1]) and "run tools/make_shards.py index" in table
    lines = [line.removeprefix("val/val-000000.tar: ") for line in faults(copy, capsys)[:-1]]
    assert len(lines) == MAX_PROBLEMS + 1
    assert lines[-1] == f"... and {len(samples) + 3 - MAX_PROBLEMS} more"  # three are of the old index
    found = [line for line in lines[:-1] if ".idx" not in line]
    assert found[0] == "sample a at byte 512: expected a class index of at most 6 digits in a.cls, got b'7.0'"
    assert found[1].endswith("expected 256x256, got 256x100")
    assert len(found) > 15 and all("expected a label below 10, got 10" in line for line in found[2:])


def test_a_wrong_table(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table under a checksum that fits, of which rows of a shard changed places or have another label, is a fault of
    that shard, which names the first; one that is damaged is a fault of the split, in fast, too."""
    path, manifest = copy / "train" / "samples.npy", copy / "train" / "manifest.json"
    samples = np.load(path)
    parts = [samples[samples["shard"] == shard] for shard in range(3)]
    parts[1]["label"][[7, 9]] = 5 - parts[1]["label"][[7, 9]] // 9
    parts[2][[3, 4]] = parts[2][[4, 3]]
    change_json(manifest, samples_sha256=write_samples(copy / "train", parts))
    found = faults(copy, capsys)
    for line, shard, row in zip(found, (1, 2), (7, 3), strict=True):
        place = f"train/train-00000{shard}.tar: row {row} of its part of samples.npy does not match n"
        offset = samples["offset"][samples["shard"] == shard][row]
        assert line.startswith(place) and f" at byte {offset}; remove that file" in line
    verify(copy, fast=True)
    rewrite(path, lambda content: content[:-1])
    for fast in (True, False):
        (line,) = faults(copy, capsys, fast)
        assert line.startswith(f"train: {path}: expected the SHA-256 of manifest.json")


def test_command_line(copy: Path, tmp_path: Path) -> None:
    """Exit codes 0, 3 for damage (and packing again mends it), 2 for a wrong folder; one sentence each on stderr."""
    assert "all valid" in run_ok("tools/make_shards.py", "verify", "--fast", copy)
    rewrite(copy / "train" / "train-000001.tar", lambda content: content[:5000])
    done = run_here("tools/make_shards.py", "verify", copy, "--workers", "2")
    assert done.returncode == 3 and "remove train/train-000001.tar and run pack again" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and "train/train-000001.tar: expected" in done.stdout
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "none", tmp_path / "empty"):
        for command in ("verify", "stats"):
            assert str(folder) in refuses("tools/make_shards.py", command, folder)


def format_rows(rows: dict[str, str]) -> set[str]:
    """Format rows of the table that `stats` prints."""
    return {f"  {name:<20}{value}" for name, value in rows.items()}


def spread(values: list[int]) -> str:
    """As the table has it."""
    return f"min {min(values):,}, median {median(values):,.0f}, mean {mean(values):,.0f}, max {max(values):,}"


def test_stats(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every number of the packed demo."""
    stats(shards)
    tables = capsys.readouterr().out.split(f"{shards}/")[1:]
    for split, table in zip(("train", "val"), tables, strict=True):
        tars = sorted((shards / split).glob("*.tar"))
        samples = list(webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False))
        manifest = read_json(shards / split / "manifest.json")
        assert {Image.open(io.BytesIO(sample["jpg"])).size for sample in samples} == {(256, 256)}
        cmyk = sum("CMYK JPEG file" in row["found"] for row in manifest["repairs"])
        rows = {
            "samples": f"{len(samples):,}",
            "classes": "10, 0 without an image",
            "images per class": spread(list(Counter(int(sample["cls"]) for sample in samples).values())),
            "shards": str(len(tars)),
            "samples per shard": spread([row["samples"] for row in manifest["shards"]]),
            "bytes": f"{sum(tar.stat().st_size for tar in tars):,}",
            "bytes per shard": spread([tar.stat().st_size for tar in tars]),
            "bytes per image": spread([len(sample["jpg"]) for sample in samples]),
            "repaired or noted": str(len(manifest["repairs"])),
            f"  {cmyk}": "CMYK JPEG file",
            "skipped": "0",
        }
        lines = table.splitlines()
        assert cmyk > 0 and lines[0] == split and format_rows(rows) <= set(lines)
        assert "store crop256" in table and "seed 2012" in table


def test_stats_of_adopted_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A manifest without versions, seed and plan; a class without an image is counted."""
    write_foreign(tmp_path / "src", "x", [0, 0, 2, 2, 2, 2], 4, newline=b"\n")
    adopt(tmp_path / "src", tmp_path / "shards", split="val", pattern="x-*.tar", workers=1)
    capsys.readouterr()
    stats(tmp_path / "shards")
    rows = {"classes": "3, 1 without an image", "images per class": spread([2, 0, 4]), "versions": "unknown"}
    rows |= {"options": "store adopted", "source": f"adopted from {tmp_path / 'src'} with x-*.tar"}
    assert format_rows(rows) <= set(capsys.readouterr().out.splitlines())
