"""`bench peers` times no contender that does less than the job, and leaves none out in silence."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.eigenbasis import Eigenbasis
from pipeline.lighting import Lighting
from pipeline.shards import ShardSet, open_shards
from tests.helpers import run_ok
from tests.test_bench import TURNS, rows_of
from tools.benchmarks import peers
from tools.benchmarks.common import read_samples, select_first_shards
from tools.benchmarks.peer_loaders import JPEGS, PEERS, PIXELS, WINDOWS, Batches, PeerData, Table


@pytest.fixture(scope="module")
def data(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> PeerData:
    """What contenders are checked on."""
    place, train = tmp_path_factory.mktemp("peers"), open_shards(shards, "train")
    few = peers.write_numbered(train, place / "few")
    basis = Eigenbasis.load(shards / "pca.json", train.manifest_sha256)
    return PeerData(few, peers.extract(few, place / "few"), basis, 16, 2, place, False, {}, show=True)


@pytest.fixture(scope="module")
def decoded(data: PeerData, few: Path, tmp_path_factory: pytest.TempPathFactory) -> PeerData:
    """The same images out of a pixel store."""
    place = tmp_path_factory.mktemp("decoded")
    run_ok("tools/make_shards.py", "decode", few, place / "pixels")
    pixels = peers.write_numbered(open_shards(place / "pixels", "train"), place / "few")
    jpegs = peers.write_numbered(open_shards(few, "train"), place / "jpegs")
    return replace(data, shards=pixels, files=peers.extract(jpegs, place / "files"))


def honest(data: PeerData, **less: Any) -> Batches:
    """The job, by the formula; `less` leaves out a part."""
    rng, matrix = np.random.default_rng(0), Lighting().shift_matrix(data.basis)
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path, _ in data.files])
    while True:
        order = rng.permutation(len(pixels))
        order[0] = order[1] if less.get("twice") else order[0]
        for numbers in order.reshape(-1, data.batch_size):
            batch = []
            for n in numbers:
                top, left = (16, 16) if less.get("centre") else rng.integers(33, size=2)
                window = pixels[n, top : top + 224, left : left + 224].astype(float)
                window = window[:, ::-1] if rng.random() < less.get("flip", 0.5) else window
                window = window + less.get("noise", 0) * (np.arange(224)[:, None, None] == 7)
                draw = rng.standard_normal(3) * less.get("lighting", 1)
                batch.append((window - data.basis.mean + matrix @ draw) / less.get("divisor", 1.1))
            images = np.stack(batch).astype(less.get("dtype", np.float32))
            yield torch.from_numpy(images[:, : less.get("height", 224)]), torch.from_numpy(numbers)


@pytest.mark.parametrize(
    "less, complaint",
    [
        ({"dtype": np.float64}, "float64"),
        ({"twice": True}, "expected 128 images in an epoch, got 127"),
        ({"noise": 3.0}, "levels off"),
        ({"divisor": 1.0}, "levels off"),
        ({"centre": True}, r"33 offsets, got \[1, 1\]"),
        ({"flip": 0.0}, "images flipped, got 0%"),
        ({"lighting": 0.5}, "standard normal draws of lighting"),
    ],
)
def test_less_than_the_job_is_refused(data: PeerData, less: dict[str, Any], complaint: str) -> None:
    """A contender that leaves out a part, or yields an image twice, is not timed."""
    with pytest.raises(AssertionError, match=complaint):
        peers.check_batches(honest(data, **less), data, levels=1)


@pytest.mark.parametrize("name", ["honest", "dali", "ours"])
def test_the_job_done_passes(data: PeerData, name: str) -> None:
    """The formula itself, DALI's example graph and the trainer's loader do the job, to Pillow's pixels."""
    batches = honest(data) if name == "honest" else PEERS[name][0].load(data)
    found = peers.check_batches(batches, data, levels=1)
    assert "128 of 128 images, once each; pixels 0.00 levels off" in found
    batches.close()


@pytest.mark.parametrize("name, table", [("ours", PIXELS), ("ours", WINDOWS), ("numpy", WINDOWS)])
def test_a_pixel_store_gives_the_pixels_of_its_jpegs(decoded: PeerData, name: str, table: Table) -> None:
    """Finished batches and uint8 windows of a pixel store have Pillow's pixels of the JPEGs; others, or flipped ones,
    are refused."""
    peer = next(peer for peer in PEERS[name] if peer.table == table)
    decoded = replace(decoded, windows=table.windows)
    with closing(peer.load(decoded)) as batches:
        assert "pixels 0.00 levels off" in peers.check_batches(batches, decoded, 1)
    if table == WINDOWS:
        for change in (lambda images: images ^ 1, lambda images: images.flip(2), lambda images: 255 - images):
            with closing(peer.load(decoded)) as batches, pytest.raises(AssertionError, match="expected"):
                peers.check_batches(((change(x), y) for x, y in batches), decoded, 1)  # type: ignore[arg-type]


def test_the_same_bytes_everywhere(numbered_shards: Callable[..., ShardSet], tmp_path: Path) -> None:
    """Files hold the shards' JPEGs, in their order, under their labels; a limit takes whole shards; the checked images
    are the first ones, numbered."""
    shards = numbered_shards(200, 4)
    samples = list(read_samples(shards))
    files = peers.extract(shards, tmp_path / "files")
    assert [(Path(path).read_bytes(), label) for path, label in files] == [sample[1:] for sample in samples]
    assert [Path(path).parent.name for path, _ in files][:2] == ["000000", "000001"]
    assert [select_first_shards(shards, n).num_samples for n in (1, 50, 51, 1000)] == [50, 50, 100, 200]
    few = peers.write_numbered(shards, tmp_path / "few")
    assert [sample[1:] for sample in read_samples(few)] == [(samples[n][1], n) for n in range(peers.CHECKED)]
    assert few.num_samples == peers.CHECKED


@pytest.mark.slow
def test_each_peer_is_timed_or_listed_with_the_reason(shards: Path, tmp_path: Path) -> None:
    """Installed contenders are checked and timed, others are listed with the reason."""
    text = run_ok("tools/bench.py", "peers", shards, "--batch-size", "32", *TURNS, tmp_path / "rows.jsonl")
    rows = rows_of(tmp_path / "rows.jsonl")
    missing = rows[0]["not_measured"]
    titles = {peer.title for table in PEERS.values() for peer in table if peer.table == JPEGS}
    assert {row["contender"] for row in rows} | {each.partition(" (")[0] for each in missing} == titles
    assert {"torch DataLoader + Pillow", "webdataset + Pillow", "DALI, as its ImageNet example", "ours"} <= {
        row["contender"] for row in rows
    }
    assert (
        all(row["versions"]["webdataset"] for row in rows)
        and "--ffcv-python" in missing[f"FFCV ({JPEGS.title})"]
    )
    assert text.count("128 of 128 images, once each") == len(rows) and text.count("not measured: ") == len(
        missing
    )
