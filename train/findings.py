"""What an evaluation finds out about each class, and the images it was most wrong about."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.shards import ClassName

CONFUSION_LIMIT = 4000
"""Classes up to which every pair is counted: 64 MB."""


@dataclass(frozen=True)
class Example:
    """One image that was looked at."""

    image: torch.Tensor
    """(3, 256, 256), as the loader gave it, on the CPU."""
    label: int
    guesses: list[int]
    """The most probable classes, five at most, best first."""
    probabilities: list[float]
    """Theirs."""

    @property
    def correct(self) -> bool:
        """Whether the first guess is right."""
        return self.guesses[0] == self.label


class Findings:
    """Counts per class over a whole validation split; fed batch by batch, never waits for the device in between."""

    EXAMPLES = 10

    def __init__(self, classes: int, device: torch.device) -> None:
        self._classes = classes
        # One row more, for padding.
        self.counts = torch.zeros(classes + 1, 3, dtype=torch.int64, device=device)
        """Of each class: images, of these right at once, and among the five most probable."""
        pairs = (classes + 1) if classes <= CONFUSION_LIMIT else 0
        self.confusion = torch.zeros(pairs, classes, dtype=torch.int32, device=device)
        """[label, guess]; no rows where there are too many classes."""
        self._wrong, self._right = Extremes(self.EXAMPLES), Extremes(self.EXAMPLES)

    def see(self, images: torch.Tensor, labels: torch.Tensor, scores: torch.Tensor) -> None:
        """Take note of a batch: (N, 3, 256, 256), (N,) and probabilities (N, classes)."""
        best = scores.topk(min(5, self._classes), 1)
        rows = torch.where(labels >= 0, labels, self._classes)
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

    def collect(
        self, total: Callable[[torch.Tensor], torch.Tensor], gather: Callable[[Any], list[Any]]
    ) -> None:
        """Put together what all processes found, in each of them: `total` adds tensors up, `gather` lists objects."""
        self.counts, self.confusion = total(self.counts), total(self.confusion)
        for extremes in (self._wrong, self._right):
            # From the CPU: a CUDA tensor that is unpickled goes to the device of its process' number, if there is one.
            extremes.merge(gather(tuple(each.cpu() for each in extremes.kept)))

    @property
    def mistakes(self) -> list[Example]:
        """Up to ten images that the network was surest about and wrong, the surest first."""
        return self._wrong.examples()

    @property
    def close_calls(self) -> list[Example]:
        """Up to ten that it was right about, but least sure, the least sure first."""
        return self._right.examples()

    def table(self, names: Sequence[ClassName]) -> list[dict[str, Any]]:
        """A row for each class: errors in percent (None without images), and what it is mistaken for most."""
        rows = []
        mistaken = self.confusion[: self._classes].clone()
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
        """The table as a CSV file."""
        rows, out = self.table(names), io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {name: round(v, 4) if isinstance(v, float) else v for name, v in row.items()} for row in rows
        )
        return out.getvalue().encode()


class Extremes:
    """The rows with the highest keys of all that were seen; on the device until asked for."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.kept: tuple[torch.Tensor, ...] = ()
        """Keys, images, labels, guesses, probabilities."""

    def add(self, keys: torch.Tensor, rows: tuple[torch.Tensor, ...]) -> None:
        """Look at more rows; those whose key is -inf are never kept."""
        best = keys.topk(min(self._count, len(keys)))
        own = (best.values, *(row[best.indices] for row in rows))
        self.merge([self.kept, own] if self.kept else [own])

    def merge(self, several: list[tuple[torch.Tensor, ...]]) -> None:
        """Keep the best of several."""
        device = several[0][0].device
        joined = [
            torch.cat([each.to(device) for each in parts])
            for parts in zip(*filter(None, several), strict=True)
        ]
        best = joined[0].topk(min(self._count, len(joined[0]))).indices
        self.kept = tuple(each[best] for each in joined)

    def examples(self) -> list[Example]:
        """Those kept, best first."""
        if not self.kept:
            return []
        keys, images, labels, guesses, probabilities = (each.cpu() for each in self.kept)
        return [
            Example(images[k], int(labels[k]), guesses[k].tolist(), probabilities[k].tolist())
            for k in range(len(keys))
            if keys[k] > -torch.inf
        ]
