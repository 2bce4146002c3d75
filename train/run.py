"""Train a network.

    python -m train.run --config FILE --data.shards SHARDS --run.dir DIR [--section.key VALUE ...]

The same command resumes a run that was stopped (Ctrl-C, SIGTERM, SIGUSR1, or any other end); a finished run is
evaluated again. Under torchrun or srun it is one run of all processes.
"""

import os
from typing import TYPE_CHECKING, NoReturn

from train.config import Config, parse_config
from train.launch import find_launch
from train.program import exit_with, outlive_full_disk, told_once

# torch and DALI take seconds to import, which neither --help nor a wrong option waits for: functions do it.
if TYPE_CHECKING:
    from train.directory import RunDirectory
    from train.state import TrainState
    from train.stop import StopVote


def run(config: Config) -> None:
    """Meet the other processes, train, evaluate, draw, report."""
    import torch

    from train.device import pick_device, set_arithmetic, tune_malloc
    from train.directory import RunDirectory
    from train.placement import Placement, lost_processes_told
    from train.state import TrainState
    from train.stop import StopSignal, StopVote

    tune_malloc()
    requested = StopSignal()
    find_launch(os.environ, torch.cuda.device_count())
    arithmetic = set_arithmetic(config.run.deterministic)
    device = pick_device(config.run.device)
    with lost_processes_told():
        with told_once():
            placement = Placement(config.parallel, device)
        directory = RunDirectory(config.run.dir)
        placement.first_does(directory.claim)
        state = placement.together(lambda: TrainState(config, device, placement))
        set_out(state, directory)
        describe(state, arithmetic)
        train(state, StopVote(placement, requested))
    placement.leave()


def set_out(state: "TrainState", directory: "RunDirectory") -> None:
    """Build the network and go to where the run stands, or to the weights that it starts from."""
    from train.agreement import facts
    from train.checkpoint import find_checkpoint

    config, placement = state.config, state.placement
    checkpoint = placement.together(lambda: find_checkpoint(config.run.dir))
    placement.agree(facts(state, checkpoint))
    state.build()
    told = ""
    if checkpoint:
        path = placement.together(lambda: state.restore(checkpoint))
        told = f"resuming from {path} (epoch {state.epoch + 1}, step {state.step})"
    elif config.train.weights:
        told = state.start_from(config.train.weights)
    placement.first_does(lambda: directory.prepare(config))
    if told and placement.is_first:
        print(told)


def train(state: "TrainState", stop: "StopVote") -> None:
    """Train to the end or until stopped, evaluate; the first process tells and writes."""
    from train.findings import Findings
    from train.loop import Trainer
    from train.metrics import MetricsLog
    from train.pictures import draw_pictures
    from train.report import report

    log = MetricsLog(state.config.run.dir, state.step, state.epoch) if state.placement.is_first else None
    trainer, findings = Trainer(state, log, stop), Findings(state.config.model.outputs, state.device)
    finished = trainer.fit()
    accuracy = trainer.evaluate(all_views=True, findings=findings) if finished else None
    if accuracy:
        network = state.learner.gather_network()
        if state.placement.is_first:
            report(state, network, accuracy, findings, draw_pictures(state, network, findings))
    elif state.placement.is_first:
        print(
            f"stopped and saved at step {state.step} (epoch {state.epoch + 1}); run the same command again to resume"
        )
    trainer.close()


def describe(state: "TrainState", arithmetic: str) -> None:
    """Open the shards; in the first process, say what is about to happen."""
    from train.device import gpu_advice

    loader, placement = state.train_loader, state.placement
    opening_bytes = placement.together(loader.open)
    if not placement.is_first:
        return
    everywhere = "" if placement.world == 1 else f" in each of {placement.world} processes"
    parameters = sum(parameter.numel() for parameter in state.learner.model.parameters())
    print(
        f"{state.train_shards.num_samples} training and {state.val_shards.num_samples} validation images, "
        f"{len(state.train_shards.classes)} classes; {parameters:,} parameters on {state.device}{everywhere}"
    )
    if state.device.type == "cuda":
        print(arithmetic)
    images = state.config.train.batch_size // placement.num_replicas // state.config.train.accumulate
    for line in gpu_advice(state.device, placement.world, images) if state.config.run.device != "cpu" else ():
        print(line)
    left_over = f"{loader.dropped_per_epoch} images, others every time, do not fill a batch"
    print(f"{loader.steps_per_epoch} steps an epoch ({left_over})")
    print(f"opening the shards took {opening_bytes / 1e6:.0f} MB of memory")


def main() -> NoReturn:
    """The command line."""
    outlive_full_disk()
    exit_with(lambda: run(parse_config()))


if __name__ == "__main__":
    main()
