"""Predict the most probable classes of image files, as evaluation sees images: centre crop or ten views.

    python tools/predict.py RUN_OR_WEIGHTS IMAGE [IMAGE ...]

An image is resized and cropped to 256x256 as packing does it (`tools/packing/images.py`), less the mean, and cut into
the views of `train/evaluate.py`.

Shapes: N images, H = W = 256, C = 3 channels (RGB), K classes.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from pipeline.shards import ClassName, read_classes
from train.program import Parser, exit_with

if TYPE_CHECKING:
    import torch

    from train.trained import Trained

BATCH_SIZE = 32
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
"""Of the files that are taken from a folder."""


def predict(
    checkpoint: Path,
    images: list[str],
    views: Literal["ten", "centre"],
    top: int,
    shards: Path | None,
    device: Literal["auto", "cpu", "cuda"],
    as_json: bool,
) -> None:
    """Print the `top` most probable classes of each image; arguments as on the command line."""
    if top < 1:
        raise ValueError(f"--top: expected at least 1, got {top}; leave it out for 5")
    paths = [path for name in images for path in find_images(name)]
    import torch  # takes seconds, which errors above need not wait for

    from model.alexnet import AlexNet
    from train.device import pick_device
    from train.trained import read_trained

    trained, target = read_trained(checkpoint), pick_device(device)
    names = find_class_names(trained, shards)
    model = AlexNet(trained.config)
    model.load_state_dict(trained.state)
    model.to(target).eval()
    rows: list[dict[str, Any]] = []
    for start in range(0, len(paths), BATCH_SIZE):
        batch = paths[start : start + BATCH_SIZE]
        images_NHWC = torch.stack([read_square(path) for path in batch])
        values, indices = compute_probabilities(model, trained, images_NHWC, views).topk(min(top, len(names)))
        for path, probabilities, classes in zip(batch, values.tolist(), indices.tolist(), strict=True):
            found = [
                {"index": k, "wnid": names[k].wnid, "words": names[k].words, "probability": probability}
                for k, probability in zip(classes, probabilities, strict=True)
            ]
            rows.append({"image": str(path), "classes": found})
            if not as_json:
                lines = [
                    f"  {100 * each['probability']:5.1f} %  {each['wnid']}  {each['words']}" for each in found
                ]
                print("\n".join([str(path), *lines]))
    if as_json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))


def find_images(name: str) -> list[Path]:
    """List the file, or the images under the folder. Raises `FileNotFoundError` where there is none."""
    path = Path(name)
    inside = sorted(path.rglob("*")) if path.is_dir() else []
    found = [each for each in inside if each.suffix.lower() in SUFFIXES and each.is_file()]
    found += [path] if path.is_file() else []
    if not found:
        raise FileNotFoundError(f"{name}: expected an image file or a folder of some; check the name")
    return found


def find_class_names(trained: "Trained", shards: Path | None) -> list[ClassName]:
    """Read the classes' names from `shards`, else from the run's shards if they are still there; else wnids or numbers
    have to do. Raises `ValueError` for shards of other classes."""
    wnids = trained.wnids or [f"class {k}" for k in range(trained.config.outputs)]
    names: Sequence[ClassName] = ()
    if shards:
        names = read_classes(shards)
    else:
        with suppress(
            OSError, ValueError, KeyError, TypeError, IndexError
        ):  # moved, or not a run's checkpoint
            config = yaml.safe_load((trained.path.parents[1] / "config.yaml").read_text())
            names = read_classes(Path(config["data"]["shards"]))
    if len(names) == len(wnids) and trained.wnids in (None, [name.wnid for name in names]):
        return list(names)
    if shards:
        raise ValueError(f"{shards}/classes.json: expected the classes of {trained.path}; leave it out")
    return [ClassName(wnid, "") for wnid in wnids]


def read_square(path: Path) -> "torch.Tensor":
    """Read an image file as uint8 (H, W, C). Raises `ValueError` that names it."""
    import torch

    from tools.packing.images import crop256, decode

    try:
        decoded = decode(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}; leave it out") from None
    return torch.from_numpy(crop256(decoded.pixels, decoded.size))


def compute_probabilities(
    model: "torch.nn.Module", trained: "Trained", images_NHWC: "torch.Tensor", views: str
) -> "torch.Tensor":
    """Compute class probabilities (N, K) of uint8 images (N, H, W, C)."""
    import torch

    from pipeline.loader import mean_offset
    from pipeline.normalize import normalize
    from train.accuracy import probabilities

    device, augmentation = next(model.parameters()).device, trained.augmentation
    means_NC = torch.from_numpy(trained.basis.mean).float().expand(len(images_NHWC), 3)
    inputs_NHWC = torch.empty(images_NHWC.shape)
    normalize(images_NHWC, None, means_NC, augmentation.std, None, inputs_NHWC)
    offset = mean_offset(trained.basis, augmentation)
    offset = None if offset is None else offset.to(device, torch.float32)
    mirrored = augmentation.flip > 0
    centre_NK, ten_NK = probabilities(model, inputs_NHWC.permute(0, 3, 1, 2).to(device), mirrored, offset)
    return ten_NK if views == "ten" else centre_NK


def main() -> None:
    """Read the command line and predict."""
    parser = Parser(
        prog="python tools/predict.py", description="Predict the most probable classes of image files."
    )
    run = "A run directory, a step-*.pt, a .safetensors or torchvision's .pth."
    views = {"type": Literal["ten", "centre"], "help": "The mean of ten views, or the centre crop."}
    shards = "Shards whose classes.json names the classes; by default the run's."
    device = {"type": Literal["auto", "cpu", "cuda"], "help": "auto takes the first GPU if there is one."}
    parser.add_argument("checkpoint", type=Path, help=run)
    parser.add_argument("images", nargs="+", help="Image files, or folders of them.")
    parser.add_argument("--views", default="ten", **views)
    parser.add_argument("--top", type=int, default=5, help="Classes to print of each image.")
    parser.add_argument("--shards", type=Path, default=None, help=shards)
    parser.add_argument("--device", default="auto", **device)
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    given = parser.parse_args()
    options = (given.views, given.top, given.shards, given.device, given.json)
    exit_with(lambda: predict(given.checkpoint, given.images, *options))


if __name__ == "__main__":
    main()
