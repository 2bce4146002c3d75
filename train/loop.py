"""The training loop: epochs of steps, an evaluation after each, and checkpoints.

A stop falls between two steps. The device is never waited for but at log steps, in evaluation and where a checkpoint is
taken: the host runs at most two steps ahead (see `StepMeter`), and DALI has the next batches in flight before a step
needs them.
"""

import math
import sys
from time import perf_counter

import torch
from tqdm import tqdm

from pipeline.shards import DataError
from train.accuracy import Accuracy, evaluate
from train.alarms import Alarms
from train.checkpoint import CheckpointWriter, step_of
from train.findings import Findings
from train.metrics import MetricsLog
from train.program import DIVERGED, REMEDIES, DivergedError
from train.state import TrainState
from train.stop import StopVote


class Trainer:
    """Moves a state forward, and writes down how."""

    def __init__(self, state: TrainState, log: MetricsLog | None, stop: StopVote) -> None:
        """Processes other than the first have no log."""
        self.state, self.log, self.stop = state, log, stop
        self.config, self.placement = state.config, state.placement
        self.writer = CheckpointWriter(self.config.run.dir, self.config.run.keep, state.checkpoint)
        self.save_ms = 0.0
        """How long training stood still for checkpoints since the last row."""
        self.trouble: OSError | None = None
        """What kept the last checkpoint from being written."""
        self.alarms = Alarms(
            self.config.model.outputs, tqdm.write if self.placement.is_first else lambda line: None
        )

    def fit(self) -> bool:
        """Train from the present position to the end. Returns False when it was stopped; its state is saved either way.

        Raises `DivergedError` when the loss is no longer finite, `DataError` when reading fails, and `OSError` when the
        last checkpoint cannot be written.
        """
        while not self.state.finished:
            try:
                stopped = self.train_epoch()
                started = perf_counter()
                accuracy = None if stopped else self.evaluate(all_views=False)
            except DataError as error:
                if self.placement.world > 1:  # the others are in the midst of a step
                    raise
                self.save()
                self.finish_saving()
                raise DataError(f"{error}; what was trained is saved, the same command goes on") from None
            if accuracy:
                self.end_epoch(accuracy, perf_counter() - started)
            self.save()  # where evaluation was interrupted, going on begins with it
            if accuracy is None:
                break
        self.placement.together(self.finish_saving)
        return self.state.finished

    def train_epoch(self) -> bool:
        """Train what is left of the present epoch. Returns whether it was stopped."""
        run, state, loader, meter = self.config.run, self.state, self.state.train_loader, self.state.meter
        state.learner.model.train()
        self.stop.hurry()
        steps = loader.steps_per_epoch
        title, quiet = (
            f"epoch {state.epoch + 1}",
            None if self.placement.is_first else True,
        )  # None: if on a terminal
        with tqdm(desc=title, total=steps, unit="step", disable=quiet, leave=False) as progress:
            progress.update(loader.at_step % steps)
            for batch in loader.epoch(state.epoch):
                meter.start_step()
                saving = self.writer.busy
                logged = (state.step + 1) % run.log_every == 0  # what is logged has the gradient's norm
                passed = (loader.at_step - 0.5) / steps
                rates = state.schedule.rates(state.learner.names, passed)
                loss, correct, norm = state.learner.step(self.placement.share(batch), rates, with_norm=logged)
                meter.end_step(loss, correct, batch, saving=saving or self.writer.busy)
                state.step += 1
                progress.update()
                if norm is not None:
                    figures = self.log_row(norm, state.schedule.lr(passed))
                    shown = {"loss": f"{figures['loss']:.3f}", "lr": f"{state.schedule.lr(passed):.4g}"}
                    speed, wait = f"{figures['images_per_s']:,.0f}", f"{figures['wait_percent']:.1f} %"
                    progress.set_postfix({**shown, "images/s": speed, "wait": wait})
                    if progress.disable and self.placement.is_first:  # no terminal: a log
                        position = f"epoch {state.epoch + 1} step {state.step}"
                        figures_text = f"loss {shown['loss']} lr {shown['lr']} {speed} images/s wait {wait}"
                        print(f"{position} {figures_text}", flush=True)
                if self.stop():
                    return True
                if state.step % run.save_every == 0:
                    self.save()
        self.check_finite(meter.loss_sum())
        return False

    def log_row(self, norm: torch.Tensor, lr: float) -> dict[str, float]:
        """Read the meter and write its row. Raises `DivergedError`."""
        self.check_finite(self.state.meter.loss_sum())
        figures = self.state.meter.read(self.config.train.batch_size)
        if self.save_ms:
            figures["save_ms"], self.save_ms = self.save_ms, 0.0
        if self.writer.latest:
            figures["saved_step"] = step_of(self.writer.latest)  # by which lost checkpoints are missed
        figures["gradient_norm"] = norm.item()
        if self.state.device.type == "cuda":
            figures["gpu_memory_gb"] = torch.cuda.max_memory_allocated(self.state.device) / 1e9
        if self.state.learner.scale.enabled:
            figures["loss_scale"] = self.state.learner.scale.factor.item()
        if self.log:
            self.log.write("train", self.state.step, epoch=self.state.epoch, lr=lr, **figures)
        self.alarms.train_row(self.state.step, self.state.epoch, self.config.run.log_every, figures)
        return figures

    def end_epoch(self, accuracy: Accuracy, seconds: float) -> None:
        """Count the epoch, tell how it went, and let the rate follow."""
        self.state.epoch += 1
        error = 100 - accuracy.centre_top1
        self.state.schedule.end_epoch(error)
        if self.state.best is None or error < self.state.best["top1_error"]:
            self.state.best = {"step": self.state.step, "top1_error": error}
        if self.config.run.keep_every and self.state.epoch % self.config.run.keep_every == 0:
            self.state.kept.append(self.state.step)
        if self.log:
            errors = {"centre_top1_error": error, "centre_top5_error": 100 - accuracy.centre_top5}
            self.log.write("eval", self.state.step, epoch=self.state.epoch, **errors, eval_s=seconds)
            share = f"{accuracy.centre_top1:.1f} %"
            tqdm.write(f"epoch {self.state.epoch}/{self.config.train.epochs}: centre top-1 accuracy {share}")
        self.alarms.eval_row(self.state.epoch, accuracy)

    def evaluate(self, *, all_views: bool, findings: Findings | None = None) -> Accuracy | None:
        """Accuracy over the whole validation split; None when it was interrupted."""
        self.state.meter.pause()
        self.stop.hurry()
        watch = {"watch": findings.see} if findings else {}
        accuracy = evaluate(
            self.state.learner.network,
            self.state.val_loader,
            self.mirrored,
            all_views=all_views,
            interrupted=self.stop,
            total=self.placement.total,
            **watch,
        )
        if findings and accuracy:
            findings.collect(self.placement.total, self.placement.gather)
        return accuracy

    def check_finite(self, loss: float) -> None:
        """Raise `DivergedError` unless the loss is a number; nothing is saved over a good checkpoint then."""
        if not math.isfinite(loss):
            if not self.placement.is_first:
                sys.exit(DIVERGED)  # all find it at the same step, one tells
            self.tell_trouble()
            log_every = self.config.run.log_every
            first = (self.state.step - 1) // log_every * log_every + 1
            latest = self.writer.latest
            raise DivergedError(
                f"training diverged in steps {first} to {self.state.step}: loss or weights are no longer finite. The "
                f"last good checkpoint is {latest or 'none'}; start a new run with a lower --optimizer.lr or some "
                "--optimizer.warmup_epochs"
                + (f", or from it with --train.weights {latest}" if latest else "")
            )

    @property
    def mirrored(self) -> bool:
        """Whether evaluation uses mirrored views."""
        return self.config.data.augmentation.flip > 0

    def save(self) -> None:
        """Take a checkpoint, together with all processes, and begin to write it. Raises `DivergedError` rather than
        save weights that are not finite."""
        started = perf_counter()
        if self.placement.any(not self.state.learner.is_finite):
            self.check_finite(math.nan)
        content = self.state.capture()
        if self.log:
            self.tell_trouble()
            self.writer.start(self.state.step, content, self.log.sync, self.state.kept)
        self.state.meter.pause()
        self.save_ms += (perf_counter() - started) * 1e3

    def finish_saving(self) -> None:
        """Wait until the last checkpoint is written. Raises `OSError` where it cannot be."""
        error = self.writer.wait()
        if error:
            raise error
        self.tell_saved()

    def tell_trouble(self) -> None:
        """Wait for the checkpoint before, and say so if it could not be written, for another reason than the one before
        that."""
        error = self.writer.wait()
        if error is None:
            self.tell_saved()
        elif self.trouble is None or error.errno != self.trouble.errno:
            tqdm.write(
                f"could not save: {error.filename}: {error.strerror}; going on, the last good checkpoint is "
                f"{self.writer.latest or 'none'}; {REMEDIES.get(error.errno or 0, 'look after the disk')}"
            )
            self.trouble = error

    def tell_saved(self) -> None:
        """Say that saving works again, if it did not."""
        if self.trouble:
            tqdm.write(f"saving works again: {self.writer.latest}")
        self.trouble = None

    def close(self) -> None:
        """Stop the loaders, once what is being written is written."""
        self.tell_trouble()
        self.state.close()
