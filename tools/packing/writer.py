"""Write shards with many processes, on one or more machines that share only the output folder.

The unit of work is the shard. It is written under a lock that is released when its process dies, and is renamed into
place when it is complete; then its index, then its sidecar `NAME.json` with their sizes and checksum. So a killed pack
resumes, and two packers on the same output share the work.

`plan.json` identifies the pack of an unfinished split. The packer that finds all sidecars of a split merges them into
`manifest.json`, after `samples.npy`, and removes them; packers that do so at the same time write the same bytes.
"""

import fnmatch
import hashlib
import itertools
import json
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pipeline.errors import UserError
from pipeline.files import atomic_writer, read_json, write_bytes, write_json
from pipeline.shards import FORMAT_VERSION, SAMPLE, SAMPLES, SAMPLES_SHA256, check_manifest, open_samples
from tools.packing.images import Packed, pack_image
from tools.packing.index import index_text, read_index, write_samples
from tools.packing.plan import Options, Plan, Sample, ShardPlan, library_versions
from tools.packing.pool import set_current_item
from tools.packing.tars import sanitize_name

READ_AHEAD = 16
"""Images that the kernel reads ahead of the one being packed."""
RECORDS = ("manifest.json", "plan.json")
"""Files that identify the pack of a split: finished, unfinished."""
LISTING = "listing.npz"
"""The cached listing of the raw images, next to the splits."""
TOP_FILES = ("classes.json", LISTING, "pca.*", "mean_image.*", "preview.png")
"""Patterns of the files next to the splits."""
SPILL = "spill-*"
"""Folder in a split where `parquet.py` keeps packed images until their shard is written."""
Pack = Callable[[Sample], tuple[Packed | str, int]]
"""Function from a sample to its packed image, or the reason to skip it, and the size of its file."""


class PackStats(NamedTuple):
    """Counts of one unit of work."""

    images: int = 0
    bytes_read: int = 0
    bytes_written: int = 0


def write_shard(plan: ShardPlan, pack: Pack | None = None) -> PackStats:
    """Read, pack (by default with `pack_sample`) and write the images of one shard."""

    def iter_packed() -> Iterator[tuple[Sample, tuple[Packed | str, int]]]:
        for _, image in plan.samples[:READ_AHEAD]:
            image.prefetch()
        for sample, ahead in itertools.zip_longest(plan.samples, plan.samples[READ_AHEAD:]):
            if ahead:
                ahead[1].prefetch()
            yield sample, pack(sample) if pack else pack_sample(sample, plan.options)

    return write_packed(plan, iter_packed())


def pack_sample(sample: Sample, options: Options, raw: bytes | None = None) -> tuple[Packed | str, int]:
    """Pack one image, reading its file unless given. Returns the image or the reason to skip it, and the file's size.

    Raises `UserError` with archive, name and key for an undecodable image, unless `on_bad` is "skip".
    """
    key, image = sample
    set_current_item(f"{image.escaped_name} in {image.file}")
    try:
        raw = image.read() if raw is None else raw
        return pack_image(raw, options.store, options.quality), len(raw)
    except ValueError as error:
        if options.on_bad == "fail":
            raise UserError(
                f"{image.escaped_name} in {image.file} (key {key}): {error}; --on-bad skip leaves such images out"
            ) from None
        return str(error), image.size


