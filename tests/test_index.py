"""Row n of samples.npy is sample n of the shards, read with tarfile alone; `index` adds it to shards of version 0.1 and
changes nothing else."""

import io
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.eigenbasis import Eigenbasis
from pipeline.files import hash_file, read_json, sha256, write_json
from pipeline.shards import SAMPLE, ShardSet, open_shards
from tests.helpers import ROOT, Make, files, read_tar, refuses, run_ok, run_python, write_foreign
from tools.packing.adopt import adopt
from tools.packing.index import index
from tools.packing.verify import verify

INDEX = ("tools/make_shards.py", "index")


def read_by_tarfile(tars: tuple[str, ...]) -> list[tuple[int, str, bytes, int]]:
    """Shard, key, image and label of every sample, in stored order."""
    found = []
    for number, path in enumerate(tars):
        content = [(*name.split("."), data) for name, data in read_tar(Path(path)).items()]
        labels = {key: int(data) for key, kind, data in content if kind == "cls"}
        images = [(key, data) for key, kind, data in content if kind in ("jpg", "jpeg")]
        found += [(number, key, data, labels[key]) for key, data in images]
    return found


def read_by_rows(shards: ShardSet) -> list[tuple[int, str, bytes, int]]:
    """The same by the table."""
    rows = [row.tolist() for row in shards.samples]
    return [
        (shard, shards.read_key(n), Path(shards.tars[shard]).read_bytes()[offset : offset + size], label)
        for n, (shard, offset, size, label) in enumerate(rows)
    ]


def test_rows_are_the_samples(few: Path, tmp_path: Path) -> None:
    """Of packed shards, of a choice of them in another order, and of adopted ones, whose labels end in white space."""
    val = open_shards(few, "val")
    assert read_by_rows(val) == read_by_tarfile(val.tars) and len(val.samples) == val.num_samples == 179
    some = open_shards(few, "train").only([2, 0])
    assert [Path(tar).name for tar in some.tars] == ["train-000002.tar", "train-000000.tar"]
    assert read_by_rows(some) == read_by_tarfile(some.tars)
    for table in (val.samples, some.samples):
        with pytest.raises(ValueError, match="read-only"):
            table["label"] = 0
    write_foreign(tmp_path / "src", "x", [3, 1, 2, 1, 0], 2, "jpeg", b" \n")
    adopt(tmp_path / "src", tmp_path / "shards", split="train", pattern="*.tar", workers=2)
    adopted = open_shards(tmp_path / "shards", "train")
    assert read_by_rows(adopted) == read_by_tarfile(adopted.tars)
    assert adopted.samples["label"].tolist() == [3, 1, 2, 1, 0]


def test_a_key_of_a_damaged_header_is_empty(numbered_shards: Make) -> None:
    """Whatever the bytes, and where the shard is gone; the others keep theirs."""
    shards = numbered_shards(4, 1)
    tar, at = Path(shards.tars[0]), int(shards.samples[1]["offset"]) - 512
    sound = tar.read_bytes()
    for header in (bytes(512), b"\xff" * 512, b"x" + sound[at + 1 : at + 512], sound[at : at + 512][::-1]):
        tar.write_bytes(sound[:at] + header + sound[at + 512 :])
        assert [shards.read_key(n) for n in range(4)] == ["s0", "", "s2", "s3"]
    tar.write_bytes(sound[:700])
    assert [shards.read_key(n) for n in range(2)] == ["s0", ""]
    tar.unlink()
    assert shards.read_key(0) == "" == replace(shards, samples=np.zeros(1, SAMPLE)).read_key(0)


@pytest.fixture
def old(few: Path, tmp_path: Path) -> Path:
    """Shards as version 0.1 wrote them."""
    shards = Path(shutil.copytree(few, tmp_path / "old"))
    for split in ("train", "val"):
        (shards / split / "samples.npy").unlink()
        manifest = read_json(shards / split / "manifest.json")
        del manifest["samples_sha256"]
        write_json(shards / split / "manifest.json", manifest)
    return shards


@pytest.mark.parametrize("workers", ["1", "2"])
def test_shards_of_version_0_1(few: Path, old: Path, workers: str) -> None:
    """They are refused with the command, which gives the bytes of a pack; their identity is the SHA-256 of the manifest
    as it was, and pca.json still fits. Then there is nothing to do, but where the table is damaged."""
    identity = sha256((old / "train" / "manifest.json").read_bytes())
    with pytest.raises(ValueError, match=f"run tools/make_shards.py index {old} "):
        open_shards(old, "train")
    run_ok(*INDEX, old, "--workers", workers)
    assert files(old) == files(few)
    assert open_shards(old, "train").manifest_sha256 == identity
    Eigenbasis.load(old / "pca.json", identity)
    assert run_ok(*INDEX, old).count("nothing to do") == 2
    (old / "val" / "samples.npy").write_bytes(b"x")
    assert run_ok(*INDEX, old).count("nothing to do") == 1 and files(old) == files(few)


