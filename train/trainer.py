"""The trainer: owns shards, loaders, model, optimizer, checkpoints and metrics of one run.

A run stops between two steps. The host waits for the device at log steps, in evaluation and when it takes a checkpoint;
otherwise it runs at most two steps ahead (`StepMeter`). A checkpoint holds the position in the data and the random
states, so on a CPU the final weights of a resumed run are bitwise those of an uninterrupted one.

Shapes: N images, C colours, H rows, W columns, K classes.
"""

import hashlib
import math
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import nvidia.dali
import torch
import torch.nn.functional as F
from tqdm import tqdm

from model.alexnet import AlexNet
from model.towers import seed_process
from pipeline.eigenbasis import Eigenbasis
from pipeline.errors import DataError, UserError
from pipeline.loader import PADDING, Batch, Loader, hash_basis, train_loader, val_loader
from pipeline.shards import open_shards
from train.accuracy import Accuracy, EvalStats, evaluate
from train.checkpoint import CheckpointWriter, load_checkpoint
from train.cli import DIVERGED, DivergedError, log
from train.config import Config, check_same_run, flatten
from train.device import can_compile, compile_model
from train.distributed import Distributed, StopFlag
from train.metrics import MetricsLog, StepMeter, Warnings
from train.optimizer import AlexNetSGD, LossScale, LRSchedule
from train.pretrained import check_finite, check_shapes, init_from

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
PROFILE_WAIT = 10
"""Steps before the profiler's warm-up of one step: in them the network is compiled and memory is allocated."""


