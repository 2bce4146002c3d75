"""Predict the most probable classes of image files, as evaluation sees images: centre crop or ten views.

    python tools/predict.py RUN_OR_WEIGHTS IMAGE [IMAGE ...]

An image is resized and cropped to 256x256 as in packing (`tools/packing/images.py`), the mean is subtracted, and the
views of `train/accuracy.py` are cropped.

Shapes: N images, H = W = 256, C = 3 channels (RGB), K classes.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from pipeline.errors import UserError
from pipeline.shards import ClassName, read_classes
from train.cli import Parser, expand_home, run_main

if TYPE_CHECKING:
    import torch

    from train.pretrained import Pretrained

BATCH_SIZE = 32


def predict(
    checkpoint: Path,
    images: list[str],
    views: Literal["ten", "centre"],
    top: int,
    shards: Path | None,
    device: Literal["auto", "cpu", "cuda"],
    json_output: bool,
) -> None:
    """Print the `top` most probable classes of each image; arguments as on the command line.

    Raises `UserError` at the end if some images are undecodable."""
    if top < 1:
        raise UserError(f"--top: expected at least 1, got {top}; leave it out for 5")
    paths = [path for name in images for path in find_images(name)]
    import torch  # takes seconds; errors in the arguments come first

    from model.alexnet import AlexNet
    from train.device import pick_device
    from train.pretrained import read_pretrained

    trained, target = read_pretrained(checkpoint), pick_device(device)
    names = find_class_names(trained, shards)
    model = AlexNet(trained.config)
    model.load_state_dict(trained.state)
    model.to(target).eval()
    rows: list[dict[str, Any]] = []
    errors: list[str] = []
    for start in range(0, len(paths), BATCH_SIZE):
        squares: dict[int, torch.Tensor] = {}
        for number, path in enumerate(paths[start : start + BATCH_SIZE], start):
            try:
                squares[number] = read_square(path)
            except ValueError as error:
                errors.append(f"{path}: {error}")
        if squares:
            images_NHWC = torch.stack([*squares.values()])
            best = compute_probabilities(model, trained, images_NHWC, views).topk(min(top, len(names)))
            for number, values, indices in zip(
                squares, best.values.tolist(), best.indices.tolist(), strict=True
            ):
                pairs = zip(indices, values, strict=True)
                classes = [{"index": k, **asdict(names[k]), "probability": value} for k, value in pairs]
                rows.append({"image": str(paths[number]), "classes": classes})
    if json_output:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
    for row in rows if not json_output else ():
        print(row["image"])
        for each in row["classes"]:
            print(f"  {100 * each['probability']:5.1f} %  {each['wnid']}  {each['words']}".rstrip())
    if errors:
        more = f" (and {len(errors) - 1} more images)" if len(errors) > 1 else ""
        raise UserError(f"{errors[0]}{more}; give other files in their place, all others were predicted")


def find_images(name: str) -> list[Path]:
    """List the file, the images in a folder, or the files of a glob. Raises `FileNotFoundError` if there is none."""
    from tools.packing import layouts

    path = expand_home(name)
    if path.is_dir():
        images, _ = layouts.collect_images(layouts.read_folder(path))
        paths = [Path(image.name) for image in images]
    else:
        names = [str(path), *glob(str(path))]  # noqa: PTH207 (of Path, whose pattern may not be absolute)
        paths = list({Path(each) for each in names if Path(each).is_file()})
    if not paths:
        raise FileNotFoundError(f"{path}: expected an image file, a folder or a glob of some; check the name")
    return sorted(paths)


def find_class_names(trained: "Pretrained", shards: Path | None) -> list[ClassName]:
    """Read the class names from `shards`, else from the run's shards if they still exist, else use wnids or numbers.
    Raises `UserError` for shards of other classes."""
    wnids = trained.wnids or [f"class {k}" for k in range(trained.config.outputs)]
    names: Sequence[ClassName] = ()
    if shards:
        names = read_classes(shards)
    else:
        with suppress(Exception):  # the shards were moved, or the file is not in a run directory
            config = yaml.safe_load((trained.path.parents[1] / "config.yaml").read_text())
            names = read_classes(Path(config["data"]["shards"]))
    if len(names) == len(wnids) and trained.wnids in (None, [name.wnid for name in names]):
        return list(names)
    if shards:
        raise UserError(f"{shards}/classes.json: expected the classes of {trained.path}; leave it out")
    return [ClassName(wnid, "") for wnid in wnids]


def read_square(path: Path) -> "torch.Tensor":
    """Read an image file as uint8 (H, W, C). Raises `UserError`."""
    import torch

    from tools.packing.images import crop256, decode

    decoded = decode(path.read_bytes())
    return torch.from_numpy(crop256(decoded.pixels, decoded.size))


def compute_probabilities(
    model: "torch.nn.Module", trained: "Pretrained", images_NHWC: "torch.Tensor", views: str
) -> "torch.Tensor":
    """Compute class probabilities (N, K) of uint8 images (N, H, W, C)."""
    import torch

    from pipeline.loader import compute_mean_offset
    from train.accuracy import predict_probabilities

    device, augmentation = next(model.parameters()).device, trained.augmentation
    inputs_NHWC = images_NHWC - torch.from_numpy(trained.basis.mean).float()
    inputs_NHWC = inputs_NHWC / torch.tensor(augmentation.stds)
    offset = compute_mean_offset(trained.basis, augmentation)
    offset = None if offset is None else offset.to(device, torch.float32)
    mirrored = augmentation.flip > 0
    centre_NK, ten_NK = predict_probabilities(
        model, inputs_NHWC.permute(0, 3, 1, 2).to(device), mirrored, offset
    )
    return ten_NK if views == "ten" else centre_NK


def main() -> None:
    """Read the command line and predict."""
    about = "Predict the most probable classes of image files."
    parser = Parser(prog="python tools/predict.py", description=about)
    run = "A run directory, a step-*.pt, a .safetensors or torchvision's .pth."
    views: dict[str, Any] = {
        "type": Literal["ten", "centre"],
        "help": "The mean of ten views, or the centre crop.",
    }
    device: dict[str, Any] = {
        "type": Literal["auto", "cpu", "cuda"],
        "help": "auto uses the first GPU, if any.",
    }
    parser.add_argument("checkpoint", type=Path, help=run)
    parser.add_argument("images", nargs="+", help="Image files, folders or globs.")
    parser.add_argument("--views", default="ten", **views)
    parser.add_argument("--top", type=int, default=5, help="Classes to print per image.")
    parser.add_argument(
        "--shards", type=Path, help="Shards with the classes.json to use; by default the run's."
    )
    parser.add_argument("--device", default="auto", **device)
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    args = parser.parse_args()
    options = (args.views, args.top, args.shards, args.device, args.json)
    run_main(lambda: predict(args.checkpoint, args.images, *options))


if __name__ == "__main__":
    main()
