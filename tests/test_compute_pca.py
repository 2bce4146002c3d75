"""The tool sees the training images alone, as Pillow decodes them, and its file does not depend on how it went
through them."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from pipeline.files import read_json
from tests.conftest import run_ok, run_python


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
