"""Accuracy on the centre crop and averaged over ten views (Krizhevsky et al. 2012, section 4.1), and per-class results.

Ten views are the four corner crops, the central one, and their mirrors; the softmax outputs are averaged. A model that
was trained without flips gets the five unmirrored crops. Shapes: N images, C colours, H rows, W columns, K classes.
"""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.augment import CROP_SIDE
from pipeline.errors import DataError
from pipeline.loader import Loader
from pipeline.shards import IMAGE_SIDE, ClassName
from train.distributed import Distributed

FAR, MIDDLE = IMAGE_SIDE - CROP_SIDE, (IMAGE_SIDE - CROP_SIDE) // 2
CENTRE = (MIDDLE, MIDDLE)
CROPS = (CENTRE, (0, 0), (0, FAR), (FAR, 0), (FAR, FAR))
"""(top, left) offsets of the five crops."""


@dataclass(frozen=True)
class Accuracy:
    """Shares of correct answers, 0 to 100 %. Top-5 is top-min(5, classes)."""

    samples: int
    centre_top1: float
    centre_top5: float
    views: str
    """"ten-view" or "five-view"; empty if only the centre was evaluated."""
    views_top1: float
    views_top5: float

    def rows(self) -> list[tuple[str, str]]:
        """Format the figures to print: (name, value) of each."""
        names = [("centre top-1", self.centre_top1), ("centre top-5", self.centre_top5)]
        if self.views:
            names += [(f"{self.views} top-1", self.views_top1), (f"{self.views} top-5", self.views_top5)]
        return [(f"{name} accuracy", f"{value:.1f} %") for name, value in names]


def crop(images_NCHW: torch.Tensor, offsets: tuple[int, int]) -> torch.Tensor:
    """Crop images, (N, 3, 256, 256) -> (N, 3, 224, 224), without a copy."""
    top, left = offsets
    return images_NCHW[:, :, top : top + CROP_SIDE, left : left + CROP_SIDE]


