"""Views are the ten windows of 2012, averages those of probabilities, and every sample counts once."""

import csv
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torch import nn

from model.weights import weights_bytes
from pipeline.eigenbasis import Eigenbasis
from pipeline.files import read_json
from pipeline.loader import Batch, val_loader
from pipeline.settings import DataConfig
from pipeline.shards import ShardSet, open_shards
from tests.helpers import refuses, run_ok, run_python, tiny
from train.accuracy import evaluate, probabilities, top_hits
from train.evaluate import evaluate_checkpoint

OFFSETS = [(0, 0), (0, 32), (32, 0), (32, 32), (16, 16)]


class Corner(nn.Module):
    """Logits from the first pixels of a view: tells views and mirrors apart."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, 224, 224) -> (N, 6)."""
        assert images.shape[1:] == (3, 224, 224)
        return torch.cat([images[:, :, 0, 0], images[:, :, 3, 220]], 1)


@pytest.mark.parametrize("mirrored", [True, False])
@pytest.mark.parametrize("mean_image", [True, False])
def test_ten_views(mirrored: bool, mean_image: bool) -> None:
    """Average softmax over four corners, the centre and their mirrors, with numpy; the centre alone beside it. A mean
    image is subtracted from each of them as it is, neither cut elsewhere nor mirrored."""
    images, offset = torch.randn(4, 3, 256, 256), torch.randn(3, 224, 224)
    centre, average = probabilities(Corner(), images, mirrored, offset if mean_image else None)

    def softmax(logits: np.ndarray) -> np.ndarray:
        return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)

    expected = []
    for top, left in OFFSETS:
        view = images.numpy()[:, :, top : top + 224, left : left + 224]
        for oriented in (view, view[:, :, :, ::-1]) if mirrored else (view,):
            oriented = oriented - mean_image * offset.numpy()
            expected.append(softmax(np.concatenate([oriented[:, :, 0, 0], oriented[:, :, 3, 220]], 1)))
    assert len(expected) == (10 if mirrored else 5)
    np.testing.assert_allclose(average.numpy(), np.mean(expected, 0), rtol=1e-5)
    np.testing.assert_allclose(centre.numpy(), expected[-2 if mirrored else -1], rtol=1e-5)


def test_top_hits() -> None:
    """Labels among the k highest; padding never counts; k is capped by the classes."""
    scores = torch.tensor([[0.1, 0.5, 0.2, 0.9], [0.4, 0.3, 0.2, 0.1], [9.0, 8, 7, 6]])
    assert top_hits(scores, torch.tensor([3, 3, -1]), 1) == 1
    assert top_hits(scores, torch.tensor([1, 1, -1]), 2) == 2
    assert top_hits(scores, torch.tensor([2, 3, -1]), 5) == 2


class Numbers:
    """A stand-in for a loader: 5 samples in batches of 2, the last one padded, whose correct class is in the pixels."""

    device = torch.device("cpu")
    mean_offset = None

    def __iter__(self):  # type: ignore[no-untyped-def]  # noqa: ANN204
        for labels in ([0, 1], [2, 0], [1, -1]):
            images = torch.zeros(2, 3, 256, 256)
            for image, label in zip(images, labels, strict=True):
                image[label] = 1
            yield Batch(images, torch.tensor(labels))


def test_accuracy_ignores_padding() -> None:
    """Five samples, all right; one class swapped: as many wrong as there are."""

    class Sighted(Corner):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images)[:, :3]

    perfect = evaluate(Sighted(), Numbers(), mirrored=True)  # type: ignore[arg-type]
    assert perfect is not None and perfect.samples == 5
    assert (perfect.centre_top1, perfect.centre_top5, perfect.views_top1, perfect.views) == (
        100,
        100,
        100,
        "ten-view",
    )

    class Blind(Corner):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits = super().forward(images)[:, :3].clone()
            logits[:, 0] = -1
            return logits

    wrong = evaluate(Blind(), Numbers(), mirrored=False)  # type: ignore[arg-type]
    assert wrong is not None and wrong.centre_top1 == pytest.approx(60) and wrong.centre_top5 == 100
    assert wrong.views == "five-view" and ("five-view top-1 accuracy", "60.0 %") in wrong.rows()
    assert evaluate(Corner(), Numbers(), mirrored=True, interrupted=lambda: True) is None  # type: ignore[arg-type]


def test_over_ranks_with_the_real_loader(
    numbered_shards: Callable[[int, int], ShardSet], plain_basis: Eigenbasis, tmp_path: Path
) -> None:
    """Sample counts of 1 and of 3 ranks add up to the split."""
    numbered_shards(41, 3)
    val = open_shards(tmp_path, "val")
    for num_ranks in (1, 3):
        place = {"batch_size": 4, "num_ranks": num_ranks, "device": "cpu"}
        ranks = [
            val_loader(val, plain_basis, DataConfig(tmp_path), rank=rank, **place)
            for rank in range(num_ranks)
        ]
        results = [evaluate(Corner(), loader, mirrored=True) for loader in ranks]
        assert sum(result.samples for result in results if result) == 41