class Trainer:
    """One run on this rank. Call `build`, then `load_checkpoint` or `init_from` if needed, then `fit`."""

    def __init__(self, config: Config, device: torch.device, distributed: Distributed) -> None:
        """Open the shards and set up the loaders. Raises one `UserError` for everything that does not fit them."""
        self.device, self.distributed = device, distributed
        shards = config.data.shards
        self.train_shards, self.val_shards = open_shards(shards, "train"), open_shards(shards, "val")
        classes = len(self.train_shards.classes)
        self.config = config = config.with_classes(classes)
        problems: list[str] = []
        if config.model.num_classes != classes:
            problems.append(
                f"{shards} has {classes} classes; leave --model.num_classes {config.model.outputs} out"
            )
        with collect_errors(problems):
            self.basis = Eigenbasis.load(
                config.data.eigenbasis or shards / "pca.json",
                self.train_shards.manifest_sha256,
                with_mean_image=config.data.augmentation.mean == "image",
            )
        batch_size = config.train.batch_size
        with collect_errors(problems):
            distributed.check_batch(batch_size, config.train.grad_accum_steps, self.train_shards.num_samples)
        if problems:
            raise UserError("; ".join(problems))
        data = config.data
        if config.run.deterministic:
            # A GPU's JPEG engine may give other pixels at each call (nvImageCodec's tests).
            data = replace(data, speed=replace(data.speed, hw_decoder_load=0.0))
        common: dict[str, Any] = {
            "batch_size": batch_size // distributed.world_size,
            "device": device,
            "basis": self.basis,
            **{each.name: getattr(data, each.name) for each in fields(data) if each.name != "shards"},
        }
        self.train_loader = train_loader(
            self.train_shards,
            seed=config.train.seed,
            rank=distributed.rank,
            num_ranks=distributed.world_size,
            **common,
        )
        self.val_loader = val_loader(  # a pair of towers sees the same images
            self.val_shards, rank=distributed.replica, num_ranks=distributed.num_replicas, **common
        )
        self.epoch, self.step = 0, 0
        """Finished epochs, and updates so far."""
        self.best: dict[str, float] | None = None
        """{"step", "top1_error"} at the end of the best epoch."""
        self.pinned_steps: list[int] = []
        """Steps whose checkpoints are kept for good (`run.keep_every`)."""
        self.writer = CheckpointWriter(config.run.dir, config.run.keep_last)
        self.log: MetricsLog | None = None

    def build(self) -> None:
        """Build model and optimizer. A collective."""
        config, device = self.config, self.device
        self.model = self.distributed.build_model(config.model, config.train.seed).to(device)
        self.optimizer = AlexNetSGD(self.model.named_parameters(), config.optimizer)
        self.schedule = LRSchedule(config.optimizer, config.train.epochs)
        self.scale = LossScale(device, config.train.precision == "fp16")
        self.compiled: torch.nn.Module = self.model
        if config.train.compile:
            self.compiled = compile_model(self.model, device)
            if device.type == "cuda" and can_compile(device):
                self.optimizer.compile()
        self.ddp = self.distributed.wrap_ddp(self.compiled)
        self.meter = StepMeter(device, self.distributed)
        self.warnings = Warnings(config.model.outputs)

    @property
    def finished(self) -> bool:
        """True once all epochs are trained, or the schedule has ended the training."""
        return self.epoch >= self.config.train.epochs or self.schedule.finished

    @property
    def epoch_progress(self) -> float:
        """Fraction of the epoch at the middle of the current step."""
        return (self.train_loader.at_step - 0.5) / self.train_loader.steps_per_epoch

    def fit(self, stop: StopFlag) -> bool:
        """Train to the end. Returns False when it was stopped; the state is saved either way.

        Raises `DivergedError` when the loss is not finite, `DataError` when reading fails, and `OSError` when the last
        checkpoint cannot be written.
        """
        self.stop, config = stop, self.config
        if self.distributed.is_rank_zero:
            self.log = MetricsLog(config.run.dir, self.step, self.epoch)
        self.saved_at, self.save_ms = perf_counter(), 0.0
        while not self.finished:
            try:
                stopped = self.train_epoch()
                accuracy = None if stopped else self.evaluate()
            except DataError as error:
                if self.distributed.world_size > 1:
                    raise  # saving is a collective, and the others are inside a step
                self.save()
                self.writer.finish()
                raise DataError(f"{error}; what was trained is saved, the same command resumes it") from None
            if accuracy:
                self.end_epoch(accuracy)
            self.save()  # if the evaluation was interrupted, the resumed run begins with it
            if accuracy is None:
                break
        self.distributed.run_on_all_ranks(self.writer.finish)
        return self.finished

    def train_epoch(self) -> bool:
        """Train the rest of the epoch. Returns whether it was stopped."""
        run, loader, meter = self.config.run, self.train_loader, self.meter
        self.model.train()
        self.stop.sync()
        with self.progress_bar() as progress, self.profile() as profiler:
            is_trained = loader.at_epoch > self.epoch  # but its evaluation was interrupted
            for batch in () if is_trained else loader.epoch(self.epoch):
                meter.start_step()
                saving, log_step = self.writer.busy, (self.step + 1) % run.log_every == 0
                self.schedule.set_lrs(self.optimizer, self.epoch_progress)
                with self.distributed.detect_lost_process():
                    loss, correct, skipped, grad_norm = self.train_step(batch, with_norm=log_step)
                meter.end_step(loss, correct, batch, saving=saving or self.writer.busy, skipped=skipped)
                log_skipped(loader)
                self.step += 1
                self.distributed.end_startup()
                progress.update()
                if profiler:
                    profiler.step()
                if grad_norm is not None:
                    self.log_row(grad_norm, progress)
                stop, save = self.stop.check(perf_counter() - self.saved_at > 60 * run.save_minutes)
                if stop:
                    return True
                if save:
                    self.save()
        self.check_finite(meter.loss_sum())
        return False

    def train_step(
        self, batch: Batch, with_norm: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | int, torch.Tensor | None]:
        """Make one update from one batch, at the rates in the optimizer's groups, without waiting for the device.

        Returns the loss (its sum over valid samples divided by the batch size), the numbers of correct predictions
        and of skipped samples, and if wanted the gradient's norm over the whole model, all on the device.
        """
        images_NCHW, labels_N = self.distributed.gather_batch(batch)
        micro_batches, half = self.config.train.grad_accum_steps, AUTOCAST.get(self.config.train.precision)
        loss = torch.zeros((), device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        skipped = (labels_N == PADDING).sum() if self.config.data.on_corrupt == "skip" else 0
        chunks = zip(images_NCHW.chunk(micro_batches), labels_N.chunk(micro_batches), strict=True)
        for number, (images, labels) in enumerate(chunks, start=1):
            with self.distributed.grad_sync(self.ddp, enabled=number == micro_batches):
                with torch.autocast(self.device.type, half, enabled=half is not None):
                    logits_NK = self.ddp(images)
                # Divided by the whole batch, padding included, so that every sample has the same weight.
                total = F.cross_entropy(logits_NK, labels, ignore_index=PADDING, reduction="sum")
                micro_loss = total / len(labels_N)
                (micro_loss * self.scale.factor if self.scale.enabled else micro_loss).backward()
            loss += micro_loss.detach()
            correct += (logits_NK.detach().argmax(1) == labels).sum()
        gradients = self.optimizer.gradients
        overflow = self.scale.unscale(gradients, self.distributed.any_rank)
        norm = None
        if with_norm:
            squares = torch.stack([gradient.float().square().sum() for gradient in gradients]).sum()
            norm = self.distributed.sum_over_towers(squares).sqrt()
        self.optimizer.step(skip=overflow)
        return loss, correct, skipped, norm

    def log_row(self, grad_norm: torch.Tensor, progress: "tqdm[Any]") -> None:
        """Write a row of metrics and show it. Raises `DivergedError`."""
        self.check_finite(self.meter.loss_sum())
        lr = self.schedule.lr("weights", self.epoch_progress)
        values = self.meter.read(self.config.train.batch_size)
        if self.save_ms:
            values["save_ms"], self.save_ms = self.save_ms, 0.0
        if self.writer.latest:
            # By this `RunDirectory.claim` notices that checkpoints were removed.
            values["saved_step"] = int(self.writer.latest.stem.removeprefix("step-"))
        values["gradient_norm"] = grad_norm.item()
        if self.device.type == "cuda":
            values["gpu_memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        if self.scale.enabled:
            values["loss_scale"] = self.scale.factor.item()
        if self.log is None:
            return
        self.log.write("train", self.step, epoch=self.epoch, lr=lr, **values)
        self.warnings.check(self.step, self.epoch, self.config.run.log_every, values)
        speed, wait = f"{values['images_per_s']:,.0f}", f"{values['wait_percent']:.1f} %"
        shown = {"loss": f"{values['loss']:.3f}", "lr": f"{lr:.4g}", "images/s": speed, "wait": wait}
        progress.set_postfix(shown)
        if progress.disable:  # no terminal: a log
            text = f"loss {shown['loss']} lr {shown['lr']} {speed} images/s wait {wait}"
            log(f"epoch {self.epoch + 1} step {self.step} {text}")

    def progress_bar(self) -> "tqdm[Any]":
        """Make the progress bar of the epoch's steps; only rank 0 shows it, on a terminal."""
        steps, hidden = self.train_loader.steps_per_epoch, None if self.distributed.is_rank_zero else True
        title = f"epoch {self.epoch + 1}"
        progress: tqdm[Any] = tqdm(desc=title, total=steps, unit="step", disable=hidden, leave=False)
        progress.update(self.train_loader.at_step % steps)
        return progress

    @contextmanager
    def profile(self) -> Iterator[torch.profiler.profile | None]:
        """Record `run.profile_steps` steps as a Chrome trace in RUN/profile.json, once, on rank 0."""
        run, path = self.config.run, self.config.run.dir / "profile.json"
        if not run.profile_steps or not self.distributed.is_rank_zero or path.exists():
            yield None
            return

        def write_trace(profiler: torch.profiler.profile) -> None:
            profiler.export_chrome_trace(str(path))
            log(f"profile of {run.profile_steps} steps: {path}; ui.perfetto.dev opens it")

        schedule = torch.profiler.schedule(wait=PROFILE_WAIT, warmup=1, active=run.profile_steps, repeat=1)
        with torch.profiler.profile(schedule=schedule, on_trace_ready=write_trace) as profiler:
            yield profiler

    def end_epoch(self, accuracy: Accuracy) -> None:
        """Count the epoch, log its validation errors, and pass the top-1 error to the learning rate schedule."""
        self.epoch += 1
        error = 100 - accuracy.centre_top1
        self.schedule.end_epoch(error)
        if self.best is None or error < self.best["top1_error"]:
            self.best = {"step": self.step, "top1_error": error}
        if self.config.run.keep_every and self.epoch % self.config.run.keep_every == 0:
            self.pinned_steps.append(self.step)
        if self.log:
            errors = {"centre_top1_error": error, "centre_top5_error": 100 - accuracy.centre_top5}
            skipped = {"skipped": self.val_skipped} if self.val_skipped else {}
            self.log.write("eval", self.step, epoch=self.epoch, **errors, eval_s=self.eval_s, **skipped)
            epochs = self.config.train.epochs
            log(f"epoch {self.epoch}/{epochs}: centre top-1 accuracy {accuracy.centre_top1:.1f} %")

    def evaluate(self, all_views: bool = False, stats: EvalStats | None = None) -> Accuracy | None:
        """Measure the accuracy over the validation split; None if a stop was requested."""
        started = perf_counter()
        self.meter.mark_gap()
        self.stop.sync()
        with self.distributed.detect_lost_process():
            accuracy = evaluate(
                self.compiled,
                self.val_loader,
                self.distributed,
                mirrored=self.config.data.augmentation.flip > 0,
                all_views=all_views,
                interrupted=lambda: self.stop.check()[0],
                stats=stats,
            )
        self.eval_s = perf_counter() - started
        self.val_skipped = log_skipped(self.val_loader)
        return accuracy

    def check_finite(self, loss: float) -> None:
        """Raise `DivergedError` unless the loss is finite, so that no good checkpoint is overwritten."""
        if not math.isfinite(loss):
            if not self.distributed.is_rank_zero:
                sys.exit(DIVERGED)  # all ranks find it at the same step
            self.writer.log_save_error()
            log_every, latest = self.config.run.log_every, self.writer.latest
            first = (self.step - 1) // log_every * log_every + 1
            remedy = "start a new run with a lower --optimizer.lr or some --optimizer.warmup_epochs"
            raise DivergedError(
                f"training diverged in steps {first} to {self.step}: loss or weights are not finite. The last good "
                f"checkpoint is {latest or 'none'}; {remedy}"
                + (f", or from it with --train.init_from {latest}" if latest else "")
            )

    def save(self) -> None:
        """Copy the state and start to write it as a checkpoint. A collective.

        Raises `DivergedError` instead if weights are not finite.
        """
        started = perf_counter()
        finite = torch.stack([weight.isfinite().all() for weight in self.model.parameters()]).all()
        if self.distributed.all_reduce_max(not finite)[0]:
            self.check_finite(math.nan)
        content = self.state_dict()
        if self.log:
            self.writer.start(self.step, content, self.log.sync, self.pinned_steps)
        self.meter.mark_gap()
        self.saved_at = perf_counter()
        self.save_ms += (self.saved_at - started) * 1e3

    def state_dict(self) -> dict[str, Any]:
        """Return the content of a checkpoint, with tensors copied to the CPU; {} except on rank 0. A collective."""
        model_config = self.config.model
        weights = self.distributed.gather_state_dict(self.model.state_dict(), model_config)
        velocities = self.distributed.gather_state_dict(self.optimizer.velocities, model_config)
        random_state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random_state["cuda"] = torch.cuda.get_rng_state(self.device)
        ranks = self.distributed.all_gather({"random": random_state, "meter": self.meter.state_dict()})
        if not self.distributed.is_rank_zero:
            return {}
        image = self.basis.mean_image
        return {
            "config": self.config.to_json(),
            "wnids": [name.wnid for name in self.train_shards.classes],
            "eigenbasis": self.basis.to_json(),
            "mean_image": None if image is None else torch.from_numpy(image),
            "model": copy_to_cpu(weights),
            "optimizer": copy_to_cpu(velocities),
            "scale": copy_to_cpu(self.scale.state_dict()),
            "schedule": self.schedule.state_dict(),
            "epoch": self.epoch,
            "best": self.best,
            "pinned_steps": list(self.pinned_steps),
            "loader": self.train_loader.state_dict(),
            "ranks": ranks,
        }

    def load_checkpoint(self, path: Path) -> None:
        """Resume from a checkpoint. On another number of processes, or in another mode, the same images follow with
        the same augmentation; dropout then starts from other random states.

        Raises `UserError` if it is damaged or belongs to another run.
        """
        try:
            self._load_state_dict(load_checkpoint(path), path)
        except (KeyError, TypeError, AttributeError, IndexError):
            raise UserError(f"{path}: not a checkpoint of this program; put back one that is") from None

    def _load_state_dict(self, content: dict[str, Any], path: Path) -> None:
        """Load the content of a checkpoint. Raises `KeyError`, `TypeError` and others if another program wrote it."""
        config, shards = self.config.to_json(), self.config.data.shards
        ranks, distributed = content["ranks"], self.distributed
        position = content["loader"]
        check_same_run(content["config"], config, position["epoch"] + (position["step"] > 0))
        if content["wnids"] != [name.wnid for name in self.train_shards.classes]:
            raise UserError(f"{path} was trained on other classes than {shards}/classes.json lists")
        if content["eigenbasis"] != self.basis.to_json():
            ours = self.config.data.eigenbasis or shards / "pca.json"
            raise UserError(
                f"{path} was trained with another eigenbasis than {ours}; restore that file, or give it as "
                "--data.eigenbasis FILE"
            )
        for part in ("model", "optimizer"):
            check_shapes(content[part], self.config.model, path)
        check_finite(content["model"], path)
        self.epoch, self.step, self.writer.latest = content["epoch"], content["step"], path
        self.best, self.pinned_steps = content["best"], content["pinned_steps"]
        self.model.load_state_dict(distributed.shard_state_dict(content["model"]))
        self.optimizer.load_velocities(distributed.shard_state_dict(content["optimizer"]))
        self.scale.load_state_dict(content["scale"])
        self.schedule.load_state_dict(content["schedule"])
        self.train_loader.load_state_dict(content["loader"])
        if len(ranks) != distributed.world_size or content["config"]["parallel"] != config["parallel"]:
            seed_process(self.config.train.seed, self.step, distributed.rank)
            return
        own = ranks[distributed.rank]
        self.meter.load_state_dict(own["meter"])
        torch.set_rng_state(own["random"]["cpu"])
        if "cuda" in own["random"]:
            torch.cuda.set_rng_state(own["random"]["cuda"], self.device)

    def init_from(self, path: Path) -> str:
        """Start from the weights in a file. Returns a sentence to log. Raises `FileNotFoundError` or `UserError`."""
        own = self.distributed.gather_state_dict(self.model.state_dict(), self.config.model)
        std = self.config.data.augmentation.stds
        state, message = self.distributed.run_on_all_ranks(
            lambda: init_from(path, self.config.model, self.basis, std, own)
        )
        self.model.load_state_dict(self.distributed.shard_state_dict(state))
        return message

    def gather_model(self) -> AlexNet:
        """Return the whole model, both towers, uncompiled, on every rank. A collective."""
        whole = AlexNet(self.config.model).to(self.device)
        whole.load_state_dict(self.distributed.gather_state_dict(self.model.state_dict(), self.config.model))
        return whole

    def run_signature(self, checkpoint: Path | None) -> dict[str, Any]:
        """Return the values that must be equal on all ranks, by name: contents of shards and run, but not paths."""
        config = {
            name: value
            for name, value in flatten(self.config.to_json()).items()
            if name not in ("data.shards", "data.eigenbasis", "run.dir", "train.init_from")
            and not name.startswith("data.speed.")
        }
        root = Path(__file__).resolve().parents[1]
        sources = sorted(
            path for package in ("pipeline", "model", "train") for path in (root / package).glob("*.py")
        )
        return config | {
            "the number of processes": self.distributed.world_size,
            "the newest checkpoint in run.dir": checkpoint.name if checkpoint else "none",
            "train/manifest.json": self.train_shards.manifest_sha256[:12],
            "val/manifest.json": self.val_shards.manifest_sha256[:12],
            "pca.json": hash_basis(self.basis),
            "the program's source": short_sha256(b"\0".join(path.read_bytes() for path in sources)),
            "Python": platform.python_version(),
            "torch": torch.__version__,
            "DALI": nvidia.dali.__version__,
            "the device": self.device.type,
        }

    def close(self) -> None:
        """Finish the checkpoint that is being written; close metrics and loaders."""
        self.writer.log_save_error()
        if self.log:
            self.log.close()
        self.train_loader.close()
        self.val_loader.close()


def log_skipped(loader: Loader) -> int:
    """Log the damaged samples that a loader has skipped since the last call, on the rank that met them; returns their
    number."""
    count = len(loader.skipped)
    for _ in range(count):
        log(f"skipped: {loader.skipped.pop(0)} cannot be decoded")
    return count


@contextmanager
def collect_errors(problems: list[str]) -> Iterator[None]:
    """Append errors of the user to `problems`, so that one sentence can report all of them."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        problems.append(str(error))


def copy_to_cpu(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy tensors to the CPU, as training changes them while the copies are written."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}


def short_sha256(content: bytes) -> str:
    """Hash content to 12 hexadecimal digits, enough to compare it between ranks."""
    return hashlib.sha256(content).hexdigest()[:12]
