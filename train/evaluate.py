"""Evaluate a network: centre crop and ten views (Krizhevsky et al. 2012, section 4.1).

python -m train.evaluate CHECKPOINT SHARDS
"""

import os
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from pipeline.errors import UserError
from pipeline.files import check_writable, write_bytes
from pipeline.shards import ShardSet, open_shards
from train.cli import run_program
from train.config import ParallelConfig
from train.launch import set_launch_variables

if TYPE_CHECKING:
    from train.pretrained import Pretrained


def evaluate_checkpoint(
    checkpoint: Path,
    shards: Path,
    batch_size: int = 64,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    per_class: Path | None = None,
    confusion: Path | None = None,
) -> None:
    """Evaluate a network on a validation split: centre crop and ten views, top-1 and top-5.

    Under torchrun or srun each process evaluates a part of the images.

    Args:
        checkpoint: A step-*.pt, a run directory for its newest one, a .safetensors file, or torchvision's .pth.
        shards: Directory with val/ and classes.json.
        batch_size: Images at a time, in each process.
        device: auto takes a GPU if there is one.
        per_class: CSV file to write, a row for each class: errors over all views, and the class it is most often
            mistaken for.
        confusion: PNG file to write: the confusion matrix.
    """
    check_arguments(batch_size, per_class, confusion)
    import torch  # takes seconds, which neither --help nor a wrong argument waits for

    from model.alexnet import AlexNet
    from pipeline.loader import val_loader
    from train.accuracy import EvalStats, evaluate
    from train.device import pick_device, tune_malloc
    from train.distributed import Distributed
    from train.pretrained import read_pretrained

    tune_malloc()
    set_launch_variables(os.environ, torch.cuda.device_count())
    distributed = Distributed(ParallelConfig())
    torch_device = distributed.run_on_all_ranks(lambda: pick_device(device))
    trained = distributed.run_on_all_ranks(lambda: read_pretrained(checkpoint))
    val = distributed.run_on_all_ranks(lambda: open_val(trained, shards))
    distributed.run_on_rank_zero(lambda: check_outputs(len(val.classes), per_class, confusion))
    decode = cast(Literal["auto"], trained.decode) if torch_device.type == "cuda" else "cpu"
    loader = distributed.run_on_all_ranks(
        lambda: val_loader(
            val,
            batch_size=batch_size,
            rank=distributed.rank,
            num_ranks=distributed.world_size,
            device=torch_device,
            basis=trained.basis,
            decode=decode,
            augmentation=trained.augmentation,
        )
    )
    model = AlexNet(trained.config).to(torch_device)
    model.load_state_dict(trained.state)
    stats = EvalStats(len(val.classes), torch_device)
    accuracy = evaluate(model, loader, distributed, mirrored=trained.augmentation.flip > 0, stats=stats)
    assert accuracy is not None, "nothing interrupts it"
    loader.close()
    if distributed.is_rank_zero:
        print(f"{trained.path}: {accuracy.samples} images")
        for name, value in accuracy.rows():
            print(f"{name}: {value}")
        if per_class:
            write_bytes(per_class, stats.csv(val.classes))
        if confusion:
            from train.pictures import draw_confusion, saved_figure  # matplotlib takes its time

            with saved_figure(confusion) as figure:
                draw_confusion(figure, stats, val.classes)
    distributed.shutdown()


def check_arguments(batch_size: int, per_class: Path | None, confusion: Path | None) -> None:
    """Raise `UserError` for arguments that are wrong for any checkpoint and shards."""
    if batch_size < 1:
        raise UserError(f"--batch-size: expected at least 1, got {batch_size}")
    for path, suffix in ((per_class, ".csv"), (confusion, ".png")):
        if path and (path.suffix != suffix or path.is_dir()):
            raise UserError(f"{path}: expected the name of a {suffix} file")


def check_outputs(classes: int, per_class: Path | None, confusion: Path | None) -> None:
    """Raise `UserError` or `OSError` for outputs that could not be written, before the evaluation."""
    from train.accuracy import CONFUSION_LIMIT

    if confusion and classes > CONFUSION_LIMIT:
        raise UserError(
            f"--confusion: expected at most {CONFUSION_LIMIT} classes, got {classes}; leave it out"
        )
    for path in (per_class, confusion):
        if path:
            check_writable(path)


def open_val(trained: "Pretrained", shards: Path) -> ShardSet:
    """Open the validation split. Raises `UserError` unless its classes are the network's."""
    val = open_shards(shards, "val")
    names = [name.wnid for name in val.classes]
    for k, (expected, found) in enumerate(zip_longest(trained.wnids or names, names, fillvalue="none")):
        if expected != found:
            raise UserError(
                f"{shards}/classes.json: expected the classes of {trained.path}, whose class {k} is {expected}, got "
                f"{found}; give shards of the same classes"
            )
    if len(names) != trained.config.outputs:
        raise UserError(
            f"{trained.path} has {trained.config.outputs} outputs, {shards} has {len(names)} classes; give other shards"
        )
    return val


if __name__ == "__main__":
    run_program(evaluate_checkpoint)
