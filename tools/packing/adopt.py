"""Adopt WebDataset shards made elsewhere: write links, DALI indexes and a manifest; nothing is copied.

    python tools/make_shards.py adopt SRC SHARDS --split train --pattern 'imagenet1k-train-{0000..1023}.tar' [--convert]

Every tar is read in full. The index lists only the JPEG and the `.cls` of each sample. Every image is decoded: none can
be re-encoded here, so images that the loader might refuse are refused at once.

`--convert` writes a shard in place of each link, as pack writes those with `--store original`, and resumes as pack.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from pipeline.errors import UserError
from pipeline.files import read_json, sha256, write_bytes, write_json
from pipeline.shards import (
    FORMAT_VERSION,
    MAX_LABEL_DIGITS,
    SAMPLE,
    SAMPLES,
    SAMPLES_SHA256,
    ClassName,
    check_manifest,
    classes_json,
    open_shards,
    read_classes,
)
from tools.packing.images import find_fault, pack_image
from tools.packing.index import index_text, write_samples
from tools.packing.index import read_shard as read_rows
from tools.packing.labels import read_class_file
from tools.packing.listing import RawImage
from tools.packing.plan import Options, Sample, ShardPlan, library_versions
from tools.packing.pool import check_workers, run_jobs, set_current_item
from tools.packing.tars import RAW_EXTENSIONS, index_sample, read_samples, sanitize_name
from tools.packing.writer import RECORDS, read_sidecar, write_shard

MAX_TARS = 100_000
"""Names in a range of a pattern: braceexpand keeps all of them in memory."""
MAX_NUMBERED_CLASSES = 200_000
"""Classes without names; five times as many would take more than 1 GB."""
OnBad = Literal["fail", "skip"]
REMEDY = "download or make it again, or pack the raw images"


class ShardIndex(NamedTuple):
    """Content of one tar."""

    row: dict[str, Any]
    """Its row in the manifest."""
    index_text: bytes
    """Its DALI index; empty for a converted one, which has it."""
    samples: np.ndarray
    """Its rows of `samples.npy`."""
    max_label: int
    """The largest class index in it."""
    skipped: list[dict[str, Any]]
    """The manifest's rows of skipped samples."""
    repairs: list[dict[str, Any]]
    """Those of converted images."""


def adopt(
    src: Path,
    shards: Path,
    *,
    split: Literal["train", "val"],
    pattern: str,
    classes: Path | None = None,
    convert: bool = False,
    on_bad: OnBad = "fail",
    workers: int | None = None,
) -> None:
    """Use shards that other programs wrote, by links, without copying or changing them; or convert them.

    Adopt the split with all classes first: it writes classes.json, which the others must match.

    Args:
        src: Folder of the shards; it is only read.
        shards: Folder to write into; SHARDS/SPLIT must be new or written by the same command.
        split: Split that the shards become.
        pattern: Files of SRC, as a glob with webdataset's braces: name-{0000..1023}.tar.
        classes: Names of the classes: a text file with one WordNet id per line in sorted order, words after it, or
            a classes.json. By default classes are numbered.
        convert: Write own shards of the same names in place of links: other images than plain JPEGs are encoded, and
            labels may be the "label" or "cls" of a .json, as numbers or as names that --classes lists.
        on_bad: What to do with an image that DALI might refuse or decode differently (other formats, CMYK, damage;
            with --convert: an undecodable one): stop, or leave it out and list it in the manifest.
        workers: Processes; every core by default.
    """
    processes = check_workers(workers)
    tars = find_tars(src, pattern)
    directory = shards / split
    source = f"{'converted' if convert else 'adopted'} from {src.absolute()} with {pattern}"
    if shards.resolve().is_relative_to(src.resolve()):
        raise UserError(f"{shards}: expected a folder outside of {src}, which is only read; give another")
    if is_adopted(directory, tars, source, convert):
        remove_sidecars(directory)
        load_class_names(shards, classes, max_label=0, num_samples=1)  # raises for other --classes
        print(f"{directory} is adopted already; nothing to do")
        return
    present = shards / "classes.json"
    known = read_class_list(classes or present) if classes or present.exists() else ()
    options: dict[str, Any] = {"classes": {name.wnid: k for k, name in enumerate(known)}, "on_bad": on_bad}
    read = partial(read_shard, **options)
    if convert:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "plan.json", {"source": source})
        read = partial(convert_shard, directory, **options)
    indexes = run_jobs(read, tars, [tar.stat().st_size for tar in tars], processes, "reading")
    num_samples = sum(shard.row["samples"] for shard in indexes)
    skipped = [row for shard in indexes for row in shard.skipped]
    repairs = [row for shard in indexes for row in shard.repairs]
    max_label = max(shard.max_label for shard in indexes)
    names, origin = load_class_names(shards, classes, max_label, num_samples)

    directory.mkdir(parents=True, exist_ok=True)
    for tar, shard in () if convert else zip(tars, indexes, strict=True):
        link = directory / tar.name
        if not link.is_symlink():
            link.symlink_to(tar)
        write_bytes(link.with_suffix(".idx"), shard.index_text)
    if not (shards / "classes.json").exists():
        write_json(shards / "classes.json", classes_json(names))
    manifest = {
        "format_version": FORMAT_VERSION,
        "split": split,
        "num_samples": num_samples,
        "num_classes": len(names),
        "source": source,
        "options": {"store": "adopted"},
        **({"versions": library_versions()} if convert else {}),
        "renamed": {},
        "shards": [shard.row for shard in indexes],
        "repairs": repairs,
        "skipped": skipped,
        SAMPLES_SHA256: write_samples(directory, [shard.samples for shard in indexes]),
    }
    check_manifest(manifest, directory / "manifest.json")
    write_json(directory / "manifest.json", manifest)
    remove_sidecars(directory)
    counts = f"{num_samples} images in {len(tars)} shards, {len(skipped)} skipped"
    counts += f", {len(repairs)} converted or noted" if convert else ""
    print(f"{directory}: {counts}, {len(names)} classes {origin}")


