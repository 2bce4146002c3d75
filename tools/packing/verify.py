"""Check shards against their manifest, sample by sample.

    python tools/make_shards.py verify SHARDS [--fast]

Everything that is wrong is told at once, a line each. A checksum shows that a file was damaged; the checks on samples
say where, and find what no checksum can: shards that were wrong from the start.
"""

import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.files import read_json
from pipeline.shards import DataError, check_manifest, read_classes
from tools.packing.check_shard import Job, Report, check_shard
from tools.packing.manifest import is_top_file
from tools.packing.pool import check_workers
from tools.packing.tars import over_shards
from train.program import one_line

SPLITS = ("train", "val")


def verify(shards: Path, fast: bool = False, workers: int | None = None) -> None:
    """Check shards: files, checksums, indexes, labels, keys, every image, and that classes are mixed.

    Args:
        shards: Folder written by pack or adopt.
        fast: Check manifests, sizes and indexes alone, without reading the shards.
        workers: Processes; every core by default.
    """
    processes = check_workers(workers)
    started, images, tars = time.perf_counter(), 0, 0
    reports: list[Report] = []
    present = present_splits(shards)
    for split in SPLITS:
        if split not in present and (shards / split).is_dir():
            reports.append(Report(split, {"manifest": ["holds no manifest.json: its pack was not finished"]}))
    for split in present:
        path = shards / split / "manifest.json"
        try:
            manifest = read_json(path)
            check_manifest(manifest, path)
        except ValueError as error:
            reports.append(Report(split, {"manifest": [str(error)]}))
        else:
            jobs = list_jobs(path.parent, manifest, fast)
            sizes = [int(job.row["bytes"]) for job in jobs]
            if fast:
                of_shards = [check_shard(job) for job in jobs]
            else:
                of_shards = over_shards(check_shard, jobs, sizes, processes, f"checking {split}")
            reports += [*of_shards, check_split(path.parent, manifest, jobs, of_shards)]
            images, tars = images + manifest["num_samples"], tars + len(jobs)
    strays = sorted(path.name for path in shards.iterdir() if path.name not in SPLITS and not is_top_file(path.name))
    reports.append(Report(str(shards), notes=[f"{name} is no part of the shards" for name in strays]))

    for line in (line for report in reports for line in report.lines()):
        print(one_line(line))
    num_problems = sum(len(found) for report in reports for found in report.problems.values())
    if num_problems:
        damaged = [report.place for report in reports if report.problems and report.place.endswith(".tar")]
        raise DataError(f"{shards} has {num_problems} problem(s), told one a line; {remedy(damaged)}")
    rate = "the images were not read" if fast else f"{images / (time.perf_counter() - started):.0f} images/s"
    print(f"{shards}: {images} images in {tars} shards, all sound ({rate})")


def remedy(damaged: list[str]) -> str:
    """What to do, given the shards with problems."""
    if not damaged:
        return "pack or adopt again"
    more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
    return (
        f"remove {', '.join(damaged[:3])}{more} and run the pack command again, it writes just those; restore adopted "
        "shards at their source, then remove the split and adopt it again"
    )


def present_splits(shards: Path) -> list[str]:
    """The splits with a manifest. Raises `FileNotFoundError` or `ValueError`."""
    if not shards.is_dir():
        raise FileNotFoundError(f"{shards} is no folder; give the folder that pack or adopt wrote")
    splits = [split for split in SPLITS if (shards / split / "manifest.json").is_file()]
    if not splits:
        raise ValueError(f"{shards} holds neither train/manifest.json nor val/manifest.json; pack or adopt (again)")
    return splits


def list_jobs(directory: Path, manifest: dict[str, Any], fast: bool) -> list[Job]:
    """One job a shard, from a manifest that may lack all that `check_manifest` does not ask for."""
    store = str(manifest.get("options", {}).get("store", ""))
    left_out = [row for row in manifest.get("skipped", []) if isinstance(row, dict)]
    skipped = frozenset(
        (str(row.get("shard")), int(row["offset"])) for row in left_out if type(row.get("offset")) is int
    )
    classes = manifest["num_classes"]
    return [Job(directory / row["name"], row, classes, store, skipped, fast) for row in manifest["shards"]]


