"""Sound files of every kind that a program of ours reads, small ones, for tests/attacks.py to damage."""

import io
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from model.alexnet import AlexNet
from model.weights import OURS, weights_bytes
from pipeline.eigenbasis import Moments, write_eigenbasis
from pipeline.shards import open_shards
from tests.helpers import ROOT, jpeg, photo
from tests.mutate import make_tar
from tools.make_demo import DIGIT_TO_ID, DIGIT_TO_WNID, write_archives
from tools.make_shards import pack
from tools.packing import layouts as layouts_module
from tools.packing.layouts import read_devkit
from train.checkpoint import save_checkpoint
from train.config import parse_config

QUICKSTART = ROOT / "train" / "configs" / "quickstart.yaml"


class Place(NamedTuple):
    """Where an attack happens."""

    seeds: Path
    """Sound files; they are copied."""
    given: Path
    """Input, new for each; nothing may change in it."""
    out: Path
    """Output, likewise new; everything else around it has to stay as it is."""


def config_arguments(seeds: Path, out: Path) -> list[str]:
    """A tiny network's options."""
    small = "--model.channels [2,2,2,2,2] --model.fc_dim 4 --train.batch_size 4 --run.device cpu"
    return [
        "--config",
        str(QUICKSTART),
        *small.split(),
        "--data.shards",
        str(seeds / "shards"),
        "--run.dir",
        str(out / "run"),
    ]


def config_of(place: Place) -> Any:
    """The configuration of the run among the seeds."""
    return sound_config(place.seeds, place.out)


@cache
def sound_config(seeds: Path, out: Path) -> Any:
    """As `config_of`; made once in a process, for it takes a while."""
    return parse_config(config_arguments(seeds, out))


def copy(source: Path, target: Path) -> None:
    """A folder with what it holds."""
    shutil.copytree(source, target, dirs_exist_ok=True)


def members_of(tar: bytes) -> dict[str, bytes]:
    """The files of a plain tar."""
    import tarfile

    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        return {info.name: opened.extractfile(info).read() for info in opened if info.isfile()}  # type: ignore[union-attr]


@contextmanager
def known_devkit() -> Iterator[None]:
    """Read the devkit, which takes half a second, once in a process: for attacks on other files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts_module, "read_devkit", cached_devkit)
        yield


@cache
def sound_devkit(content: bytes) -> Any:
    """What a devkit holds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "devkit")
        path.write_bytes(content)
        return read_devkit(path)


def cached_devkit(path: Path) -> Any:
    """As `read_devkit`."""
    return sound_devkit(path.read_bytes())


def packed(raw: Path, shards: Path, **options: Any) -> None:
    """Pack in this process."""
    with known_devkit():
        pack(raw, shards, workers=1, **options)


def make_images(folder: Path) -> None:
    """Files of the kinds that ImageNet holds, and of others."""
    rng = np.random.default_rng(0)
    pixels = photo(rng, 40, 60)
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    kinds: dict[str, bytes] = {
        "rgb": jpeg(pixels),
        "grey": jpeg(pixels, "L"),
        "cmyk": jpeg(pixels, "CMYK"),
        "progressive": jpeg(pixels, progressive=True, subsampling="4:4:4"),
        "exif": jpeg(pixels, exif=exif),
        "square": jpeg(photo(rng, 256, 256), quality=50),
        "restarts": jpeg(pixels, restart_marker_blocks=2),
    }
    for name, data in kinds.items():
        (folder / f"{name}.jpg").write_bytes(data)
    image = Image.fromarray(pixels)
    for extension in ("png", "gif", "bmp", "webp", "tiff", "ppm", "jp2", "ico", "tga", "avif"):
        image.save(folder / f"rgb.{extension}")
    Image.fromarray(rng.integers(0, 2**16, (40, 60), np.uint16)).save(folder / "deep.png")
    image.quantize(16).save(folder / "palette.png")
    image.save(folder / "lzw.tif", compression="tiff_lzw")
    Image.fromarray(rng.random((40, 60), np.float32)).save(folder / "float.tif")


