"""Write shards with many processes, on one or more machines that share only the output folder.

The unit of work is the shard. It is written under a lock that is released when its process dies, and is renamed into
place when it is complete; then its index, then its sidecar `NAME.json` with their sizes and checksum. So a killed pack
resumes, and two packers on the same output share the work.

`plan.json` identifies the pack of an unfinished split. The packer that finds all sidecars of a split merges them into
`manifest.json` and removes them; packers that do so at the same time write the same bytes.
"""

import fnmatch
import hashlib
import itertools
import json
import shutil
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tqdm import tqdm

from pipeline.files import atomic_writer, read_json, write_bytes, write_json
from pipeline.shards import FORMAT_VERSION, check_manifest, index_text
from tools.packing.images import Packed, pack_image
from tools.packing.plan import Options, Plan, Sample, ShardPlan, library_versions
from tools.packing.pool import imap_unordered, set_current_item

READ_AHEAD = 16
"""Images that the kernel reads ahead of the one being packed."""
LOG_EVERY_S = 60.0
"""Seconds between lines of progress where there is no terminal."""
LISTING = "listing.npz"
"""The cached listing of the raw images, next to the splits."""
TOP_FILES = ("classes.json", LISTING, "pca.*", "mean_image.*", "preview.png")
"""Patterns of the files next to the splits."""
SPILL = "spill-*"
"""Folder in a split where `parquet.py` keeps packed images until their shard is written."""


class PackStats(NamedTuple):
    """Counts of one unit of work."""

    images: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    busy: bool = False
    """Another process is writing this shard."""


def run_jobs(
    work: Callable[[Any], PackStats],
    jobs: Iterable[Any],
    total: int,
    workers: int,
    description: str = "packing",
) -> list[PackStats]:
    """Run `work` on each job in `workers` processes, with a progress bar over `total` images; raises as they do."""
    started = logged = time.perf_counter()
    results: list[PackStats] = []
    with tqdm(total=total, desc=description, unit="img", disable=None) as progress:
        for _, done in imap_unordered(work, jobs, workers):
            results.append(done)
            progress.update(done.images)
            now, images = time.perf_counter(), sum(done.images for done in results)
            rate, read = images / (now - started), sum(done.bytes_read for done in results) / (now - started)
            progress.set_postfix_str(f"{read / 1e6:.0f} MB/s read")
            if now - logged > LOG_EVERY_S and not sys.stderr.isatty():
                minutes = (total - images) / rate / 60 if rate else float("inf")
                print(f"{images} of {total} images, {rate:.0f} images/s, {minutes:.0f} min left", flush=True)
                logged = now
    return results


def write_shard(plan: ShardPlan) -> PackStats:
    """Read, pack and write the images of one shard."""

    def iter_packed() -> Iterator[tuple[Sample, tuple[Packed | str, int]]]:
        for _, image in plan.samples[:READ_AHEAD]:
            image.prefetch()
        for sample, ahead in itertools.zip_longest(plan.samples, plan.samples[READ_AHEAD:]):
            if ahead:
                ahead[1].prefetch()
            yield sample, pack_sample(sample, plan.options)

    return write_packed(plan, iter_packed())


def pack_sample(sample: Sample, options: Options, raw: bytes | None = None) -> tuple[Packed | str, int]:
    """Pack one image, reading its file unless given. Returns the image or the reason to skip it, and the file's size.

    Raises `ValueError` with archive, name and key for an undecodable image, unless `on_bad` is "skip".
    """
    key, image = sample
    set_current_item(f"{image.escaped_name} in {image.file}")
    try:
        raw = image.read() if raw is None else raw
        return pack_image(raw, options.store, options.quality), len(raw)
    except ValueError as error:
        if options.on_bad == "fail":
            raise ValueError(
                f"{image.escaped_name} in {image.file} (key {key}): {error}; --on-bad skip leaves such images out"
            ) from None
        return str(error), image.size


def write_packed(plan: ShardPlan, packed: Iterable[tuple[Sample, tuple[Packed | str, int]]]) -> PackStats:
    """Write one shard: the tar, then its index, then `NAME.json` with its checksum and the notes on its images.

    Does nothing where another process is writing it, or has written it meanwhile.
    """
    try:
        with atomic_writer(plan.path, wait=False) as file:
            note = read_sidecar(plan.path, plan, len(plan.samples))
            if note and is_complete(plan.path, note["shard"]):
                raise WrittenElsewhereError
            tar, index, bytes_read = TarWriter(file), [], 0
            repairs: list[dict[str, str]] = []
            skipped: list[dict[str, str]] = []
            for (key, image), (result, size) in packed:
                bytes_read += size
                if isinstance(result, str):
                    skipped.append({"key": key, "name": image.escaped_name, "reason": result})
                    continue
                if result.found:
                    repairs.append({"key": key, "found": result.found, "done": result.done})
                members = ((f"{key}.jpg", result.jpeg), (f"{key}.cls", str(image.label).encode()))
                index.append([tar.add(name, data) for name, data in members])
            tar.close()
    except BlockingIOError:
        return PackStats(busy=True)
    except WrittenElsewhereError:
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


