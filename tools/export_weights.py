"""Export a run's weights for other programs.

    python tools/export_weights.py RUN weights.safetensors

The file's metadata has the network's configuration and the input's normalization (see `model/weights.py`).
"""

from pathlib import Path

from model.settings import AlexNetConfig, Names
from pipeline.errors import UserError
from pipeline.files import write_bytes
from train.cli import run_program


def export_weights(checkpoint: Path, out: Path, names: Names = "alexnet-dali") -> None:
    """Write the weights of a checkpoint as safetensors.

    Args:
        checkpoint: A step-*.pt, or a run directory for its newest one.
        out: `.safetensors` file to write.
        names: Names of the tensors: ours, or torchvision's, for `model.variant: torchvision` only.
    """
    if out.suffix != ".safetensors" or out.is_dir():
        raise UserError(f"{out}: expected a file to write; give a name that ends in .safetensors")
    from model.weights import weights_bytes
    from train.checkpoint import checkpoint_path, load_checkpoint

    path = checkpoint_path(checkpoint)
    content = load_checkpoint(path)
    try:
        config, state = AlexNetConfig.from_json(content["config"]["model"]), content["model"]
        std = content["config"]["data"]["augmentation"]["std"]
        inputs = {"mean": content["eigenbasis"]["mean"], "std": std}
        step, has_mean_image = content["step"], content.get("mean_image") is not None
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(f"{path}: not a checkpoint of a training run; give one of RUN/checkpoints") from None
    try:
        data = weights_bytes(state, config, inputs, names)
    except ValueError as error:
        raise UserError(f"{path}: cannot be exported: {error}; give another checkpoint") from None
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(out, data)
    print(f"{out}: step {step} of {path.parent.parent}, {len(data) / 1e6:.1f} MB")
    if has_mean_image:
        print("note: training subtracted a mean image; the file has only its mean colour")


if __name__ == "__main__":
    run_program(export_weights)
