"""Benchmark our loader and others on the same jobs and images; each is checked before it is timed.

The job: decode a 256x256 JPEG, crop a random 224x224 window, flip or not, subtract the mean, shift along the RGB axes,
divide by 1.1, float32. The same from decoded pixels. And of these the window alone, uint8, as a GPU does the rest. To
add a contender: a generator and a row of `PEERS` in peer_loaders.py.

Shapes: N images, H rows, W columns, C colours.
"""

import itertools
import multiprocessing
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from pipeline.eigenbasis import Eigenbasis
from pipeline.errors import UserError
from pipeline.lighting import Lighting
from pipeline.machine import num_cores, raise_open_file_limit
from pipeline.shards import IMAGE_SIDE, SAMPLE, ShardSet, open_shards
from tools.benchmarks import common

if TYPE_CHECKING:
    from tools.benchmarks.peer_loaders import Batches, PeerData

MAX_IMAGES = 20_000
"""Whole shards with at least so many images are used; they are also extracted to files."""
CHECKED, CHECK_SHARD, CHECK_BATCH = 128, 32, 16
"""Checked images, and per shard and batch; each divides the first, so that an epoch has every image once."""
SIDE = 224
GRID = 16
"""Every 16th pixel is enough to locate a crop."""


def bench_peers(
    shards: Path,
    pixels: Path | None = None,
    batch_size: int = 128,
    workers: int | None = None,
    seconds: float = 3.0,
    repeats: int = 5,
    peers: list[str] | None = None,
    ffcv_python: Path | None = None,
    slipstream_python: Path | None = None,
    out: Path | None = None,
) -> None:
    """Measure our loader and others on a CPU: torch's DataLoader, webdataset, SPDL, FFCV, slipstream, DALI's example.

    Each is checked first; one that is not installed or skips a part of the job is listed with the reason.

    Args:
        shards: Folder written by make_shards, with 256x256 images, and compute_pca.
        pixels: Its pixel store, by make_shards decode, for those that read decoded pixels (default: JPEGs alone).
        batch_size: Images per batch.
        workers: Processes or threads of each (default: one per core); ours reads with so many and decodes
            with one more.
        seconds: Length of one measurement.
        repeats: Measurements of each contender, taken in turns.
        peers: Some of pillow, torchvision, webdataset, spdl, ffcv, slipstream, dali, numpy and ours (default: all).
        ffcv_python: Python of an environment with FFCV (docs/benchmarks/details.md).
        slipstream_python: The same with slipstream.
        out: File of JSON lines to append one row per contender to.
    """
    from tools.benchmarks.peer_loaders import COPY, OURS, PEERS, Peer, PeerData
    from train.device import tune_malloc

    common.check_options(out, batch_size=batch_size, workers=workers, seconds=seconds, repeats=repeats)
    names = list(PEERS) if peers is None else peers
    if not names or set(names) - set(PEERS):
        raise UserError(f"--peers: expected some of {', '.join(PEERS)}, got {', '.join(names) or 'none'}")
    train = common.select_first_shards(open_shards(shards, "train"), max(MAX_IMAGES, batch_size))
    if train.any_size or train.is_decoded or train.num_samples < max(CHECKED, batch_size):
        expected = f"{max(CHECKED, batch_size)} images of 256x256 or more (pack --store crop256)"
        raise UserError(f"{shards}: expected {expected}, got {train.num_samples} of store {train.store}")
    decoded = common.select_first_shards(open_shards(pixels, "train"), train.num_samples) if pixels else train
    if pixels and not (decoded.is_decoded and decoded.num_samples == train.num_samples):
        raise UserError(f"--pixels: expected what make_shards.py decode makes of {shards}, got {pixels}")
    basis = Eigenbasis.load(shards / "pca.json", train.manifest_sha256)
    pythons = {"ffcv": ffcv_python, "slipstream": slipstream_python}
    contenders = [peer for name in names for peer in PEERS[name] if pixels or not peer.table.from_pixels]
    raise_open_file_limit(4 * len(train.tars))
    tune_malloc()  # as the trainer does
    multiprocessing.set_forkserver_preload(["torch"])
    workers = workers or num_cores()
    stores, measured = {train.store: train, decoded.store: decoded}, dict[str, Peer]()
    turns, missing = dict[str, Callable[[], common.Rate]](), dict[str, str]()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        scratch = Path(folder)
        few = {store: write_numbered(each, scratch / store) for store, each in stores.items()}
        files = extract(few[train.store], scratch / "few"), extract(train, scratch / "all")
        print(f"one epoch of {CHECKED} images from each, in batches of {CHECK_BATCH}:")
        for peer in contenders:
            name = f"{peer.title} ({peer.table.title})"
            store = decoded.store if peer.table.from_pixels else train.store
            rest = scratch, peer.table.windows, pythons
            checked = PeerData(few[store], files[0], basis, CHECK_BATCH, 2, *rest, True)
            timed = PeerData(stores[store], files[1], basis, batch_size, workers, *rest)
            try:
                with closing(peer.load(checked)) as batches:
                    print(f"{name}: {check_batches(batches, checked, peer.levels)}", flush=True)
            except (ImportError, OSError, RuntimeError, AssertionError) as error:
                missing[name] = (str(error).strip() or repr(error)).splitlines()[-1]
                print(f"{name}: not measured: {missing[name]}")
                continue
            step = partial(next, stack.enter_context(closing(peer.load(timed))))
            turns[name], measured[name] = partial(common.measure, step, batch_size, seconds), peer
        if not turns:
            raise UserError("--peers: expected one that runs here, got none; see above")
        rates = common.interleave(turns, repeats)

    data = common.describe_shards(train)
    print(f"{data}; batch {batch_size}")
    print(f"{workers} processes or threads each, of ours one more, {repeats} repeats")
    context: dict[str, Any] = {"data": data, "shards": train.manifest_sha256, "batch_size": batch_size}
    context |= {"workers": workers, "device": "cpu", "not_measured": missing}
    for library, python in pythons.items():
        code = f"from importlib.metadata import *; print(version(packages_distributions()['{library}'][0]))"
        if python and any(peer in measured.values() for peer in PEERS[library]):
            context[library] = subprocess.check_output([python, "-c", code], text=True).strip()
    for table in dict.fromkeys(peer.table for peer in measured.values()):
        rows = {peer.title: rates[name] for name, peer in measured.items() if peer.table == table}
        reference = next((title for title in (COPY, OURS) if title in rows), next(iter(rows)))
        common.report_rates(table.title, rows, reference, out, **context)