def write_packed(plan: ShardPlan, packed: Iterable[tuple[Sample, tuple[Packed | str, int]]]) -> PackStats:
    """Write one shard: the tar, then its index, then `NAME.json` with its checksum and the notes on its images.

    Does nothing where another process is writing it, or has written it meanwhile.
    """
    if read_sidecar(plan.path, plan.digest, len(plan.samples)):
        return PackStats()
    try:
        with atomic_writer(plan.path, wait=False) as file:
            tar, index, bytes_read = TarWriter(file), [], 0
            repairs: list[dict[str, str]] = []
            skipped: list[dict[str, str]] = []
            for (key, image), (result, size) in packed:
                bytes_read += size
                note_key = sanitize_name(key)  # another program's may be of any characters, ours are not
                if isinstance(result, str):
                    skipped.append({"key": note_key, "name": image.escaped_name, "reason": result})
                    continue
                if result.found:
                    repairs.append({"key": note_key, "found": result.found, "done": result.done})
                members = ((f"{key}.jpg", result.jpeg), (f"{key}.cls", str(image.label).encode()))
                index.append([tar.add(name, data) for name, data in members])
            tar.close()
    except BlockingIOError:
        return PackStats()
    index_bytes = index_text(index).encode()
    write_bytes(plan.path.with_suffix(".idx"), index_bytes)
    shard = {
        "name": plan.path.name,
        "samples": len(index),
        "bytes": tar.offset,
        "sha256": tar.digest.hexdigest(),
        "index_bytes": len(index_bytes),
    }
    note = {"plan": plan.digest, "shard": shard, "repairs": repairs, "skipped": skipped}
    write_json(plan.path.with_suffix(".json"), note)
    return PackStats(len(plan.samples), bytes_read, tar.offset)


class TarWriter:
    """Plain USTAR members (mtime, uid and gid 0), or PAX ones where names need it, hashed as they are written."""

    def __init__(self, file: BinaryIO) -> None:
        """Write to an empty `file`."""
        self.file, self.offset, self.digest = file, 0, hashlib.sha256()

    def add(self, name: str, data: bytes) -> tuple[str, int, int, str]:
        """Append a member; returns its entry in the index."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self.write(info.tobuf(tarfile.PAX_FORMAT))
        offset = self.offset
        self.write(data)
        self.write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return name.rsplit(".", 1)[1], offset, len(data), sanitize_name(name)

    def close(self) -> None:
        """Write the end mark."""
        end = 2 * tarfile.BLOCKSIZE
        self.write(bytes(end + -(self.offset + end) % tarfile.RECORDSIZE))

    def write(self, data: bytes) -> None:
        """Append bytes."""
        self.file.write(data)
        self.digest.update(data)
        self.offset += len(data)


def is_top_file(name: str) -> bool:
    """Return True if our programs write a file of this name next to the splits."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in TOP_FILES)


def check_output(shards: Path, classes: dict[str, Any], plans: list[Plan]) -> None:
    """Raise `UserError` for an output folder that holds anything but this pack."""
    splits = {plan.directory.name for plan in plans}
    present = {path.name for path in shards.iterdir() if path.suffix != ".tmp"} if shards.is_dir() else set()
    foreign = sorted(name for name in present - splits if not is_top_file(name))
    if (shards.exists() and not shards.is_dir()) or foreign:
        reason = f"it holds {foreign[0]}" if foreign else "it is a file"
        raise UserError(
            f"{shards}: expected a new folder or one of the same command, but {reason}; give another"
        )
    if "classes.json" in present and read_json(shards / "classes.json") != classes:
        raise UserError(f"{shards}: holds shards of other classes; give another folder")
    for plan in plans:
        records = [plan.directory / name for name in RECORDS if (plan.directory / name).is_file()]
        for path in records:
            check_same_pack(path, plan)
        known = {plan.path(number).stem for number in range(plan.num_shards)} if records else set()
        records += [plan.directory / SAMPLES] * bool(records)
        for path in plan.directory.glob("*"):
            if not (path.stem in known or path in records or path.suffix == ".tmp" or path.match(SPILL)):
                raise UserError(
                    f"{path}: expected plan.json or manifest.json and the shards that they name; remove it or give "
                    "another folder"
                )


