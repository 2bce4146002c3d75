"""The tool sees the training images alone, as Pillow decodes them, and its file does not depend on how it went
through them."""

import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline.files import read_json, write_json
from pipeline.reader import decoded_batches
from pipeline.shards import ShardSet, open_shards
from tests.helpers import jpeg, photo, refuses, run_here, run_ok, start_python, wait_for
from tools.compute_pca import compute_pca, draw_sample
from tools.make_shards import pack
from tools.packing.adopt import adopt
from tools.packing.images import crop256


def test_file(few: Path, tmp_path: Path) -> None:
    """Counts are exact, moments those of the pixels that Pillow decodes, bytes the same for another batch size and
    thread count."""
    content = read_json(few / "pca.json")
    tars = [str(path) for path in sorted((few / "train").glob("*.tar"))]
    total, products, count = np.zeros(3), np.zeros((3, 3)), 0
    for sample in webdataset.WebDataset(tars, shardshuffle=False, empty_check=False):
        pixels = np.asarray(Image.open(io.BytesIO(sample["jpg"]))).reshape(-1, 3).astype(float)
        total, products, count = total + pixels.sum(0), products + pixels.T @ pixels, count + 1
    assert content["num_images"] == count and content["num_pixels"] == count * 256 * 256
    np.testing.assert_allclose(content["sum"], total, rtol=1e-4)  # decoders may differ by a level in a pixel
    np.testing.assert_allclose(content["sum_products"], products, rtol=1e-4)

    copy = tmp_path / "shards"
    shutil.copytree(few, copy)
    assert "nothing to do" in run_ok("tools/compute_pca.py", copy)
    (copy / "pca.json").unlink()
    run_ok("-m", "tools.compute_pca", copy, "--batch-size", "7", "--threads", "1")
    assert (copy / "pca.json").read_bytes() == (few / "pca.json").read_bytes()


def test_parts_and_restarts(shards: Path, tmp_path: Path) -> None:
    """Three parts, one of them killed (-9) in its midst and started again, in any order and from torchrun's or Slurm's
    environment, leave the bytes of one run; what was counted is not counted again; the last one writes and cleans up.
    """
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    (copy / "pca.json").unlink()
    before = {path.name for path in copy.iterdir()}
    assert "left to other parts" in run_ok("tools/compute_pca.py", copy, "--part", "3/3", "--batch-size", "7")

    slow = ["tools/compute_pca.py", str(copy), "--batch-size", "1", "--threads", "1"]
    killed = start_python(*slow, env={**os.environ, "RANK": "0", "WORLD_SIZE": "3"})
    wait_for(lambda: list(copy.glob("pca.part-*-00")), killed)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -9, "the part was through before it could be killed"
    (first,) = copy.glob("pca.part-*-00")
    stamp = first.stat().st_mtime_ns
    again = run_here("tools/compute_pca.py", copy, env={"RANK": "0", "WORLD_SIZE": "3"})
    assert again.returncode == 0 and "left to other parts" in again.stdout
    counted = int(re.search(r"counted (\d+) images", again.stdout)[1])  # type: ignore[index]
    ours = sum(open_shards(copy, "train").samples[0::3])
    assert 0 < counted < ours and first.stat().st_mtime_ns == stamp

    # A quick estimate, and a part that was started with another option, leave what others have counted alone.
    compute_pca(copy, sample=9)
    compute_pca(copy, part="2/3", mean_image=True)
    (copy / "pca.json").unlink()
    for stray in copy.glob("pca.part-*"):
        if stray.name.split("-")[1] != first.name.split("-")[1]:
            stray.unlink()

    task = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3"}
    last = run_here("tools/compute_pca.py", copy, env=task)
    assert (
        last.returncode == 0
        and "stddev along the axes" in last.stdout
        and "part 2 of 3 (from SLURM" in last.stdout
    )
    assert (copy / "pca.json").read_bytes() == (shards / "pca.json").read_bytes()
    assert {path.name for path in copy.iterdir()} == before | {"pca.json"}


