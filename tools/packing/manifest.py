"""The state of an output folder: whose a half-written split is, which shards are whole, and the manifest at its end.

`plan.json` says whose a half-written split is, and `NAME.json` vouches for a shard and its index. Whoever finds all
`NAME.json` of a split there folds them into `manifest.json` and removes the rest; packers that come together write the
same bytes.
"""

import fnmatch
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.files import atomic_writer, read_json, write_json
from pipeline.shards import FORMAT_VERSION, check_manifest
from tools.packing.plan import Options, Plan, ShardPlan, versions

LISTING = "listing.jsonl"
"""The cached listing of the raw images, beside the splits."""
TOP_FILES = ("classes.json", LISTING, "pca.*", "mean_image.*", "preview.png")
"""What stands beside the splits, as patterns."""
SPILL = "spill-*"
"""Where `sequential.py` keeps what it has packed; in a split's folder."""


def is_top_file(name: str) -> bool:
    """Whether our programs write a file of this name beside the splits."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in TOP_FILES)


def check_output(shards: Path, classes: dict[str, Any], plans: list[Plan]) -> None:
    """Refuse output folders that hold anything but this pack, with `ValueError`."""
    splits = {plan.directory.name for plan in plans}
    present = {path.name for path in shards.iterdir() if path.suffix != ".tmp"} if shards.is_dir() else set()
    foreign = sorted(name for name in present - splits if not is_top_file(name))
    if (shards.exists() and not shards.is_dir()) or foreign:
        raise ValueError(
            f"{shards} holds something else{''.join(f' ({name})' for name in foreign[:1])}; give a "
            "folder that is new, empty or begun by the same command"
        )
    if "classes.json" in present and read_json(shards / "classes.json") != classes:
        raise ValueError(f"{shards} holds shards of other classes; give another folder")
    for plan in plans:
        planned = {plan.path(number).stem for number in range(plan.num_shards)} | {"manifest", "plan"}
        files = [path for path in plan.directory.glob("*") if path.suffix != ".tmp" and not path.match(SPILL)]
        for path in (plan.directory / "manifest.json", plan.directory / "plan.json"):
            if path.is_file() and recorded_plan(path) != plan.digest:
                raise other_pack(path, plan.options)
        for path in files:
            if path.stem not in planned:
                raise ValueError(f"{path} is not part of this pack; give another folder or remove it")
        if files and not {"manifest.json", "plan.json"} & {path.name for path in files}:
            raise ValueError(
                f"{plan.directory} holds files, but no plan.json or manifest.json that says of what; remove it or give "
                "another folder"
            )


def claim(shards: Path, classes: dict[str, Any], plans: list[Plan]) -> None:
    """Make the output folders ours, or refuse them with `ValueError` before anything is written."""
    check_output(shards, classes, plans)
    for plan in plans:
        plan.directory.mkdir(parents=True, exist_ok=True)
        if not (plan.directory / "manifest.json").is_file():
            claim_split(plan)
    if not (shards / "classes.json").is_file():  # after the claim: another packer that was first may have other classes
        write_json(shards / "classes.json", classes)


def claim_split(plan: Plan) -> None:
    """Write `plan.json`, which says whose the half-written split is, unless another packer was first.

    Raises `ValueError` when that one has another plan.
    """
    path = plan.directory / "plan.json"
    with atomic_writer(plan.directory / "plan.json") as file:  # others wait here for the first
        first = recorded_plan(path)
        begun = read_json(path) if first else {"plan": plan.digest, "options": asdict(plan.options)}
        file.write(json.dumps(begun).encode())
    if recorded_plan(path) != plan.digest:
        raise other_pack(path, plan.options)


def other_pack(path: Path, options: Options) -> ValueError:
    """The output is of another pack; `path` is its `manifest.json` or `plan.json`, which names the options."""
    recorded = recorded_content(path).get("options")
    before, now = recorded if isinstance(recorded, dict) else {}, asdict(options)
    for name in sorted(before.keys() & now.keys() - {"on_bad"}):
        if before[name] != now[name]:
            option = f"--{name.replace('_', '-')}"
            return ValueError(
                f"{path.parent} was packed with {option} {before[name]}, not {now[name]}; give {option} {before[name]} "
                f"to resume it, or another folder, or remove {path.parent.parent} to pack it again"
            )
    return ValueError(
        f"{path.parent} was packed from other images, or with other versions of Pillow, simplejpeg or torch; give "
        "another folder or remove it"
    )


def recorded_content(path: Path) -> dict[str, Any]:
    """What stands in `manifest.json` or `plan.json`; nothing where there is none."""
    content = read_json(path) if path.is_file() else None
    return content if isinstance(content, dict) else {}


def recorded_plan(path: Path) -> str | None:
    """The digest in `manifest.json` or `plan.json`; None where there is none."""
    return recorded_content(path).get("plan")


def read_note(path: Path, plan: Plan | ShardPlan, num_samples: int) -> dict[str, Any] | None:
    """What `NAME.json` says of a shard; None where there is none, or it is damaged: then the shard is written again.

    Raises `ValueError` when it is of another pack.
    """
    try:
        note = json.loads(path.with_suffix(".json").read_bytes())
        shard, digest = note["shard"], note["plan"]
        sound = shard["name"] == path.name and shard["samples"] + len(note["skipped"]) == num_samples
        sound = sound and len(shard["sha256"]) == 64 and min(shard["bytes"], shard["index_bytes"]) > 0
        sound = sound and isinstance(note["repairs"], list)
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if digest != plan.digest:
        raise other_pack(path.parent / "plan.json", plan.options)
    return note if sound else None


def notes(plan: Plan) -> dict[int, dict[str, Any]]:
    """Each `NAME.json` that is there, by the shard's number."""
    sizes = {number: last - first for number in range(plan.num_shards) for first, last in [plan.bounds(number)]}
    found = {number: read_note(plan.path(number), plan, size) for number, size in sizes.items()}
    return {number: note for number, note in found.items() if note is not None}