class WrittenElsewhereError(Exception):
    """Another packer has written the shard meanwhile."""


class TarWriter:
    """Plain USTAR members (mtime, uid and gid 0), hashed as they are written."""

    def __init__(self, file: BinaryIO) -> None:
        """Write to an empty `file`."""
        self.file, self.offset, self.digest = file, 0, hashlib.sha256()

    def add(self, name: str, data: bytes) -> tuple[str, int, int, str]:
        """Append a member; returns its entry in the index."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self.write(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self.offset
        self.write(data)
        self.write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return name.rsplit(".", 1)[1], offset, len(data), name

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
    """Raise `ValueError` for an output folder that holds anything but this pack."""
    splits = {plan.directory.name for plan in plans}
    present = {path.name for path in shards.iterdir() if path.suffix != ".tmp"} if shards.is_dir() else set()
    foreign = sorted(name for name in present - splits if not is_top_file(name))
    if (shards.exists() and not shards.is_dir()) or foreign:
        reason = f"it holds {foreign[0]}" if foreign else "it is a file"
        raise ValueError(
            f"{shards}: expected a new folder or one of the same command, but {reason}; give another"
        )
    if "classes.json" in present and read_json(shards / "classes.json") != classes:
        raise ValueError(f"{shards}: holds shards of other classes; give another folder")
    for plan in plans:
        planned = {plan.path(number).stem for number in range(plan.num_shards)} | {"manifest", "plan"}
        files = [path for path in plan.directory.glob("*") if path.suffix != ".tmp" and not path.match(SPILL)]
        for path in (plan.directory / "manifest.json", plan.directory / "plan.json"):
            if path.is_file() and read_plan_digest(path) != plan.digest:
                raise wrong_pack_error(path, plan.options)
        for path in files:
            if path.stem not in planned:
                raise ValueError(f"{path}: not part of this pack; remove it or give another folder")
        if files and not {"manifest.json", "plan.json"} & {path.name for path in files}:
            raise ValueError(
                f"{plan.directory}: expected plan.json or manifest.json with the shards, got neither; remove it "
                "or give another folder"
            )


def claim_output(shards: Path, classes: dict[str, Any], plans: list[Plan]) -> None:
    """Create the output folders and claim them for this pack. Raises `ValueError` before anything is written."""
    check_output(shards, classes, plans)
    for plan in plans:
        plan.directory.mkdir(parents=True, exist_ok=True)
        if not (plan.directory / "manifest.json").is_file():
            claim_split(plan)
    # After the claim: another packer that was first may have other classes.
    if not (shards / "classes.json").is_file():
        write_json(shards / "classes.json", classes)


def claim_split(plan: Plan) -> None:
    """Write `plan.json`, which identifies the pack, unless another packer was first.

    Raises `ValueError` when that one has another plan.
    """
    path = plan.directory / "plan.json"
    with atomic_writer(path) as file:  # locked: others wait for the first
        first = read_plan_digest(path)
        content = read_json(path) if first else {"plan": plan.digest, "options": asdict(plan.options)}
        file.write(json.dumps(content).encode())
    if read_plan_digest(path) != plan.digest:
        raise wrong_pack_error(path, plan.options)


def wrong_pack_error(path: Path, options: Options) -> ValueError:
    """Make the error for output of another pack; `path` is its `manifest.json` or `plan.json`."""
    recorded = read_record(path).get("options")
    before, now = recorded if isinstance(recorded, dict) else {}, asdict(options)
    for name in sorted(before.keys() & now.keys() - {"on_bad"}):
        if before[name] != now[name]:
            option = f"--{name.replace('_', '-')}"
            return ValueError(
                f"{path.parent}: expected {option} {before[name]}, as it was packed, got {now[name]}; give "
                f"{option} {before[name]} to resume, or another folder, or remove {path.parent.parent}"
            )
    return ValueError(
        f"{path.parent}: packed from other images, or by other versions of this program, Pillow, simplejpeg or torch; "
        "remove it or give another folder"
    )


def read_record(path: Path) -> dict[str, Any]:
    """Read `manifest.json` or `plan.json`; empty if missing."""
    content = read_json(path) if path.is_file() else None
    return content if isinstance(content, dict) else {}


def read_plan_digest(path: Path) -> str | None:
    """Read the plan's digest from `manifest.json` or `plan.json`; None if missing."""
    return read_record(path).get("plan")


