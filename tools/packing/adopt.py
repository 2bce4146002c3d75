"""Adopt WebDataset shards made elsewhere: links, DALI indexes and a manifest in a shard directory; nothing is copied.

    python tools/make_shards.py adopt SRC SHARDS --split train --pattern 'imagenet1k-train-{0000..1023}.tar'

Every tar is read in full. Of each sample the index lists the JPEG and the `.cls` alone. Every image is decoded: nothing
can be re-encoded here, so what the pipeline might refuse is refused at once.
"""

import hashlib
import os
import re
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline.files import read_json, write_bytes, write_json
from pipeline.shards import (
    FORMAT_VERSION,
    MAX_LABEL_DIGITS,
    ClassName,
    check_manifest,
    classes_json,
    index_text,
    open_shards,
    read_classes,
)
from tools.packing.images import find_fault
from tools.packing.pool import check_workers, map_shards, name_work
from tools.packing.tars import READ_BYTES, index_sample, printable, read_samples

MOST_TARS = 100_000
"""That a range in a pattern may stand for: braceexpand holds all of its names."""
MADE_UP_CLASSES = 200_000
"""That are numbered without question; five times as many would take more than 1 GB."""


class Indexed(NamedTuple):
    """What one tar holds."""

    row: dict[str, Any]
    """Its row in the manifest."""
    index_text: bytes
    """Its DALI index."""
    max_label: int
    """The largest class index in it."""
    skipped: list[dict[str, Any]]
    """Rows for the manifest of the samples that were left out."""


def adopt(
    src: Path,
    shards: Path,
    *,
    split: Literal["train", "val"],
    pattern: str,
    classes: Path | None = None,
    on_bad: Literal["fail", "skip"] = "fail",
    workers: int | None = None,
) -> None:
    """Make shards that other programs wrote usable here, by links, without copying or changing them.

    Adopt the split with all classes first: the first one writes classes.json, the others have to fit it.

    Args:
        src: Folder that holds the shards; it is only read.
        shards: Folder to write into; SHARDS/SPLIT must be new or left by the same command.
        split: What the shards become.
        pattern: Which files of SRC, as a glob and with braces as webdataset writes them: name-{0000..1023}.tar.
        classes: Names of the classes: a text file with one WordNet id per line in sorted order, words after it, or
            a classes.json. By default classes are numbered.
        on_bad: What to do with an image that DALI might refuse or show otherwise than viewers do (other formats, CMYK,
            damage): stop, or leave it out of the index and list it in the manifest.
        workers: Processes; every core by default.
    """
    processes = check_workers(workers)
    tars = find_tars(src, pattern)
    directory, source = shards / split, f"adopted from {src.absolute()} with {pattern}"
    if shards.resolve().is_relative_to(src.resolve()):
        raise ValueError(f"{shards} lies inside {src}, which is only read; give a folder elsewhere")
    if is_adopted(directory, tars, source):
        print(f"{directory} is adopted already; nothing to do")
        return
    read = partial(read_shard, on_bad=on_bad)
    found = map_shards(read, tars, [tar.stat().st_size for tar in tars], processes, "reading")
    num_samples, max_label = (
        sum(shard.row["samples"] for shard in found),
        max(shard.max_label for shard in found),
    )
    skipped = [row for shard in found for row in shard.skipped]
    if max_label >= max(num_samples, MADE_UP_CLASSES) and not (classes or (shards / "classes.json").exists()):
        raise ValueError(
            f"{src} holds label {max_label}, but {num_samples} images; mend that label or give --classes"
        )
    names, origin = class_names(shards, classes, max_label)

    directory.mkdir(parents=True, exist_ok=True)
    for tar, shard in zip(tars, found, strict=True):
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
        "renamed": {},
        "shards": [shard.row for shard in found],
        "repairs": [],
        "skipped": skipped,
    }
    check_manifest(manifest, directory / "manifest.json")
    write_json(directory / "manifest.json", manifest)
    counts = f"{num_samples} images in {len(tars)} shards, {len(skipped)} skipped"
    print(f"{directory}: {counts}, {len(names)} classes {origin}")