def test_another_folder(few: Path, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --out shards stay as they are, and a folder of absolute links verifies; again, nothing to do. A folder of
    other files is refused and keeps them."""
    monkeypatch.chdir(tmp_path)
    before, out = files(old), tmp_path / "deep" / "out"
    index(Path("old"), out, workers=1)
    links = [path for path in out.rglob("*") if path.is_symlink()]
    assert files(old) == before and files(out) == files(few)
    assert len(links) == 2 * 4 and all(link.readlink() == old / link.relative_to(out) for link in links)
    verify(out, workers=1)
    assert run_ok(*INDEX, old, "--out", out).count("nothing to do") == 2
    (tmp_path / "full" / "train").mkdir(parents=True)
    (tmp_path / "full" / "train" / "train-000001.tar").write_bytes(b"mine")
    assert "give a new folder" in refuses(*INDEX, old, "--out", tmp_path / "full")
    assert files(tmp_path / "full") == {"train/train-000001.tar": b"mine"}
    assert "got others; give another folder" in refuses(*INDEX, numbered(tmp_path), "--out", out)


def numbered(tmp_path: Path) -> Path:
    """A split of other shards."""
    write_foreign(tmp_path / "src", "x", [0, 1], 2)
    adopt(tmp_path / "src", tmp_path / "other", split="train", pattern="*.tar", workers=1)
    return tmp_path / "other"


def edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Change a file."""
    return lambda shards: (shards / name).write_bytes(change((shards / name).read_bytes()))


def swap(lines: bytes) -> bytes:
    """The second and third line change places."""
    head, first, second, *rest = lines.splitlines(keepends=True)
    return b"".join([head, second, first, *rest])


def set_label(data: bytes, label: bytes = b"x") -> bytes:
    """Another text in the first label."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        at = tar.getmembers()[1].offset_data
    return data[:at] + label + data[at + len(label) :]


def keep_two_classes(data: bytes) -> bytes:
    """A class list that is short."""
    content = json.loads(data)
    return json.dumps(content | {"classes": content["classes"][:2]}).encode()


TAR, LINES = "val/val-000000.tar", "val/val-000000.idx"


@pytest.mark.parametrize(("damage", "message"), [
    (edit(TAR, set_label), r"val-000000.tar: ILSVRC\w+.jpg: expected a class index of at most 6 digits .* got b'x'"),
    (edit("classes.json", keep_two_classes), r"train-000000.tar: n\w+.jpg: expected a label below 2, got \d;"),
    (edit(TAR, lambda data: data[:-512]), r"val-000000.tar: expected \d+ bytes and 179 samples in its .idx, got"),
    (edit(TAR, lambda data: b"y" + data[1:]), "val-000000.tar: its .idx does not fit at ILSVRC"),
    (edit(LINES, lambda data: data.replace(b" 512 ", b" 1024 ")), "val-000000.tar: its .idx does not fit at ILSVRC"),
    (edit(LINES, lambda data: data.replace(b"cls", b"clz", 1)), "val-000000.tar: its .idx does not fit at ILSVRC"),
    (edit(LINES, swap), "val-000000.tar: its .idx does not fit at ILSVRC"),
    (edit(LINES, lambda data: b"v1.2 0\n"), "179 samples in its .idx, got .* and 0;"),
    (edit(LINES, lambda data: b"v9" + data[2:]), "val-000000.idx is damaged"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(
    old: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    """By shard and sample, in one sentence, exit code 2, with nothing written."""
    damage(old)
    before = files(tmp_path)
    assert re.search(message, refuses(*INDEX, old, "--workers", "1"))
    assert re.search(message, refuses(*INDEX, old, "--workers", "1", "--out", tmp_path / "out"))
    assert files(tmp_path) == before and not (tmp_path / "out").exists()


OPEN = r"""
import json, re, sys, time
from pathlib import Path
from pipeline.shards import open_samples

def private_bytes():
    return sum(map(int, re.findall(r"Private_\w+: +(\d+)", Path("/proc/self/smaps_rollup").read_text()))) * 1024

before, started = private_bytes(), time.perf_counter()
samples = open_samples(Path(sys.argv[1]), json.loads(sys.argv[2]))
assert len(samples) == 14_000_000 and samples[-1].tolist() == (0, 0, 0, 0)
print(time.perf_counter() - started, private_bytes() - before)
"""


def test_many_samples(tmp_path: Path) -> None:
    """A table of 14 million opens in seconds (most of a second is the checksum) and takes next to no memory."""
    path = tmp_path / "samples.npy"
    np.lib.format.open_memmap(path, "w+", SAMPLE, (14_000_000,)).flush()
    manifest = {"num_samples": 14_000_000, "samples_sha256": hash_file(path)}
    (tmp_path / "open.py").write_text(OPEN)
    done = run_python(
        tmp_path / "open.py", tmp_path, json.dumps(manifest), env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    seconds, private = map(float, done.stdout.split())
    assert seconds < 5 and private < 50e6, done.stderr
