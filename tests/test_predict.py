"""Predictions of image files are what evaluation makes of the same images."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from model.alexnet import AlexNet
from pipeline.loader import val_loader
from pipeline.settings import DataConfig
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


def predicted(weights: Path, *arguments: str | Path) -> list[dict[str, object]]:
    """What the program prints as JSON."""
    return json.loads(run_ok("tools/predict.py", weights, *arguments, "--device", "cpu", "--json"))  # type: ignore[no-any-return]


@pytest.mark.parametrize("views", ["ten", "centre"])
def test_probabilities_are_evaluations(weights: Path, few: Path, tmp_path: Path, views: str) -> None:
    """On the images of a validation split the probabilities are evaluation's."""
    tars = [str(path) for path in sorted((few / "val").glob("*.tar"))]
    for sample in webdataset.WebDataset(tars, shardshuffle=False):
        (tmp_path / f"{sample['__key__']}.jpg").write_bytes(sample["jpg"])
    rows = predicted(weights, tmp_path, "--views", views, "--top", "10")
    trained, val = read_pretrained(weights), open_shards(few, "val")
    model = AlexNet(trained.config)
    model.load_state_dict(trained.state)
    config = DataConfig(few, decode="cpu", augmentation=trained.augmentation)
    loader = val_loader(val, trained.basis, config, batch_size=179, rank=0, num_ranks=1, device="cpu")
    ((images, _),) = list(loader)
    expected = predict_probabilities(model.eval(), images, True)[views == "ten"]
    keys = [sample["__key__"] for sample in webdataset.WebDataset(tars, shardshuffle=False)]
    by_key = {Path(str(row["image"])).stem: row["classes"] for row in rows}
    assert len(rows) == len(keys) == 179
    for key, chances in zip(keys, expected, strict=True):
        got = torch.zeros(10)
        for each in by_key[key]:  # type: ignore[attr-defined]
            got[each["index"]] = each["probability"]
        assert torch.allclose(got, chances, atol=1e-6)


def test_files_and_folders_give_each_image_once(
    weights: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each gives its images once, in order, whatever format they are in; classes have the names of the shards."""
    rng = np.random.default_rng(0)
    for name in ("a/1.jpg", "a/2.png", "a/notes.txt", "b.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        out = io.BytesIO()
        Image.fromarray(photo(rng, 300, 400)).save(out, {"png": "PNG", "ebp": "WEBP"}.get(name[-3:], "JPEG"))
        (tmp_path / name).write_bytes(out.getvalue() if not name.endswith("txt") else b"x")
    (tmp_path / "a" / "._1.jpg").write_bytes(b"a system's file, which packing ignores, too")
    rows = predicted(
        weights, tmp_path / "a", tmp_path / "b.webp", tmp_path / "a" / "1.jpg", "--shards", shards
    )
    assert [Path(str(row["image"])).name for row in rows] == ["1.jpg", "2.png", "b.webp", "1.jpg"]
    names = {row.wnid: (k, row.words) for k, row in enumerate(open_shards(shards, "val").classes)}
    for row in rows:
        chances = [each["probability"] for each in row["classes"]]  # type: ignore[attr-defined]
        assert len(chances) == 5 and chances == sorted(chances, reverse=True) and 0 < sum(chances) <= 1
        assert all(names[each["wnid"]] == (each["index"], each["words"]) for each in row["classes"])  # type: ignore[attr-defined]
    text = run_ok("tools/predict.py", weights, tmp_path / "b.webp", "--device", "cpu", "--top", "1")
    assert "class " in text and len(text.splitlines()) == 2


def test_one_bad_image_leaves_the_others(weights: Path, tmp_path: Path) -> None:
    """The images of a glob that can be decoded are predicted; exit code 2 and a sentence name the other."""
    for k in range(3):
        (tmp_path / f"{k}.jpg").write_bytes(jpeg(photo(np.random.default_rng(k)))[: 100 if k == 1 else None])
    done = run_here("tools/predict.py", weights, f"{tmp_path}/*.jpg", "--device", "cpu", "--json")
    assert done.returncode == 2 and str(tmp_path / "1.jpg") in done.stderr
    assert [Path(row["image"]).name for row in json.loads(done.stdout)] == ["0.jpg", "2.jpg"]


@pytest.mark.parametrize("name", ["none.jpg", "empty", "bad.jpg"])
def test_what_is_no_image_is_named(weights: Path, tmp_path: Path, name: str) -> None:
    """A sentence that names it."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jpg").write_bytes(jpeg(photo(np.random.default_rng(0)))[:100])
    assert f"{tmp_path / name}: " in refuses("tools/predict.py", weights, tmp_path / name)
