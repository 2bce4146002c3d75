"""The same few images in each of the layouts that raw ImageNet comes in, and what is to become of them."""

import io
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from pipeline.files import read_json
from tests.helpers import jpeg, photo, tar_of, write

SOLUTION = "LOC_val_solution.csv"
WNIDS = ["n00000011", "n00000022", "n00000033"]
Images = dict[str, tuple[str, str, bytes]]  # stem -> (split, wnid, file)


def image_set(size: int = 24) -> Images:
    """Files with the oddities of the real thing, each of another colour."""
    rng, images = np.random.default_rng(0), {}
    for number in range(size):
        split, wnid = ("val" if number % 4 == 3 else "train"), WNIDS[number % 3]
        pixels = photo(rng, int(rng.integers(90, 200)), int(rng.integers(90, 200)))
        stem = f"ILSVRC2012_val_{number:08d}" if split == "val" else f"{wnid}_{number}"
        data = jpeg(pixels, ["RGB", "L", "CMYK"][number % 3] if number < 6 else "RGB")
        if number == 7:
            out = io.BytesIO()
            Image.fromarray(pixels).save(out, "PNG")
            data = out.getvalue()
        images[stem] = (split, wnid, data)
    return images


def kaggle(raw: Path, images: Images) -> None:
    """Kaggle's download, unzipped."""
    tree = raw / "ILSVRC/Data/CLS-LOC"
    for stem, (split, wnid, data) in images.items():
        write(tree / (f"train/{wnid}" if split == "train" else "val") / f"{stem}.JPEG", data)
    write(tree / "test/ILSVRC2012_test_00000001.JPEG", b"not used")
    solution = [f"{stem},{wnid} 1 2 3 4 \n" for stem, (split, wnid, _) in images.items() if split == "val"]
    (raw / SOLUTION).write_text("".join(["ImageId,PredictionString\n", *solution]), "utf-8-sig")
    (raw / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} thing, {wnid[-1]}\n" for wnid in WNIDS))


def folders(raw: Path, images: Images) -> None:
    """Class folders with extensions in any case, nested and linked, among files that are no images."""
    for number, (stem, (split, wnid, data)) in enumerate(images.items()):
        folder = raw / split / wnid / ("deep/er" if number % 5 == 0 else "")
        write(folder / (stem + [".JPEG", ".jpg", ".Jpg", ".JPG"][number % 4]), data)
    for name in (".DS_Store", "._n00000011_0.JPEG", "readme.txt"):
        write(raw / "train" / WNIDS[0] / name, b"no image")
    elsewhere = raw.parent / "elsewhere"  # one class and one file are links to another disk
    (raw / "train" / WNIDS[1]).rename(elsewhere)
    (raw / "train" / WNIDS[1]).symlink_to(elsewhere)
    one = next(path for path in elsewhere.iterdir() if path.is_file())
    one.rename(raw.parent / "one")
    one.symlink_to(raw.parent / "one")


def class_tars(raw: Path, images: Images) -> None:
    """ImageNet-21k's folder of tars; no validation images."""
    raw.mkdir()
    for wnid in WNIDS:
        files = {f"{stem}.JPEG": data for stem, (_, of, data) in images.items() if of == wnid}
        write(raw / f"{wnid}.tar", tar_of(files))


def split_tars(raw: Path, images: Images) -> None:
    """Class folders in a tar for each split."""
    for split in ("train", "val"):
        files = {f"{wnid}/{stem}.JPEG": data for stem, (of, wnid, data) in images.items() if of == split}
        write(raw / f"{split}.tar", tar_of(files))


def parquet(raw: Path, images: Images) -> None:
    """Hugging Face's files: several a split, several row groups a file."""
    import pyarrow
    import pyarrow.parquet

    (raw / "data").mkdir(parents=True)
    for split, name in (("train", "train"), ("val", "validation")):
        rows = [
            {"image": {"bytes": data, "path": f"{stem}.JPEG"}, "label": WNIDS.index(wnid)}
            for stem, (of, wnid, data) in images.items()
            if of == split
        ]
        for part in range(2):
            table = pyarrow.Table.from_pylist(rows[part::2])
            path = raw / "data" / f"{name}-{part:05d}-of-00002.parquet"
            pyarrow.parquet.write_table(table, path, row_group_size=4)


def expected_square(data: bytes) -> np.ndarray:
    """The 256x256 image by Pillow alone."""
    with Image.open(io.BytesIO(data)) as image:
        rgb = image.convert("RGB")
    width, height = (round(side * 256 / min(rgb.size)) for side in rgb.size)
    left, top = (width - 256) // 2, (height - 256) // 2
    resized = rgb.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + 256, top + 256)))


def check_shards(shards: Path, images: Images, wnids: list[str] = WNIDS) -> None:
    """Assert that shards hold these images, each in its split, under its class of `wnids`, with Pillow's pixels."""
    assert [row["wnid"] for row in read_json(shards / "classes.json")["classes"]] == wnids
    splits = sorted({split for split, *_ in images.values()})
    assert sorted(path.name for path in shards.iterdir() if path.is_dir()) == splits
    samples = [(split, *sample) for split in splits for sample in read_shards(shards, split)]
    assert sorted(key for _, key, *_ in samples) == sorted(images)
    for split, key, label, data in samples:
        assert (split, wnids[label]) == images[key][:2], key
        pixels = np.asarray(Image.open(io.BytesIO(data))).astype(int)
        assert np.abs(pixels - expected_square(images[key][2])).mean() < 1.5, key


def read_shards(shards: Path, split: str) -> list[tuple[str, int, bytes]]:
    """Key, label and image of every sample, by the webdataset library."""
    tars = [str(path) for path in sorted((shards / split).glob("*.tar"))]
    samples = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False) if tars else ()
    return [(sample["__key__"], int(sample["cls"]), sample["jpg"]) for sample in samples]
