"""The tool sees the training images alone, as Pillow decodes them, and its file does not depend on how it went
through them."""

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline.files import read_json, write_json
from pipeline.loader import decoded_batches
from pipeline.shards import ShardSet, open_shards
from tests.helpers import ROOT, jpeg, photo, refuses, run_ok
from tools.compute_pca import compute_pca, sum_batches
from tools.make_shards import pack
from tools.moments import Moments
from tools.packing.adopt import adopt
from tools.packing.images import crop256


def test_sums_are_those_of_pillows_pixels(few: Path, tmp_path: Path) -> None:
    """Counts are exact, moments those of the pixels that Pillow decodes, bytes the same for another thread count."""
    content = read_json(few / "pca.json")
    tars = [str(path) for path in sorted((few / "train").glob("*.tar"))]
    total, products, count = np.zeros(3), np.zeros((3, 3)), 0
    for sample in webdataset.WebDataset(tars, shardshuffle=False, empty_check=False):
        pixels = np.asarray(Image.open(io.BytesIO(sample["jpg"]))).reshape(-1, 3).astype(float)
        total, products, count = total + pixels.sum(0), products + pixels.T @ pixels, count + 1
    assert content["num_images"] == count and content["num_pixels"] == count * 256 * 256
    np.testing.assert_allclose(content["sum"], total, rtol=1e-4)  # decoders may differ by a level in a pixel
    np.testing.assert_allclose(content["sum_products"], products, rtol=1e-4)
    out = tmp_path / "new" / "pca.json"
    taskset = ["taskset", "-c", str(min(os.sched_getaffinity(0))), sys.executable]
    subprocess.run([*taskset, "tools/compute_pca.py", few, "--out", out], cwd=ROOT, check=True)
    assert out.read_bytes() == (few / "pca.json").read_bytes()
    assert "nothing to do" in run_ok("tools/compute_pca.py", few)


def test_sums_do_not_depend_on_batches_and_threads(numbered_shards: Callable[..., ShardSet]) -> None:
    """Whatever the batches and threads, their sums add up to those of all images, and of no other."""
    split = numbered_shards(20, 3)
    stored = np.concatenate([batch.numpy().copy() for batch in decoded_batches(split, 10)])
    for batch_size, threads in ((1, 9), (7, 1), (64, 9)):
        sums = list(sum_batches(split, batch_size, threads, with_image=True))
        assert sum((each.moments for each in sums), Moments()) == Moments.of(stored)
        np.testing.assert_array_equal(sum(each.image for each in sums), stored.sum(0, dtype=np.int64))


def test_mean_image_is_that_of_the_decoded_images(few: Path, tmp_path: Path) -> None:
    """The mean of every pixel of the decoded training images, exact up to float32; pca.json stays the same, packing and
    verifying know both files. One that is of other images, or damaged, is made again."""
    copy = tmp_path / "shards"
    shutil.copytree(few, copy)
    assert "nothing to do" not in run_ok("tools/compute_pca.py", copy, "--mean-image")
    stored = np.concatenate([batch.numpy() for batch in decoded_batches(open_shards(copy, "train"), 32)])
    mean, sound = np.load(copy / "mean_image.npy"), (copy / "mean_image.npy").read_bytes()
    assert mean.dtype == np.float32
    np.testing.assert_array_equal(mean, stored.mean(0, dtype=np.float64).astype(np.float32))
    np.testing.assert_array_equal(np.asarray(Image.open(copy / "mean_image.png")), np.rint(stored.mean(0)))
    assert "nothing to do" in run_ok("tools/compute_pca.py", copy, "--mean-image")
    assert "note:" not in run_ok("tools/make_shards.py", "verify", copy, "--fast")
    np.save(copy / "mean_image.npy", mean + 1)
    for _ in range(2):
        compute_pca(copy, mean_image=True)
        assert (copy / "mean_image.npy").read_bytes() == sound
        (copy / "mean_image.npy").write_bytes(sound[:1000])
    assert (copy / "pca.json").read_bytes() == (few / "pca.json").read_bytes()


