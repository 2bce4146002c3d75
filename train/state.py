"""What a checkpoint holds of a run, taken between two steps and put back."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from model.parallel import seed_process
from model.weights import check_tensors
from train.checkpoint import checkpoint_at_an_edge, load_checkpoint
from train.config import check_same_run
from train.trained import check_finite

if TYPE_CHECKING:
    from train.loop import Trainer


PARTS = {
    *("config", "wnids", "eigenbasis", "model", "optimizer", "scale", "schedule", "epoch", "best", "kept", "ranks"),
}
"""Of a checkpoint from which a run can go on."""


def capture(trainer: "Trainer") -> dict[str, Any]:
    """Everything from which the run goes on as if nothing had happened; all processes have to ask, the first one gets
    it. Tensors are copies, on the CPU."""
    random_state = {"cpu": torch.get_rng_state()}
    if trainer.device.type == "cuda":
        random_state["cuda"] = torch.cuda.get_rng_state(trainer.device)
    own = {
        "loader": trainer.train_loader.state_dict(),
        "random": random_state,
        "meter": trainer.meter.state_dict(),
    }
    learner, image = trainer.learner, trainer.basis.mean_image
    weights, velocities = learner.weights(), learner.velocities()
    ranks = trainer.placement.gather(own)
    if not trainer.placement.is_first:
        return {}
    return {
        "config": trainer.config.to_json(),
        "wnids": [name.wnid for name in trainer.train_shards.classes],
        "eigenbasis": trainer.basis.to_json(),
        "mean_image": None if image is None else torch.from_numpy(image),
        "model": copies(weights),
        "optimizer": copies(velocities),
        "scale": copies(learner.scale.state_dict()),
        "schedule": trainer.schedule.state_dict(),
        "epoch": trainer.epoch,
        "best": trainer.best,
        "kept": list(trainer.kept),
        "ranks": ranks,
    }


def copies(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of tensors, on the CPU: training goes on while they are written."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}


def restore(trainer: "Trainer", path: Path) -> Path:
    """Go to a checkpoint's position, or to that of an older one at an epoch's end where `resume.allow_world_change`
    wants it. Returns which. Raises `ValueError` when it is damaged or belongs to another run."""
    content, config = load_checkpoint(path), trainer.config.to_json()
    missing = sorted(PARTS - content.keys())
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}: it is no whole checkpoint, or of an older version of this program, "
            "which can go on with it"
        )
    check_same_run(content["config"], config)
    shards = trainer.config.data.shards
    if content["wnids"] != [name.wnid for name in trainer.train_shards.classes]:
        raise ValueError(f"{path} was trained on other classes than {shards}/classes.json lists")
    if content["eigenbasis"] != trainer.basis.to_json():
        raise ValueError(f"{path} was trained with another {shards}/pca.json; restore that file")
    for part in ("model", "optimizer"):
        try:
            check_tensors(content[part], trainer.config.model)
        except ValueError as error:
            raise ValueError(f"{path} is of another network: {error}") from None
    check_finite(content["model"], path)
    trainer.epoch, trainer.step = content["epoch"], content["step"]
    trainer.best, trainer.kept = content["best"], content["kept"]
    trainer.writer.latest = path
    trainer.learner.load(content["model"], content["optimizer"])
    trainer.learner.scale.load_state_dict(content["scale"])
    trainer.schedule.load_state_dict(content["schedule"])
    ranks, placement = content["ranks"], trainer.placement
    if len(ranks) != placement.world or content["config"]["parallel"] != config["parallel"]:
        return enter_another_world(trainer, ranks, path)
    own = ranks[placement.rank]
    trainer.train_loader.load_state_dict(own["loader"])
    trainer.meter.load_state_dict(own["meter"])
    random_state = own["random"]
    torch.set_rng_state(random_state["cpu"])
    if "cuda" in random_state:
        torch.cuda.set_rng_state(random_state["cuda"], trainer.device)
    return path


def enter_another_world(trainer: "Trainer", ranks: list[dict[str, Any]], path: Path) -> Path:
    """Go on from an epoch's end where there were other processes, or others that held each part."""
    if not trainer.config.resume.allow_world_change:
        raise ValueError(
            f"{path} is of {len(ranks)} processes, not {trainer.placement.world}; start that many, or say "
            "--resume.allow_world_change true, which goes on from the end of an epoch"
        )
    state = ranks[0]["loader"]
    if not state["ended"]:
        return restore(trainer, checkpoint_at_an_edge(path))
    nobodys = state["fingerprint"] | {"rank": None}  # so that no rank takes it for its own
    trainer.train_loader.load_state_dict(state | {"fingerprint": nobodys}, allow_world_change=True)
    seed_process(trainer.config.train.seed, trainer.placement.rank, trainer.epoch)
    return path
