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
from model.parallel import TowerAlexNet, seed_process
from pipeline.eigenbasis import Eigenbasis
from pipeline.loader import PADDING, Batch, train_loader, val_loader
from pipeline.shards import DataError, open_shards
from train.checkpoint import checkpoint_at_an_edge, load_checkpoint, save_checkpoint
from train.config import Config, check_same_run
from train.evaluate import Accuracy, evaluate
from train.metrics import MetricsLog, StepMeter
from train.optimizer import PaperSGD, RateSchedule
from train.placement import Placement
from train.program import DivergedError


class Trainer:
    """Network, optimizer, loaders and position of one run."""

    def __init__(self, config: Config, device: torch.device, placement: Placement) -> None:
        """Open the data and build the network. Raises `ValueError` or `FileNotFoundError` when they do not fit."""
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

        place = {
            "batch_size": placement.loader_batch(config.train.batch_size),
            "rank": placement.loader_rank,
            "num_ranks": placement.num_loader_ranks,
            "device": device,
        }
        self.train_loader = train_loader(self.train_shards, self.basis, config.data, seed=config.train.seed, **place)
        place |= {"rank": placement.replica, "num_ranks": placement.num_replicas}  # a pair looks at the same images
        self.val_loader = val_loader(self.val_shards, self.basis, config.data, **place)

        self.model = placement.build(config.model, config.train.seed).to(device)
        self.network = compiled(self.model, device) if config.train.compile else self.model
        self.replicated = placement.replicated(self.network)
        self.optimizer = PaperSGD(
            self.model.named_parameters(), config.optimizer.momentum, config.optimizer.weight_decay
        )
        self.schedule = RateSchedule(config.optimizer)
        self.meter = StepMeter(device, placement)
        self.epoch, self.step = 0, 0

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train."""
        return self.epoch >= self.config.train.epochs or self.schedule.finished

    def fit(self, log: MetricsLog | None, stop_requested: Callable[[], bool]) -> bool:
        """Train from the present position to the end. Returns False when it was stopped; its state is saved either way.
        Processes other than the first have no log.

        Raises `DivergedError` when the loss is no longer finite and `DataError` when reading fails.
        """
        while not self.finished:
            try:
                stopped = self.train_epoch(log, stop_requested)
            except DataError as error:
                if self.placement.world > 1:  # the others are in the midst of a step
                    raise
                self.save()
                raise DataError(f"{error}; what was trained is saved, the same command goes on") from None
            accuracy = None if stopped else self.evaluate(all_views=False, interrupted=stop_requested)
            if accuracy:
                self.end_epoch(log, accuracy)
            self.save()  # where evaluation was interrupted, going on begins with it
            self.meter.pause()
            if accuracy is None:
                return False
        return True

    def train_epoch(self, log: MetricsLog | None, stop_requested: Callable[[], bool]) -> bool:
        """Train what is left of the present epoch. Returns whether it was stopped."""
        run, meter = self.config.run, self.meter
        self.model.train()
        steps = self.train_loader.steps_per_epoch
        name, quiet = f"epoch {self.epoch + 1}", None if self.placement.is_first else True  # None: if on a terminal
        with tqdm(desc=name, total=steps, unit="step", disable=quiet, leave=False) as progress:
            progress.update(self.train_loader.at_step % steps)
            for batch in self.train_loader.epoch(self.epoch):
                meter.start_step()
                meter.end_step(*self.train_step(self.placement.share(batch)), batch)
                self.step += 1
                progress.update()
                if self.step % run.log_every == 0:
                    self.check_finite(meter.loss_sum())
                    figures = meter.read(self.config.train.batch_size)
                    if log:
                        log.write("train", self.step, epoch=self.epoch, lr=self.schedule.lr, **figures)
                    progress.set_postfix(loss=f"{figures['loss']:.3f}", images_per_s=f"{figures['images_per_s']:.0f}")
                if self.placement.any(stop_requested()):
                    return True
                if self.step % run.save_every == 0:
                    self.save()
                    meter.pause()
        self.check_finite(meter.loss_sum())
        return False

    def end_epoch(self, log: MetricsLog | None, accuracy: Accuracy) -> None:
        """Count the epoch, tell how it went, and let the rate follow."""
        self.epoch += 1
        self.schedule.end_epoch(100 - accuracy.centre_top1)
        if not log:
            return
        errors = {"centre_top1_error": 100 - accuracy.centre_top1, "centre_top5_error": 100 - accuracy.centre_top5}
        log.write("eval", self.step, epoch=self.epoch, **errors)
        share = f"{accuracy.centre_top1:.1f} %"
        tqdm.write(f"epoch {self.epoch}/{self.config.train.epochs}: centre top-1 accuracy {share}")

    def evaluate(self, *, all_views: bool, interrupted: Callable[[], bool]) -> Accuracy | None:
        """Accuracy over the whole validation split; None when it was interrupted."""
        return evaluate(
            self.network,
            self.val_loader,
            self.mirrored,
            all_views=all_views,
            interrupted=lambda: self.placement.any(interrupted()),
            total=self.placement.total,
        )

    def train_step(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """One update. Returns the batch's mean loss and number of correct answers, both on the device."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16"):
            logits = self.replicated(batch.images)
        loss = F.cross_entropy(logits, batch.labels, ignore_index=PADDING)
        loss.backward()
        self.optimizer.step(self.schedule.lr)
        return loss.detach(), (logits.detach().argmax(1) == batch.labels).sum()

    def check_finite(self, loss: float) -> None:
        """Raise `DivergedError` unless the loss is a number; nothing is saved over a good checkpoint then."""
        if not math.isfinite(loss):
            raise DivergedError(
                f"training diverged by step {self.step} (loss or weights are no longer finite); "
                "start a new run with a lower --optimizer.lr"
            )

    @property
    def mirrored(self) -> bool:
        """Whether evaluation uses mirrored views."""
        return self.config.data.augmentation.flip > 0

    def save(self) -> None:
        """Write a checkpoint, together with all processes. Raises `DivergedError` rather than save weights that are not
        finite."""
        if self.placement.any(not all(weight.isfinite().all() for weight in self.model.parameters())):
            self.check_finite(math.nan)
        random_state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random_state["cuda"] = torch.cuda.get_rng_state(self.device)
        model = self.config.model
        own = {"loader": self.train_loader.state_dict(), "random": random_state, "meter": self.meter.state_dict()}
        content: dict[str, Any] = {
            "config": self.config.to_json(),
            "wnids": [name.wnid for name in self.train_shards.classes],
            "eigenbasis": self.basis.to_json(),
            "mean_image": None if self.basis.mean_image is None else torch.from_numpy(self.basis.mean_image),
            "model": self.placement.whole(self.model.state_dict(), model),
            "optimizer": self.placement.whole(self.optimizer.state_dict(), model),
            "schedule": self.schedule.state_dict(),
            "epoch": self.epoch,
            "ranks": self.placement.gather(own),
        }
        if self.placement.is_first:
            save_checkpoint(self.config.run.dir, self.step, content, self.config.run.keep)

    def resume(self, path: Path) -> Path:
        """Go to a checkpoint's position, or to that of an older one at an epoch's end where `resume.allow_world_change`
        wants it. Returns which. Raises `ValueError` when it belongs to another run."""
        content, config = load_checkpoint(path), self.config.to_json()
        if "ranks" not in content:
            raise ValueError(f"{path} is of an older version of this program, which can go on with it")
        check_same_run(content["config"], config)
        if content["wnids"] != [name.wnid for name in self.train_shards.classes]:
            raise ValueError(f"{path} was trained on other classes than {self.config.data.shards}/classes.json lists")
        if content["eigenbasis"] != self.basis.to_json():
            raise ValueError(f"{path} was trained with another {self.config.data.shards}/pca.json; restore that file")
        self.epoch, self.step = content["epoch"], content["step"]
        self.model.load_state_dict(self.placement.part(content["model"]))
        self.optimizer.load_state_dict(self.placement.part(content["optimizer"]))
        self.schedule.load_state_dict(content["schedule"])
        ranks, world = content["ranks"], self.placement.world
        if len(ranks) != world or content["config"]["parallel"] != config["parallel"]:
            return self.enter_another_world(ranks, path)
        own = ranks[self.placement.rank]
        self.train_loader.load_state_dict(own["loader"])
        self.meter.load_state_dict(own["meter"])
        random_state = own["random"]
        torch.set_rng_state(random_state["cpu"])
        if "cuda" in random_state:
            torch.cuda.set_rng_state(random_state["cuda"], self.device)
        return path

    def enter_another_world(self, ranks: list[dict[str, Any]], path: Path) -> Path:
        """Go on from an epoch's end where there were other processes, or others that held each part."""
        if not self.config.resume.allow_world_change:
            raise ValueError(
                f"{path} is of {len(ranks)} processes, not {self.placement.world}; start that many, or say "
                "--resume.allow_world_change true, which goes on from the end of an epoch"
            )
        state = ranks[0]["loader"]
        if not state["ended"]:
            return self.resume(checkpoint_at_an_edge(path))
        nobodys = state["fingerprint"] | {"rank": None}  # so that no rank takes it for its own
        self.train_loader.load_state_dict(state | {"fingerprint": nobodys}, allow_world_change=True)
        seed_process(self.config.train.seed, self.placement.rank, self.epoch)
        return path

    def gather_network(self) -> None:
        """Leave training: every process holds the whole network from here on, uncompiled. All have to ask."""
        if isinstance(self.model, TowerAlexNet):
            state = self.placement.whole(self.model.state_dict(), self.config.model)
            self.model = self.network = self.replicated = AlexNet(self.config.model).to(self.device)
            self.model.load_state_dict(state)

    def close(self) -> None:
        """Stop the loaders."""
        self.train_loader.close()
        self.val_loader.close()


def compiled(model: AlexNet, device: torch.device) -> torch.nn.Module:
    """What of the network pays to compile: all of it on a GPU; on a CPU, or where it is one tower of two, the
    normalization, which is its slow layer. Where compiling cannot work the run goes on uncompiled."""
    if device.type == "cuda" and not isinstance(model, TowerAlexNet):
        return cast(torch.nn.Module, torch.compile(model, dynamic=False))
    if not can_compile(device):
        print("not compiling: there is no C++ compiler, or PyTorch lies in a folder with a space in its name")
    else:
        torch._dynamo.config.suppress_errors = True  # without Python's headers: warn, and run uncompiled
        model.normalize = torch.compile(model.normalize, dynamic=False)  # type: ignore[method-assign]
    return model


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works: for a CPU it calls a C++ compiler, without quoting its own path."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    return device.type == "cuda" or (compiler is not None and " " not in torch.__file__)
