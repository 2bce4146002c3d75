"""The wheel has everything in it, and works where its source is not."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers import ROOT

ROOMS = ("pipeline", "model", "train", "tools")


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Without this checkout on Python's path."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, env=clean, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from what git knows: what lies around in the checkout must not get in."""
    source, out = (tmp_path_factory.mktemp(name) for name in ("source", "wheel"))
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in files.decode().split("\0"):
        if name and (ROOT / name).is_file() and not name.startswith(("tests/", "docs/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        source,
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        out,
    ]
    done = run(*build, cwd=out)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("alexnet_dali-*.whl")
    return path


def test_what_is_in_it(wheel: Path) -> None:
    """Every module, every recipe and the page, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = subprocess.run(
        ["git", "ls-files", *ROOMS], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert packed == {name for name in files.split() if (ROOT / name).is_file()}


def test_it_works_elsewhere(wheel: Path, shards: Path, tmp_path: Path) -> None:
    """Its three programs run from an empty folder, recipes are found by name, and the documented commands work."""
    place, here = tmp_path / "site", tmp_path / "here"
    here.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", place, wheel]
    assert run(*install, cwd=here).returncode == 0
    scripts = {path.name for path in (place / "bin").iterdir()}
    assert scripts == {"make-shards", "compute-pca", "alexnet-train"}
    for words in (
        [sys.executable, place / "bin" / "make-shards", "stats", shards],
        [sys.executable, place / "bin" / "compute-pca", shards],
        [sys.executable, "-m", "tools.doctor", shards],
    ):
        done = run(*words, cwd=here, PYTHONPATH=str(place))
        assert done.returncode == 0, done.stderr
    train = [sys.executable, place / "bin" / "alexnet-train"]
    rest = [
        "--data.shards",
        shards,
        "--run.dir",
        here / "run",
        "--data.augmentation.mean",
        "channel",
        "--model.num_classes",
        "11",
    ]
    for recipe in ("--config=paper", "--config=fast.yaml"):
        done = run(*train, recipe, *rest, cwd=here, PYTHONPATH=str(place))
        assert done.returncode == 2 and "leave --model.num_classes 11 out" in done.stderr, done.stderr
    done = run(*train, "--config", "papper", *rest, cwd=here, PYTHONPATH=str(place))
    assert done.returncode == 2 and "papper" in done.stderr and not any(here.iterdir())
