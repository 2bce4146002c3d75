"""After DALI failed, the damage is found by looking: its place is told, and sound shards are not blamed."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from pipeline.diagnose import locate_corrupt_sample
from pipeline.errors import DataError
from pipeline.reader import decoded_batches
from pipeline.shards import open_shards, read_index
from tests.helpers import jpeg, photo, run_python


@pytest.fixture
def copy(few: Path, tmp_path: Path) -> Path:
    """Shards to be damaged."""
    shutil.copytree(few, tmp_path / "shards")
    return tmp_path / "shards"


def overwrite(tar: Path, change: Callable[[bytes], bytes]) -> str:
    """Change the image of the 12th sample, to as many bytes at most; what names it."""
    _, offset, size, name = read_index(tar.with_suffix(".idx"))[11][0]
    sound = tar.read_bytes()
    changed = change(sound[offset : offset + size])
    assert len(changed) <= size
    tar.write_bytes(sound[:offset] + changed.ljust(size, b"\0") + sound[offset + size :])
    return f"{name} at offset {offset} of {tar}"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda data: b"x" * len(data), "cannot be decoded"),
        (lambda data: data[: len(data) // 2], "cannot be decoded"),
        (lambda data: data[:100], "cannot be decoded"),
        (lambda data: b"", "cannot be decoded"),
        (lambda data: jpeg(photo(np.random.default_rng(0), 64, 48), quality=30), "is 48x64, not 256x256"),
    ],
)
def test_an_image(copy: Path, change: Callable[[bytes], bytes], told: str) -> None:
    """Is named by key, offset and shard."""
    place = overwrite(copy / "train" / "train-000001.tar", change)
    assert locate_corrupt_sample(open_shards(copy, "train")).startswith(f"{place} {told}")


def test_a_cut_image_while_reading(copy: Path) -> None:
    """Which DALI refuses though libjpeg decodes it: the sentence names it."""
    place = overwrite(copy / "train" / "train-000001.tar", lambda data: data[: len(data) // 2])
    with pytest.raises(DataError) as raised:
        list(decoded_batches(open_shards(copy, "train"), 32))
    assert place in str(raised.value)


def test_the_image_that_dali_refuses(copy: Path) -> None:
    """Is named, not another before it of which libjpeg warns and which DALI shows."""
    tar = copy / "train" / "train-000000.tar"
    for number, stray in ((2, b"JFIF\0\0\0"), (5, None)):
        _, offset, size, _ = read_index(tar.with_suffix(".idx"))[number][0]
        content = tar.read_bytes()
        image = content[offset : offset + size]
        if stray:  # JFIF revision 0.0
            image = image.replace(b"JFIF\0\1\1", stray)
            with pytest.raises(ValueError, match="JFIF"):
                simplejpeg.decode_jpeg(image)
        else:
            image = image[:-40] + bytes(40)
        tar.write_bytes(content[:offset] + image + content[offset + size :])
    warned, place = (read_index(tar.with_suffix(".idx"))[number][0][3] for number in (2, 5))
    with pytest.raises(DataError) as raised:
        list(decoded_batches(open_shards(copy, "train"), 32))
    assert f"{place} at offset" in str(raised.value) and warned not in str(raised.value)


AGAIN_AND_AGAIN = """
import sys
from pathlib import Path
from pipeline.eigenbasis import Eigenbasis
from pipeline.loader import train_loader
from pipeline.settings import DataConfig
from pipeline.errors import DataError
from pipeline.shards import open_shards
folder = Path(sys.argv[1])
train = open_shards(folder, "train")
basis = Eigenbasis.load(folder / "pca.json", train.manifest_sha256)
config = DataConfig(folder, shuffle_buffer=1)
for seed in range(30):
    loader = train_loader(train, basis, config, batch_size=32, seed=seed, rank=0, num_ranks=1, device="cpu")
    try:
        list(loader.epoch(0))
    except DataError as error:
        assert sys.argv[2] in str(error), error
    else:
        sys.exit("no error")
    loader.close()
"""


def test_no_crash_over_a_header(copy: Path) -> None:
    """Where a header cannot be read, DALI's decoder used to end the process, now and then."""
    place = overwrite(copy / "train" / "train-000001.tar", lambda data: b"x" * len(data))
    done = run_python("-c", AGAIN_AND_AGAIN, copy, place)
    assert done.returncode == 0, (done.returncode, done.stderr)


def test_files(copy: Path) -> None:
    """A shard that is cut or gone, an index of other samples or none; nothing where all is sound."""
    train = open_shards(copy, "train")
    assert locate_corrupt_sample(train) == ""
    tar = Path(train.tars[0])
    index, content = tar.with_suffix(".idx"), tar.read_bytes()
    tar.write_bytes(content[: len(content) // 2])
    assert f"{tar} has {len(content) // 2} bytes, but" in locate_corrupt_sample(train)
    tar.unlink()
    assert locate_corrupt_sample(train) == f"{tar}: No such file or directory"
    tar.write_bytes(content)
    lines = index.read_text().splitlines()
    index.write_text("\n".join([f"v1.2 {len(lines) - 2}", *lines[1:-1]]) + "\n")
    assert (
        locate_corrupt_sample(train)
        == f"{index} lists {len(lines) - 2} samples, the manifest {len(lines) - 1}"
    )
    index.write_text("v1.2 x\n")
    assert "damaged or not a DALI index" in locate_corrupt_sample(train)
