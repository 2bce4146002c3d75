"""Views are the ten crops of 2012, averages those of probabilities, and every sample counts once, over any ranks."""

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
from pipeline.errors import UserError
from pipeline.files import read_json
from pipeline.loader import Batch, val_loader
from pipeline.settings import DataConfig
from pipeline.shards import ClassName, ShardSet, open_shards
from tests.helpers import refuses, run_ok, run_python, tiny
from train import accuracy as module
from train.accuracy import EvalStats, evaluate, predict_probabilities, top_k_correct
from train.config import ParallelConfig
from train.distributed import Distributed
from train.evaluate import evaluate_checkpoint

OFFSETS = [(0, 0), (0, 32), (32, 0), (32, 32), (16, 16)]


class Corner(nn.Module):
    """Logits from two pixels of a view, which differ between views and mirrors; `hidden` of the classes are."""

    def __init__(self, classes: int = 6, hidden: int = 0) -> None:
        super().__init__()
        self.classes, self.hidden = classes, hidden

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, 224, 224) -> (N, classes)."""
        assert images.shape[1:] == (3, 224, 224)
        logits = torch.cat([images[:, :, 0, 0], images[:, :, 3, 220]], 1)[:, : self.classes].clone()
        logits[:, : self.hidden] = -1
        return logits


@pytest.mark.parametrize("mirrored", [True, False])
@pytest.mark.parametrize("mean_image", [True, False])
def test_ten_views(mirrored: bool, mean_image: bool) -> None:
    """Average softmax over four corners, the centre and their mirrors, with numpy; the centre alone. A mean image is
    subtracted from each view as it is, neither cropped nor mirrored."""
    images, offset = torch.randn(4, 3, 256, 256), torch.randn(3, 224, 224)
    centre, average = predict_probabilities(Corner(), images, mirrored, offset if mean_image else None)
    expected = []
    for top, left in OFFSETS:
        view = images.numpy()[:, :, top : top + 224, left : left + 224]
        for oriented in (view, view[:, :, :, ::-1]) if mirrored else (view,):
            oriented = oriented - mean_image * offset.numpy()
            exp = np.exp(np.concatenate([oriented[:, :, 0, 0], oriented[:, :, 3, 220]], 1))
            expected.append(exp / exp.sum(1, keepdims=True))
    assert len(expected) == (10 if mirrored else 5)
    np.testing.assert_allclose(average.numpy(), np.mean(expected, 0), rtol=1e-5)
    np.testing.assert_allclose(centre.numpy(), expected[-2 if mirrored else -1], rtol=1e-5)


def test_top_k() -> None:
    """Labels among the k highest; padding never counts; k is capped by the classes."""
    scores = torch.tensor([[0.1, 0.5, 0.2, 0.9], [0.4, 0.3, 0.2, 0.1], [9.0, 8, 7, 6]])
    assert top_k_correct(scores, torch.tensor([3, 3, -1]), 1) == 1
    assert top_k_correct(scores, torch.tensor([1, 1, -1]), 2) == 2
    assert top_k_correct(scores, torch.tensor([2, 3, -1]), 5) == 2


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


@pytest.fixture
def alone() -> Distributed:
    """One process."""
    return Distributed(ParallelConfig())


def test_accuracy_ignores_padding(alone: Distributed) -> None:
    """Five samples, all right; with one class never predicted, as many wrong as it has; None when interrupted."""
    perfect = evaluate(Corner(3), Numbers(), alone, mirrored=True)  # type: ignore[arg-type]
    assert perfect is not None and perfect.samples == 5 and perfect.views == "ten-view"
    assert (perfect.centre_top1, perfect.centre_top5, perfect.views_top1) == (100, 100, 100)
    wrong = evaluate(Corner(3, hidden=1), Numbers(), alone, mirrored=False)  # type: ignore[arg-type]
    assert wrong is not None and wrong.centre_top1 == pytest.approx(60) and wrong.centre_top5 == 100
    assert wrong.views == "five-view" and ("five-view top-1 accuracy", "60.0 %") in wrong.rows()
    assert evaluate(Corner(), Numbers(), alone, mirrored=True, interrupted=lambda: True) is None  # type: ignore[arg-type]


def test_over_ranks_with_the_real_loader(
    numbered_shards: Callable[[int, int], ShardSet],
    plain_basis: Eigenbasis,
    tmp_path: Path,
    alone: Distributed,
) -> None:
    """Sample counts of 1 and of 3 ranks add up to the split."""
    numbered_shards(41, 3)
    val = open_shards(tmp_path, "val")
    for num_ranks in (1, 3):
        place = {"batch_size": 4, "num_ranks": num_ranks, "device": "cpu"}
        loaders = (
            val_loader(val, plain_basis, DataConfig(tmp_path), rank=r, **place) for r in range(num_ranks)
        )
        results = [evaluate(Corner(), loader, alone, mirrored=True) for loader in loaders]
        assert sum(result.samples for result in results if result) == 41


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

    def fails(*arguments: object, **options: object) -> None:
        raise UserError("it was evaluated")

    monkeypatch.setattr("train.accuracy.evaluate", fails)
    files = sorted(tmp_path.iterdir())
    cases: list[tuple[Path, dict[str, object], str]] = [
        (other, {}, "has 11 outputs"),
        (nan, {}, "finite"),
        (weights, {"per_class": tmp_path / "x.txt"}, r"x\.txt"),
        (weights, {"confusion": tmp_path}, str(tmp_path)),
        (weights, {"batch_size": 0}, "--batch-size"),
        (weights, {"per_class": tmp_path / "x.csv", "confusion": tmp_path / "x.png"}, "it was evaluated"),
    ]
    for path, options, named in cases:
        with pytest.raises(UserError, match=named):
            evaluate_checkpoint(path, shards, device="cpu", **options)  # type: ignore[arg-type]
    for name in ("per_class", "confusion"):
        with pytest.raises(FileNotFoundError, match="/proc/x"):
            out = Path("/proc/x.csv" if name == "per_class" else "/proc/x.png")
            evaluate_checkpoint(weights, shards, device="cpu", **{name: out})  # type: ignore[arg-type]
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
    no pairs are counted; without images it is empty of errors."""
    stats = stats_of(batches(20))
    stats.counts[2] = 0
    rows = list(csv.DictReader(io.StringIO(stats.csv(NAMES).decode())))
    assert [row["words"] for row in rows] == [name.words for name in NAMES]
    assert rows[2]["top1_error"] == "" and 0 <= float(rows[3]["top1_error"]) <= 100
    assert stats_of([]).mistakes == [] and len(stats_of([]).csv(NAMES).splitlines()) == CLASSES + 1
    monkeypatch.setattr(module, "CONFUSION_LIMIT", CLASSES - 1)
    stats = stats_of(batches(3))
    assert not len(stats.confusion) and "mistaken_for" not in stats.table(NAMES)[0]
    assert sum(row["images"] for row in stats.table(NAMES)) > 0
