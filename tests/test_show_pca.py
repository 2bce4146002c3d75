"""The table's figures are those of the file and of the published ones, and the picture shows the axes' colours."""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from tools.show_pca import IMAGENET, table

from pipeline.files import read_json
from tests.helpers import run_ok


def test_published_figures() -> None:
    """ImageNet's axes are orthonormal to their four digits; beside themselves they stand at an angle of zero, and their
    variances on 0..1 are those that fb.resnet's readers know (.228, .0212, .0060)."""
    vectors, deviations = np.array(IMAGENET["eigenvectors"]), np.array(IMAGENET["axis_stddev"])
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=2e-4)
    assert (vectors[np.abs(vectors).argmax(0), range(3)] > 0).all()
    np.testing.assert_allclose(deviations**2 / 255**2, [0.228, 0.0212, 0.0060], rtol=0.01)
    content = {
        "num_images": 1,
        "mean": IMAGENET["mean"],
        "eigenvalues": (deviations**2).tolist(),
        "eigenvectors": vectors.tolist(),
    }
    lines = table(content).splitlines()
    assert max(map(float, lines[-1].split()[-3:])) < 1
    assert "121.78 (121.78)" in lines[5] and "89.37 (89.37)" in lines[7]


def test_show(few: Path, tmp_path: Path) -> None:
    """`--show` on finished shards computes nothing again, prints the file's own figures and draws a picture in which
    the middle of each ramp is the mean colour."""
    copy = tmp_path / "shards"
    shutil.copytree(few, copy)
    output = run_ok("tools/compute_pca.py", copy, "--show")
    assert "nothing to do" in output
    content = read_json(copy / "pca.json")
    for name in ("mean", "channel_stddev", "axis_stddev"):
        for value in content[name]:
            assert f"{value:.2f} (" in output, name
    share = 100 * content["eigenvalues"][0] / sum(content["eigenvalues"])
    assert f"{share:.2f} (" in output
    pixels = np.asarray(Image.open(copy / "pca.png").convert("RGB")).astype(int)
    middle = pixels[:, pixels.shape[1] // 2]
    close = (np.abs(middle - np.array(content["mean"])) <= 2).all(1)
    runs = np.flatnonzero(np.diff(np.concatenate([[0], close, [0]])) == 1)
    assert len(runs) >= 3, "three ramps cross the mean colour in the middle of the picture"
    assert "note:" not in run_ok("tools/make_shards.py", "verify", copy, "--fast")