def test_sample(few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An estimate from a few images says so in the file, is the same for the same seed, gives way to the basis of all
    images, and does not replace it."""
    copy = tmp_path / "shards"
    shutil.copytree(few, copy)
    path, exact = copy / "pca.json", (few / "pca.json").read_bytes()
    assert "nothing to do" in run_ok("tools/compute_pca.py", copy, "--sample", "10")
    contents = []
    for seed in (2012, 2012, 7):
        path.unlink()
        compute_pca(copy, sample=10, seed=seed)
        assert "an estimate" in capsys.readouterr().out
        contents.append(read_json(path))
    assert contents[0] == contents[1] and contents[0]["sum"] != contents[2]["sum"]
    assert contents[2]["sample"] == {"images": 10, "seed": 7} and contents[2]["num_images"] == 10
    compute_pca(copy)
    assert path.read_bytes() == exact
    for wrong in (0, 100000):
        with pytest.raises(ValueError, match="--sample"):
            compute_pca(copy, sample=wrong)


def test_sample_takes_what_it_says(numbered_shards: Callable[[int, int], ShardSet], tmp_path: Path) -> None:
    """A sample of one is one of the images, over the seeds several of them; a sample of all is all of them."""
    train = numbered_shards(30, 4)
    stored = np.concatenate([batch.numpy().copy() for batch in decoded_batches(train, 64)])
    sums = [tuple(row) for row in stored.sum((1, 2), dtype=np.int64).tolist()]
    found = set()
    for seed in range(5):
        folder = tmp_path / str(seed)
        folder.mkdir()
        (image_1HWC,) = decoded_batches(draw_sample(train, 1, seed, folder), 4)
        found.add(sums.index(tuple(image_1HWC[0].numpy().sum((0, 1), dtype=np.int64).tolist())))
    assert len(found) > 1
    everything = draw_sample(train, train.num_samples, 0, tmp_path)
    assert everything.samples == train.samples
    np.testing.assert_array_equal(
        np.concatenate([b.numpy() for b in decoded_batches(everything, 64)]), stored
    )


def test_mean_image(few: Path, tmp_path: Path) -> None:
    """The mean of every pixel of the decoded training images, exact up to float32; pca.json stays the same, packing and
    verifying know both files."""
    copy = tmp_path / "shards"
    shutil.copytree(few, copy)
    assert "nothing to do" not in run_ok("tools/compute_pca.py", copy, "--mean-image", "--batch-size", "50")
    stored = np.concatenate([batch.numpy() for batch in decoded_batches(open_shards(copy, "train"), 32)])
    mean = np.load(copy / "mean_image.npy")
    assert mean.dtype == np.float32
    np.testing.assert_array_equal(mean, stored.mean(0, dtype=np.float64).astype(np.float32))
    np.testing.assert_array_equal(np.asarray(Image.open(copy / "mean_image.png")), np.rint(stored.mean(0)))
    assert (copy / "pca.json").read_bytes() == (few / "pca.json").read_bytes()
    assert "nothing to do" in run_ok("tools/compute_pca.py", copy, "--mean-image")
    assert "note:" not in run_ok("tools/make_shards.py", "verify", copy, "--fast")

    # One that is of other images, or damaged, is made again; pca.json, here another decoder's, stays.
    write_json(copy / "pca.json", {**read_json(copy / "pca.json"), "decoder": "another"})
    kept, sound = (copy / "pca.json").read_bytes(), (copy / "mean_image.npy").read_bytes()
    np.save(copy / "mean_image.npy", mean + 1)
    for _ in range(2):
        compute_pca(copy, mean_image=True)
        assert (copy / "mean_image.npy").read_bytes() == sound and (copy / "pca.json").read_bytes() == kept
        (copy / "mean_image.npy").write_bytes(sound[:1000])
    with pytest.raises(ValueError, match="--sample"):
        compute_pca(copy, sample=3, mean_image=True)


def test_degenerate_images_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Grey images, one colour and a single image work, with a warning; a sound set has none."""
    rng = np.random.default_rng(0)
    grey = [np.repeat(photo(rng, 300, 300)[:, :, :1], 3, 2) for _ in range(3)]
    for name, images, told in (
        ("grey", grey, "one axis of colour"),
        ("flat", [np.full((300, 300, 3), 90, np.uint8)] * 2, "the same colour"),
        ("one", [photo(rng, 300, 300)], "one image is no data set"),
        ("sound", [photo(rng, 300, 300) for _ in range(3)], ""),
    ):
        for number, image in enumerate(images):
            path = tmp_path / name / "raw" / "train" / "a" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        pack(tmp_path / name / "raw", tmp_path / name / "shards", workers=1, subsampling="444")
        capsys.readouterr()
        compute_pca(tmp_path / name / "shards")
        output = capsys.readouterr().out
        assert told in output and ("warning" in output) == bool(told), name
        content = read_json(tmp_path / name / "shards" / "pca.json")
        assert np.isfinite(content["eigenvectors"]).all() and min(content["eigenvalues"]) >= 0


def test_wrong_input(few: Path, tmp_path: Path) -> None:
    """No shards, or a pca.json of other shards: one sentence, code 2, nothing written."""
    assert "manifest.json" in refuses("tools/compute_pca.py", tmp_path)
    assert not list(tmp_path.iterdir())
    copy = tmp_path / "shards"
    shutil.copytree(few, copy)
    other = json.dumps({**read_json(copy / "pca.json"), "manifest_sha256": "other"})
    (copy / "pca.json").write_text(other)
    assert "other shards" in refuses("tools/compute_pca.py", copy)
    assert (copy / "pca.json").read_text() == other


def test_images_of_other_sizes(tmp_path: Path) -> None:
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
def test_gpu(few: Path, tmp_path: Path) -> None:
    """A GPU counts the same images, names its decoder, and its eigenvalues are those of the CPU within a per cent; its
    own runs agree to the byte."""
    files = []
    for batch_size in (64, 50):
        copy = tmp_path / str(batch_size)
        shutil.copytree(few, copy)
        (copy / "pca.json").unlink()
        run_ok("tools/compute_pca.py", copy, "--device", "cuda", "--batch-size", str(batch_size))
        files.append((copy / "pca.json").read_bytes())
    assert files[0] == files[1]
    ours, cpu = json.loads(files[0]), read_json(few / "pca.json")
    assert ours["num_images"] == cpu["num_images"] and ours["decoder"].endswith("gpu")
    np.testing.assert_allclose(ours["eigenvalues"], cpu["eigenvalues"], rtol=0.01)