def remove_sidecars(directory: Path) -> None:
    """Remove what resuming a conversion needed."""
    for path in set(directory.glob("*.json")) - {directory / "manifest.json"}:
        path.unlink(missing_ok=True)


def find_tars(src: Path, pattern: str) -> list[Path]:
    """Find the shards, as absolute paths sorted by name. Raises `FileNotFoundError` or `ValueError`."""
    from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

    if not src.is_dir():
        raise FileNotFoundError(f"{src}: not a directory; give the folder of the shards as SRC")
    if not pattern or Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        raise UserError(f"--pattern: expected names relative to {src}, without .., got {pattern!r}")
    if any(int(last) - int(first) > MAX_TARS for first, last in re.findall(r"\{(\d+)\.\.(\d+)", pattern)):
        raise UserError(f"--pattern: expected at most {MAX_TARS} names, got {pattern!r}")
    tars: dict[str, Path] = {}
    try:
        for part in braceexpand(pattern):
            matches = [path.absolute() for path in src.glob(part) if path.is_file()]
            if not matches:
                raise FileNotFoundError(f"{src / part}: not found; download it or change --pattern")
            for path in matches:
                if not re.fullmatch(r"[\w.-]+\.tar", path.name):
                    raise UserError(
                        f"{path}: expected NAME.tar (letters, digits, _ . -); unpack or rename it"
                    )
                if tars.setdefault(path.name, path) != path:
                    raise UserError(f"{path}: the same name as {tars[path.name]}; adopt one, or rename it")
    except UnbalancedBracesError as error:
        raise UserError(f"--pattern {pattern!r}: {error}; close every brace") from None
    return [tars[name] for name in sorted(tars)]


def is_adopted(directory: Path, tars: list[Path], source: str, convert: bool) -> bool:
    """Return True if these shards are already adopted in `directory`. Raises `UserError` if it holds anything else."""
    records = [read_json(directory / name) for name in RECORDS if (directory / name).is_file()]
    if any(not isinstance(record, dict) or record.get("source") != source for record in records):
        raise UserError(f"{directory}: packed, or adopted from elsewhere; give another folder or remove it")
    suffixes = (".tar", ".idx", ".json") if convert else (".tar", ".idx")
    known = {*RECORDS, SAMPLES, *(tar.with_suffix(suffix).name for tar in tars for suffix in suffixes)}
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        is_ours = bool(records) if convert else path.suffix != ".tar" or path.is_symlink()
        if path.suffix != ".tmp" and not (is_ours and path.name in known):
            raise UserError(
                f"{directory}: expected the shards of {source}, got {path.name}; give another folder or remove it"
            )
    if not (directory / "manifest.json").is_file():
        return False
    try:
        return len(open_shards(directory.parent, directory.name).tars) == len(tars)
    except (FileNotFoundError, ValueError):
        return False


