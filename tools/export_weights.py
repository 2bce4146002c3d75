"""Export a run's weights for other programs.

    python tools/export_weights.py RUN weights.safetensors

The file's metadata has the network's configuration and the input's normalization (see `model/weights.py`).
"""

from pathlib import Path

from model.settings import Names
from pipeline.errors import UserError
from pipeline.files import write_bytes
from train.cli import run_program


def export_weights(checkpoint: Path, out: Path, names: Names = "alexnet-dali") -> None:
    """Write the weights of a checkpoint as safetensors.

    Args:
        checkpoint: A step-*.pt, or a run directory for its newest one; or weights, to be renamed.
        out: `.safetensors` file to write.
        names: Names of the tensors: ours, or torchvision's, for `model.variant: torchvision` only.
    """
    if out.suffix != ".safetensors" or out.is_dir():
        raise UserError(f"{out}: expected a file to write; give a name that ends in .safetensors")
    from model.weights import weights_bytes
    from train.pretrained import read_pretrained

    trained = read_pretrained(checkpoint)
    inputs = {"mean": trained.basis.mean.tolist(), "std": trained.augmentation.std}
    try:
        data = weights_bytes(trained.state, trained.config, inputs, names)
    except ValueError as error:
        raise UserError(f"{trained.path}: cannot be exported: {error}; give another checkpoint") from None
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(out, data)
    print(f"{out}: weights of {trained.path}, {len(data) / 1e6:.1f} MB")
    if trained.basis.mean_image is not None:
        print("note: training subtracted a mean image; the file has only its mean colour")


if __name__ == "__main__":
    run_program(export_weights)
