"""Views are the ten crops of 2012, averages those of probabilities, and every sample counts once, over any ranks."""

import csv
import io
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torch import nn

from model.weights import weights_bytes
from pipeline.eigenbasis import Eigenbasis
from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.shards import ClassName, open_shards
from tests.helpers import Make, collect, loaders, refuses, run_ok, run_python, tiny
from train.accuracy import EvalStats, evaluate, predict_probabilities
from train.config import ParallelConfig
from train.distributed import Distributed
from train.evaluate import evaluate_checkpoint

OFFSETS = [(0, 0), (0, 32), (32, 0), (32, 32), (16, 16)]


class Corner(nn.Module):
    """Logits of six classes from two pixels of a view, which differ between views and mirrors."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, 224, 224) -> (N, 6)."""
        assert images.shape[1:] == (3, 224, 224)
        return torch.cat([images[:, :, 0, 0], images[:, :, 3, 220]], 1)


@pytest.mark.parametrize("mean_image", [True, False])
def test_ten_views(mean_image: bool) -> None:
    """Average softmax over four corners and the centre, with or without mirrors, with numpy; the centre alone.
    A mean image is subtracted from each view as it is, neither cropped nor mirrored."""
    images, offset = torch.randn(4, 3, 256, 256), mean_image * torch.randn(3, 224, 224)
    expected: list[np.ndarray] = []  # mirrors last
    for step in (1, -1):
        for top, left in OFFSETS:
            view = images.numpy()[:, :, top : top + 224, left : left + 224][:, :, :, ::step] - offset.numpy()
            exp = np.exp(np.concatenate([view[:, :, 0, 0], view[:, :, 3, 220]], 1))
            expected.append(exp / exp.sum(1, keepdims=True))
    for views in (5, 10):
        centre, average = predict_probabilities(Corner(), images, views == 10, offset if mean_image else None)
        np.testing.assert_allclose(average.numpy(), np.mean(expected[:views], 0), rtol=1e-5)
        np.testing.assert_allclose(centre.numpy(), expected[4], rtol=1e-5)


@pytest.fixture
def alone() -> Distributed:
    """One process."""
    return Distributed(ParallelConfig())


def test_over_ranks_with_the_real_loader(
    numbered_shards: Make, plain_basis: Eigenbasis, tmp_path: Path, alone: Distributed
) -> None:
    """Samples and hits of 1 and of 3 ranks, whose last batches are padded, are those of all images at once; None when
    interrupted."""
    numbered_shards(41, 3)
    val = open_shards(tmp_path, "val")
    (whole,) = loaders(val, plain_basis, 1, False, batch_size=41)
    ((images, labels),) = collect(whole, range(1))
    torch.manual_seed(0)
    model = nn.Sequential(nn.AvgPool2d(32), nn.Flatten(), nn.Linear(147, 41))
    model[2].weight.data /= 10
    with torch.no_grad():
        orders = [np.argsort(-each.numpy(), 1) for each in predict_probabilities(model, images, True)]
    hits = [(order[:, :k] == labels.numpy()[:, None]).sum() for order in orders for k in (1, 5)]
    assert 0 < hits[1] < 41 and 0 < hits[3] < 41
    for num_ranks in (1, 3):
        sums = np.zeros(5)
        for loader in loaders(val, plain_basis, num_ranks, False, batch_size=4):
            found = evaluate(model, loader, alone, mirrored=True)
            assert found and found.views == "ten-view"
            shares = (found.centre_top1, found.centre_top5, found.views_top1, found.views_top5)
            sums += found.samples * np.array([1, *(share / 100 for share in shares)])
        assert sums == pytest.approx([41, *hits])
    assert evaluate(model, whole, alone, mirrored=True, interrupted=lambda: True) is None