def load_class_names(
    shards: Path, file: Path | None, max_label: int, num_samples: int
) -> tuple[tuple[ClassName, ...], str]:
    """Load the classes, and a text on their origin. Raises `UserError` where the labels do not fit."""
    place = shards / "classes.json"
    names = read_classes(shards) if place.exists() else None
    if file is not None:
        listed = read_class_list(file)
        if names not in (None, listed):
            raise UserError(
                f"{file}: expected the classes of {place}; leave --classes out or give another folder"
            )
        names, place = listed, file
    if names is None:
        if max_label >= max(num_samples, MAX_NUMBERED_CLASSES):  # not a class: an ID, a checksum
            raise UserError(
                f"expected labels below {num_samples}, the images, got {max_label}; correct it or give --classes FILE"
            )
        names = tuple(ClassName(f"{k:0{MAX_LABEL_DIGITS}}", f"class {k}") for k in range(max_label + 1))
        return names, "(numbered from 000000; name them by --classes FILE)"
    if max_label >= len(names):
        raise UserError(
            f"{place}: expected more than {max_label} classes, as the shards have labels, got {len(names)}; adopt the "
            "split with all classes first, into another folder, or give other --classes"
        )
    return names, f"of {place}"


def read_class_list(path: Path) -> tuple[ClassName, ...]:
    """Read the classes in the order of the labels. Raises `UserError` unless it is the sorted one."""
    names = read_class_file(path)
    if names != sorted(names, key=lambda name: name.wnid):
        raise UserError(f"{path}: expected classes in sorted order, the order of the labels; sort it")
    return tuple(names)


def read_shard(path: Path, classes: Mapping[str, int], on_bad: OnBad) -> ShardIndex:
    """Index one tar. Raises `UserError` with its name and the sample."""
    index, rows, max_label, remedy = [], [], -1, REMEDY
    skipped: list[dict[str, Any]] = []
    with path.open("rb") as file:
        sha256, size = hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
        try:
            for key, members in read_samples(file):
                try:
                    entries, image, label = index_sample(file, key, members)
                except UserError:
                    index_sample(file, key, members, RAW_EXTENSIONS, classes)  # raises if --convert would
                    remedy = "--convert writes shards of JPEG and .cls"
                    raise
                place = f"{sanitize_name(image.name)} at byte {image.offset}"
                set_current_item(f"{place} of {path}")
                max_label = max(max_label, label)
                fault = find_fault(raw := os.pread(file.fileno(), image.size, image.offset))
                if fault and on_bad == "fail":
                    remedy = "--on-bad skip leaves such images out"
                    with suppress(UserError):  # decodable
                        fault = pack_image(raw, "original", 90).found
                        remedy = f"--convert encodes it, {remedy}"
                    raise UserError(f"{place} (key {sanitize_name(key)}): {fault}")
                if fault:
                    row = {"key": sanitize_name(key), "name": sanitize_name(image.name), "reason": fault}
                    skipped.append({**row, "shard": path.name, "offset": image.offset})
                else:
                    index.append(entries)
                    rows.append((0, image.offset, image.size, label))
            if not index:
                raise UserError(f"no{' valid' if skipped else ''} sample found")
        except ValueError as error:
            raise UserError(f"{path}: {error}; {remedy}") from None
    content = {"name": path.name, "samples": len(index), "bytes": size, "sha256": sha256}
    return ShardIndex(content, index_text(index).encode(), np.array(rows, SAMPLE), max_label, skipped, [])


def convert_shard(directory: Path, path: Path, classes: Mapping[str, int], on_bad: OnBad) -> ShardIndex:
    """Write a shard of ours with the samples of one tar, unless it is there. Raises `UserError` as `read_shard`."""
    samples: list[Sample] = []
    with path.open("rb") as file:
        try:
            for key, members in read_samples(file):
                _, image, label = index_sample(file, key, members, RAW_EXTENSIONS, classes)
                samples.append((key, RawImage(image.name, str(path), image.offset, image.size, label)))
        except ValueError as error:
            raise UserError(f"{path}: {error}; {REMEDY}") from None
    digest = sha256(json.dumps([samples, library_versions()]).encode())
    plan = ShardPlan(directory / path.name, samples, Options("original", on_bad=on_bad), digest)
    write_shard(plan)
    note = read_sidecar(plan.path, digest, len(samples))
    if note is None:
        raise UserError(f"{plan.path}: another process writes it; wait until it has ended, and start again")
    if not note["shard"]["samples"]:
        raise UserError(f"{path}: no{' valid' if samples else ''} sample found; {REMEDY}")
    rows = read_rows(directory, 10**MAX_LABEL_DIGITS, note["shard"])
    return ShardIndex(note["shard"], b"", rows, int(rows["label"].max()), note["skipped"], note["repairs"])