def find_tars(src: Path, pattern: str) -> list[Path]:
    """Absolute paths of the shards in the order of their names. Raises `FileNotFoundError` or `ValueError`."""
    from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

    if not src.is_dir():
        raise FileNotFoundError(f"{src} is not a folder; SRC is the one that holds the shards")
    if not pattern or pattern.startswith("/") or ".." in Path(pattern).parts or "\0" in pattern:
        raise ValueError(f"--pattern: expected names relative to {src}, without .., got {pattern!r}")
    for first, last in re.findall(r"\{(\d+)\.\.(\d+)", pattern):
        if abs(int(first) - int(last)) > MOST_TARS:
            raise ValueError(f"--pattern: expected at most {MOST_TARS} names, got {pattern!r}")
    tars: dict[str, Path] = {}
    try:
        for part in braceexpand(pattern):  # stops at the first that is missing, however many it stands for
            matches = [path.absolute() for path in src.glob(part) if path.is_file()]
            if not matches:
                raise FileNotFoundError(
                    f"{src / part} is missing or matches no file; fetch it or change --pattern"
                )
            for path in matches:
                if not re.fullmatch(r"[\w.-]+\.tar", path.name):
                    raise ValueError(
                        f"{path} is not called NAME.tar (letters, digits, _ . -); unpack or rename it"
                    )
                if tars.setdefault(path.name, path) != path:
                    raise ValueError(
                        f"{path} and {tars[path.name]} have the same name; adopt one, or rename it"
                    )
    except UnbalancedBracesError as error:
        raise ValueError(f"--pattern {pattern!r}: {error}; close every brace") from None
    return [tars[name] for name in sorted(tars)]


def is_adopted(directory: Path, tars: list[Path], source: str) -> bool:
    """Whether these shards are adopted there already. Raises `ValueError` where anything else is."""
    wanted = {name: tar for tar in tars for name in (tar.name, tar.with_suffix(".idx").name)}
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        if path.name == "manifest.json" or path.suffix == ".tmp":
            continue
        ours = path.name in wanted
        if ours and path.suffix == ".tar":
            ours = path.is_symlink() and path.readlink() == wanted[path.name]
        if not ours:
            raise ValueError(
                f"{directory} holds something else ({path.name}); give another folder or remove it"
            )
    path = directory / "manifest.json"
    if not path.is_file():
        return False
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("source") != source:
        raise ValueError(
            f"{directory} was packed or adopted from elsewhere; give another folder or remove it"
        )
    try:
        opened = open_shards(directory.parent, directory.name)
    except (FileNotFoundError, ValueError):
        return False
    return [Path(tar).name for tar in opened.tars] == [tar.name for tar in tars]


def class_names(shards: Path, file: Path | None, max_label: int) -> tuple[tuple[ClassName, ...], str]:
    """The classes, and for the output where they come from. Raises `ValueError` where the labels do not fit."""
    existing = shards / "classes.json"
    given = read_class_file(file) if file is not None else None
    if existing.exists():
        names, place = read_classes(shards), existing
        if given is not None and given != names:
            raise ValueError(
                f"{file} and {existing} list other classes; leave --classes out or give another folder"
            )
    elif given is not None:
        assert file is not None
        names, place = given, file
    else:
        names = tuple(ClassName(f"{k:0{MAX_LABEL_DIGITS}}", f"class {k}") for k in range(max_label + 1))
        return names, "(numbered 000000...; --classes FILE names them)"
    if max_label >= len(names):
        raise ValueError(
            f"the shards hold label {max_label}, {place} lists {len(names)} classes; adopt the split with all classes "
            "first, into another folder, or give the right --classes"
        )
    return names, f"of {place}"


def read_class_file(path: Path) -> tuple[ClassName, ...]:
    """Read a classes.json, or lines of a WordNet id and words. Raises `FileNotFoundError` or `ValueError`."""
    if path.name == "classes.json":
        return read_classes(path.parent)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; --classes is a text file of one WordNet id per line")
    try:
        lines = [line.split(maxsplit=1) for line in path.read_bytes().decode().splitlines() if line.strip()]
    except UnicodeDecodeError:
        lines = []
    wnids = [line[0] for line in lines]
    if not wnids or wnids != sorted(set(wnids)):
        raise ValueError(
            f"{path} does not list one WordNet id per line in sorted order; labels count in that order"
        )
    return tuple(ClassName(line[0], line[-1].strip()) for line in lines)


def read_shard(path: Path, on_bad: str = "fail") -> Indexed:
    """Index one tar. Raises `ValueError` that names it and the sample."""
    index, max_label = [], -1
    skipped: list[dict[str, Any]] = []
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
        size = file.tell()
        try:
            for key, members in read_samples(file):
                entries, image, label = index_sample(file, key, members)
                place = f"{printable(image.name)} at byte {image.offset}"
                name_work(f"{place} of {path}")
                max_label = max(max_label, label)
                fault = find_fault(os.pread(file.fileno(), image.size, image.offset))
                if fault and on_bad == "fail":
                    raise ValueError(
                        f"{place} (key {printable(key)}): {fault} (--on-bad skip leaves such images out)"
                    )
                if fault:
                    row = {"key": printable(key), "name": printable(image.name), "reason": fault}
                    skipped.append({**row, "shard": path.name, "offset": image.offset})
                else:
                    index.append(entries)
            if not index:
                raise ValueError(f"holds no sample{' that can be read as it is' if skipped else ''}")
        except ValueError as error:
            raise ValueError(f"{path}: {error}; fetch or make it again, or pack the raw images") from None
    counted = {"name": path.name, "samples": len(index), "bytes": size, "sha256": digest.hexdigest()}
    return Indexed(counted, index_text(index).encode(), max_label, skipped)
