"""The published archives of ImageNet: a damaged devkit is refused in a sentence, as are archives with other sums."""

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from tests.helpers import refuses, tar_of
from tools.make_demo import DIGIT_TO_WNID, make_devkit
from tools.packing.layouts import read_devkit


@pytest.mark.parametrize(("at", "value"), [(384, 0), (428, 1), (500, 1), (652, 128)])
def test_a_devkit_that_ends_scipys_reader(tmp_path: Path, at: int, value: int) -> None:
    """One byte of meta.mat is enough for a segmentation fault (scipy 1.17); it is a sentence here."""
    files = {"meta.mat": b"", "ILSVRC2012_validation_ground_truth.txt": b""}
    with tarfile.open(fileobj=io.BytesIO(make_devkit(dict.fromkeys(DIGIT_TO_WNID.values(), 1), [1]))) as tar:
        for name in files:
            files[name] = tar.extractfile(f"ILSVRC2012_devkit_t12/data/{name}").read()  # type: ignore[union-attr]
    path = tmp_path / "devkit.tar.gz"
    write_devkit(path, files)
    assert len(read_devkit(path)[0]) == 10
    mat = bytearray(files["meta.mat"])
    mat[at] = value
    write_devkit(path, {**files, "meta.mat": bytes(mat)})
    with pytest.raises(
        ValueError, match=r"devkit.tar.gz: not the devkit .*, or damaged \(unreadable meta.mat"
    ):
        read_devkit(path)


def write_devkit(path: Path, files: dict[str, bytes]) -> None:
    """A devkit of these files."""
    tar = tar_of({f"ILSVRC2012_devkit_t12/data/{name}": data for name, data in files.items()})
    path.write_bytes(gzip.compress(tar))


def test_md5(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Archives that are not the published ones are refused by name; those with the right sums pass."""
    import hashlib

    from tools.packing import layouts

    told = refuses("tools/make_shards.py", "pack", raw, tmp_path / "shards", "--check-md5")
    assert "ILSVRC2012_img_train.tar: expected MD5" in told
    assert not (tmp_path / "shards").exists()
    sums = {name: hashlib.md5((raw / name).read_bytes()).hexdigest() for name in layouts.ARCHIVES}
    monkeypatch.setattr(layouts, "ARCHIVES", sums)
    layouts.verify_md5(raw, "ILSVRC-2012 archives")