def check_split(directory: Path, manifest: dict[str, Any], jobs: list[Job], reports: list[Report]) -> Report:
    """What no shard shows alone: foreign files, classes, keys that repeat, and whether classes are mixed."""
    whole = Report(directory.name)
    expected = {"manifest.json", *(name for job in jobs for name in (job.path.name, job.path.with_suffix(".idx").name))}
    strays = sorted(path.name for path in directory.iterdir() if path.name not in expected)
    whole.notes += [f"{name} is not in the manifest" for name in strays]
    if manifest["split"] != directory.name:
        whole.problem("manifest", f"its manifest describes the split {manifest['split']}")
    try:
        num_classes = len(read_classes(directory.parent))
        if num_classes != manifest["num_classes"]:
            whole.problem("classes", f"classes.json lists {num_classes}, the manifest {manifest['num_classes']}")
    except (FileNotFoundError, ValueError) as error:
        whole.problem("classes", str(error))
    if jobs[0].fast:
        return whole

    for report in reports:
        whole.labels.update(report.labels)
    if empty := [label for label in range(manifest["num_classes"]) if not whole.labels[label]]:
        whole.notes.append(f"{len(empty)} of {manifest['num_classes']} classes have no image, the first is {empty[0]}")
    if repeats := repeated_keys(reports):
        # Others number their samples anew in every shard; our packer never does.
        sentence = (
            f"{len(repeats)} samples have the key of another, the first is number {repeats[0][1]} of {repeats[0][0]}"
        )
        whole.notes.append(sentence) if jobs[0].store == "adopted" else whole.problem("keys", sentence)
    unmixed = unmixed_shards(whole.labels, reports)
    if unmixed or has_runs(whole.labels, reports):
        sentence = "not shuffled: most images have the class of their neighbour"
        if unmixed:
            place, held, usual = unmixed[0]
            sentence = (
                f"not shuffled: {len(unmixed)} of {len(reports)} shards hold too few classes; {place} has {held}, a "
                f"random order about {usual:.0f}"
            )
        # Order matters where a network learns from it.
        whole.notes.append(sentence) if directory.name == "val" else whole.problem("order", sentence)
    return whole


def repeated_keys(reports: list[Report]) -> list[tuple[str, int]]:
    """(shard, position in it from 1) of samples whose key an earlier one has."""
    keys = np.concatenate([np.array(report.keys, np.uint64) for report in reports])
    order = np.argsort(keys, kind="stable")
    repeats = np.sort(order[1:][keys[order][1:] == keys[order][:-1]])
    starts = np.cumsum([0, *(len(report.keys) for report in reports)])
    shards = np.searchsorted(starts, repeats, side="right") - 1
    return [(reports[shard].place, int(k - starts[shard]) + 1) for shard, k in zip(shards, repeats, strict=True)]


def unmixed_shards(total: Counter[int], reports: list[Report]) -> list[tuple[str, int, float]]:
    """(shard, classes in it, classes expected) where a shard has less than half of the classes that a random order
    gives, and by more than five standard deviations.

    A class of share p is in a shard of n samples with probability q = 1 - (1 - p)^n; the classes' sum has at most the
    variance of independent ones, for a place that one takes is lost to the others.
    """
    shares = np.array(list(total.values())) / max(total.total(), 1)
    found = []
    for report in reports:
        q = 1 - (1 - shares) ** report.labels.total()
        expected, deviation = float(q.sum()), float(np.sqrt((q * (1 - q)).sum()))
        if len(report.labels) < min(expected / 2, expected - 5 * deviation):
            found.append((report.place, len(report.labels), expected))
    return found


def has_runs(total: Counter[int], reports: list[Report]) -> bool:
    """Whether neighbours share their class halfway to always, and by more than six standard deviations of a random
    order, in which they do with the probability sum of p^2. Tells also where the classes are few."""
    num_images = total.total()
    pairs = num_images - len(reports)
    if pairs < 1:
        return False
    chance = sum((number / num_images) ** 2 for number in total.values())
    excess = sum(report.repeats for report in reports) / pairs - chance
    return bool(excess > max((1 - chance) / 2, 6 * (chance * (1 - chance) / pairs) ** 0.5))