def claim_output(shards: Path, classes: dict[str, Any], plans: list[Plan]) -> None:
    """Create the output folders and claim them for this pack. Raises `UserError` before anything is written."""
    check_output(shards, classes, plans)
    for plan in plans:
        plan.directory.mkdir(parents=True, exist_ok=True)
        if not (plan.directory / "manifest.json").is_file():
            path = plan.directory / "plan.json"
            with atomic_writer(path) as file:  # locked: others wait for the first, whose content stays
                content = {"plan": plan.digest, "options": asdict(plan.options)}
                file.write(path.read_bytes() if path.is_file() else json.dumps(content).encode())
            check_same_pack(path, plan)
    # After the claim: another packer that was first may have other classes.
    if not (shards / "classes.json").is_file():
        write_json(shards / "classes.json", classes)


def check_same_pack(path: Path, plan: Plan) -> None:
    """Raise `UserError` if `path`, a `manifest.json` or `plan.json`, is of another pack."""
    record = read_json(path)
    record = record if isinstance(record, dict) else {}
    if record.get("plan") == plan.digest:
        return
    before, now = record.get("options"), asdict(plan.options)
    for name in sorted(now.keys() - {"on_bad"}):
        if isinstance(before, dict) and before.get(name, now[name]) != now[name]:
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{path.parent}: expected {option} {before[name]}, as it was packed, got {now[name]}; give "
                f"{option} {before[name]} to resume, or another folder, or remove {path.parent.parent}"
            )
    raise UserError(
        f"{path.parent}: packed from other images, or by other versions of this program, Pillow, simplejpeg or torch; "
        "remove it or give another folder"
    )


def read_sidecar(path: Path, digest: str, num_samples: int) -> dict[str, Any] | None:
    """Read the `NAME.json` of a finished shard; None if the shard is to be written (again)."""
    try:
        note: dict[str, Any] = json.loads(path.with_suffix(".json").read_bytes())
        is_whole = note["shard"]["samples"] + len(note["skipped"]) == num_samples
        is_ours = note["plan"] == digest and isinstance(note["repairs"], list)
        return note if is_whole and is_ours and is_complete(path, note["shard"]) else None
    except (OSError, ValueError, LookupError, TypeError):  # missing or damaged
        return None


def read_sidecars(plan: Plan) -> dict[int, dict[str, Any]]:
    """Read the `NAME.json` of all finished shards, by number."""
    sizes = enumerate(plan.num_images(range(plan.num_shards)))
    sidecars = {number: read_sidecar(plan.path(number), plan.digest, size) for number, size in sizes}
    return {number: note for number, note in sidecars.items() if note}


def is_complete(path: Path, row: dict[str, Any]) -> bool:
    """Return True if a shard and its index exist with their recorded sizes."""
    sizes = ((path, row["bytes"]), (path.with_suffix(".idx"), row["index_bytes"]))
    return all(file.is_file() and file.stat().st_size == size for file, size in sizes)


def find_unfinished(plan: Plan) -> list[int]:
    """List the shards that are missing, or not of the size that `NAME.json` (later the manifest) records."""
    # Sidecars first: another packer that finishes now writes the manifest before it removes them.
    finished = read_sidecars(plan)
    numbers = range(plan.num_shards)
    if manifest := read_manifest(plan):
        rows = {row["name"]: row for row in manifest["shards"]}  # a shard without an image is not in it
        return [
            n for n in numbers if (row := rows.get(plan.path(n).name)) and not is_complete(plan.path(n), row)
        ]
    return [number for number in numbers if number not in finished]


def read_manifest(plan: Plan) -> dict[str, Any] | None:
    """Read the manifest of a split; None if it is unfinished. Raises `UserError` as `check_whole`."""
    path = plan.directory / "manifest.json"
    if not path.is_file():
        return None
    manifest: dict[str, Any] = read_json(path)
    check_whole(plan, manifest)
    return manifest