def test_per_class_and_confusion(tmp_path: Path, few: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    for k, row in enumerate(csv.DictReader(out.open())):
        own = np.array(labels) == k
        assert int(row["images"]) == own.sum() > 0
        assert float(row["top1_error"]) == pytest.approx(100 - 100 * right[own].mean(), abs=1e-3)
    assert np.asarray(Image.open(picture)).std() > 10


def test_wrong_input(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing or damaged checkpoint, weights of other classes or not finite, and outputs that cannot be written are
    refused by name before an image is read; nothing is left behind."""
    (tmp_path / "x.pt").write_bytes(b"no checkpoint")
    for path in (tmp_path / "none.pt", tmp_path, tmp_path / "x.pt"):
        assert str(path) in refuses("-m", "train.evaluate", path, shards)
    weights, other, nan = (tmp_path / f"{name}.safetensors" for name in ("w", "other", "nan"))
    tiny(other, shards, num_classes=11)
    model = tiny(weights, shards)
    model.fc8.bias.data[0] = float("nan")
    nan.write_bytes(weights_bytes(model.state_dict(), model.config, {"mean": [0, 0, 0], "std": 1}))
    monkeypatch.setattr("train.accuracy.evaluate", Mock(side_effect=UserError("it was evaluated")))
    files = sorted(tmp_path.iterdir())
    cases: list[tuple[Path, dict[str, object], str]] = [
        (other, {}, "has 11 outputs"),
        (nan, {}, "finite"),
        (weights, {"per_class": tmp_path / "x.txt"}, r"x\.txt"),
        (weights, {"per_class": Path("/proc/x.csv")}, "/proc/x"),
        (weights, {"confusion": tmp_path}, str(tmp_path)),
        (weights, {"batch_size": 0}, "--batch-size"),
        (weights, {"per_class": tmp_path / "x.csv", "confusion": tmp_path / "x.png"}, "it was evaluated"),
    ]
    for path, options, named in cases:
        with pytest.raises((UserError, FileNotFoundError), match=named):
            evaluate_checkpoint(path, shards, device="cpu", **options)  # type: ignore[arg-type]
    assert sorted(tmp_path.iterdir()) == files


@pytest.mark.slow
def test_over_processes(tmp_path: Path, shards: Path) -> None:
    """Three processes print once, and write, what one does, to the byte."""
    tiny(tmp_path / "w.safetensors", shards)
    lines = []
    for processes in ("1", "3"):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
        out = ["--per-class", tmp_path / f"{processes}.csv", "--device", "cpu"]
        command = [*launcher, "-m", "train.evaluate", tmp_path / "w.safetensors", shards, *out]
        text = run_ok(*command, run=run_python)
        lines.append([line for line in text.splitlines() if "accuracy" in line or "images" in line])
    assert lines[0] == lines[1] and len(lines[0]) == 5
    assert (tmp_path / "1.csv").read_bytes() == (tmp_path / "3.csv").read_bytes()


CLASSES, BATCH = 7, 5
NAMES = [ClassName(f"n{k}", f"word {k}, more") for k in range(CLASSES)]
Batches = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def batches(count: int) -> Batches:
    """Random images, labels of which some are padding, and probabilities."""
    torch.manual_seed(count)
    made = []
    for _ in range(count):
        labels = torch.randint(-1, CLASSES, (BATCH,))
        made.append((torch.rand(BATCH, 3, 4, 4), labels, torch.randn(BATCH, CLASSES).softmax(1)))
    return made


def stats_of(given: Batches) -> EvalStats:
    """Of one process."""
    stats = EvalStats(CLASSES, torch.device("cpu"))
    for batch in given:
        stats.update(*batch)
    return stats


def test_counts_and_examples_with_numpy() -> None:
    """Images, top-1 and top-5 hits, every pair of label and guess, the ten surest mistakes and least sure hits; padding
    counts nowhere."""
    given = batches(40)
    stats = stats_of(given)
    images, labels, scores = (np.concatenate([b[k] for b in given]) for k in range(3))
    order, best = np.argsort(-scores, 1), scores.max(1)
    rows = stats.table(NAMES)
    for k, row in enumerate(rows):
        own = labels == k
        assert row["images"] == own.sum() and row["wnid"] == f"n{k}"
        np.testing.assert_allclose(row["top1_error"], 100 * (order[own, 0] != k).mean())
        np.testing.assert_allclose(row["top5_error"], 100 * (order[own, :5] != k).all(1).mean())
        guesses = np.bincount(order[own, 0], minlength=CLASSES)
        np.testing.assert_array_equal(stats.confusion[k].numpy(), guesses)
        guesses[k] = 0
        assert row["times"] == guesses.max() and row["mistaken_for"] == f"n{guesses.argmax()}"
    assert sum(row["images"] for row in rows) == (labels >= 0).sum() < len(labels)
    wrong = np.flatnonzero((labels >= 0) & (order[:, 0] != labels))
    right = np.flatnonzero((labels >= 0) & (order[:, 0] == labels))
    for examples, expected in (
        (stats.mistakes, wrong[np.argsort(-best[wrong])][:10]),
        (stats.close_calls, right[np.argsort(best[right])][:10]),
    ):
        assert len(examples) == 10
        for example, k in zip(examples, expected, strict=True):
            np.testing.assert_array_equal(example.image.numpy(), images[k])
            assert (example.label, example.guesses[0]) == (labels[k], order[k, 0])
            np.testing.assert_allclose(example.probabilities, np.sort(scores[k])[::-1][:5], rtol=1e-6)


def test_stats_over_ranks(alone: Distributed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks with a third each combine to what one finds; a rank without images does no harm."""
    given = batches(12)
    one, ranks = stats_of(given), [stats_of(given[:4]), stats_of(given[4:12]), stats_of([])]
    sums = [torch.stack([getattr(each, name) for each in ranks]).sum(0) for name in ("counts", "confusion")]
    gathered = [[each._wrong.rows for each in ranks], [each._right.rows for each in ranks]]
    for rank in ranks:
        reduced, lists = iter(sums), iter(gathered)
        monkeypatch.setattr(alone, "all_reduce_sum", lambda _, reduced=reduced: next(reduced))
        monkeypatch.setattr(alone, "all_gather", lambda _, lists=lists: next(lists))
        rank.all_reduce(alone)
        assert rank.csv(NAMES) == one.csv(NAMES)
        for mine, whole in ((rank.mistakes, one.mistakes), (rank.close_calls, one.close_calls)):
            assert [e.probabilities for e in mine] == [e.probabilities for e in whole]
            assert all(torch.equal(a.image, b.image) for a, b in zip(mine, whole, strict=True))


def test_csv(monkeypatch: pytest.MonkeyPatch) -> None:
    """The csv module reads it back, commas in names and all; a class without images has no error; with too many classes
    no pairs are counted."""
    stats = stats_of(batches(20))
    stats.counts[2] = 0
    rows = list(csv.DictReader(io.StringIO(stats.csv(NAMES).decode())))
    assert [row["words"] for row in rows] == [name.words for name in NAMES]
    assert rows[2]["top1_error"] == "" and 0 <= float(rows[3]["top1_error"]) <= 100
    monkeypatch.setattr("train.accuracy.CONFUSION_LIMIT", CLASSES - 1)
    stats = stats_of(batches(3))
    assert not len(stats.confusion) and "mistaken_for" not in stats.table(NAMES)[0]