@pytest.mark.parametrize(("kind", "count"), [("grey", 3), ("flat", 2), ("photo", 1)])
def test_degenerate_images_get_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, count: int
) -> None:
    """Grey images and one colour work, with a warning; a photograph has none."""
    rng, folder = np.random.default_rng(0), tmp_path / "raw" / "train" / "a"
    folder.mkdir(parents=True)
    for number in range(count):
        image = photo(rng, 300, 300)
        image = {"grey": np.repeat(image[:, :, :1], 3, 2), "flat": np.full_like(image, 90), "photo": image}[
            kind
        ]
        Image.fromarray(image).save(folder / f"{number}.png")
    pack(tmp_path / "raw", tmp_path / "shards", workers=1)
    capsys.readouterr()
    compute_pca(tmp_path / "shards")
    assert ("warning" in capsys.readouterr().out) == (kind != "photo")
    content = read_json(tmp_path / "shards" / "pca.json")
    assert np.isfinite(content["eigenvectors"]).all() and min(content["eigenvalues"]) >= 0


def test_wrong_input_writes_nothing(few: Path, tmp_path: Path) -> None:
    """No shards, or a pca.json of other shards: one sentence, code 2, nothing written."""
    assert "manifest.json" in refuses("tools/compute_pca.py", tmp_path)
    assert not list(tmp_path.iterdir())
    out, other = tmp_path / "pca.json", {**read_json(few / "pca.json"), "manifest_sha256": "other"}
    write_json(out, other)
    assert "other shards" in refuses("tools/compute_pca.py", few, "--out", out)
    assert read_json(out) == other
    (tmp_path / "train").symlink_to(few / "train")
    shutil.copy(few / "classes.json", tmp_path)
    out.rename(tmp_path / "old.json")
    (tmp_path / "pca.json.tmp").mkdir()
    assert "pca.json: cannot be written" in refuses("tools/compute_pca.py", tmp_path)


def test_images_of_other_sizes_count_as_packed(tmp_path: Path) -> None:
    """Adopted images that are not 256x256 count as what the packer would have made of them."""
    rng = np.random.default_rng(0)
    images = [photo(rng, *size) for size in ((224, 224), (256, 256), (300, 256), (375, 500))]
    source, adopted = tmp_path / "source", tmp_path / "shards"
    source.mkdir()
    with webdataset.TarWriter(str(source / "a.tar")) as tar:
        for number, image in enumerate(images):
            tar.write({"__key__": f"s{number}", "jpg": jpeg(image, quality=100, subsampling=0), "cls": b"0"})
    adopt(source, adopted, split="train", pattern="*.tar", workers=1)
    compute_pca(adopted)
    pixels = np.concatenate([crop256(image.copy()).reshape(-1, 3) for image in images]).astype(float)
    content = read_json(adopted / "pca.json")
    assert content["num_pixels"] == len(pixels)
    np.testing.assert_allclose(content["mean"], pixels.mean(0), atol=0.1)
    np.testing.assert_allclose(content["covariance"], np.cov(pixels.T, ddof=0), rtol=0.01, atol=5)


@pytest.mark.gpu
def test_gpu_agrees_with_cpu(few: Path, tmp_path: Path) -> None:
    """A GPU counts the same images, names its decoder, and its eigenvalues are those of the CPU within a per cent; its
    own runs agree to the byte."""
    paths = [tmp_path / name for name in ("one.json", "two.json")]
    for path in paths:
        run_ok("tools/compute_pca.py", few, "--device", "cuda", "--out", path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    ours, cpu = read_json(paths[0]), read_json(few / "pca.json")
    assert ours["num_images"] == cpu["num_images"] and ours["decoder"].endswith("gpu")
    np.testing.assert_allclose(ours["eigenvalues"], cpu["eigenvalues"], rtol=0.01)
