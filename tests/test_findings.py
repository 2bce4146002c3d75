"""What is counted per class, and which images are shown, is the same however a split is cut up among processes."""

import csv
import io

import numpy as np
import torch

from pipeline.shards import ClassName
from train import findings as findings_module
from train.accuracy import EvalStats

CLASSES, BATCH = 7, 5
NAMES = [ClassName(f"n{k}", f"word {k}, more") for k in range(CLASSES)]


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Random images, labels of which some are padding, and probabilities."""
    torch.manual_seed(count)
    made = []
    for _ in range(count):
        labels = torch.randint(-1, CLASSES, (BATCH,))
        made.append((torch.rand(BATCH, 3, 4, 4), labels, torch.randn(BATCH, CLASSES).softmax(1)))
    return made


def seen(given: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> EvalStats:
    """EvalStats over batches, as one process has them."""
    found = EvalStats(CLASSES, torch.device("cpu"))
    for batch in given:
        found.see(*batch)
    return found


def test_counts_with_numpy() -> None:
    """Images, hits among the first and the first five, and every pair of label and guess; padding is nobody's."""
    given = batches(40)
    found = seen(given)
    labels, scores = np.concatenate([b[1] for b in given]), np.concatenate([b[2] for b in given])
    order = np.argsort(-scores, 1)
    rows = found.table(NAMES)
    for k, row in enumerate(rows):
        own = labels == k
        assert row["images"] == own.sum() and row["wnid"] == f"n{k}"
        np.testing.assert_allclose(row["top1_error"], 100 * (order[own, 0] != k).mean())
        np.testing.assert_allclose(row["top5_error"], 100 * (order[own, :5] != k).all(1).mean())
        guesses = np.bincount(order[own, 0], minlength=CLASSES)
        np.testing.assert_array_equal(found.confusion[k].numpy(), guesses)
        guesses[k] = 0
        assert row["times"] == guesses.max() and row["mistaken_for"] == f"n{guesses.argmax()}"
    assert sum(row["images"] for row in rows) == (labels >= 0).sum() < len(labels)


def test_examples_with_numpy() -> None:
    """The ten surest mistakes and the ten least sure hits of all images, in their order."""
    given = batches(40)
    found = seen(given)
    images, labels, scores = (np.concatenate([b[k] for b in given]) for k in range(3))
    best, guess = scores.max(1), scores.argmax(1)
    wrong = np.flatnonzero((labels >= 0) & (guess != labels))
    right = np.flatnonzero((labels >= 0) & (guess == labels))
    for examples, expected in (
        (found.mistakes, wrong[np.argsort(-best[wrong])][:10]),
        (found.close_calls, right[np.argsort(best[right])][:10]),
    ):
        assert len(examples) == 10
        for example, k in zip(examples, expected, strict=True):
            np.testing.assert_array_equal(example.image.numpy(), images[k])
            assert (example.label, example.guesses[0], example.correct) == (
                labels[k],
                guess[k],
                labels[k] == guess[k],
            )
            np.testing.assert_allclose(example.probabilities, np.sort(scores[k])[::-1][:5], rtol=1e-6)


def test_shared_out() -> None:
    """Three processes that look at a third each find together what one finds; a process without images does no harm."""
    given = batches(12)
    alone, parts = seen(given), [seen(given[:4]), seen(given[4:12]), seen([])]
    counts, confusion = (
        torch.stack([getattr(p, name) for p in parts]).sum(0) for name in ("counts", "confusion")
    )
    kept = [[part._wrong.kept for part in parts], [part._right.kept for part in parts]]
    for part in parts:
        totals, lists = iter((counts, confusion)), iter(kept)
        part.collect(lambda _, totals=totals: next(totals), lambda _, lists=lists: next(lists))  # type: ignore[misc]
        assert part.csv(NAMES) == alone.csv(NAMES)
        for mine, all_of_it in ((part.mistakes, alone.mistakes), (part.close_calls, alone.close_calls)):
            assert [e.probabilities for e in mine] == [e.probabilities for e in all_of_it]
            assert all(torch.equal(a.image, b.image) for a, b in zip(mine, all_of_it, strict=True))


def test_csv_and_nothing_found() -> None:
    """The file is read back by the csv module, commas in names and all; a class without images has no error."""
    found = seen(batches(20))
    found.counts[2] = 0
    rows = list(csv.DictReader(io.StringIO(found.csv(NAMES).decode())))
    assert [row["words"] for row in rows] == [name.words for name in NAMES]
    assert rows[2]["top1_error"] == "" and 0 <= float(rows[3]["top1_error"]) <= 100
    nothing = seen([])
    assert (
        nothing.mistakes == nothing.close_calls == [] and len(nothing.csv(NAMES).splitlines()) == CLASSES + 1
    )


def test_too_many_classes_for_pairs(monkeypatch: object) -> None:
    """Beyond the limit classes are counted, pairs are not."""
    monkeypatch.setattr(findings_module, "CONFUSION_LIMIT", CLASSES - 1)  # type: ignore[attr-defined]
    found = seen(batches(3))
    assert not len(found.confusion) and "mistaken_for" not in found.table(NAMES)[0]
    assert sum(row["images"] for row in found.table(NAMES)) > 0
