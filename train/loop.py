"""The training loop: epochs of steps, an evaluation after each, and a state from which the same weights come again.

The position is (finished epochs, updates). A stop falls between two steps; what is saved then continues with the very
next batch, with the same dropout masks, so that on a CPU the final weights are bitwise those of an undisturbed run.
"""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from tqdm import tqdm

from model.alexnet import AlexNet
from pipeline.eigenbasis import Eigenbasis
from pipeline.loader import PADDING, Batch, train_loader, val_loader
from pipeline.shards import open_shards
from train.checkpoint import load_checkpoint, save_checkpoint
from train.config import Config, check_same_run
from train.evaluate import Accuracy, evaluate
from train.metrics import MetricsLog, StepClock
from train.optimizer import PaperSGD, RateSchedule
from train.program import DivergedError

LOADER_RANK, NUM_LOADER_RANKS = 0, 1
"""One process loads everything."""


class Trainer:
    """Network, optimizer, loaders and position of one run."""

    def __init__(self, config: Config, device: torch.device) -> None:
        """Open the data and build the network. Raises `ValueError` or `FileNotFoundError` when they do not fit."""
        self.config, self.device = config, device
        shards = config.data.shards
        self.train_shards, self.val_shards = open_shards(shards, "train"), open_shards(shards, "val")
        self.basis = Eigenbasis.load(shards / "pca.json", self.train_shards.manifest_sha256)
        classes = len(self.train_shards.classes)
        if classes != config.model.num_classes:
            raise ValueError(
                f"{shards} holds {classes} classes; say --model.num_classes {classes}, not {config.model.num_classes}"
            )

        torch.manual_seed(config.train.seed)
        self.model = AlexNet(config.model).to(device)
        self.network = compiled(self.model, device) if config.train.compile else self.model
        self.optimizer = PaperSGD(
            self.model.named_parameters(), config.optimizer.momentum, config.optimizer.weight_decay
        )
        self.schedule = RateSchedule(config.optimizer)
        place = {
            "batch_size": config.train.batch_size,
            "rank": LOADER_RANK,
            "num_ranks": NUM_LOADER_RANKS,
            "device": device,
        }
        self.train_loader = train_loader(self.train_shards, self.basis, config.data, seed=config.train.seed, **place)
        self.val_loader = val_loader(self.val_shards, self.basis, config.data, **place)
        self.epoch, self.step = 0, 0

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train."""
        return self.epoch >= self.config.train.epochs or self.schedule.finished

    def fit(self, log: MetricsLog, stop_requested: Callable[[], bool]) -> bool:
        """Train from the present position to the end. Returns False when it was stopped; its state is saved either way.

        Raises `DivergedError` when the loss is no longer finite and `DataError` when reading fails.
        """
        config = self.config
        clock = StepClock(self.device)
        loss_sum, correct = torch.zeros((), device=self.device), torch.zeros((), dtype=torch.int64, device=self.device)
        logged_at = self.step
        while not self.finished:
            self.model.train()
            steps = self.train_loader.steps_per_epoch
            progress = tqdm(
                total=steps,
                initial=self.train_loader.at_step % steps,
                desc=f"epoch {self.epoch}",
                unit="step",
                disable=None,
                leave=False,
            )
            for batch in self.train_loader.epoch(self.epoch):
                clock.start_step()
                loss, hits = self.train_step(batch)
                loss_sum += loss
                correct += hits
                clock.end_step()
                self.step += 1
                progress.update()

                stopping = stop_requested()
                saving = stopping or self.step % config.run.save_every == 0
                if self.step % config.run.log_every == 0 or saving:
                    count = (self.step - logged_at) * config.train.batch_size
                    mean_loss = loss_sum.item() / max(self.step - logged_at, 1)
                    self.check_finite(mean_loss)
                    if self.step % config.run.log_every == 0:
                        error = 100 - 100 * correct.item() / count
                        timing = clock.read(config.train.batch_size)
                        log.write(
                            "train",
                            self.step,
                            epoch=self.epoch,
                            lr=self.schedule.lr,
                            loss=mean_loss,
                            top1_error=error,
                            **timing,
                        )
                        progress.set_postfix(loss=f"{mean_loss:.3f}", images_per_s=f"{timing['images_per_s']:.0f}")
                        loss_sum.zero_()
                        correct.zero_()
                        logged_at = self.step
                if saving:
                    self.save()
                    clock.pause()
                if stopping:
                    progress.close()
                    return False
            progress.close()

            self.check_finite(loss_sum.item())
            accuracy = evaluate(
                self.network, self.val_loader, self.mirrored, all_views=False, interrupted=stop_requested
            )
            if accuracy is None:
                self.save()  # at the epoch's edge: going on begins with this evaluation
                return False
            self.epoch += 1
            self.schedule.end_epoch(100 - accuracy.centre_top1)
            log.write(
                "eval",
                self.step,
                epoch=self.epoch,
                centre_top1_error=100 - accuracy.centre_top1,
                centre_top5_error=100 - accuracy.centre_top5,
            )
            tqdm.write(f"epoch {self.epoch}/{config.train.epochs}: centre top-1 accuracy {accuracy.centre_top1:.1f} %")
            self.save()
            clock.pause()
        return True

    def train_step(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """One update. Returns the batch's mean loss and number of correct answers, both on the device."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16"):
            logits = self.network(batch.images)
        loss = F.cross_entropy(logits, batch.labels, ignore_index=PADDING)
        loss.backward()
        self.optimizer.step(self.schedule.lr)
        return loss.detach(), (logits.detach().argmax(1) == batch.labels).sum()

    def check_finite(self, loss: float) -> None:
        """Raise `DivergedError` unless the loss is a number; nothing is saved over a good checkpoint then."""
        if not math.isfinite(loss):
            raise DivergedError(
                f"the loss is {loss} at step {self.step}, training diverged; the last checkpoint is sound: "
                "start a new run with a lower --optimizer.lr"
            )

    @property
    def mirrored(self) -> bool:
        """Whether evaluation uses mirrored views."""
        return self.config.data.augmentation.flip > 0

    def evaluate_all_views(self, stop_requested: Callable[[], bool]) -> Accuracy | None:
        """Centre crop and ten views over the whole validation split; None when it was stopped."""
        return evaluate(self.network, self.val_loader, self.mirrored, interrupted=stop_requested)

    def save(self) -> Path:
        """Write a checkpoint."""
        random_state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random_state["cuda"] = torch.cuda.get_rng_state(self.device)
        content: dict[str, Any] = {
            "config": self.config.to_json(),
            "wnids": [name.wnid for name in self.train_shards.classes],
            "eigenbasis": self.basis.to_json(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "epoch": self.epoch,
            "loaders": [self.train_loader.state_dict()],
            "random": [random_state],
        }
        return save_checkpoint(self.config.run.dir, self.step, content, self.config.run.keep)

    def resume(self, path: Path) -> None:
        """Go to a checkpoint's position. Raises `ValueError` when it belongs to another run."""
        content = load_checkpoint(path)
        check_same_run(content["config"], self.config.to_json())
        self.train_loader.load_state_dict(content["loaders"][LOADER_RANK])
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.schedule.load_state_dict(content["schedule"])
        self.epoch, self.step = content["epoch"], content["step"]
        random_state = content["random"][LOADER_RANK]
        torch.set_rng_state(random_state["cpu"])
        if "cuda" in random_state:
            torch.cuda.set_rng_state(random_state["cuda"], self.device)

    def close(self) -> None:
        """Stop the loaders."""
        self.train_loader.close()
        self.val_loader.close()


def compiled(model: AlexNet, device: torch.device) -> torch.nn.Module:
    """What of the network pays to compile: all of it on a GPU, on a CPU the normalization, which is its slow layer.

    On a CPU, PyTorch calls a C++ compiler, and does so without quoting its own path; where that cannot work the run
    goes on uncompiled.
    """
    if device.type == "cuda":
        return cast(torch.nn.Module, torch.compile(model, dynamic=False))
    if not (shutil.which("g++") or shutil.which("clang++")) or " " in torch.__file__:
        print("not compiling: there is no C++ compiler, or PyTorch lies in a folder with a space in its name")
    else:
        torch._dynamo.config.suppress_errors = True  # without Python's headers: warn, and run uncompiled
        model.normalize = torch.compile(model.normalize, dynamic=False)  # type: ignore[method-assign]
    return model
