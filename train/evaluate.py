"""Evaluation: centre crop and ten views (Krizhevsky et al. 2012, section 4.1).

    python -m train.evaluate CHECKPOINT SHARDS

Ten views are the four corner windows, the central one, and their mirrors; the softmax outputs are averaged. A network
that was trained without flips gets the five unmirrored windows.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from pipeline.files import check_writable, write_bytes
from pipeline.settings import DataConfig
from pipeline.shards import ShardSet, open_shards
from train.config import ParallelConfig
from train.launch import find_launch
from train.program import run_program, told_once

if TYPE_CHECKING:
    from train.trained import Trained


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
    import torch  # takes seconds, which neither --help nor a wrong argument waits for

    from model.alexnet import AlexNet
    from pipeline.loader import val_loader
    from train.accuracy import evaluate
    from train.device import pick_device, tune_malloc
    from train.findings import Findings
    from train.placement import Placement, lost_processes_told
    from train.trained import read_trained

    tune_malloc()
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
        where: dict[str, Any] = {"rank": placement.rank, "num_ranks": placement.world, "device": place}
        loader = placement.together(
            lambda: val_loader(val, trained.basis, config, batch_size=batch_size, **where)
        )
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
    """Find out before the work whether all can be written after it. Raises `ValueError` or `OSError`."""
    from train.findings import CONFUSION_LIMIT

    if confusion and classes > CONFUSION_LIMIT:
        raise ValueError(f"{classes} classes are too many for a picture; leave --confusion out")
    for path in (per_class, confusion):
        if path:
            check_writable(path)


def open_for(trained: "Trained", shards: Path) -> ShardSet:
    """The validation split, whose classes are to be the network's."""
    val = open_shards(shards, "val")
    names = [name.wnid for name in val.classes]
    if trained.wnids is not None and names != trained.wnids:
        raise ValueError(
            f"{trained.path} was trained on other classes than {shards}/classes.json lists; give the shards it was "
            "trained on"
        )
    if len(names) != trained.config.outputs:
        raise ValueError(
            f"{trained.path} tells {trained.config.outputs} classes apart, {shards} has {len(names)}"
        )
    return val


if __name__ == "__main__":
    run_program(evaluate_checkpoint)