def make_seeds(seeds: Path) -> None:
    """Everything that attacks begin with, made by our own programs."""
    import pyarrow as pa
    import pyarrow.parquet

    make_images(seeds / "images")
    image = [(seeds / "images" / f"{name}.jpg").read_bytes() for name in ("rgb", "grey", "cmyk", "exif")]
    wnids = sorted(DIGIT_TO_WNID.values())
    (seeds / "raw").mkdir()
    with redirect_stdout(io.StringIO()), known_devkit():
        write_archives(
            seeds / "raw",
            {wnid: [(f"{wnid}_{k}.JPEG", image[k % 4]) for k in range(2)] for wnid in wnids},
            [(f"ILSVRC2012_val_{k:08d}.JPEG", image[0]) for k in range(1, 11)],
            list(DIGIT_TO_ID.values()),
        )
        for name in ("shards", "half"):
            pack(seeds / "raw", seeds / name, samples_per_shard=11, workers=1)
    (seeds / "tars").mkdir()
    for wnid in wnids[:3]:
        (seeds / "tars" / f"{wnid}.tar").write_bytes(
            make_tar({f"{wnid}_{k}.JPEG": image[0] for k in range(2)})
        )
    make_kaggle(seeds / "kaggle", wnids[:3], image[0])
    rows = {"image": [{"path": f"{wnid}_1.JPEG", "bytes": "x"} for wnid in wnids], "label": list(range(10))}
    (seeds / "rows.json").write_text(json.dumps(rows))
    rows["image"] = [{**row, "bytes": image[0]} for row in rows["image"]]  # type: ignore[dict-item]
    told = {"huggingface": json.dumps({"info": {"features": {"label": {"names": wnids}}}})}
    pyarrow.parquet.write_table(
        pa.table(rows).replace_schema_metadata(told), seeds / "data.parquet", row_group_size=4
    )
    (seeds / "parquet").mkdir()
    shutil.copy(seeds / "data.parquet", seeds / "parquet" / "train-00000-of-00001.parquet")
    make_half(seeds)

    pixels = np.stack([photo(np.random.default_rng(k)) for k in range(3)])
    train = open_shards(seeds / "shards", "train")
    write_eigenbasis(seeds / "shards" / "pca.json", Moments.of(pixels), train.manifest_sha256, "any")
    np.save(seeds / "shards" / "mean_image.npy", pixels.mean(0).astype(np.float32))
    make_run(seeds)


def make_half(seeds: Path) -> None:
    """The output of a packer that has written one shard, and of one that has spilled everything."""
    from tools.packing import parquet

    done = json.loads((seeds / "half/train/manifest.json").read_bytes())
    for row in done["shards"]:
        note = {"plan": done["plan"], "shard": row, "repairs": [], "skipped": []}
        (seeds / "half/train" / row["name"]).with_suffix(".json").write_text(json.dumps(note))
    (seeds / "half/train/manifest.json").unlink()
    (seeds / "half/train/plan.json").write_text(json.dumps({"plan": done["plan"]}))
    (seeds / "half/train/train-000001.tar").unlink()

    patch = pytest.MonkeyPatch()
    with patch.context() as patched, redirect_stdout(io.StringIO()), pytest.raises(KeyboardInterrupt):
        patched.setattr(parquet, "write_spilled_shard", stopped)
        packed(seeds / "parquet", seeds / "half-spilled", samples_per_shard=11)


def stopped(work: object) -> None:
    """As if Ctrl-C was pressed."""
    raise KeyboardInterrupt


def make_kaggle(raw: Path, wnids: list[str], image: bytes) -> None:
    """Kaggle's tree."""
    tree = raw / "ILSVRC/Data/CLS-LOC"
    for wnid in wnids:
        (tree / "train" / wnid).mkdir(parents=True)
        (tree / "train" / wnid / f"{wnid}_1.JPEG").write_bytes(image)
    (tree / "val").mkdir()
    lines = ["ImageId,PredictionString"]
    for number, wnid in enumerate(wnids, start=1):
        (tree / "val" / f"ILSVRC2012_val_{number:08d}.JPEG").write_bytes(image)
        lines.append(f"ILSVRC2012_val_{number:08d},{wnid} 1 2 3 4 ")
    (raw / "LOC_val_solution.csv").write_text("\n".join(lines) + "\n")
    (raw / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} thing, {wnid}\n" for wnid in wnids))


def make_run(seeds: Path) -> None:
    """A run directory, and its weights in both kinds of files."""
    config = parse_config(config_arguments(seeds, seeds))
    model, basis = AlexNet(config.model), json.loads((seeds / "shards" / "pca.json").read_bytes())
    fields = ("mean", "eigenvalues", "eigenvectors")
    content = {
        "config": config.to_json(),
        "model": model.state_dict(),
        "wnids": sorted(DIGIT_TO_WNID.values()),
    }
    content |= {
        "eigenbasis": {name: basis[name] for name in fields},
        "mean_image": None,
        "epoch": 1,
        "kept": [],
    }
    content |= {"best": {"step": 3, "top1_error": 50.0}, "ranks": [{"loader": {"ended": True}}]}
    for step in (3, 7):
        save_checkpoint(seeds / "run", step, content, keep=2)
    (seeds / "run" / "config.yaml").write_text("data:\n\ntrain:\n\nrun:\n\nmodel:\n\noptimizer:\n")
    rows: list[dict[str, Any]] = [
        {
            "kind": "train",
            "step": step,
            "epoch": step // 30,
            "loss": 2.0,
            "top1_error": 80.0,
            "images_per_s": 900.0,
        }
        | {"wait_percent": 1.0, "step_ms_p50": 3.0, "saved_step": step // 7 * 7}
        for step in range(0, 60, 10)
    ]
    rows += [{"kind": "eval", "step": 30, "epoch": 1, "centre_top1_error": 50.0, "eval_s": 1.0}]
    (seeds / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    inputs = {"mean": basis["mean"], "std": 1.0}
    (seeds / "w.safetensors").write_bytes(weights_bytes(model.state_dict(), config.model, inputs))
    theirs = AlexNet(type(config.model)("torchvision", channels=(2, 2, 2, 2, 2), fc_dim=4, num_classes=10))
    torch.save({name: theirs.state_dict()[ours] for name, ours in OURS.items()}, seeds / "w.pth")
