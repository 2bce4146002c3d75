"""Pack raw ImageNet into WebDataset shards with DALI indexes.

    python tools/make_shards.py pack RAW SHARDS

The unit of work is the shard. Its bytes depend on the raw images, the options and the seed alone, not on the number of
workers;
a shard appears under its name only when it is whole, so a pack that was interrupted goes on where it stopped.
"""

import ctypes
import hashlib
import io
import json
import multiprocessing
import os
import signal
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Literal, NamedTuple

import PIL.features
import simplejpeg
from tqdm import tqdm

from pipeline.files import atomic_writer, read_json, sha256, write_bytes, write_json
from pipeline.shards import FORMAT_VERSION, KEY, classes_json, index_text
from tools.images import pack_image
from tools.raw import RawImage, open_raw
from train.program import run_program

Sample = tuple[str, RawImage]


class Options(NamedTuple):
    """What a shard's bytes depend on beside the raw images; recorded in the manifest."""

    store: str
    quality: int
    subsampling: str
    samples_per_shard: int
    seed: int
    on_bad: str


class ShardPlan(NamedTuple):
    """One shard to be written."""

    path: Path
    samples: list[Sample]
    options: Options
    digest: str
    """SHA-256 over samples, options and library versions: equal digests mean equal bytes."""


def pack(
    raw: Path,
    shards: Path,
    samples_per_shard: int = 1000,
    workers: int | None = None,
    seed: int = 2012,
    quality: int = 90,
    on_bad: Literal["fail", "skip"] = "fail",
) -> None:
    """Pack the archives of ILSVRC-2012 into shards of 256x256 JPEGs.

    Run again after an interruption, it does what is left.

    Args:
        raw: Folder that holds ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz.
        shards: Folder to write into; new, empty, or begun by the same command.
        samples_per_shard: Images per shard, at most; shards differ by one image at most.
        workers: Processes; every core by default.
        seed: Seed of the one global order in which images are packed.
        quality: JPEG quality, 1 to 100.
        on_bad: What to do with an image that cannot be decoded: stop, or leave it out and list it in the manifest.
    """
    if samples_per_shard < 1 or not 1 <= quality <= 100 or (workers is not None and workers < 1):
        raise ValueError("--samples-per-shard and --workers must be at least 1, --quality 1 to 100")
    options = Options("crop256", quality, "420", samples_per_shard, seed, on_bad)
    data = open_raw(raw)
    print(f"{raw}: {data.layout}, {len(data.classes)} classes")
    plans = {split: plan_split(shards / split, split, images, options) for split, images in data.splits.items()}
    claim(shards, classes_json(data.classes), plans)

    workers = workers or len(os.sched_getaffinity(0))
    left = [plan for split, split_plans in plans.items() for plan in unfinished(shards / split, split_plans)]
    if left:
        started = time.perf_counter()
        write_shards(left, workers)
        seconds, images = time.perf_counter() - started, sum(len(plan.samples) for plan in left)
        print(f"packed {images} images in {seconds:.1f} s ({images / seconds:.0f} images/s, {workers} workers)")
    else:
        print("every shard is there already; nothing to do")
    for split, split_plans in plans.items():
        manifest = write_manifest(shards / split, split_plans, len(data.classes), options, data.layout)
        print(
            f"{shards / split}: {manifest['num_samples']} images in {len(manifest['shards'])} shards, "
            f"{len(manifest['repairs'])} repaired or noted, {len(manifest['skipped'])} skipped"
        )


