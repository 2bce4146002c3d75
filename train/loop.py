"""The training loop: epochs of steps, an evaluation after each, and a state from which the same weights come again.

The position is (finished epochs, updates). A stop falls between two steps; what is saved then continues with the very
next batch, with the same dropout masks, so that on a CPU the final weights are bitwise those of an undisturbed run.

The device is never waited for but at log steps, in evaluation and where a checkpoint is taken: the host runs at most
two steps ahead (see `StepMeter`), and DALI has the next batches in flight before a step needs them.
"""

import math
import sys
from pathlib import Path
from time import perf_counter

import torch
from tqdm import tqdm

from pipeline.eigenbasis import Eigenbasis
from pipeline.loader import train_loader, val_loader
from pipeline.shards import DataError, open_shards
from train.alarms import Alarms
from train.checkpoint import CheckpointWriter, step_of
from train.config import Config
from train.evaluate import Accuracy, evaluate
from train.findings import Findings
from train.learner import Learner
from train.meter import StepMeter
from train.metrics import MetricsLog
from train.placement import Placement
from train.program import DIVERGED, REMEDIES, DivergedError
from train.schedule import RateSchedule
from train.state import capture
from train.stop import StopVote
from train.trained import initial_state


class Trainer:
    """Learner, loaders and position of one run."""

    def __init__(self, config: Config, device: torch.device, placement: Placement) -> None:
        """Open the data and lay out the loaders; `build` follows. Raises `ValueError` or `FileNotFoundError` when they
        do not fit."""
        self.config, self.device, self.placement = config, device, placement
        shards = config.data.shards
        self.train_shards, self.val_shards = open_shards(shards, "train"), open_shards(shards, "val")
        self.basis = Eigenbasis.load(
            shards / "pca.json",
            self.train_shards.manifest_sha256,
            with_mean_image=config.data.augmentation.mean == "image",
        )
        classes = len(self.train_shards.classes)
        if classes != config.model.num_classes:
            raise ValueError(
                f"{shards} holds {classes} classes; say --model.num_classes {classes}, not {config.model.num_classes}"
            )
        placement.check_pieces(config.train.batch_size, config.train.accumulate)

        place = {
            "batch_size": placement.loader_batch(config.train.batch_size),
            "rank": placement.loader_rank,
            "num_ranks": placement.num_loader_ranks,
            "device": device,
        }
        self.train_loader = train_loader(self.train_shards, self.basis, config.data, seed=config.train.seed, **place)
        place |= {"rank": placement.replica, "num_ranks": placement.num_replicas}  # a pair looks at the same images
        self.val_loader = val_loader(self.val_shards, self.basis, config.data, **place)
        self.epoch, self.step = 0, 0
        self.save_ms = 0.0
        """How long training stood still for checkpoints since the last row."""
        self.best: dict[str, float] | None = None
        """{"step", "top1_error"} of the best epoch's end."""
        self.kept: list[int] = []
        """Steps of checkpoints that are kept for good."""
        self.writer = CheckpointWriter(config.run.dir, config.run.keep)
        self.trouble: OSError | None = None
        """What kept the last checkpoint from being written."""
        self.alarms = Alarms(classes, tqdm.write if placement.is_first else lambda line: None)

    def build(self) -> None:
        """Build network and optimizer, in all processes together."""
        self.learner = Learner(self.config, self.device, self.placement)
        self.schedule = RateSchedule(self.config.optimizer, self.config.train.epochs)
        self.meter = StepMeter(self.device, self.placement)

    def start_from(self, path: Path) -> str:
        """Take weights from a file. Returns a sentence about them. Raises `FileNotFoundError` or `ValueError`."""
        own, model = self.learner.weights(), self.config.model
        std = self.config.data.augmentation.std
        state, told = self.placement.together(lambda: initial_state(path, model, self.basis, std, own))
        self.learner.model.load_state_dict(self.placement.part(state))
        return told

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train."""
        return self.epoch >= self.config.train.epochs or self.schedule.finished

    def fit(self, log: MetricsLog | None, stop: StopVote) -> bool:
        """Train from the present position to the end. Returns False when it was stopped; its state is saved either way.
        Processes other than the first have no log.

        Raises `DivergedError` when the loss is no longer finite, `DataError` when reading fails, and `OSError` when the
        last checkpoint cannot be written.
        """
        while not self.finished:
            try:
                stopped = self.train_epoch(log, stop)
                started = perf_counter()
                accuracy = None if stopped else self.evaluate(stop, all_views=False)
            except DataError as error:
                if self.placement.world > 1:  # the others are in the midst of a step
                    raise
                self.save(log)
                self.finish_saving()
                raise DataError(f"{error}; what was trained is saved, the same command goes on") from None
            if accuracy:
                self.end_epoch(log, accuracy, perf_counter() - started)
            self.save(log)  # where evaluation was interrupted, going on begins with it
            if accuracy is None:
                break
        self.placement.together(self.finish_saving)
        return self.finished

    def train_epoch(self, log: MetricsLog | None, stop: StopVote) -> bool:
        """Train what is left of the present epoch. Returns whether it was stopped."""
        run, meter = self.config.run, self.meter
        self.learner.model.train()
        stop.hurry()
        steps = self.train_loader.steps_per_epoch
        title, quiet = f"epoch {self.epoch + 1}", None if self.placement.is_first else True  # None: if on a terminal
        with tqdm(desc=title, total=steps, unit="step", disable=quiet, leave=False) as progress:
            progress.update(self.train_loader.at_step % steps)
            for batch in self.train_loader.epoch(self.epoch):
                meter.start_step()
                saving = self.writer.busy
                logged = (self.step + 1) % run.log_every == 0  # what is logged has the gradient's norm
                passed = (self.train_loader.at_step - 0.5) / steps
                rates = self.schedule.rates(self.learner.names, passed)
                loss, correct, norm = self.learner.step(self.placement.share(batch), rates, with_norm=logged)
                meter.end_step(loss, correct, batch, saving=saving or self.writer.busy)
                self.step += 1
                progress.update()
                if norm is not None:
                    figures = self.log_row(log, norm, self.schedule.lr(passed))
                    progress.set_postfix(loss=f"{figures['loss']:.3f}", images_per_s=f"{figures['images_per_s']:.0f}")
                if stop():
                    return True
                if self.step % run.save_every == 0:
                    self.save(log)
        self.check_finite(meter.loss_sum())
        return False

    def log_row(self, log: MetricsLog | None, norm: torch.Tensor, lr: float) -> dict[str, float]:
        """Read the meter and write its row. Raises `DivergedError`."""
        self.check_finite(self.meter.loss_sum())
        figures = self.meter.read(self.config.train.batch_size)
        if self.save_ms:
            figures["save_ms"], self.save_ms = self.save_ms, 0.0
        if self.writer.latest:
            figures["saved_step"] = step_of(self.writer.latest)  # by which lost checkpoints are missed
        figures["gradient_norm"] = norm.item()
        if self.device.type == "cuda":
            figures["gpu_memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        if self.learner.scale.enabled:
            figures["loss_scale"] = self.learner.scale.factor.item()
        if self.train_loader.cached_share:
            figures["cache_hits_percent"] = 100 * self.train_loader.cached_share if self.epoch else 0.0
        if log:
            log.write("train", self.step, epoch=self.epoch, lr=lr, **figures)
        self.alarms.train_row(self.step, self.epoch, self.config.run.log_every, figures)
        return figures

    def end_epoch(self, log: MetricsLog | None, accuracy: Accuracy, seconds: float) -> None:
        """Count the epoch, tell how it went, and let the rate follow."""
        self.epoch += 1
        error = 100 - accuracy.centre_top1
        self.schedule.end_epoch(error)
        if self.best is None or error < self.best["top1_error"]:
            self.best = {"step": self.step, "top1_error": error}
        if self.config.run.keep_every and self.epoch % self.config.run.keep_every == 0:
            self.kept.append(self.step)
        if log:
            errors = {"centre_top1_error": error, "centre_top5_error": 100 - accuracy.centre_top5}
            log.write("eval", self.step, epoch=self.epoch, **errors, eval_s=seconds)
            share = f"{accuracy.centre_top1:.1f} %"
            tqdm.write(f"epoch {self.epoch}/{self.config.train.epochs}: centre top-1 accuracy {share}")
        self.alarms.eval_row(self.epoch, accuracy)

    def evaluate(self, stop: StopVote, *, all_views: bool, findings: Findings | None = None) -> Accuracy | None:
        """Accuracy over the whole validation split; None when it was interrupted."""
        self.meter.pause()
        stop.hurry()
        watch = {"watch": findings.see} if findings else {}
        accuracy = evaluate(
            self.learner.network,
            self.val_loader,
            self.mirrored,
            all_views=all_views,
            interrupted=stop,
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
            first = (self.step - 1) // log_every * log_every + 1
            latest = self.writer.latest
            raise DivergedError(
                f"training diverged in steps {first} to {self.step}: loss or weights are no longer finite. The last "
                f"good checkpoint is {latest or 'none'}; start a new run with a lower --optimizer.lr or some "
                "--optimizer.warmup_epochs" + (f", or from it with --train.weights {latest}" if latest else "")
            )

    @property
    def mirrored(self) -> bool:
        """Whether evaluation uses mirrored views."""
        return self.config.data.augmentation.flip > 0

    def save(self, log: MetricsLog | None) -> None:
        """Take a checkpoint, together with all processes, and begin to write it. Raises `DivergedError` rather than
        save weights that are not finite."""
        started = perf_counter()
        if self.placement.any(not self.learner.is_finite):
            self.check_finite(math.nan)
        content = capture(self)
        if log:
            self.tell_trouble()
            self.writer.start(self.step, content, log.sync, self.kept)
        self.meter.pause()
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
        self.train_loader.close()
        self.val_loader.close()