def test_wrong_input(tmp_path: Path, shards: Path) -> None:
    """No checkpoint, or a file that is none: one sentence, code 2."""
    (tmp_path / "x.pt").write_bytes(b"no checkpoint")
    for place, message in (
        (tmp_path / "none.pt", "is no file"),
        (tmp_path, "is no file"),
        (tmp_path / "x.pt", "is damaged"),
    ):
        assert message in refuses("-m", "train.evaluate", place, shards)


def test_weights_per_class_and_confusion(
    tmp_path: Path, few: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights alone are evaluated as Pillow, numpy and ten forward passes do it; the CSV has each class's error and the
    picture is one."""
    model = tiny(tmp_path / "w.safetensors", few)
    out, picture = tmp_path / "new" / "classes.csv", tmp_path / "new" / "confusion.png"
    evaluate_checkpoint(tmp_path / "w.safetensors", few, 50, "cpu", out, picture)
    mean = np.array(read_json(few / "pca.json")["mean"])
    guesses, labels = [], []
    for sample in webdataset.WebDataset(sorted(map(str, (few / "val").glob("*.tar"))), shardshuffle=False):
        pixels = np.asarray(Image.open(io.BytesIO(sample["jpg"])).convert("RGB"), np.float32) - mean
        image = torch.from_numpy(pixels).float().permute(2, 0, 1)
        views = [image[:, top : top + 224, left : left + 224] for top, left in OFFSETS]
        with torch.no_grad():
            scores = model(torch.stack([*views, *(view.flip(2) for view in views)])).softmax(1).mean(0)
        guesses.append(int(scores.argmax()))
        labels.append(int(sample["cls"]))
    right = np.array(guesses) == labels
    assert f"ten-view top-1 accuracy: {100 * right.mean():.1f} %" in capsys.readouterr().out
    rows = list(csv.DictReader(out.open()))
    for k, row in enumerate(rows):
        own = np.array(labels) == k
        assert int(row["images"]) == own.sum() > 0
        assert float(row["top1_error"]) == pytest.approx(100 - 100 * right[own].mean(), abs=1e-3)
    assert np.asarray(Image.open(picture)).std() > 10


def test_wrong_weights(tmp_path: Path, shards: Path) -> None:
    """Another number of classes, no such file, and odd names for what is to be written: one sentence each."""
    path = tmp_path / "w.safetensors"
    tiny(path, shards, num_classes=11)
    with pytest.raises(ValueError, match=r"tells 11 classes apart, .* has 10"):
        evaluate_checkpoint(path, shards, device="cpu")
    with pytest.raises(FileNotFoundError, match="not a file"):
        evaluate_checkpoint(tmp_path / "none.safetensors", shards, device="cpu")
    with pytest.raises(ValueError, match=r"is to be a \.csv file"):
        evaluate_checkpoint(path, shards, device="cpu", per_class=tmp_path / "x.txt")
    with pytest.raises(ValueError, match=r"is to be a \.png file"):
        evaluate_checkpoint(path, shards, device="cpu", confusion=tmp_path)
    with pytest.raises(ValueError, match="--batch-size must be at least 1"):
        evaluate_checkpoint(path, shards, 0, device="cpu")
    model = tiny(path, shards)
    model.fc8.bias.data[0] = float("nan")
    path.write_bytes(weights_bytes(model.state_dict(), model.config, {"mean": [0, 0, 0], "std": 1}))
    with pytest.raises(ValueError, match="holds weights that are not finite"):
        evaluate_checkpoint(path, shards, device="cpu")
    assert [each.name for each in tmp_path.iterdir()] == ["w.safetensors"]


def test_outputs_that_cannot_be_written(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told of before an image is looked at; an evaluation that fails leaves no file."""
    path, out = tmp_path / "w.safetensors", tmp_path / "out"
    tiny(path, shards)

    def fails(*arguments: object, **options: object) -> None:
        raise ValueError("it was evaluated")

    monkeypatch.setattr("train.accuracy.evaluate", fails)
    for options in ({"per_class": Path("/proc/x.csv")}, {"confusion": Path("/proc/x.png")}):
        with pytest.raises(FileNotFoundError, match="/proc/x"):
            evaluate_checkpoint(path, shards, device="cpu", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="it was evaluated"):
        evaluate_checkpoint(path, shards, 64, "cpu", out / "x.csv", out / "x.png")
    assert not list(out.iterdir())


@pytest.mark.slow
def test_over_processes(tmp_path: Path, shards: Path) -> None:
    """Three processes print once, and write, what one does, to the byte."""
    tiny(tmp_path / "w.safetensors", shards)
    told = []
    for processes in ("1", "3"):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
        out = ["--per-class", tmp_path / f"{processes}.csv", "--device", "cpu"]
        told.append(
            run_ok(
                *launcher, "-m", "train.evaluate", tmp_path / "w.safetensors", shards, *out, run=run_python
            )
        )
    one, three = (
        [line for line in text.splitlines() if "accuracy" in line or "images" in line] for text in told
    )
    assert one == three and len(one) == 5
    assert (tmp_path / "1.csv").read_bytes() == (tmp_path / "3.csv").read_bytes()