def extract(shards: ShardSet, folder: Path) -> list[tuple[str, int]]:
    """Extract every JPEG of the shards to a file. Returns paths and class indexes."""
    files = []
    for key, jpeg, label in common.read_samples(shards):
        path = folder / f"{label:06}" / f"{key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg)
        files.append((str(path), label))
    return files


def write_numbered(shards: ShardSet, folder: Path) -> ShardSet:
    """Write the first images as new shards with the image's number as class index, which shows whether each is loaded
    once."""
    import webdataset

    extension = "npy" if shards.is_decoded else "jpg"
    folder.mkdir()
    with webdataset.ShardWriter(f"{folder}/%06d.tar", maxcount=CHECK_SHARD, verbose=0) as writer:
        for number, (_, image, _) in enumerate(itertools.islice(common.read_samples(shards), CHECKED)):
            writer.write({"__key__": f"{number:06}", extension: image, "cls": number})
    tars, places = sorted(map(str, folder.glob("*.tar"))), []
    for number, tar in enumerate(tars):
        with tarfile.open(tar) as file:
            members = [member for member in file if member.name.endswith(extension)]
        places += [(number, member.offset_data, member.size) for member in members]
    samples = np.array([(*place, number) for number, place in enumerate(places)], SAMPLE)
    return replace(shards, tars=tuple(tars), samples=samples)