def check_whole(plan: Plan, manifest: dict[str, Any]) -> None:
    """Raise `UserError` unless all images of a split are in its manifest."""
    path = plan.directory / "manifest.json"
    check_manifest(manifest, path)
    has_fields = {"repairs", "skipped"} <= manifest.keys() and all(
        "index_bytes" in row for row in manifest["shards"]
    )
    if not has_fields or manifest["num_samples"] + len(manifest["skipped"]) != len(plan.listing):
        raise UserError(f"{path}: expected {len(plan.listing)} images, packed or skipped; restore it")


def write_manifest(plan: Plan, num_classes: int, layout: str) -> dict[str, Any] | None:
    """Merge the shards' `NAME.json` into `manifest.json`, then remove them; None while shards are missing. Writes
    `samples.npy` unless it is there.

    Any number of packers may do so at the same time: they write the same bytes.
    """
    sidecars, manifest = read_sidecars(plan), read_manifest(plan)
    if manifest is None:
        if len(sidecars) < plan.num_shards:
            return None
        rows = [sidecars[number] for number in range(plan.num_shards)]
        num_samples = sum(note["shard"]["samples"] for note in rows)
        if not num_samples:
            remedy = "choose another --val-fraction" if plan.directory.name == "val" else "are they images?"
            raise UserError(f"{plan.directory.name}: no image could be decoded; {remedy}")
        manifest = {
            "format_version": FORMAT_VERSION,
            "split": plan.directory.name,
            "num_samples": num_samples,
            "num_classes": num_classes,
            "source": layout,
            "options": asdict(plan.options),
            "versions": library_versions(),
            "plan": plan.digest,
            "renamed": dict(plan.renamed_keys()),
            "shards": [note["shard"] for note in rows if note["shard"]["samples"]],
            "repairs": [row for note in rows for row in note["repairs"]],
            "skipped": [row for note in rows for row in note["skipped"]],
        }
        check_whole(plan, manifest)
    try:
        open_samples(plan.directory, manifest)
    except (FileNotFoundError, UserError):  # a new manifest, one of version 0.1, or a table that was removed
        manifest[SAMPLES_SHA256] = write_samples(plan.directory, list_samples(plan, manifest))
        write_json(plan.directory / "manifest.json", manifest)
    (plan.directory / "plan.json").unlink(missing_ok=True)
    for spill in plan.directory.glob(SPILL):
        shutil.rmtree(spill, ignore_errors=True)
    written = {row["name"] for row in manifest["shards"]}
    for number in range(plan.num_shards):
        tar = plan.path(number)
        tar.with_suffix(".json").unlink(missing_ok=True)
        if tar.name not in written:  # all of its images were skipped
            tar.unlink(missing_ok=True)
            tar.with_suffix(".idx").unlink(missing_ok=True)
    return manifest


def list_samples(plan: Plan, manifest: dict[str, Any]) -> list[np.ndarray]:
    """List the rows of `samples.npy` of each shard: places from its index, labels from the plan. Raises `UserError`."""
    labels, found = plan.listing.columns()["label"], []
    skipped = {str(row.get("key")) for row in manifest["skipped"] if isinstance(row, dict)}
    numbers = {plan.path(number).name: number for number in range(plan.num_shards)}
    for row in manifest["shards"]:
        path = plan.path(number := numbers.get(row["name"], 0))
        images = plan.order[plan.starts[number] : plan.starts[number + 1]].tolist()
        kept = [image for image in images if not (skipped and plan.key(image) in skipped)]
        entries = [entry for members in read_index(path.with_suffix(".idx")) for entry in members]
        places = [(offset, size) for extension, offset, size, _ in entries if extension == "jpg"]
        if len(places) != len(kept) or any(sum(place) > row["bytes"] for place in places):
            raise UserError(f"{path.with_suffix('.idx')}: damaged; remove it and run pack again")
        rows = np.zeros(len(kept), SAMPLE)
        rows["offset"], rows["size"] = np.reshape(places, (-1, 2)).T
        rows["label"] = labels[kept]
        found.append(rows)
    return found
