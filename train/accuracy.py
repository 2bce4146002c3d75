"""Accuracy on the centre crop and averaged over ten views (Krizhevsky et al. 2012, section 4.1).

Ten views are the four corner windows, the central one, and their mirrors; the softmax outputs are averaged. A network
that was trained without flips gets the five unmirrored windows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.draws import CROP_SIDE
from pipeline.loader import Loader
from pipeline.shards import IMAGE_SIDE

FAR, MIDDLE = IMAGE_SIDE - CROP_SIDE, (IMAGE_SIDE - CROP_SIDE) // 2
CENTRE = (MIDDLE, MIDDLE)
WINDOWS = (CENTRE, (0, 0), (0, FAR), (FAR, 0), (FAR, FAR))
"""(top, left) offsets of the five windows."""


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
        """(name, value) of each figure, for people."""
        names = [("centre top-1", self.centre_top1), ("centre top-5", self.centre_top5)]
        if self.views:
            names += [(f"{self.views} top-1", self.views_top1), (f"{self.views} top-5", self.views_top5)]
        return [(f"{name} accuracy", f"{value:.1f} %") for name, value in names]


def window(images: torch.Tensor, offsets: tuple[int, int]) -> torch.Tensor:
    """(N, 3, 256, 256) -> (N, 3, 224, 224), a view."""
    top, left = offsets
    return images[:, :, top : top + CROP_SIDE, left : left + CROP_SIDE]


@torch.inference_mode()
def probabilities(
    model: nn.Module, images: torch.Tensor, mirrored: bool, mean_offset: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Class probabilities (N, classes) of the centre crop, and averaged over ten views (five unless `mirrored`).

    `mean_offset`, from the loader, is subtracted from every view: the mean image is neither windowed nor flipped.
    """
    views = [window(images, offsets) for offsets in WINDOWS]
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
    mirrored: bool,
    *,
    all_views: bool = True,
    interrupted: Callable[[], bool] = lambda: False,
    total: Callable[[torch.Tensor], torch.Tensor] = lambda counts: counts,
    watch: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None] = lambda images, labels, scores: None,
) -> Accuracy | None:
    """Accuracy over a whole validation split, every image counted once.

    Args:
        model: Images to logits.
        loader: From `val_loader`.
        mirrored: Whether views include mirrors.
        all_views: Also the average over views, which costs ten times the centre crop.
        interrupted: Asked between batches; once true, None is returned.
        total: Adds up counts of all processes that evaluate a part each.
        watch: Is given each batch: images (N, 3, 256, 256), labels, and what `all_views` or the centre crop makes of
            it, probabilities or logits (N, classes).
    """
    model.eval()
    correct = torch.zeros(4, dtype=torch.int64, device=loader.device)
    samples = torch.zeros((), dtype=torch.int64, device=loader.device)
    for images, labels in loader:
        if interrupted():
            return None
        if all_views:
            centre, average = probabilities(model, images, mirrored, loader.mean_offset)
        else:
            centre_NCHW = window(images, CENTRE)
            centre = average = model(
                centre_NCHW if loader.mean_offset is None else centre_NCHW - loader.mean_offset
            )
        hits = [top_hits(scores, labels, k) for scores in (centre, average) for k in (1, 5)]
        watch(images, labels, average)
        correct += torch.stack(hits)
        samples += (labels >= 0).sum()
    counts = total(torch.cat([samples[None], correct])).tolist()
    shares = [100 * count / counts[0] for count in counts[1:]]
    name = ("ten-view" if mirrored else "five-view") if all_views else ""
    return Accuracy(counts[0], shares[0], shares[1], name, shares[2], shares[3])


def top_hits(scores: torch.Tensor, labels: torch.Tensor, k: int) -> torch.Tensor:
    """How many labels are among the k highest of their row's scores; padding (-1) never is."""
    return (scores.topk(min(k, scores.shape[1]), 1).indices == labels[:, None]).any(1).sum()