@torch.inference_mode()
def predict_probabilities(
    model: nn.Module, images_NCHW: torch.Tensor, mirrored: bool, mean_offset: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute class probabilities (N, K) of the centre crop, and averaged over ten views (five unless `mirrored`).

    `mean_offset`, from the loader, is subtracted from every view, as the centre of the mean image was in training.
    """
    views = [crop(images_NCHW, offsets) for offsets in CROPS]
    if mirrored:
        views += [view.flip(3) for view in views]
    if mean_offset is not None:
        views = [view - mean_offset for view in views]
    softmaxes = [model(view).softmax(1) for view in views]
    return softmaxes[0], torch.stack(softmaxes).mean(0)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Loader,
    distributed: Distributed,
    *,
    mirrored: bool,
    all_views: bool = True,
    interrupted: Callable[[], bool] = lambda: False,
    stats: "EvalStats | None" = None,
) -> Accuracy | None:
    """Measure accuracy over a whole validation split, every image counted once over all ranks.

    Args:
        model: Images to logits.
        loader: From `val_loader`.
        distributed: Adds up the counts of all ranks.
        mirrored: Whether views include mirrors.
        all_views: Whether to evaluate all views, at ten times the cost, or the centre crop alone.
        interrupted: Called before each batch; when it returns True, the evaluation ends and returns None.
        stats: Updated with each batch: probabilities over all views, or logits of the centre crop.
    """
    model.eval()
    correct = torch.zeros(4, dtype=torch.int64, device=loader.device)
    samples = torch.zeros((), dtype=torch.int64, device=loader.device)
    for images_NCHW, labels_N in loader:
        if interrupted():
            return None
        if all_views:
            centre_NK, average_NK = predict_probabilities(model, images_NCHW, mirrored, loader.mean_offset)
        else:
            centre_NCHW = crop(images_NCHW, CENTRE)
            if loader.mean_offset is not None:
                centre_NCHW = centre_NCHW - loader.mean_offset
            centre_NK = average_NK = model(centre_NCHW)
        correct += torch.stack(
            [top_k_correct(s, labels_N, k) for s in (centre_NK, average_NK) for k in (1, 5)]
        )
        samples += (labels_N >= 0).sum()
        if stats:
            stats.update(images_NCHW, labels_N, average_NK)
    if stats:
        stats.all_reduce(distributed)
    counts = distributed.all_reduce_sum(torch.cat([samples[None], correct])).tolist()
    if not counts[0]:
        raise DataError("no validation image can be decoded; copy or pack the shards again")
    shares = [100 * count / counts[0] for count in counts[1:]]
    name = ("ten-view" if mirrored else "five-view") if all_views else ""
    return Accuracy(counts[0], shares[0], shares[1], name, shares[2], shares[3])


def top_k_correct(scores_NK: torch.Tensor, labels_N: torch.Tensor, k: int) -> torch.Tensor:
    """Count the labels that are among the k highest scores of their row; padding (-1) never is."""
    return (scores_NK.topk(min(k, scores_NK.shape[1]), 1).indices == labels_N[:, None]).any(1).sum()


CONFUSION_LIMIT = 4000
"""Most classes for which a confusion matrix is kept: it then takes 64 MB."""


@dataclass(frozen=True)
class Example:
    """One evaluated image."""

    image: torch.Tensor
    """(3, 256, 256), on the CPU, normalized as the loader returned it."""
    label: int
    guesses: list[int]
    """The most probable classes, five at most, best first."""
    probabilities: list[float]
    """Their probabilities."""

    @property
    def correct(self) -> bool:
        """True if the first guess is right."""
        return self.guesses[0] == self.label


class EvalStats:
    """Counts per class over a validation split, and the surest mistakes and closest calls; `update` does not wait for
    the device."""

    EXAMPLES = 10
    """Number of examples of each kind."""

    def __init__(self, classes: int, device: torch.device) -> None:
        self._num_classes = classes
        # One row more, for padding.
        self.counts = torch.zeros(classes + 1, 3, dtype=torch.int64, device=device)
        """(classes + 1, 3): per class the number of images, of these correct in top-1, and in top-5."""
        pairs = (classes + 1) if classes <= CONFUSION_LIMIT else 0
        self.confusion = torch.zeros(pairs, classes, dtype=torch.int32, device=device)
        """[label, guess]; no rows with more than `CONFUSION_LIMIT` classes."""
        self._wrong, self._right = TopK(self.EXAMPLES), TopK(self.EXAMPLES)

    def update(self, images: torch.Tensor, labels: torch.Tensor, scores: torch.Tensor) -> None:
        """Count a batch: (N, 3, 256, 256), (N,) and probabilities (N, K)."""
        best = scores.topk(min(5, self._num_classes), 1)
        rows = torch.where(labels >= 0, labels, self._num_classes)
        hits = best.indices == labels[:, None]
        seen = torch.stack([torch.ones_like(hits[:, 0]), hits[:, 0], hits.any(1)], 1)
        self.counts.index_add_(0, rows, seen.long())
        if len(self.confusion):
            ones = torch.ones_like(rows, dtype=torch.int32)
            self.confusion.index_put_((rows, best.indices[:, 0]), ones, accumulate=True)
        confidence, never = best.values[:, 0], torch.full_like(best.values[:, 0], -torch.inf)
        rows_of = (images, labels, best.indices, best.values)
        self._wrong.add(torch.where((labels >= 0) & ~hits[:, 0], confidence, never), rows_of)
        self._right.add(torch.where((labels >= 0) & hits[:, 0], -confidence, never), rows_of)

    def all_reduce(self, distributed: Distributed) -> None:
        """Combine the counts and examples of all ranks, on each of them."""
        self.counts = distributed.all_reduce_sum(self.counts)
        self.confusion = distributed.all_reduce_sum(self.confusion)
        for top in (self._wrong, self._right):
            # On the CPU, as a CUDA tensor is unpickled onto the GPU of its number, which another process may use.
            top.merge(distributed.all_gather(tuple(each.cpu() for each in top.rows)))

    @property
    def mistakes(self) -> list[Example]:
        """Up to ten images for which the network was wrong with the highest probability, highest first."""
        return self._wrong.examples()

    @property
    def close_calls(self) -> list[Example]:
        """Up to ten images for which it was right with the lowest probability, lowest first."""
        return self._right.examples()

    def table(self, names: Sequence[ClassName]) -> list[dict[str, Any]]:
        """Make a row for each class: errors in percent (None without images), and the class most often confused."""
        rows = []
        mistaken = self.confusion[: self._num_classes].clone()
        if len(mistaken):
            mistaken.fill_diagonal_(0)
        for index, (images, right, among_five) in enumerate(self.counts[:-1].tolist()):
            name = names[index]
            row: dict[str, Any] = {"index": index, "wnid": name.wnid, "words": name.words, "images": images}
            row["top1_error"] = 100 - 100 * right / images if images else None
            row["top5_error"] = 100 - 100 * among_five / images if images else None
            if len(mistaken):
                times, guess = mistaken[index].max(0)
                row |= {"mistaken_for": names[int(guess)].wnid if times else "", "times": int(times)}
            rows.append(row)
        return rows

    def csv(self, names: Sequence[ClassName]) -> bytes:
        """Encode the table as a CSV file."""
        rows, out = self.table(names), io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {name: round(v, 4) if isinstance(v, float) else v for name, v in row.items()} for row in rows
        )
        return out.getvalue().encode()


class TopK:
    """The rows with the highest keys of all that were added; on the device until `examples` is called."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.rows: tuple[torch.Tensor, ...] = ()
        """Keys, images, labels, guesses, probabilities."""

    def add(self, keys: torch.Tensor, rows: tuple[torch.Tensor, ...]) -> None:
        """Add rows; those whose key is -inf are never kept."""
        best = keys.topk(min(self._count, len(keys)))
        own = (best.values, *(row[best.indices] for row in rows))
        self.merge([self.rows, own] if self.rows else [own])

    def merge(self, several: list[tuple[torch.Tensor, ...]]) -> None:
        """Keep the best rows of several sets."""
        device = several[0][0].device
        joined = [
            torch.cat([each.to(device) for each in parts])
            for parts in zip(*filter(None, several), strict=True)
        ]
        best = joined[0].topk(min(self._count, len(joined[0]))).indices
        self.rows = tuple(each[best] for each in joined)

    def examples(self) -> list[Example]:
        """Return the rows as examples on the CPU, best first."""
        if not self.rows:
            return []
        keys, images, labels, guesses, probabilities = (each.cpu() for each in self.rows)
        return [
            Example(images[k], int(labels[k]), guesses[k].tolist(), probabilities[k].tolist())
            for k in range(len(keys))
            if keys[k] > -torch.inf
        ]
