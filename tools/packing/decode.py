"""Decode shards once: write a pixel store of the same samples, whose images need no decoder.

    python tools/make_shards.py decode SHARDS OUT

One sample is `<key>.npy` (uint8, 256x256x3, RGB) and `<key>.cls`; shards, keys, order and labels are those of SHARDS.
Pixels are those that training decodes on a CPU, so the files depend on SHARDS and on DALI's version alone, not on
workers or restarts. Each shard is renamed into place when it is complete, then its index, then `NAME.json` with its row
of the manifest; so a decode that was killed resumes.
"""

import io
import itertools
import json
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.eigenbasis import read_eigenbasis, read_mean_image
from pipeline.errors import UserError
from pipeline.files import atomic_writer, read_json, write_bytes, write_json
from pipeline.shards import (
    FORMAT_VERSION,
    SAMPLE,
    SAMPLES,
    SAMPLES_SHA256,
    classes_json,
    hash_manifest,
    open_shards,
    read_classes,
)
from tools.packing.index import find_splits, index_text, read_index, write_samples
from tools.packing.plan import library_versions
from tools.packing.pool import check_workers, run_jobs
from tools.packing.writer import TarWriter, is_complete

BATCH_SIZE = 32
"""Images decoded at a time: 6 MB."""


def decode(shards: Path, out: Path, workers: int | None = None) -> None:
    """Decode shards once, for GPUs that train faster than JPEGs decode. ImageNet takes 252 GB.

    The same command resumes an interrupted decode.

    Args:
        shards: Folder written by pack or adopt; it is only read.
        out: Folder to write into; new, or written by the same command.
        workers: Processes; every core by default.
    """
    processes = check_workers(workers)
    splits = {split: open_shards(shards, split) for split in find_splits(shards)}
    if any(source.is_decoded for source in splits.values()):
        raise UserError(f"{shards}: expected shards of images, got a pixel store; give the former")
    for split, source in splits.items():
        claim_split(out / split, source.manifest_sha256, [Path(tar).name for tar in source.tars])
    if not (out / "classes.json").exists():
        write_json(out / "classes.json", classes_json(read_classes(shards)))
    for split, source in splits.items():
        if (out / split / "manifest.json").exists():
            print(f"{out / split} is decoded already; nothing to do")
            continue
        counts = np.diff(source.find_starts()).tolist()
        todo = [
            n for n in range(len(counts)) if read_row(out / split, Path(source.tars[n]), counts[n]) is None
        ]
        started = time.perf_counter()
        write = partial(decode_shard, shards, split, out / split)
        run_jobs(write, todo, [counts[n] for n in todo], processes, f"decoding {split}", "img")
        seconds, images = time.perf_counter() - started, sum(counts[n] for n in todo)
        write_manifest(shards / split, out / split, [Path(tar) for tar in source.tars], counts)
        print(f"{out / split}: {source.num_samples} images, {images / seconds:.0f} images/s")
    if "train" in splits:
        copy_eigenbasis(shards, out, splits["train"].manifest_sha256)


def claim_split(directory: Path, source: str, tars: list[str]) -> None:
    """Create a split's folder, or check that it is a pixel store of the same shards. Raises `UserError`."""
    directory.mkdir(parents=True, exist_ok=True)
    known = {file for tar in tars for file in (tar, f"{tar[:-4]}.idx", f"{tar[:-4]}.json")}
    known |= {"manifest.json", SAMPLES, "plan.json"}
    others = [path.name for path in directory.iterdir() if path.name not in known and path.suffix != ".tmp"]
    records = [
        read_json(path) for name in ("plan.json", "manifest.json") if (path := directory / name).exists()
    ]
    if others or any(not isinstance(each, dict) or each.get("decoded_from") != source for each in records):
        raise UserError(
            f"{directory}: expected a new folder, or a pixel store of the same shards; give another folder"
        )
    if not records:
        write_json(directory / "plan.json", {"decoded_from": source})


