"""Write where each sample lies: `samples.npy`, by which training reads, and DALI's indexes.

python tools/make_shards.py index SHARDS [--out DIR]
"""

import os
import tarfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import UserError
from pipeline.files import atomic_writer, check_writable, hash_file, read_json, write_bytes, write_json
from pipeline.shards import (
    SAMPLE,
    SAMPLES,
    SAMPLES_SHA256,
    check_manifest,
    hash_manifest,
    open_shards,
    read_classes,
    read_header,
)
from tools.packing.pool import check_workers, run_jobs
from tools.packing.tars import Member, read_label, sanitize_name

Index = list[list[tuple[str, int, int, str]]]
"""For each sample its members as (extension, offset of the data in bytes, size in bytes, member name)."""
SPLITS = ("train", "val")
TOP_FILES = ("classes.json", "pca.json", "mean_image.npy")
"""Files next to the splits that `--out` copies."""


def index_text(samples: Index) -> str:
    """Format a DALI webdataset index (format v1.2, as `wds2idx` of DALI 2.4 writes it)."""
    lines = [
        " ".join(f"{ext} {offset} {size} {name}" for ext, offset, size, name in members)
        for members in samples
    ]
    return "\n".join([f"v1.2 {len(samples)}", *lines]) + "\n"


def read_index(path: Path) -> Index:
    """Parse what `index_text` wrote. Raises `UserError` when the file is not such an index."""
    try:
        header, *lines = path.read_bytes().decode().splitlines()
        rows = [line.split(" ") for line in lines]
        samples = [
            [
                (ext, int(offset), int(size), name)
                for ext, offset, size, name in zip(*[iter(row)] * 4, strict=True)
            ]
            for row in rows
        ]
        if any(not 0 <= number < 2**62 for row in samples for _, *numbers, _ in row for number in numbers):
            raise ValueError
    except ValueError:
        header, samples = "", []
    if header.split() != ["v1.2", str(len(samples))]:
        raise UserError(f"{path} is damaged or not a DALI index of format v1.2; copy it again or pack again")
    return samples


def write_samples(directory: Path, shards: Sequence[np.ndarray]) -> str:
    """Write a split's `samples.npy` and return its SHA-256, which belongs into the manifest.

    Args:
        directory: Folder of the split.
        shards: `SAMPLE` (samples,) of each shard, in the manifest's order; numbers of shards are filled in.
    """
    samples = np.concatenate(shards)
    samples["shard"] = np.repeat(np.arange(len(shards)), [len(rows) for rows in shards])
    with atomic_writer(directory / SAMPLES) as file:
        np.save(file, samples)
    return hash_file(directory / SAMPLES)


def index(shards: Path, out: Path | None = None, workers: int | None = None) -> None:
    """Write samples.npy, which training needs, for shards of version 0.1. The shards and what names them stay the same.

    Args:
        shards: Folder written by pack or adopt.
        out: Write into this folder instead, with links to the shards, if SHARDS cannot be written.
        workers: Processes; every core by default.
    """
    processes, target = check_workers(workers), out or shards
    splits, classes = find_splits(shards), read_classes(shards)
    found: dict[str, tuple[dict[str, Any], list[np.ndarray]]] = {}
    for split in splits:
        path = shards / split / "manifest.json"
        manifest = read_json(path)
        check_manifest(manifest, path)
        if is_indexed(target / split, manifest):
            print(f"{target / split} has its {SAMPLES} already; nothing to do")
            continue
        if out is None:
            try:
                check_writable(shards / split / SAMPLES)
            except PermissionError:
                raise UserError(
                    f"{shards / split}: cannot be written; write into another folder with --out DIR"
                ) from None
        read = partial(read_shard, shards / split, len(classes))
        sizes = [row["samples"] for row in manifest["shards"]]
        found[split] = (
            manifest,
            run_jobs(read, manifest["shards"], sizes, processes, f"indexing {split}", "img"),
        )
    if out and found:
        link_shards(shards, out, {split: manifest for split, (manifest, _) in found.items()})
    for split, (manifest, rows) in found.items():
        checksum = write_samples(target / split, rows)
        write_json(target / split / "manifest.json", manifest | {SAMPLES_SHA256: checksum})
        print(f"{target / split}: {manifest['num_samples']} samples of {len(rows)} shards")


