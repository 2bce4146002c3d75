"""A run's state: its data, its network, where it stands, and what a checkpoint holds of all that.

The position is (finished epochs, updates) and, in the loader, the next batch. What is taken between two steps and put
back goes on with that batch and with the same dropout masks: on a CPU the final weights are bitwise those of an
undisturbed run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from model.towers import seed_process
from model.weights import check_tensors
from pipeline.eigenbasis import Eigenbasis
from pipeline.loader import train_loader, val_loader
from pipeline.shards import open_shards
from train.checkpoint import checkpoint_at_an_edge, load_checkpoint
from train.config import Config, check_same_run
from train.learner import Learner
from train.meter import StepMeter
from train.placement import Placement
from train.schedule import RateSchedule
from train.trained import check_finite, initial_state

PARTS = {
    *(
        "config",
        "wnids",
        "eigenbasis",
        "model",
        "optimizer",
        "scale",
        "schedule",
        "epoch",
        "best",
        "kept",
        "ranks",
    ),
}
"""Of a checkpoint from which a run can go on."""


class TrainState:
    """Shards, loaders, learner and position of one run."""

    def __init__(self, config: Config, device: torch.device, placement: Placement) -> None:
        """Open the data and lay out the loaders; `build` follows. Raises `ValueError` or `FileNotFoundError` when they
        do not fit."""
        self.device, self.placement = device, placement
        shards = config.data.shards
        self.train_shards, self.val_shards = open_shards(shards, "train"), open_shards(shards, "val")
        classes = len(self.train_shards.classes)
        self.config = config = config.with_classes(classes)
        problems: list[str] = []
        if config.model.num_classes != classes:
            problems.append(
                f"{shards} holds {classes} classes; leave --model.num_classes {config.model.outputs} out"
            )
        with collect_errors(problems):
            self.basis = Eigenbasis.load(
                shards / "pca.json",
                self.train_shards.manifest_sha256,
                with_mean_image=config.data.augmentation.mean == "image",
            )
        batch_size, accumulate = config.train.batch_size, config.train.accumulate
        with collect_errors(problems):
            placement.check_batch(
                batch_size,
                accumulate,
                config.data.augmentation.images_per_crop,
                self.train_shards.num_samples,
            )
        if problems:
            raise ValueError("; ".join(problems))
        place: dict[str, Any] = {
            "batch_size": placement.loader_batch(batch_size),
            "rank": placement.loader_rank,
            "num_ranks": placement.num_loader_ranks,
            "device": device,
        }
        data = config.data
        if config.run.deterministic:  # JPEG engines may differ between calls (nvImageCodec's tests)
            data = replace(data, speed=replace(data.speed, hw_decoder_load=0.0))
        self.train_loader = train_loader(self.train_shards, self.basis, data, seed=config.train.seed, **place)
        place |= {
            "rank": placement.replica,
            "num_ranks": placement.num_replicas,
        }  # a pair looks at the same images
        self.val_loader = val_loader(self.val_shards, self.basis, data, **place)
        self.epoch, self.step = 0, 0
        self.best: dict[str, float] | None = None
        """{"step", "top1_error"} of the best epoch's end."""
        self.kept: list[int] = []
        """Steps of checkpoints that are kept for good."""
        self.checkpoint: Path | None = None
        """Where it came from."""

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

    def capture(self) -> dict[str, Any]:
        """Everything from which the run goes on as if nothing had happened; all processes have to ask, the first one
        gets it. Tensors are copies, on the CPU."""
        random_state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random_state["cuda"] = torch.cuda.get_rng_state(self.device)
        own = {
            "loader": self.train_loader.state_dict(),
            "random": random_state,
            "meter": self.meter.state_dict(),
        }
        learner, image = self.learner, self.basis.mean_image
        weights, velocities = learner.weights(), learner.velocities()
        ranks = self.placement.gather(own)
        if not self.placement.is_first:
            return {}
        return {
            "config": self.config.to_json(),
            "wnids": [name.wnid for name in self.train_shards.classes],
            "eigenbasis": self.basis.to_json(),
            "mean_image": None if image is None else torch.from_numpy(image),
            "model": copies(weights),
            "optimizer": copies(velocities),
            "scale": copies(learner.scale.state_dict()),
            "schedule": self.schedule.state_dict(),
            "epoch": self.epoch,
            "best": self.best,
            "kept": list(self.kept),
            "ranks": ranks,
        }

    def restore(self, path: Path) -> Path:
        """Go to a checkpoint's position, or to that of an older one at an epoch's end where `resume.allow_world_change`
        wants it. Returns which. Raises `ValueError` when it is damaged or belongs to another run."""
        content = load_checkpoint(path)
        try:
            return self._go_to(content, path)
        except (KeyError, TypeError, AttributeError, IndexError):
            raise ValueError(
                f"{path} is not as this program writes checkpoints; put back one that is"
            ) from None

    def _go_to(self, content: dict[str, Any], path: Path) -> Path:
        """As `restore`, to what a checkpoint holds. Raises about anything where values are of other kinds than ours."""
        config = self.config.to_json()
        missing = sorted(PARTS - content.keys())
        if missing:
            raise ValueError(
                f"{path} lacks {', '.join(missing)}: it is no whole checkpoint, or of an older version of this "
                "program, which can go on with it"
            )
        check_same_run(content["config"], config, content["ranks"][0]["loader"]["epoch"] + 1)
        shards = self.config.data.shards
        if content["wnids"] != [name.wnid for name in self.train_shards.classes]:
            raise ValueError(f"{path} was trained on other classes than {shards}/classes.json lists")
        if content["eigenbasis"] != self.basis.to_json():
            raise ValueError(f"{path} was trained with another {shards}/pca.json; restore that file")
        for part in ("model", "optimizer"):
            try:
                check_tensors(content[part], self.config.model)
            except ValueError as error:
                raise ValueError(f"{path} is of another network: {error}") from None
        check_finite(content["model"], path)
        self.epoch, self.step = content["epoch"], content["step"]
        self.best, self.kept = content["best"], content["kept"]
        self.checkpoint = path
        self.learner.load(content["model"], content["optimizer"])
        self.learner.scale.load_state_dict(content["scale"])
        self.schedule.load_state_dict(content["schedule"])
        ranks, placement = content["ranks"], self.placement
        if len(ranks) != placement.world or content["config"]["parallel"] != config["parallel"]:
            return self._enter_another_world(ranks, path)
        own = ranks[placement.rank]
        self.train_loader.load_state_dict(own["loader"])
        self.meter.load_state_dict(own["meter"])
        random_state = own["random"]
        torch.set_rng_state(random_state["cpu"])
        if "cuda" in random_state:
            torch.cuda.set_rng_state(random_state["cuda"], self.device)
        return path

    def _enter_another_world(self, ranks: list[dict[str, Any]], path: Path) -> Path:
        """Go on from an epoch's end where there were other processes, or others that held each part."""
        if not self.config.resume.allow_world_change:
            raise ValueError(
                f"{path} is of {len(ranks)} processes, not {self.placement.world}; start that many, or say "
                "--resume.allow_world_change true, which goes on from the end of an epoch"
            )
        state = ranks[0]["loader"]
        if not state["ended"]:
            return self.restore(checkpoint_at_an_edge(path))
        nobodys = state["fingerprint"] | {"rank": None}  # so that no rank takes it for its own
        self.train_loader.load_state_dict(state | {"fingerprint": nobodys}, allow_world_change=True)
        seed_process(self.config.train.seed, self.placement.rank, self.epoch)
        return path

    def close(self) -> None:
        """Stop the loaders."""
        self.train_loader.close()
        self.val_loader.close()


@contextmanager
def collect_errors(problems: list[str]) -> Iterator[None]:
    """Collect what a user has to correct, so that one sentence reports all of it."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        problems.append(str(error))


def copies(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of tensors, on the CPU: training goes on while they are written."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