def plan_split(directory: Path, split: str, images: list[RawImage], options: Options) -> list[ShardPlan]:
    """Give every image its key, its place in the one seeded order, and its shard.

    The order sorts by a hash of seed and key: the same in every version of every library.
    """
    stems = [Path(image.name).name.rsplit(".", 1)[0] for image in images]
    counts: dict[str, int] = {}
    for stem in stems:
        counts[stem] = counts.get(stem, 0) + 1
    usable = [counts[stem] == 1 and KEY.fullmatch(stem) is not None for stem in stems]
    keys = [
        stem if fine else f"{image.label}_{n}"
        for n, (stem, fine, image) in enumerate(zip(stems, usable, images, strict=True))
    ]
    if len(set(keys)) != len(keys):
        raise ValueError(
            f"two images of {split} would get the same key; rename files that are called <number>_<number>"
        )
    order = sorted(zip(keys, images, strict=True), key=lambda sample: order_hash(options.seed, sample[0]))
    num_shards = -(-len(order) // options.samples_per_shard)
    plans = []
    for shard in range(num_shards):
        samples = order[shard * len(order) // num_shards : (shard + 1) * len(order) // num_shards]
        described = [[key, image.name, image.offset, image.size, image.label] for key, image in samples]
        # `on_bad` decides whether a pack goes on, not what a whole shard holds: "skip" may follow on "fail".
        relevant = options._replace(on_bad="")._asdict()
        digest = sha256(json.dumps([described, relevant, versions()]).encode())
        plans.append(ShardPlan(directory / f"{split}-{shard:06d}.tar", samples, options, digest))
    return plans


def order_hash(seed: int, key: str) -> bytes:
    """The place of a key in the global order."""
    return hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=16).digest()


def versions() -> dict[str, str]:
    """The libraries that decide a shard's bytes."""
    turbo = PIL.features.version("libjpeg_turbo") or "unknown"
    return {"pillow": PIL.__version__, "simplejpeg": simplejpeg.__version__, "libjpeg_turbo": turbo}


def claim(shards: Path, classes: dict[str, Any], plans: dict[str, list[ShardPlan]]) -> None:
    """Make the output folders ours, or refuse them with `ValueError` before anything is written."""
    wanted = {"classes.json", "pca.json", "mean_image.npy", *plans}
    present = {path.name for path in shards.iterdir() if path.suffix != ".tmp"} if shards.is_dir() else set()
    if shards.exists() and (not shards.is_dir() or present - wanted or (present and "classes.json" not in present)):
        raise ValueError(
            f"{shards} holds something else; give a folder that is new, empty or begun by the same command"
        )
    if present and read_json(shards / "classes.json") != classes:
        raise ValueError(f"{shards} holds shards of other classes; give another folder")
    for split, split_plans in plans.items():
        planned = {plan.path.stem for plan in split_plans}
        for path in (shards / split).iterdir() if (shards / split).is_dir() else ():
            if path.name != "manifest.json" and path.suffix != ".tmp" and path.stem not in planned:
                raise ValueError(
                    f"{path} is no part of this pack (another seed or size?); give another folder or remove it"
                )
        manifest = shards / split / "manifest.json"
        if manifest.is_file() and recorded_plan(manifest) != plan_digest(split_plans):
            raise ValueError(
                f"{shards} was packed from other images or with other options; give another folder or remove it"
            )
        for plan in split_plans:
            if (note := plan.path.with_suffix(".json")).is_file() and recorded_plan(note) != plan.digest:
                raise ValueError(f"{plan.path} was packed from other images or with other options; give another folder")
    shards.mkdir(parents=True, exist_ok=True)
    write_json(shards / "classes.json", classes)
    for split in plans:
        (shards / split).mkdir(exist_ok=True)


def recorded_plan(path: Path) -> str | None:
    """The digest in a manifest or `NAME.json`."""
    content = read_json(path)
    return content.get("plan") if isinstance(content, dict) else None


def plan_digest(plans: list[ShardPlan]) -> str:
    """Names all shards of a split together."""
    return sha256("".join(plan.digest for plan in plans).encode())


def unfinished(directory: Path, plans: list[ShardPlan]) -> list[ShardPlan]:
    """The shards that are not there, or not as long as recorded.

    `NAME.json` is written last, so it vouches for its shard; later the manifest does.
    """
    manifest = directory / "manifest.json"
    recorded = {row["name"]: row["bytes"] for row in (read_json(manifest)["shards"] if manifest.is_file() else ())}
    left = []
    for plan in plans:
        note = plan.path.with_suffix(".json")
        size = read_json(note)["shard"]["bytes"] if note.is_file() else recorded.get(plan.path.name)
        whole = plan.path.is_file() and plan.path.stat().st_size == size and plan.path.with_suffix(".idx").is_file()
        if not whole:
            left.append(plan)
    return left


def write_shards(plans: list[ShardPlan], workers: int) -> None:
    """Write shards in `workers` processes, with a progress bar. Raises what the first failing worker raised."""
    total = sum(len(plan.samples) for plan in plans)
    context = multiprocessing.get_context("spawn")
    with (
        tqdm(total=total, desc="packing", unit="img", disable=None) as progress,
        ProcessPoolExecutor(min(workers, len(plans)), context, initializer=start_worker) as pool,
    ):
        futures = {pool.submit(write_shard, plan): len(plan.samples) for plan in plans}
        try:
            for future in as_completed(futures):
                future.result()
                progress.update(futures[future])
        except BrokenProcessPool:
            raise RuntimeError("a worker process died; run the same command again, finished shards are kept") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def start_worker() -> None:
    """Ctrl-C reaches every process of a terminal: workers finish their shard and leave the rest to the parent, without
    whom they end at once (Linux's PR_SET_PDEATHSIG)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def write_shard(plan: ShardPlan) -> None:
    """Write one shard: the tar, then its index, then `NAME.json` with its checksum and what was odd about its
    images."""
    repairs, skipped, index = [], [], []
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, image in plan.samples:
            try:
                packed = pack_image(image.read(), plan.options.quality)
            except ValueError as error:
                if plan.options.on_bad == "fail":
                    raise ValueError(
                        f"{image.name} in {image.archive} (key {key}): {error}; --on-bad skip leaves such images out"
                    ) from None
                skipped.append({"key": key, "name": image.name, "reason": str(error)})
                continue
            if packed.found:
                repairs.append({"key": key, "found": packed.found, "done": packed.done})
            index.append(
                [
                    add_member(tar, f"{key}.{ext}", data)
                    for ext, data in (("jpg", packed.jpeg), ("cls", str(image.label).encode()))
                ]
            )
    data = content.getvalue()
    with atomic_writer(plan.path) as file:
        file.write(data)
    write_bytes(plan.path.with_suffix(".idx"), index_text(index).encode())
    shard = {"name": plan.path.name, "samples": len(index), "bytes": len(data), "sha256": sha256(data)}
    note = {"plan": plan.digest, "shard": shard, "repairs": repairs, "skipped": skipped}
    write_json(plan.path.with_suffix(".json"), note)


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> tuple[str, int, int, str]:
    """Append a plain USTAR member (mtime, uid and gid 0); returns its entry in the index."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(info, io.BytesIO(data))
    return name.rsplit(".", 1)[1], offset, len(data), name


def write_manifest(
    directory: Path, plans: list[ShardPlan], num_classes: int, options: Options, layout: str
) -> dict[str, Any]:
    """Fold the shards' `NAME.json` into `manifest.json`, then remove them. Returns the manifest."""
    path = directory / "manifest.json"
    if not path.is_file():
        notes = [read_json(plan.path.with_suffix(".json")) for plan in plans]
        skipped = [row for note in notes for row in note["skipped"]]
        num_samples = sum(note["shard"]["samples"] for note in notes)
        planned = sum(len(plan.samples) for plan in plans)
        assert num_samples + len(skipped) == planned, "every image is packed or listed as skipped"
        manifest = {
            "format_version": FORMAT_VERSION,
            "split": directory.name,
            "num_samples": num_samples,
            "num_classes": num_classes,
            "source": layout,
            "options": options._asdict(),
            "versions": versions(),
            "plan": plan_digest(plans),
            "renamed": {
                key: image.name
                for plan in plans
                for key, image in plan.samples
                if key != Path(image.name).name.rsplit(".", 1)[0]
            },
            "shards": [note["shard"] for note in notes],
            "repairs": [row for note in notes for row in note["repairs"]],
            "skipped": skipped,
        }
        write_json(path, manifest)
    for plan in plans:
        plan.path.with_suffix(".json").unlink(missing_ok=True)
    return read_json(path)


if __name__ == "__main__":
    run_program({"pack": pack})
