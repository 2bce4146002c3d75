"""Ours beside the loaders of others, which do the same job on the same JPEGs, and show it before they are timed."""

import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import sleep

from pipeline.eigenbasis import Eigenbasis
from pipeline.machine import num_cores, raise_open_files
from pipeline.shards import open_shards
from tools.benchmarks.contenders.check import check_batches, check_decoded
from tools.benchmarks.contenders.data import CHECKED, PeerData, extract, numbered, whole_shards
from tools.benchmarks.contenders.registry import PEERS, Peer
from tools.benchmarks.measure import Table, rate, take_turns
from tools.benchmarks.record import check_out, describe, record
from train.device import keep_freed_memory

CHECK_BATCH, CHECK_WORKERS = 16, 2
"""They divide the checked images, so that every contender can hand out each of them once."""


def bench_peers(
    shards: Path,
    batch_size: int,
    workers: int | None,
    seconds: float,
    repeats: int,
    peers: list[str] | None,
    ffcv_python: Path | None,
    images: int,
    scratch: Path | None,
    out: Path | None,
) -> None:
    """See `tools/bench.py peers`."""
    if min(batch_size, repeats, images) < 1 or seconds <= 0 or (workers is not None and workers < 1):
        raise ValueError(
            "--batch-size, --workers, --repeats and --images must be at least 1, --seconds positive"
        )
    chosen = choose(peers)
    check_out(out)
    train = whole_shards(open_shards(shards, "train"), max(images, CHECKED, batch_size))
    if train.any_size:
        raise ValueError(
            f"{shards} holds images of any size, of which contenders make other pixels; pack crop256"
        )
    if train.num_samples < max(CHECKED, batch_size):
        raise ValueError(
            f"{shards} holds {train.num_samples} images; that takes {max(CHECKED, batch_size)} at least"
        )
    basis = Eigenbasis.load(shards / "pca.json", train.manifest_sha256)
    raise_open_files(len(train.tars))
    keep_freed_memory()  # as the trainer does
    multiprocessing.set_forkserver_preload(["torch"])
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        place = Path(folder)
        few = numbered(train, place / "few")
        checked = PeerData(
            few, extract(few, place / "few"), basis, CHECK_BATCH, CHECK_WORKERS, place, ffcv_python, show=True
        )
        workers = workers or num_cores()
        data = PeerData(train, extract(train, place / "all"), basis, batch_size, workers, place, ffcv_python)
        versions, missing = find(chosen, data)
        if not versions:
            raise ValueError(
                "; ".join(f"{title} cannot be measured: {reason}" for title, reason in missing.items())
            )
        print(
            f"one epoch of {CHECKED} images from each, in batches of {CHECK_BATCH}, by {CHECK_WORKERS} workers:"
        )
        for name in versions:
            print(f"{PEERS[name].title}: {check(PEERS[name], checked)}", flush=True)
        measured = measure([PEERS[name] for name in versions], data, seconds, repeats)

    print(f"{describe(train)}; batch {batch_size}")
    print(f"{workers} processes or threads each, of ours one more, {repeats} repeats")
    reference = PEERS["ours"].title
    reference = reference if reference in measured else next(iter(measured))
    table = Table("loaders that do the same job", "images/s", measured, reference)
    table.show()
    print_missing(missing, measured)
    if out:
        settings = {"shards": train.manifest_sha256, "batch_size": batch_size, "workers": workers}
        settings |= {"seconds": seconds, "device": "cpu"}
        every = {package: version for found in versions.values() for package, version in found.items()}
        record(out, "peers", [table], describe(train), settings | {"peers": every, "not_measured": missing})


def choose(names: list[str] | None) -> list[str]:
    """Which contenders take part, in the order of the table. Raises `ValueError` for one that there is not."""
    unknown = [name for name in names or [] if name not in PEERS]
    if unknown or names == []:
        raise ValueError(f"--peers takes some of {', '.join(PEERS)}, not {', '.join(unknown) or 'none'}")
    return [name for name in PEERS if names is None or name in names]


def find(names: list[str], data: PeerData) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Versions of what each contender is made of, by its name; and why others cannot take part, by their title."""
    versions, missing = {}, {}
    for name in names:
        try:
            versions[name] = PEERS[name].versions(data)
        except (
            ImportError,
            RuntimeError,
            OSError,
        ) as error:  # libraries that find their own libraries missing
            missing[PEERS[name].title] = str(error).strip().splitlines()[0]
    return versions, missing


def check(peer: Peer, data: PeerData) -> str:
    """Have a contender show that it does the job; returns what was seen, asserts that it is the job."""
    found, decoded_NHWC = check_decoded(peer.title, peer.decode(data), data, peer.levels)
    batches = peer.batches(data)
    try:
        return f"{found};\n    {check_batches(peer.title, batches, decoded_NHWC, data)}"
    finally:
        batches.close()


def measure(peers: list[Peer], data: PeerData, seconds: float, repeats: int) -> dict[str, list[float]]:
    """Images per second of each contender, in turn."""
    opened = {peer.title: peer.batches(data) for peer in peers}

    def measurement(title: str) -> Callable[[], float]:
        def measured() -> float:
            sleep(
                seconds / 3
            )  # until the one before has filled its queue: seven of them do, on the same cores
            return rate(lambda: next(opened[title]), data.batch_size, seconds)

        return measured

    try:
        return take_turns({title: measurement(title) for title in opened}, repeats)
    finally:
        for batches in opened.values():
            batches.close()


def print_missing(missing: dict[str, str], measured: dict[str, list[float]]) -> None:
    """Rows of the contenders that were not measured."""
    for title, reason in missing.items():
        print(f"{title:<{max(40, *map(len, measured))}} not measured: {reason}")
