"""Verification: sound shards pass, and each kind of damage is reported with its place.

Longer than others: it is one command, and most tests damage a copy and read the output with the same helpers.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.files import read_json, sha256, write_json
from pipeline.shards import read_index
from tests.helpers import jpeg, photo, refuses, run_here, run_ok, tar_of
from tools.packing.verify import MAX_PROBLEMS, find_image_fault, verify


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


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Replace a file's content."""
    path.write_bytes(change(path.read_bytes()))


def test_sound_shards_pass(few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In full and fast, on one process; strays are noted and are no fault."""
    count = sum(read_json(few / split / "manifest.json")["num_samples"] for split in ("train", "val"))
    verify(few, workers=1)
    assert capsys.readouterr().out.startswith(f"{few}: {count} images in 4 shards, all valid (")
    verify(few, fast=True)
    assert capsys.readouterr().out == f"{few}: {count} images in 4 shards, all valid (images not read)\n"


def test_strays_are_noted(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files that no manifest lists, in a split and next to it."""
    for name in ("train/train-000003.tar.tmp", "val/val-000000.json", "holiday.jpg"):
        (copy / name).write_bytes(b"x")
    verify(copy, fast=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "train: note: train-000003.tar.tmp is not in the manifest"
    assert lines[1] == "val: note: val-000000.json is not in the manifest"
    assert lines[2] == f"{copy}: note: holiday.jpg is not part of the shards" and len(lines) == 4


def test_a_flipped_byte(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One byte in an image shows in the checksum, with the shard's name; the full check alone sees it."""
    tar = copy / "train" / "train-000002.tar"
    (_, offset, size, _), _ = read_index(tar.with_suffix(".idx"))[5]
    rewrite(tar, lambda content: content[: offset + size // 2] + b"\0" + content[offset + size // 2 + 1 :])
    lines = faults(copy, capsys)
    assert "train/train-000002.tar: SHA-256 differs from the manifest's" in lines
    assert all(line.startswith("train/train-000002.tar: ") for line in lines)
    verify(copy, fast=True)


def test_a_damaged_image(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Told with the member's name and offset."""
    tar = copy / "train" / "train-000002.tar"
    (_, offset, size, name), _ = read_index(tar.with_suffix(".idx"))[5]
    start = offset + size // 2
    rewrite(tar, lambda content: content[:start] + b"\xff\xff\x00" * 100 + content[start + 300 :])
    (line,) = [line for line in faults(copy, capsys) if "SHA-256" not in line]
    assert line.startswith(f"train/train-000002.tar: {name} at byte {offset}: ")


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (
            lambda content: content[:700_000],
            ["bytes, got 700000", "truncated inside", "SHA-256"],
        ),
        (lambda content: content[:1000], ["bytes, got 1000", "truncated", "got 0 readable ones"]),
        (lambda content: bytes(len(content)), ["expected 180 samples, got 0 readable ones", "SHA-256"]),
        (lambda content: b"", ["bytes, got 0", "not a tar archive"]),
        (lambda content: content[7:] + content[:7], ["not a tar archive", "SHA-256"]),
        (lambda content: content[:512] + b"x" + content[513:], ["at byte 512: not a JPEG file", "SHA-256"]),
    ],
)
def test_a_damaged_tar(
    copy: Path, capsys: pytest.CaptureFixture[str], change: Callable[[bytes], bytes], messages: list[str]
) -> None:
    """Cut, zeroed, emptied or turned to garbage: reported without a crash, and the other shards are not accused."""
    rewrite(copy / "train" / "train-000001.tar", change)
    lines = faults(copy, capsys)
    assert all(line.startswith("train/train-000001.tar: ") for line in lines)
    assert all(any(message in line for line in lines) for message in messages)


def swap_two_lines(content: bytes) -> bytes:
    """Two samples of an index change places."""
    header, first, second, *rest = content.splitlines(keepends=True)
    return b"".join([header, second, first, *rest])


@pytest.mark.parametrize(
    ("change", "message", "fast_too"),
    [
        (lambda content: None, "unreadable .idx (No such file or directory)", True),
        (lambda content: b"\xfe\xff garbage \0" * 99, "expected a DALI index in its .idx", True),
        (lambda content: b"hello\nworld 1 2 3\n", "expected a DALI index in its .idx", True),
        (lambda content: content[:-200], "expected a DALI index in its .idx", True),
        (lambda content: b"v1.2 0\n", "expected 1", True),
        (
            lambda content: content.replace(b"jpg 512 ", b"jpg 51200000 "),
            "line 2 of its .idx points outside of the data",
            True,
        ),
        (
            lambda content: content.replace(b"jpg 512 ", b"jpg 513 "),
            "line 2 of its .idx points outside of the data",
            True,
        ),
        (swap_two_lines, "line 2 of its .idx does not match n", False),
        (
            lambda content: content.replace(b"jpg 512 ", b"jpg 1024 "),
            "line 2 of its .idx does not match n",
            False,
        ),
    ],
)
def test_a_damaged_index(
    copy: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[bytes], bytes | None],
    message: str,
    fast_too: bool,
) -> None:
    """What does not parse, count or lie within the tar shows without reading the tar; what lies shows with it."""
    path = copy / "train" / "train-000002.idx"
    content = change(path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert any(line.startswith(f"train/train-000002.tar: {message}") for line in faults(copy, capsys))
    if fast_too:
        assert any(
            line.startswith(f"train/train-000002.tar: {message}") for line in faults(copy, capsys, fast=True)
        )
    else:
        verify(copy, fast=True)


def test_a_missing_shard(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Gone, or a link that leads nowhere."""
    (copy / "train" / "train-000001.tar").unlink()
    (copy / "train" / "train-000002.tar").unlink()
    (copy / "train" / "train-000002.tar").symlink_to("/nowhere.tar")
    for fast in (True, False):
        assert faults(copy, capsys, fast) == [
            f"train/train-00000{n}.tar: unreadable (No such file or directory)" for n in (1, 2)
        ]


@pytest.mark.parametrize(
    "content",
    [
        b"garbage",
        b"",
        b"[]",
        b'{"format_version": 2, "shards": []}',
    ],
)
def test_a_garbage_manifest(copy: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    """A fault of that split; the other is checked all the same."""
    (copy / "val" / "manifest.json").write_bytes(content)
    (copy / "train" / "train-000000.tar").unlink()
    first, second = faults(copy, capsys)
    assert first == "train/train-000000.tar: unreadable (No such file or directory)"
    assert second.startswith("val: ") and "manifest.json" in second


def test_half_a_pack(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A split whose pack was not finished, one with the other's manifest, and a damaged list of classes."""
    (copy / "val" / "manifest.json").unlink()
    assert faults(copy, capsys, fast=True) == ["val: no manifest.json: its pack is unfinished"]
    shutil.copy(copy / "train" / "manifest.json", copy / "val")
    assert "val: expected split val, got train" in faults(copy, capsys, fast=True)
    (copy / "classes.json").write_text("[]")
    assert all(
        "classes.json" in line for line in faults(copy, capsys, fast=True) if line.startswith("train: ")
    )


def change_json(path: Path, **changes: object) -> None:
    """Replace fields of a JSON file."""
    write_json(path, read_json(path) | changes)


def test_labels_out_of_range(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shards that were wrong from the start: every such image is reported, long lists are cut and counted in full."""
    classes = read_json(copy / "classes.json")
    change_json(copy / "classes.json", classes=classes["classes"][:-1])
    assert any("classes.json: expected 10, got 9" in line for line in faults(copy, capsys, fast=True))
    change_json(copy / "train" / "manifest.json", num_classes=9)
    change_json(copy / "val" / "manifest.json", num_classes=9)
    lines = [line for line in faults(copy, capsys) if line.startswith("val/val-000000.tar: ")]
    labels = [int(key.split()[0]) for key in label_texts(copy / "val" / "val-000000.tar")]
    assert len(lines) == min(labels.count(9), MAX_PROBLEMS + 1)
    assert "expected a label below 9, got 9" in lines[0]


def label_texts(tar: Path) -> list[str]:
    """Contents of all `.cls`, read with tarfile."""
    import tarfile

    with tarfile.open(tar) as opened:
        return [opened.extractfile(m).read().decode() for m in opened if m.name.endswith(".cls")]  # type: ignore[union-attr]


def test_doubled_samples(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A shard that is there twice under two names: its keys repeat."""
    manifest = read_json(copy / "train" / "manifest.json")
    for suffix in (".tar", ".idx"):
        shutil.copy(copy / "train" / f"train-000001{suffix}", copy / "train" / f"train-000003{suffix}")
    row = {**manifest["shards"][1], "name": "train-000003.tar"}
    count = manifest["num_samples"] + row["samples"]
    change_json(copy / "train" / "manifest.json", shards=[*manifest["shards"], row], num_samples=count)
    assert faults(copy, capsys) == [
        f"train: {row['samples']} samples have a duplicate key, the first is number 1 of train/train-000003.tar"
    ]


@pytest.mark.parametrize(("store", "fault"), [("crop256", "256x100"), ("original", ""), ("adopted", "")])
def test_only_squares_fit_crop256(store: str, fault: str) -> None:
    """Other stores hold images of any size."""
    pixels = photo(np.random.default_rng(0))
    assert find_image_fault(jpeg(pixels), store) == "" and fault in find_image_fault(
        jpeg(pixels[:100]), store
    )
    assert find_image_fault(jpeg(pixels[:100], "CMYK"), store)


def test_bad_labels_and_members(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A label of another form, which DALI would misread silently, under a manifest and a checksum that fit."""
    image = jpeg(photo(np.random.default_rng(0)))
    content = tar_of([("a.jpg", image), ("a.cls", b"7.0"), ("b.jpg", image), ("b.cls", b"3")])
    (copy / "val" / "val-000000.tar").write_bytes(content)
    row = {"name": "val-000000.tar", "samples": 2, "bytes": len(content), "sha256": sha256(content)}
    change_json(copy / "val" / "manifest.json", shards=[row], num_samples=2)
    lines = [line for line in faults(copy, capsys) if ".cls" in line]
    assert lines == [
        "val/val-000000.tar: sample a at byte 512: expected a class index of at most 6 digits in a.cls, got b'7.0'"
    ]


def test_command_line(copy: Path, tmp_path: Path) -> None:
    """Exit codes 0, 3 for damage (and packing again mends it), 2 for a wrong folder; one sentence each on stderr."""
    assert "all valid" in run_ok("tools/make_shards.py", "verify", "--fast", copy)
    rewrite(copy / "train" / "train-000001.tar", lambda content: content[:5000])
    done = run_here("tools/make_shards.py", "verify", copy, "--workers", "2")
    assert done.returncode == 3 and "remove train/train-000001.tar and run pack again" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and "train/train-000001.tar: expected" in done.stdout
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "none", tmp_path / "empty"):
        assert str(folder) in refuses("tools/make_shards.py", "verify", folder)
