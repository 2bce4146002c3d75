"""The most probable classes of image files, as evaluation sees images: centre crop or ten views.

    python tools/predict.py RUN_OR_WEIGHTS IMAGE [IMAGE ...]

An image is brought to 256x256 as packing does it (`tools/packing/images.py`), less the mean, and cut into the views of
`train/evaluate.py`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.shards import ClassName, read_classes
from tools.packing.folders import image_files
from train.program import Parser, exit_with

if TYPE_CHECKING:
    import torch

    from train.trained import Trained

AT_A_TIME = 32


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
        raise ValueError(f"--top must be at least 1, not {top}")
    paths = find_images(images)
    import torch  # takes seconds, which errors above need not wait for

    from model.alexnet import AlexNet
    from train.device import pick_device
    from train.trained import read_trained

    trained, place = read_trained(checkpoint), pick_device(device)
    names = class_names(trained, shards)
    model = AlexNet(trained.config)
    model.load_state_dict(trained.state)
    model.to(place).eval()
    rows: list[dict[str, Any]] = []
    for start in range(0, len(paths), AT_A_TIME):
        some = paths[start : start + AT_A_TIME]
        chances = image_probabilities(model, trained, torch.stack([read_square(path) for path in some]), views)
        for path, row in zip(some, chances.cpu(), strict=True):
            found = row.topk(min(top, len(row)))
            rows.append({"image": str(path), "classes": [
                {"index": k, "wnid": names[k].wnid, "words": names[k].words, "probability": chance}
                for chance, k in zip(found.values.tolist(), found.indices.tolist(), strict=True)
            ]})  # fmt: skip
            if not as_json:
                print(path)
                for each in rows[-1]["classes"]:
                    words = "" if each["words"] == each["wnid"] else f"  {each['words']}"
                    print(f"  {100 * each['probability']:5.1f} %  {each['wnid']}{words}")
    if as_json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))


def find_images(names: list[str]) -> list[Path]:
    """The files behind names of files, folders and globs. Raises `FileNotFoundError` for a name of nothing."""
    paths: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        found: Iterator[Path] | list[Path] = [path] if path.is_file() else []
        if path.is_dir():
            found = image_files(path, [])
        elif not path.exists() and path.name:
            found = sorted(
                each for each in Path(path.anchor).glob(str(path.relative_to(path.anchor))) if each.is_file()
            )
        before = len(paths)
        paths += found
        if len(paths) == before:
            raise FileNotFoundError(f"{name} is no image file, no folder that holds any, and no pattern of some")
    return paths


def class_names(trained: "Trained", shards: Path | None) -> list[ClassName]:
    """What the classes are called: by the shards that are given, else by those of the run if they are still there, else
    by their wnids or numbers. Raises `ValueError` for shards of other classes."""
    if shards is not None:
        names = list(read_classes(shards))
        if len(names) != trained.config.outputs or trained.wnids not in (None, [name.wnid for name in names]):
            raise ValueError(
                f"{shards}/classes.json lists other classes than {trained.path} was trained on; leave it out"
            )
        return names
    wnids = trained.wnids or [f"class {k}" for k in range(trained.config.outputs)]
    try:
        from yaml import safe_load

        config = safe_load((trained.path.parents[1] / "config.yaml").read_text())
        names = list(read_classes(Path(config["data"]["shards"])))
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        names = []
    return names if [name.wnid for name in names] == wnids else [ClassName(wnid, wnid) for wnid in wnids]


def read_square(path: Path) -> "torch.Tensor":
    """An image file as uint8 (256, 256, 3) RGB. Raises `ValueError` that names it."""
    import torch

    from tools.packing.images import crop256, decode

    try:
        decoded = decode(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}; leave it out") from None
    return torch.from_numpy(crop256(decoded.pixels, decoded.size))


def image_probabilities(
    model: "torch.nn.Module", trained: "Trained", images_NHWC: "torch.Tensor", views: str
) -> "torch.Tensor":
    """Class probabilities (N, classes) of uint8 (N, 256, 256, 3) images."""
    import torch

    from pipeline.loader import mean_offset
    from pipeline.normalize import normalize
    from train.accuracy import probabilities

    place = next(model.parameters()).device
    augmentation = trained.augmentation
    means = torch.from_numpy(trained.basis.mean).float().expand(len(images_NHWC), 3)
    batch_NHWC = torch.empty(images_NHWC.shape)
    normalize(images_NHWC, None, means, augmentation.std, None, batch_NHWC)
    offset = mean_offset(trained.basis, augmentation)
    batch = batch_NHWC.permute(0, 3, 1, 2).to(place)
    offset = None if offset is None else offset.to(place, torch.float32)
    centre, average = probabilities(model, batch, augmentation.flip > 0, offset)
    return average if views == "ten" else centre


def main() -> None:
    """The command line."""
    parser = Parser(prog="python tools/predict.py", description="Tell the most probable classes of image files.")
    parser.add_argument(
        "checkpoint", type=Path, help="A run directory, a step-*.pt, a .safetensors or torchvision's .pth."
    )
    parser.add_argument("images", nargs="+", help="Image files, folders of them, or patterns such as 'photos/*.jpg'.")
    parser.add_argument(
        "--views", type=Literal["ten", "centre"], default="ten", help="The mean of ten views, or the centre crop."
    )
    parser.add_argument("--top", type=int, default=5, help="Classes to tell of each image.")
    parser.add_argument(
        "--shards", type=Path, default=None, help="Shards whose classes.json names the classes; by default the run's."
    )
    parser.add_argument(
        "--device",
        type=Literal["auto", "cpu", "cuda"],
        default="auto",
        help="auto takes the first GPU if there is one.",
    )
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    given = parser.parse_args()
    exit_with(
        lambda: predict(given.checkpoint, given.images, given.views, given.top, given.shards, given.device, given.json)
    )


if __name__ == "__main__":
    main()
