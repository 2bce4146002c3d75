"""Train a network.

    python -m train.run --config FILE --data.shards SHARDS --run.dir DIR [--section.key VALUE ...]

The same command resumes a run that was stopped (by Ctrl-C, SIGTERM or SIGUSR1), killed or has failed; a finished run is
evaluated again. Under torchrun or srun all processes train one network together.
"""

import os
from typing import TYPE_CHECKING

from train.cli import log, run_main
from train.config import Config, parse_config

# torch and DALI take seconds to import, for which --help and a wrong option should not wait: functions import them.
if TYPE_CHECKING:
    from train.checkpoint import RunDirectory
    from train.trainer import Trainer


def run(config: Config) -> None:
    """Join the other processes, train, evaluate, report."""
    import torch

    from train.checkpoint import RunDirectory
    from train.device import pick_device, set_precision, tune_malloc
    from train.distributed import Distributed, StopFlag, StopSignal
    from train.launch import set_launch_variables
    from train.trainer import Trainer

    tune_malloc()
    stop_signal = StopSignal()
    set_launch_variables(os.environ, torch.cuda.device_count())
    distributed = Distributed(config.parallel)
    device = distributed.run_on_all_ranks(lambda: pick_device(config.run.device))
    precision = distributed.run_on_all_ranks(lambda: set_precision(config.run.deterministic))
    directory = RunDirectory(config.run.dir)
    distributed.run_on_rank_zero(directory.claim)
    trainer = distributed.run_on_all_ranks(lambda: Trainer(config, device, distributed))
    build_or_resume(trainer, directory)
    log_summary(trainer, precision)
    finished = trainer.fit(StopFlag(distributed, stop_signal)) and evaluate_and_report(trainer)
    if not finished and distributed.is_rank_zero:
        where = "training is complete" if trainer.finished else f"epoch {trainer.epoch + 1}"
        position = f"step {trainer.step} ({where})"
        log(f"stopped and saved at {position}; run the same command again to resume")
    trainer.close()
    distributed.shutdown()


def build_or_resume(trainer: "Trainer", directory: "RunDirectory") -> None:
    """Build the model; resume where the run is, or start from other weights."""
    from train.checkpoint import find_checkpoint

    config, distributed = trainer.config, trainer.distributed
    checkpoint = distributed.run_on_all_ranks(lambda: find_checkpoint(config.run.dir))
    distributed.assert_same_on_all_ranks(trainer.run_signature(checkpoint))
    distributed.run_on_all_ranks(trainer.build)
    message = ""
    if checkpoint:
        distributed.run_on_all_ranks(lambda: trainer.load_checkpoint(checkpoint))
        message = f"resuming from {checkpoint} (epoch {trainer.epoch + 1}, step {trainer.step})"
    elif config.train.init_from:
        message = trainer.init_from(config.train.init_from)
    distributed.run_on_rank_zero(lambda: directory.prepare(config))
    if message and distributed.is_rank_zero:
        log(message)


def log_summary(trainer: "Trainer", precision: str) -> None:
    """On rank 0, log data, model, device and steps of this run."""
    from train.device import advise_on_gpus, can_compile

    loader, distributed, train = trainer.train_loader, trainer.distributed, trainer.config.train
    if not distributed.is_rank_zero:
        return
    processes = "" if distributed.world_size == 1 else f" in each of {distributed.world_size} processes"
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    log(
        f"{trainer.train_shards.num_samples} training and {trainer.val_shards.num_samples} validation images, "
        f"{len(trainer.train_shards.classes)} classes; {parameters:,} parameters on {trainer.device}{processes}"
    )
    if trainer.device.type == "cuda":
        log(precision)
    if train.compile and not can_compile(trainer.device):
        language = "C" if trainer.device.type == "cuda" else "C++"
        log(f"not compiling: no {language} compiler, or a space in PyTorch's path")
    images = train.batch_size // distributed.num_replicas // train.grad_accum_steps
    advice = advise_on_gpus(trainer.device, distributed.world_size, images)
    if advice and trainer.config.run.device != "cpu":
        log(advice)
    dropped = f"{loader.dropped_per_epoch} images, others every time, do not fill a batch and are left out"
    log(f"{loader.steps_per_epoch} steps an epoch ({dropped})")


def evaluate_and_report(trainer: "Trainer") -> bool:
    """Evaluate on all views; rank 0 prints and writes the report. Returns False if a stop was requested."""
    from train.accuracy import EvalStats
    from train.report import write_report

    stats = EvalStats(trainer.config.model.outputs, trainer.device)
    accuracy = trainer.evaluate(all_views=True, stats=stats)
    if accuracy is None:
        return False
    model = trainer.gather_model()
    if trainer.distributed.is_rank_zero:
        write_report(trainer, model, accuracy, stats)
    return True


if __name__ == "__main__":
    run_main(lambda: run(parse_config()))
