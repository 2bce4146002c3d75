"""Predictions of image files are what evaluation makes of the same images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from model.alexnet import AlexNet
from pipeline.loader import val_loader
from pipeline.shards import open_shards
from tests.helpers import jpeg, photo, refuses, run_here, run_ok, tiny
from train.accuracy import predict_probabilities
from train.pretrained import read_pretrained


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A network with random weights."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    tiny(path, shards)
    return path


def predicted(weights: Path, *arguments: str | Path) -> list[dict[str, Any]]:
    """What the program prints as JSON."""
    return json.loads(run_ok("tools/predict.py", weights, *arguments, "--device", "cpu", "--json"))  # type: ignore[no-any-return]


def test_probabilities_are_evaluations(weights: Path, few: Path, tmp_path: Path) -> None:
    """On the images of a validation split the probabilities of ten views and of the centre are evaluation's."""
    keys, trained = [], read_pretrained(weights)
    for sample in webdataset.WebDataset(sorted(map(str, few.glob("val/*.tar"))), shardshuffle=False):
        keys.append(sample["__key__"])
        (tmp_path / f"{keys[-1]}.jpg").write_bytes(sample["jpg"])
    model = AlexNet(trained.config)
    model.load_state_dict(trained.state)
    options = {"batch_size": 179, "device": "cpu", "augmentation": trained.augmentation}
    ((images, _),) = list(val_loader(few, basis=trained.basis, **options))
    expected = dict(zip(("centre", "ten"), predict_probabilities(model.eval(), images, True), strict=True))
    for views, chances in expected.items():
        rows = predicted(weights, tmp_path, "--views", views, "--top", "10")
        by_key = {Path(row["image"]).stem: row["classes"] for row in rows}
        assert len(rows) == len(keys) == 179
        for key, row in zip(keys, chances, strict=True):
            got = {each["index"]: each["probability"] for each in by_key[key]}
            assert [got[k] for k in range(10)] == pytest.approx(row.tolist(), abs=1e-6)


def test_files_and_folders_give_each_image_once(weights: Path, shards: Path, tmp_path: Path) -> None:
    """Each gives its images once, in order, whatever format they are in; classes have the names of the shards."""
    rng = np.random.default_rng(0)
    (tmp_path / "a").mkdir()
    for name in ("a/1.jpg", "a/2.png", "b.webp"):
        Image.fromarray(photo(rng, 300, 400)).save(tmp_path / name)
    for name in ("notes.txt", "._1.jpg"):  # a system's file, which packing ignores, too
        (tmp_path / "a" / name).write_bytes(b"x")
    rows = predicted(
        weights, tmp_path / "a", tmp_path / "b.webp", tmp_path / "a" / "1.jpg", "--shards", shards
    )
    assert [Path(row["image"]).name for row in rows] == ["1.jpg", "2.png", "b.webp", "1.jpg"]
    names = {row.wnid: (k, row.words) for k, row in enumerate(open_shards(shards, "val").classes)}
    for row in rows:
        chances = [each["probability"] for each in row["classes"]]
        assert len(chances) == 5 and chances == sorted(chances, reverse=True) and 0 < sum(chances) <= 1
        assert all(names[each["wnid"]] == (each["index"], each["words"]) for each in row["classes"])
    text = run_ok("tools/predict.py", weights, tmp_path / "b.webp", "--device", "cpu", "--top", "1")
    assert "class " in text and len(text.splitlines()) == 2


def test_one_bad_image_leaves_the_others(weights: Path, tmp_path: Path) -> None:
    """The images of a glob that can be decoded are predicted; exit code 2 and a sentence name the other. So it does a
    file that is missing and a folder without images."""
    for k in range(3):
        (tmp_path / f"{k}.jpg").write_bytes(jpeg(photo(np.random.default_rng(k)))[: 100 if k == 1 else None])
    done = run_here("tools/predict.py", weights, f"{tmp_path}/*.jpg", "--device", "cpu", "--json")
    assert done.returncode == 2 and str(tmp_path / "1.jpg") in done.stderr
    assert [Path(row["image"]).name for row in json.loads(done.stdout)] == ["0.jpg", "2.jpg"]
    (tmp_path / "empty").mkdir()
    for name in ("none.jpg", "empty"):
        assert f"{tmp_path / name}: " in refuses("tools/predict.py", weights, tmp_path / name)