def read_sidecar(path: Path, plan: Plan | ShardPlan, num_samples: int) -> dict[str, Any] | None:
    """Read a shard's `NAME.json`; None if it is missing or damaged: then the shard is written again.

    Raises `ValueError` when it is of another pack.
    """
    try:
        note = json.loads(path.with_suffix(".json").read_bytes())
        shard, digest = note["shard"], note["plan"]
        valid = shard["name"] == path.name and shard["samples"] + len(note["skipped"]) == num_samples
        valid = valid and len(shard["sha256"]) == 64 and min(shard["bytes"], shard["index_bytes"]) > 0
        valid = valid and isinstance(note["repairs"], list)
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if digest != plan.digest:
        raise wrong_pack_error(path.parent / "plan.json", plan.options)
    return note if valid else None


def read_sidecars(plan: Plan) -> dict[int, dict[str, Any]]:
    """Read every `NAME.json` that exists, by shard number."""
    sizes = {
        number: last - first for number in range(plan.num_shards) for first, last in [plan.bounds(number)]
    }
    sidecars = {number: read_sidecar(plan.path(number), plan, size) for number, size in sizes.items()}
    return {number: note for number, note in sidecars.items() if note is not None}


def is_complete(path: Path, row: dict[str, Any]) -> bool:
    """Return True if a shard and its index exist with their recorded sizes."""
    sizes = ((path, row["bytes"]), (path.with_suffix(".idx"), row["index_bytes"]))
    return all(file.is_file() and file.stat().st_size == size for file, size in sizes)


def find_unfinished(plan: Plan) -> list[int]:
    """List the shards that are missing, or not of the size that `NAME.json` (later the manifest) records."""
    # Sidecars first: another packer that finishes now writes the manifest before it removes them.
    recorded = {note["shard"]["name"]: note["shard"] for note in read_sidecars(plan).values()}
    numbers = list(range(plan.num_shards))
    if manifest := read_manifest(plan):
        recorded = {row["name"]: row for row in manifest["shards"]}
        numbers = [number for number in numbers if plan.path(number).name in recorded]  # others were empty
    rows = {number: recorded.get(plan.path(number).name) for number in numbers}
    return [number for number, row in rows.items() if not row or not is_complete(plan.path(number), row)]


def read_manifest(plan: Plan) -> dict[str, Any] | None:
    """Read the manifest of a split; None if it is unfinished. Raises `ValueError` unless all images are in it."""
    path = plan.directory / "manifest.json"
    if not path.is_file():
        return None
    manifest: dict[str, Any] = read_json(path)
    check_manifest(manifest, path)
    lists = [manifest.get(name) for name in ("repairs", "skipped")]
    complete = all("index_bytes" in row for row in manifest["shards"])
    if (
        not complete
        or not all(isinstance(rows, list) for rows in lists)
        or manifest["num_samples"] + len(manifest["skipped"]) != len(plan.listing)
    ):
        raise ValueError(f"{path}: expected {len(plan.listing)} images, packed or skipped; restore it")
    return manifest


def write_manifest(plan: Plan, num_classes: int, layout: str) -> dict[str, Any] | None:
    """Merge the shards' `NAME.json` into `manifest.json`, then remove them; None while shards are missing.

    Any number of packers may do so at the same time: they write the same bytes.
    """
    path = plan.directory / "manifest.json"
    sidecars = read_sidecars(plan)
    if not path.is_file() and len(sidecars) == plan.num_shards:
        rows = [sidecars[number] for number in range(plan.num_shards)]
        skipped = [row for note in rows for row in note["skipped"]]
        num_samples = sum(note["shard"]["samples"] for note in rows)
        assert num_samples + len(skipped) == len(plan.listing), "every image is packed or listed as skipped"
        if not num_samples:
            remedy = "choose another --val-fraction" if plan.directory.name == "val" else "are they images?"
            raise ValueError(f"{plan.directory.name}: no image could be decoded; {remedy}")
        content = {
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
            "skipped": skipped,
        }
        write_json(path, content)
    manifest = read_manifest(plan)
    if manifest is None:
        return None
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
