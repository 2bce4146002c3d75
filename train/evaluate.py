"""Evaluation: centre crop and ten views (Krizhevsky et al. 2012, section 4.1).

    python -m train.evaluate CHECKPOINT SHARDS

Ten views are the four corner windows, the central one, and their mirrors; the softmax outputs are averaged. A network
that was trained without flips gets the five unmirrored windows.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import nn

from model.alexnet import AlexNet
from pipeline.draws import CROP_SIDE
from pipeline.files import check_writable, write_bytes
from pipeline.loader import Loader, val_loader
from pipeline.settings import DataConfig
from pipeline.shards import IMAGE_SIDE, ShardSet, open_shards
from train.device import keep_freed_memory, pick_device
from train.findings import CONFUSION_LIMIT, Findings
from train.launch import find_launch
from train.placement import ParallelConfig, Placement, lost_processes_told
from train.program import run_program, told_once
from train.trained import Trained, read_trained

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
            centre = average = model(centre_NCHW if loader.mean_offset is None else centre_NCHW - loader.mean_offset)
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


def evaluate_checkpoint(
    checkpoint: Path,
    shards: Path,
    batch_size: int = 64,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    per_class: Path | None = None,
    confusion: Path | None = None,
) -> None:
    """Evaluate a network on a validation split: centre crop and ten views, top-1 and top-5.

    Under torchrun or srun each process looks at a share.

    Args:
        checkpoint: A step-*.pt, a run directory, whose newest one is taken, a .safetensors file or torchvision's .pth.
        shards: Folder that holds val/ and classes.json.
        batch_size: Images at a time, in each process.
        device: auto takes the first GPU if there is one.
        per_class: CSV file to write, a row for each class: errors over all views, and what it is mistaken for.
        confusion: PNG file to write: how often each class is taken for each other one.
    """
    with told_once():
        check_arguments(batch_size, per_class, confusion)
    keep_freed_memory()
    find_launch(os.environ, torch.cuda.device_count())
    place = pick_device(device)
    with lost_processes_told():
        placement = Placement(ParallelConfig(), place)
        trained = placement.together(lambda: read_trained(checkpoint))
        val = placement.together(lambda: open_for(trained, shards))
        placement.first_does(lambda: prepare_outputs(len(val.classes), per_class, confusion))
        config = DataConfig(
            shards,
            decode=cast(Literal["auto"], trained.decode) if place.type == "cuda" else "cpu",
            augmentation=trained.augmentation,
        )
        where = {"rank": placement.rank, "num_ranks": placement.world, "device": place}
        loader = placement.together(lambda: val_loader(val, trained.basis, config, batch_size=batch_size, **where))
        model = AlexNet(trained.config)
        model.load_state_dict(trained.state)
        findings = Findings(len(val.classes), place)
        mirrored = trained.augmentation.flip > 0
        accuracy = evaluate(model.to(place), loader, mirrored, total=placement.total, watch=findings.see)
        assert accuracy is not None
        findings.collect(placement.total, placement.gather)
        loader.close()
    if placement.is_first:
        print(f"{trained.path}: {accuracy.samples} images")
        for name, value in accuracy.rows():
            print(f"{name}: {value}")
        if per_class:
            write_bytes(per_class, findings.csv(val.classes))
        if confusion:
            from train.charts import draw_confusion, saved_figure  # matplotlib takes its time

            with saved_figure(confusion) as figure:
                draw_confusion(figure, findings, val.classes)
    placement.leave()


def check_arguments(batch_size: int, per_class: Path | None, confusion: Path | None) -> None:
    """Raise `ValueError` for what is wrong whatever the data."""
    if batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, not {batch_size}")
    for path, suffix in ((per_class, ".csv"), (confusion, ".png")):
        if path and (path.suffix != suffix or path.is_dir()):
            raise ValueError(f"{path} is to be a {suffix} file; give a file's name that ends so")


def prepare_outputs(classes: int, per_class: Path | None, confusion: Path | None) -> None:
    """Find out before the work whether all can be written behind it. Raises `ValueError` or `OSError`."""
    if confusion and classes > CONFUSION_LIMIT:
        raise ValueError(f"{classes} classes are too many for a picture; leave --confusion out")
    for path in (per_class, confusion):
        if path:
            check_writable(path)


def open_for(trained: Trained, shards: Path) -> ShardSet:
    """The validation split, whose classes are to be the network's."""
    val = open_shards(shards, "val")
    names = [name.wnid for name in val.classes]
    if trained.wnids is not None and names != trained.wnids:
        raise ValueError(
            f"{trained.path} was trained on other classes than {shards}/classes.json lists; give the shards it was "
            "trained on"
        )
    if len(names) != trained.config.outputs:
        raise ValueError(f"{trained.path} tells {trained.config.outputs} classes apart, {shards} has {len(names)}")
    return val


if __name__ == "__main__":
    run_program(evaluate_checkpoint)
