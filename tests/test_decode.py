"""A pixel store holds the pixels that the loader decodes, by any reader, after any number of kills; training on it is
training on its source, bit for bit."""

import io
import os
import resource
import shutil
import signal
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from nvidia.dali import Pipeline, fn
from PIL import Image

from pipeline.eigenbasis import Eigenbasis
from pipeline.errors import DataError
from pipeline.files import read_json, write_json
from pipeline.graph import Graph, build_pipeline
from pipeline.lighting import Lighting
from pipeline.loader import decoded_batches, train_loader, val_loader
from pipeline.settings import Augmentation
from pipeline.shards import open_shards
from tests.helpers import (
    TRAIN,
    Make,
    collect,
    files,
    final,
    jpeg,
    photo,
    read_tar,
    refuses,
    run_ok,
    same_batches,
    same_weights,
    small_run,
    start_python,
    wait_for,
)
from tools.packing.verify import verify
from tools.preview import render_views

DECODE = ("tools/make_shards.py", "decode")


@pytest.fixture(scope="module")
def pixels(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pixel store of `few`, decoded by one worker."""
    out = tmp_path_factory.mktemp("decode") / "pixels"
    run_ok(*DECODE, few, out, "--workers", "1")
    return out


def test_the_store_is_the_loaders_pixels(few: Path, pixels: Path) -> None:
    """Read by tarfile, by the webdataset library and by DALI's own reader with its numpy decoder: the same keys, labels
    and order as the source, within a level of Pillow; verify finds it sound, and pca.json holds."""
    for split in ("train", "val"):
        source, store = open_shards(few, split), open_shards(pixels, split)
        originals = [item for tar in source.tars for item in read_tar(Path(tar)).items()]
        members = [item for tar in store.tars for item in read_tar(Path(tar)).items()]
        assert [name.replace(".npy", ".jpg") for name, _ in members] == [name for name, _ in originals]
        for (name, original), (_, data) in list(zip(originals, members, strict=True))[:200]:
            if name.endswith(".cls"):
                assert data == original
                continue
            array = np.load(io.BytesIO(data))
            expected = np.asarray(Image.open(io.BytesIO(original)).convert("RGB")).astype(int)
            assert array.dtype == np.uint8 and np.abs(array - expected).max() <= 1
        stored = np.concatenate(list(decoded_batches(store, 64)))
        assert np.array_equal(stored, np.concatenate(list(decoded_batches(source, 64))))
        samples = webdataset.WebDataset([*store.tars], shardshuffle=False).decode()
        assert all(np.array_equal(sample["npy"], stored[n]) for n, sample in enumerate(samples))
        indexes = [str(Path(tar).with_suffix(".idx")) for tar in store.tars]
        pipe = Pipeline(64, 1, None)
        with pipe:
            raw, _ = fn.readers.webdataset(paths=[*store.tars], index_paths=indexes, ext=["npy", "cls"])  # type: ignore[misc]
            pipe.set_outputs(fn.decoders.numpy(raw))
        assert np.array_equal(pipe.run()[0].as_array(), stored[:64])
    verify(pixels, workers=1)
    Eigenbasis.load(pixels / "pca.json", open_shards(pixels, "train").manifest_sha256)


@pytest.mark.parametrize("settings", [{}, {"shuffle": "blocks", "block_shards": 1}])
def test_batches_are_the_sources(few: Path, pixels: Path, settings: dict[str, Any]) -> None:
    """Training and validation, on one rank and on two, bit for bit; also batches that are kept. The preview shows the
    same stored images and crops."""
    for make, more in ((train_loader, settings), (val_loader, {})):
        for rank, num_ranks in ((0, 1), (1, 2)):
            place: dict[str, Any] = {
                "batch_size": 32,
                "device": "cpu",
                "rank": rank,
                "num_ranks": num_ranks,
                **more,
            }
            one, two = (collect(make(folder, **place), range(2)) for folder in (few, pixels))  # type: ignore[operator]
            assert same_batches(one, two) and len(one) >= 6
    basis = Eigenbasis.load(few / "pca.json", open_shards(few, "train").manifest_sha256)
    views = [render_views(open_shards(folder, "train"), basis, Augmentation(), 3) for folder in (few, pixels)]
    for a, b in zip(*views, strict=True):
        assert a.key == b.key and np.array_equal(a.stored, b.stored) and np.array_equal(a.pixels, b.pixels)


def test_a_gpu_gets_the_same_crops(pixels: Path) -> None:
    """The graph of a GPU can be built for stored pixels: rows at full width, of which it cuts the columns, flips and
    normalizes; there is no decoder in it."""
    for crop in (True, False):
        serialized = build_pipeline(Graph("stored", "gpu", crop=crop, normalize=True), 8, 2, None).serialize()
        assert b"CropMirrorNormalize" in serialized and b"decoders" not in serialized.lower()


@pytest.mark.slow
def test_the_same_weights(few: Path, pixels: Path, tmp_path: Path) -> None:
    """A run on the pixel store ends with bitwise the weights of the run on its source."""
    for name, folder in (("jpeg", few), ("pixels", pixels)):
        run_ok(*TRAIN, *small_run(folder, tmp_path / name, "--train.epochs", "2", "--run.keep_every", "0"))
    assert same_weights(final(tmp_path / "jpeg"), final(tmp_path / "pixels"))


@pytest.mark.slow
def test_killed_and_resumed(few: Path, pixels: Path, tmp_path: Path) -> None:
    """Killed three times and resumed with two workers, all files are those of one worker in one go; run again, there is
    nothing to do."""
    out = tmp_path / "out"
    for shard in range(3):
        process = start_python(*DECODE, few, out, "--workers", "2")
        tar = out / "train" / f"train-{shard:06d}.tar"
        wait_for(lambda: tar.with_suffix(".tar.tmp").exists() or tar.exists() or process.poll() is not None)  # noqa: B023
        process.send_signal(signal.SIGKILL)
        process.communicate()
    run_ok(*DECODE, few, out, "--workers", "2")
    assert files(out) == files(pixels)
    assert run_ok(*DECODE, few, out).count("nothing to do") == 2


def test_a_full_disk(few: Path, tmp_path: Path) -> None:
    """It is said with the file's name and code 2; whole shards stay, and the same command resumes."""
    limit = 40_000_000

    def restrict() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit // 2, resource.RLIM_INFINITY))

    process = start_python(*DECODE, few, tmp_path / "out", "--workers", "1", preexec_fn=restrict)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2 and "train-000000.tar" in error and "Traceback" not in error
    assert not list((tmp_path / "out").rglob("*.tar"))
    run_ok(*DECODE, few, tmp_path / "out", "--workers", "1")


def test_other_sources_are_refused(few: Path, pixels: Path, tmp_path: Path) -> None:
    """A store of other shards, finished or not, a folder with other files, a pixel store as the source: refused with
    code 2, and nothing changes."""
    changed = tmp_path / "changed"
    shutil.copytree(few, changed)
    manifest = read_json(changed / "train" / "manifest.json")
    write_json(changed / "train" / "manifest.json", manifest | {"source": "elsewhere"})
    other = tmp_path / "other"
    (other / "train").mkdir(parents=True)
    (other / "train" / "notes.txt").write_text("mine")
    for source, out in ((changed, pixels), (few, other), (pixels, tmp_path / "new")):
        before = files(out)
        assert str(out if source != pixels else source) in refuses(*DECODE, source, out)
        assert files(out) == before


def test_damage(pixels: Path, tmp_path: Path) -> None:
    """A shard that is cut is named by the loader; one whose bytes changed, or whose array has another shape, by
    verify."""
    copy = tmp_path / "copy"
    shutil.copytree(pixels, copy)
    train = open_shards(copy, "train")
    tar = Path(train.tars[1])
    with tarfile.open(tar) as opened:
        member = opened.getmembers()[0]
    content = bytearray(tar.read_bytes())
    start = content.index(b"256, 256", member.offset_data)
    content[start : start + 8] = b"512, 128"
    tar.write_bytes(content)
    with pytest.raises(DataError):
        verify(copy, workers=1)
    loader = train_loader(copy, batch_size=32, device="cpu")
    os.truncate(tar, 1_000_000)
    with pytest.raises(DataError, match=r"train-000001\.tar"):
        list(loader)


def test_originals(numbered_shards: Make, plain_basis: Eigenbasis, tmp_path: Path) -> None:
    """Of images of any size the store has the resampled squares: training's crops are within a level of those that are
    resampled directly from the originals."""
    shards = numbered_shards(24, 2, jpeg(photo(np.random.default_rng(5), 300, 420), quality=95))
    folder, out = Path(shards.tars[0]).parents[1], tmp_path / "pixels"
    for split in ("train", "val"):
        path = folder / split / "manifest.json"
        write_json(path, read_json(path) | {"options": {"store": "original"}})
    run_ok(*DECODE, folder, out, "--workers", "1")
    plain = Augmentation(lighting=Lighting(strength=0.0))
    options: dict[str, Any] = {"batch_size": 8, "device": "cpu", "basis": plain_basis, "augmentation": plain}
    for one, two in zip(train_loader(folder, **options), train_loader(out, **options), strict=True):
        assert one.labels.equal(two.labels) and (one.images - two.images).abs().max() < 1.001