def check_batches(batches: "Batches", data: "PeerData", levels: int) -> str:
    """Load one epoch, and assert that each image came once, as a float32 crop of Pillow's pixels within `levels`, at
    any offset, flipped in half of the cases, shifted by standard normal draws and normalized; or as that crop, uint8.

    Returns a summary. Class indexes are the images' numbers.
    """
    dtype = np.uint8 if data.windows else np.float32
    pixels_NHWC = [np.asarray(Image.open(path).convert("RGB")) for path, _ in data.files]
    windows, seen, count, places = [], [], len(pixels_NHWC), IMAGE_SIDE - SIDE + 1
    for _ in range(count // data.batch_size):
        images, labels = (tensor.numpy() for tensor in next(batches))
        images_NHWC = images if images.shape[-1] == 3 else images.transpose(0, 2, 3, 1)
        kind = (images_NHWC.dtype, *images_NHWC.shape)
        complaint = f"expected 224x224 {dtype.__name__} crops, got {kind}"
        assert kind == (dtype, data.batch_size, SIDE, SIDE, 3), complaint
        if data.windows:
            images_NHWC = (images_NHWC - data.basis.mean) / Lighting().divisor  # as without lighting
        seen += labels.tolist()
        pairs = zip(images_NHWC, labels, strict=True)
        windows += [find_window(image, pixels_NHWC[label], data.basis) for image, label in pairs]
    assert sorted(seen) == list(range(count)), f"expected {count} images in an epoch, got {len(set(seen))}"
    columns, rows, flips, draws, off, mean_off = map(np.array, zip(*windows, strict=True))
    difference = f"{off.max():.2f} levels off, {mean_off.mean():.2f} in the mean"
    assert off.max() <= levels and mean_off.mean() <= levels / 8, (
        f"expected Pillow's pixels, got {difference}"
    )
    offsets = [len(set(axis.tolist())) for axis in (columns, rows)]
    assert min(offsets) > places / 2, f"expected crops at {places} offsets, got {offsets}"
    summary = f"{count} of {count} images, once each; pixels {difference}; at {' x '.join(map(str, offsets))} offsets"
    if data.windows:
        assert not flips.any() and np.abs(draws).max() < 0.05 * levels, "expected windows as they are"
        return summary
    assert 0.3 < flips.mean() < 0.7, f"expected half of the images flipped, got {flips.mean():.0%}"
    # Five standard errors of 128 draws. A decoder that is some levels off in the mean shifts the colours, too.
    mean, spread = np.abs(draws.mean(0)).max(), draws.std(0)
    normal = mean < 0.45 + 0.1 * (levels - 1) and np.abs(spread - 1).max() < 0.3
    assert normal, f"expected standard normal draws of lighting, got {draws.mean(0)} +- {spread}"
    return f"{summary}, {flips.mean():.0%} flipped, lighting +- {draws.std():.2f}"


def find_window(
    window_HWC: np.ndarray, image_HWC: np.ndarray, basis: Eigenbasis
) -> tuple[int, int, bool, np.ndarray, float, float]:
    """Locate a crop in its image, and undo its augmentation.

    Returns left, top, whether it is flipped, its lighting's normal draws (3,), and the largest and the mean difference
    of its pixels from the image's, in levels of 0..255.
    """
    lighting = Lighting()
    levels = window_HWC.astype(np.float64) * lighting.divisor + basis.mean
    views = [levels, levels[:, ::-1]]
    everywhere = sliding_window_view(image_HWC[:, :, 1], (SIDE, SIDE))[:, :, ::GRID, ::GRID]
    # Lighting shifts all pixels alike, so at the right offset the difference is constant. Green is enough.
    scores = [(view[::GRID, ::GRID, 1] - everywhere).std((2, 3)) for view in views]
    flipped, top, left = (int(k) for k in np.unravel_index(np.argmin(scores), np.shape(scores)))
    difference = views[flipped] - image_HWC[top : top + SIDE, left : left + SIDE]
    shift = np.median(difference, (0, 1))
    draw, off = np.linalg.solve(lighting.shift_matrix(basis), shift), np.abs(difference - shift)
    return left, top, bool(flipped), draw, off.max(), off.mean()