def find_splits(shards: Path) -> list[str]:
    """Find the splits with a manifest. Raises `FileNotFoundError` or `ValueError`."""
    if not shards.is_dir():
        raise FileNotFoundError(f"{shards}: not a directory; give the folder that pack or adopt wrote")
    splits = [split for split in SPLITS if (shards / split / "manifest.json").is_file()]
    if not splits:
        raise UserError(
            f"{shards}: expected train/manifest.json or val/manifest.json, got neither; pack or adopt first"
        )
    return splits


def is_indexed(directory: Path, manifest: dict[str, Any]) -> bool:
    """Return True if a folder has the samples of this manifest. Raises `UserError` if it has other shards."""
    path = directory / "manifest.json"
    if not path.exists():
        return False
    present = read_json(path)
    if not isinstance(present, dict) or hash_manifest(present) != hash_manifest(manifest):
        raise UserError(f"{path}: expected the same shards, got others; give another folder")
    try:
        open_shards(directory.parent, directory.name)
    except (FileNotFoundError, UserError):
        return False
    return True


def link_shards(shards: Path, out: Path, manifests: dict[str, dict[str, Any]]) -> None:
    """Link shards and copy the files next to them, except those that are there. Raises `UserError` for others."""
    tars = [Path(split, row["name"]) for split, content in manifests.items() for row in content["shards"]]
    links = [file for tar in tars for file in (tar, tar.with_suffix(".idx"))]
    present = [name for name in links if os.path.lexists(out / name)]
    for name in present:
        if not ((out / name).is_symlink() and (out / name).readlink() == (shards / name).absolute()):
            raise UserError(
                f"{out / name}: expected a link to {shards / name}, got another file; give a new folder"
            )
    if (out / "classes.json").exists() and read_classes(out) != read_classes(shards):
        raise UserError(f"{out}: holds shards of other classes; give a new folder")
    for split in manifests:
        (out / split).mkdir(parents=True, exist_ok=True)
    for file in TOP_FILES:
        if (shards / file).is_file() and not (out / file).exists():
            write_bytes(out / file, (shards / file).read_bytes())
    for name in set(links) - set(present):
        (out / name).symlink_to((shards / name).absolute())


def read_shard(directory: Path, num_classes: int, shard: dict[str, Any]) -> np.ndarray:
    """Read a shard's rows of `samples.npy`: places from its index, labels from the tar.

    Args:
        directory: Folder of the split.
        num_classes: Number of classes.
        shard: The shard's row of the manifest.

    Raises `UserError` with shard and sample, `FileNotFoundError`.
    """
    tar, rows = directory / shard["name"], list[tuple[int, int, int, int]]()
    samples = read_index(tar.with_suffix(".idx"))
    with tar.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no readahead of the whole shard
        size = os.fstat(file.fileno()).st_size
        if (size, len(samples)) != (shard["bytes"], shard["samples"]):
            expected = f"{shard['bytes']} bytes and {shard['samples']} samples in its .idx"
            raise UserError(f"{tar}: expected {expected}, got {size} and {len(samples)}; copy both again")
        for members in samples:
            places = {extension: Member(name, offset, size) for extension, offset, size, name in members}
            try:
                image, label = places["jpg" if "jpg" in places else "npy"], places["cls"]
                member = label._replace(size=read_header(file, label.offset).size)
                is_next = image.offset > (rows[-1][1] if rows else 0) and image.offset + image.size <= size
                fits = read_header(file, image.offset).size == image.size and member.size >= label.size
                if not (is_next and fits):
                    raise ValueError
            except (LookupError, ValueError, OSError, tarfile.TarError):
                name = sanitize_name(members[0][3]) if members else "a line"
                raise UserError(f"{tar}: its .idx does not fit at {name}; copy both again") from None
            try:
                number = int(read_label(file, member))
                if number >= num_classes:
                    raise UserError(f"expected a label below {num_classes}, got {number}")
            except UserError as error:
                raise UserError(f"{tar}: {sanitize_name(image.name)}: {error}; pack or adopt again") from None
            rows.append((0, image.offset, image.size, number))
    return np.array(rows, SAMPLE)
