"""Train a network.

    python -m train.run --config FILE --data.shards SHARDS --run.dir DIR [--section.key VALUE ...]

The same command goes on where a run was stopped (Ctrl-C, SIGTERM, or any other end); a finished run is evaluated again.
"""

import signal
from pathlib import Path
from types import FrameType

import torch
import yaml

from pipeline.files import write_bytes
from train.checkpoint import find_checkpoint
from train.config import Config, parse_config
from train.evaluate import pick_device
from train.loop import Trainer
from train.metrics import MetricsLog
from train.pictures import PICTURES, draw_pictures
from train.placement import Placement, lost_processes_told
from train.program import exit_with, keep_freed_memory
from train.report import report


def run(config: Config) -> None:
    """Train, evaluate, draw, report."""
    keep_freed_memory()
    stop = StopSignal()
    device = pick_device(config.run.device)
    torch.set_float32_matmul_precision("high")  # TF32 where a GPU has it; a CPU computes in float32 all the same
    with lost_processes_told():
        placement = Placement(config.parallel, device)
        placement.first_does(lambda: claim_directory(config.run.dir))
        train(config, Trainer(config, device, placement), stop)
    placement.leave()


def train(config: Config, trainer: Trainer, stop: "StopSignal") -> None:
    """Go on from where the run stands; in the first process, tell and write."""
    placement = trainer.placement
    checkpoint = find_checkpoint(config.run.dir)
    if checkpoint:
        checkpoint = trainer.resume(checkpoint)
        if placement.is_first:
            print(f"going on from {checkpoint} (epoch {trainer.epoch}, step {trainer.step})")
    placement.first_does(lambda: prepare_directory(config))
    describe(trainer)

    log = MetricsLog(config.run.dir, trainer.step, trainer.epoch) if placement.is_first else None
    accuracy = trainer.evaluate(all_views=True, interrupted=stop) if trainer.fit(log, stop) else None
    if accuracy:
        trainer.gather_network()
        if placement.is_first:
            report(trainer, accuracy, draw_pictures(trainer))
    elif placement.is_first:
        print(f"stopped and saved at step {trainer.step} (epoch {trainer.epoch}); run the same command again to go on")
    if log:
        log.close()
    trainer.close()


class StopSignal:
    """Turns the first SIGTERM or SIGINT into a wish to stop, asked for between steps; the second one leaves at once."""

    def __init__(self) -> None:
        self._requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        for other in (signal.SIGTERM, signal.SIGINT):
            signal.signal(other, signal.SIG_DFL)

    def __call__(self) -> bool:
        """Whether to stop."""
        return self._requested


OURS = {"config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", *PICTURES}


def claim_directory(directory: Path) -> None:
    """Refuse a run directory that holds something else, before anything is written."""
    names = {path.name.removesuffix(".tmp") for path in directory.iterdir()} if directory.is_dir() else set()
    config = directory / "config.yaml"
    begun = config.is_file() and b"\noptimizer:" in config.read_bytes()
    if (directory.exists() and not directory.is_dir()) or names - OURS or (names and not begun):
        raise ValueError(f"{directory} holds something else; give a --run.dir that is new, empty or an earlier run's")


def prepare_directory(config: Config) -> None:
    """Write the resolved configuration."""
    config.run.dir.mkdir(parents=True, exist_ok=True)
    write_bytes(config.run.dir / "config.yaml", yaml.safe_dump(config.to_json(), sort_keys=False).encode())


def describe(trainer: Trainer) -> None:
    """Open the shards; in the first process, say what is about to happen."""
    loader, placement = trainer.train_loader, trainer.placement
    opening_bytes = loader.open()
    if not placement.is_first:
        return
    everywhere = "" if placement.world == 1 else f" in each of {placement.world} processes"
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    print(
        f"{trainer.train_shards.num_samples} training and {trainer.val_shards.num_samples} validation images, "
        f"{len(trainer.train_shards.classes)} classes; {parameters:,} parameters on {trainer.device}{everywhere}"
    )
    left_over = f"{loader.dropped_per_epoch} images, others every time, do not fill a batch"
    print(f"{loader.steps_per_epoch} steps an epoch ({left_over})")
    print(f"opening the shards took {opening_bytes / 1e6:.0f} MB of memory")
    if loader.cached_share:
        print(f"the decode cache holds {loader.cached_share:.0%} of this process's images: its hits after one epoch")


if __name__ == "__main__":
    exit_with(lambda: run(parse_config()))