def is_whole(path: Path, row: dict[str, Any]) -> bool:
    """Whether a shard and its index are there, as long as recorded."""
    sizes = ((path, row["bytes"]), (path.with_suffix(".idx"), row["index_bytes"]))
    return all(file.is_file() and file.stat().st_size == size for file, size in sizes)


def unfinished(plan: Plan) -> list[int]:
    """The shards that are not there, or not as long as `NAME.json` (later the manifest) records."""
    # Notes first: another packer that finishes now writes the manifest before it removes them.
    recorded = {note["shard"]["name"]: note["shard"] for note in notes(plan).values()}
    numbers = list(range(plan.num_shards))
    if manifest := read_manifest(plan):
        recorded = {row["name"]: row for row in manifest["shards"]}
        numbers = [number for number in numbers if plan.path(number).name in recorded]  # without those left empty
    names = {number: plan.path(number).name for number in numbers}
    return [n for n, name in names.items() if name not in recorded or not is_whole(plan.path(n), recorded[name])]


def read_manifest(plan: Plan) -> dict[str, Any] | None:
    """The manifest of the split, if it is finished. Raises `ValueError` when it does not account for every image."""
    path = plan.directory / "manifest.json"
    if not path.is_file():
        return None
    manifest: dict[str, Any] = read_json(path)
    check_manifest(manifest, path)
    complete = all("index_bytes" in row for row in manifest["shards"]) and isinstance(manifest.get("skipped"), list)
    if not complete or manifest["num_samples"] + len(manifest["skipped"]) != len(plan.listing):
        raise ValueError(f"{path} is damaged: it does not account for {len(plan.listing)} images; restore it")
    return manifest


def write_manifest(plan: Plan, num_classes: int, layout: str) -> dict[str, Any] | None:
    """Fold the shards' `NAME.json` into `manifest.json`, then remove them; None while shards are missing.

    Any number of packers may come here at the same time: they write the same bytes.
    """
    path = plan.directory / "manifest.json"
    found = notes(plan)
    if not path.is_file() and len(found) == plan.num_shards:
        rows = [found[number] for number in range(plan.num_shards)]
        skipped = [row for note in rows for row in note["skipped"]]
        num_samples = sum(note["shard"]["samples"] for note in rows)
        assert num_samples + len(skipped) == len(plan.listing), "every image is packed or listed as skipped"
        if not num_samples:
            remedy = "choose another --val-fraction" if plan.directory.name == "val" else "are they images?"
            raise ValueError(f"not one image of {plan.directory.name} could be decoded; {remedy}")
        content = {
            "format_version": FORMAT_VERSION,
            "split": plan.directory.name,
            "num_samples": num_samples,
            "num_classes": num_classes,
            "source": layout,
            "options": asdict(plan.options),
            "versions": versions(),
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
        for file in (tar.with_suffix(".json"), *(() if tar.name in written else (tar, tar.with_suffix(".idx")))):
            file.unlink(missing_ok=True)  # a shard all of whose images were skipped is none
    return manifest