def read_row(directory: Path, tar: Path, num_samples: int) -> dict[str, Any] | None:
    """Read a finished shard's row of the manifest; None if the shard is to be written."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        row: dict[str, Any] = json.loads((directory / tar.name).with_suffix(".json").read_bytes())
        if row["samples"] == num_samples and is_complete(directory / tar.name, row):
            return row
    return None


def decode_shard(shards: Path, split: str, directory: Path, number: int) -> None:
    """Decode one shard, unless another process is writing it. Raises `DataError`."""
    from pipeline.loader import decoded_batches

    source = open_shards(shards, split).only([number])
    path, index = directory / Path(source.tars[0]).name, []
    images = itertools.chain.from_iterable(batch.numpy() for batch in decoded_batches(source, BATCH_SIZE, 1))
    with suppress(BlockingIOError):
        with atomic_writer(path, wait=False) as file:
            tar = TarWriter(file)
            for row, pixels in enumerate(images):
                key, label = source.read_key(row), str(source.samples["label"][row]).encode()
                members = ((f"{key}.npy", npy_bytes(pixels)), (f"{key}.cls", label))
                index.append([tar.add(name, data) for name, data in members])
            tar.close()
        text = index_text(index).encode()
        write_bytes(path.with_suffix(".idx"), text)
        content_row = {"name": path.name, "samples": len(index), "bytes": tar.offset}
        content_row |= {"sha256": tar.digest.hexdigest(), "index_bytes": len(text)}
        write_json(path.with_suffix(".json"), content_row)


def npy_bytes(pixels: np.ndarray) -> bytes:
    """Return the content of a `.npy` file."""
    content = io.BytesIO()
    np.save(content, pixels)
    return content.getvalue()


def write_manifest(source: Path, directory: Path, tars: list[Path], counts: list[int]) -> None:
    """Write `samples.npy` and the manifest of a split whose shards are all there; remove what resuming needed."""
    manifest = read_json(source / "manifest.json")
    rows = [read_row(directory, tar, count) for tar, count in zip(tars, counts, strict=True)]
    if None in rows:
        raise UserError(
            f"{directory}: another decode is writing it; wait until it has ended, and start again"
        )
    labels = open_shards(source.parent, source.name).samples["label"]
    places = [
        (0, offset, size, 0)
        for tar in tars
        for (_, offset, size, _), _ in read_index((directory / tar.name).with_suffix(".idx"))
    ]
    samples = np.array(places, SAMPLE)
    samples["label"] = labels
    content = {name: manifest[name] for name in ("renamed", "repairs", "skipped") if name in manifest}
    content = {
        "format_version": FORMAT_VERSION,
        "split": source.name,
        "num_samples": len(samples),
        "num_classes": manifest["num_classes"],
        "source": manifest.get("source", "unknown"),
        "decoded_from": hash_manifest(manifest),
        "options": {"store": "pixels"},
        "versions": library_versions(),
        **content,
        "shards": rows,
        SAMPLES_SHA256: write_samples(directory, np.split(samples, np.cumsum(counts)[:-1])),
    }
    write_json(directory / "manifest.json", content)
    for tar in tars:
        (directory / tar.name).with_suffix(".json").unlink(missing_ok=True)
    (directory / "plan.json").unlink(missing_ok=True)


def copy_eigenbasis(shards: Path, out: Path, source: str) -> None:
    """Copy pca.json and mean_image.npy, if they were made of the same pixels: of these shards, decoded on a CPU."""
    if (out / "pca.json").exists():
        return
    try:
        content = read_eigenbasis(shards / "pca.json", source)
    except (FileNotFoundError, UserError):
        return
    if not content["decoder"].endswith(" cpu"):
        return
    image = read_mean_image(shards / "mean_image.npy", np.array(content["mean"]))
    if image is not None:
        write_bytes(out / "mean_image.npy", (shards / "mean_image.npy").read_bytes())
    identity = hash_manifest(read_json(out / "train" / "manifest.json"))
    write_json(out / "pca.json", content | {"manifest_sha256": identity})
