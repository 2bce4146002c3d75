"""The tool sees the training images alone, as Pillow decodes them, and its file does not depend on how it went
through them."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline.files import read_json
from pipeline.loader import decoded_batches
from pipeline.shards import open_shards
from tests.conftest import photo, run_ok, run_python
from tools.compute_pca import compute_pca
from tools.make_shards import pack


def test_file(shards: Path, tmp_path: Path) -> None:
    """Counts are exact, moments those of the pixels that Pillow decodes, bytes the same for another batch size and
    thread count."""
    content = read_json(shards / "pca.json")
    tars = [str(path) for path in sorted((shards / "train").glob("*.tar"))]
    total, products, count = np.zeros(3), np.zeros((3, 3)), 0
    for sample in webdataset.WebDataset(tars, shardshuffle=False, empty_check=False):
        pixels = np.asarray(Image.open(io.BytesIO(sample["jpg"]))).reshape(-1, 3).astype(float)
        total, products, count = total + pixels.sum(0), products + pixels.T @ pixels, count + 1
    assert content["num_images"] == count and content["num_pixels"] == count * 256 * 256
    np.testing.assert_allclose(content["sum"], total, rtol=1e-4)  # decoders may differ by a level in a pixel
    np.testing.assert_allclose(content["sum_products"], products, rtol=1e-4)

    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    assert "nothing to do" in run_ok("tools/compute_pca.py", copy)
    (copy / "pca.json").unlink()
    run_ok("-m", "tools.compute_pca", copy, "--batch-size", "7", "--threads", "1")
    assert (copy / "pca.json").read_bytes() == (shards / "pca.json").read_bytes()


def test_mean_image(shards: Path, tmp_path: Path) -> None:
    """The mean of every pixel of the decoded training images, exact up to float32; pca.json stays the same, packing and
    verifying know both files."""
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    assert "nothing to do" not in run_ok("tools/compute_pca.py", copy, "--mean-image", "--batch-size", "50")
    stored = np.concatenate(list(decoded_batches(open_shards(copy, "train"), 32)))
    mean = np.load(copy / "mean_image.npy")
    assert mean.dtype == np.float32
    np.testing.assert_array_equal(mean, stored.mean(0, dtype=np.float64).astype(np.float32))
    np.testing.assert_array_equal(np.asarray(Image.open(copy / "mean_image.png")), np.rint(stored.mean(0)))
    assert (copy / "pca.json").read_bytes() == (shards / "pca.json").read_bytes()
    assert "nothing to do" in run_ok("tools/compute_pca.py", copy, "--mean-image")
    assert "note:" not in run_ok("tools/make_shards.py", "verify", copy, "--fast")


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


def test_wrong_input(shards: Path, tmp_path: Path) -> None:
    """No shards, or a pca.json of other shards: one sentence, code 2, nothing written."""
    none = run_python("tools/compute_pca.py", tmp_path)
    assert none.returncode == 2 and "manifest.json" in none.stderr and len(none.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    other = json.dumps({**read_json(copy / "pca.json"), "manifest_sha256": "other"})
    (copy / "pca.json").write_text(other)
    foreign = run_python("tools/compute_pca.py", copy)
    assert foreign.returncode == 2 and "other shards" in foreign.stderr
    assert (copy / "pca.json").read_text() == other
