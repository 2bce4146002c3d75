"""Nobody is timed by `bench peers` who does less than the job, and nobody who was asked for is left out in silence."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.eigenbasis import Eigenbasis
from pipeline.lighting import Lighting
from pipeline.shards import ShardSet
from tests.helpers import refuses, run_ok
from tools.benchmarks import peers as bench_peers
from tools.benchmarks.contenders.check import check_batches, check_decoded
from tools.benchmarks.contenders.data import (
    CHECKED,
    Batches,
    PeerData,
    Permutations,
    extract,
    numbered,
    whole_shards,
)
from tools.benchmarks.contenders.finish import finish
from tools.benchmarks.contenders.registry import PEERS, Peer


@pytest.fixture(scope="module")
def data(shards: Path, basis_of: Eigenbasis, tmp_path_factory: pytest.TempPathFactory) -> PeerData:
    """What contenders are checked on."""
    place = tmp_path_factory.mktemp("peers")
    few = numbered(bench_peers.open_shards(shards, "train"), place / "few")
    return PeerData(few, extract(few, place / "few"), basis_of, 16, 2, place, show=True)


@pytest.fixture(scope="module")
def basis_of(shards: Path) -> Eigenbasis:
    """The demo's eigenbasis."""
    return Eigenbasis.load(shards / "pca.json", bench_peers.open_shards(shards, "train").manifest_sha256)


@pytest.fixture(scope="module")
def decoded(data: PeerData) -> np.ndarray:
    """Its images, by Pillow."""
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path, _ in data.files])


def honest(data: PeerData, decoded: np.ndarray, **less: Any) -> Batches:
    """The job, by the formula; `less` leaves out a part."""
    rng, lighting = np.random.default_rng(0), Lighting()
    matrix = lighting.shift_matrix(data.basis)
    while True:
        order = rng.permutation(len(decoded))
        order[0] = order[1] if less.get("twice") else order[0]
        for numbers in order.reshape(-1, data.batch_size):
            batch = []
            for n in numbers:
                top, left = (16, 16) if less.get("centre") else rng.integers(33, size=2)
                window = decoded[n, top : top + 224, left : left + 224].astype(float)
                window = window[:, ::-1] if rng.random() < less.get("flip", 0.5) else window
                window = window + less.get("noise", 0) * (np.arange(224)[:, None] == 7)
                draw = rng.standard_normal(3) * less.get("lighting", 1)
                batch.append((window - data.basis.mean + matrix @ draw) / less.get("divisor", 1.1))
            images = np.stack(batch).astype(less.get("dtype", np.float32))
            yield torch.from_numpy(images[:, : less.get("height", 224)]), torch.from_numpy(numbers)


def test_an_honest_contender_passes(data: PeerData, decoded: np.ndarray) -> None:
    """What the formula gives is found to be the job, and told as such."""
    text = check_batches("honest", honest(data, decoded), decoded, data)
    assert "128 of 128 images, once each" in text and "(16, 224, 224, 3)" in text and "602112 bytes" in text


@pytest.mark.parametrize(
    "less, complaint",
    [
        ({"dtype": np.float64}, "float64"),
        ({"height": 200}, r"\(16, 200, 224, 3\)"),
        ({"twice": True}, "127 of 128 images"),
        ({"noise": 3.0}, "pixels .* off"),
        ({"divisor": 1.0}, "pixels .* off"),
        ({"centre": True}, "1 x 1 places"),
        ({"flip": 0.0}, "flips 0%"),
        ({"lighting": 0.0}, "relights"),
        ({"lighting": 0.5}, "relights"),
    ],
)
def test_less_than_the_job_is_refused(
    data: PeerData, decoded: np.ndarray, less: dict[str, Any], complaint: str
) -> None:
    """Whoever leaves out a part, or hands out an image twice and another one never, is named and not timed."""
    with pytest.raises(AssertionError, match=f"idler .*{complaint}"):
        check_batches("idler", honest(data, decoded, **less), decoded, data)


def test_other_pixels_are_refused_or_told(data: PeerData, decoded: np.ndarray) -> None:
    """A decoder may be as far from Pillow's pixels as is known of it; how far it is, is printed."""
    other = decoded.copy()
    other[5, 100, 100] ^= 4
    assert "within 4 levels" in check_decoded("fast", iter(other), data, levels=4)[0]
    assert "within 0 levels" in check_decoded("exact", iter(decoded), data, levels=1)[0]
    with pytest.raises(AssertionError, match="4 levels off"):
        check_decoded("fast", iter(other), data, levels=1)
    with pytest.raises(AssertionError, match="float32"):
        check_decoded("float", iter(decoded.astype(np.float32)), data, levels=1)


@pytest.mark.parametrize("name", ["dali", "ours"])
def test_contenders_in_this_process(data: PeerData, name: str) -> None:
    """DALI's example graph and the trainer's loader do the job, to Pillow's pixels."""
    assert "once each" in bench_peers.check(PEERS[name], data)


def test_numpy_finish(plain_basis: Eigenbasis) -> None:
    """What contenders do in numpy is the formula with numpy's own random numbers: left, top, flip, three draws."""
    pixels = np.random.default_rng(1).integers(0, 256, (256, 256, 3), np.uint8)
    out, flips = np.empty((224, 224, 3), np.float32), 0
    axes = plain_basis.eigenvectors * np.sqrt(plain_basis.eigenvalues)
    for seed in range(6):
        finish(pixels, plain_basis, np.random.default_rng(seed), out)
        rng = np.random.default_rng(seed)
        left, top = rng.integers(33, size=2)
        window, flipped = pixels[top : top + 224, left : left + 224].astype(float), rng.random() < 0.5
        window, flips = (window[:, ::-1] if flipped else window), flips + flipped
        wanted = (window - plain_basis.mean + 0.1 * axes @ rng.standard_normal(3)) / 1.1
        np.testing.assert_allclose(out, wanted, atol=1e-4)
    assert 0 < flips < 6


def test_the_same_bytes_everywhere(numbered_shards: Callable[..., ShardSet], tmp_path: Path) -> None:
    """Files hold the shards' JPEGs, in their order, under their labels; a limit takes whole shards; the checked images
    are the first ones, numbered."""
    import webdataset

    shards = numbered_shards(200, 4)
    samples = list(webdataset.WebDataset(list(shards.tars), shardshuffle=False))
    files = extract(shards, tmp_path / "files")
    assert [(Path(path).read_bytes(), label) for path, label in files] == [
        (s["jpg"], int(s["cls"])) for s in samples
    ]
    assert [Path(path).parent.name for path, _ in files][:2] == ["000000", "000001"]
    assert [whole_shards(shards, n).num_samples for n in (1, 50, 51, 1000)] == [50, 50, 100, 200]
    few = numbered(shards, tmp_path / "few")
    again = list(webdataset.WebDataset(list(few.tars), shardshuffle=False))
    assert [int(s["cls"]) for s in again] == list(range(CHECKED)) and few.num_samples == CHECKED
    assert [s["jpg"] for s in again] == [s["jpg"] for s in samples[:CHECKED]]


def test_permutations() -> None:
    """Every number comes once before any comes again, and in another order."""
    endless = iter(Permutations(50))
    first, second = ([next(endless) for _ in range(50)] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(50)) and first != second


def test_the_missing_are_listed(
    data: PeerData, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A contender that cannot be imported, or lacks a library of its own, has a row with the reason."""

    def nothing(_: PeerData) -> Iterator[np.ndarray]:
        raise AssertionError("is not to be asked")

    def broken(_: PeerData) -> dict[str, str]:
        raise RuntimeError("libavutil.so.59: cannot open\nand more")

    def absent(_: PeerData) -> dict[str, str]:
        import no_such_library  # type: ignore[import-not-found]

        return {"no": str(no_such_library)}

    monkeypatch.setitem(PEERS, "spdl", Peer("SPDL", broken, nothing, nothing))  # type: ignore[arg-type]
    monkeypatch.setitem(PEERS, "webdataset", Peer("webdataset", absent, nothing, nothing))  # type: ignore[arg-type]
    versions, missing = bench_peers.find(["webdataset", "spdl", "ffcv", "ours"], data)
    assert list(versions) == ["ours"]
    bench_peers.print_missing(missing, {"ours": [1.0]})
    rows = capsys.readouterr().out.splitlines()
    assert [row[:12].strip() for row in rows] == ["webdataset", "SPDL", "FFCV"]
    assert rows[0].endswith("not measured: No module named 'no_such_library'")
    assert rows[1].endswith("not measured: libavutil.so.59: cannot open") and "--ffcv-python" in rows[2]


def test_mistakes_on_the_command_line(shards: Path) -> None:
    """An unknown contender is refused in one sentence that lists those that there are."""
    with pytest.raises(ValueError, match=r"takes some of pillow, .*, ours, not tensorflow"):
        bench_peers.choose(["ours", "tensorflow"])
    assert bench_peers.choose(["ours", "pillow"]) == ["pillow", "ours"] and len(bench_peers.choose(None)) == 7
    none = Path("no-python")
    with pytest.raises(ValueError, match=r"FFCV cannot be measured: .*no-python"):
        bench_peers.bench_peers(shards, 16, 1, 0.1, 1, ["ffcv"], none, 128, None, None)
    with pytest.raises(ValueError, match="--workers"):
        bench_peers.bench_peers(shards, 16, 0, 0.1, 1, ["ours"], none, 128, None, None)


@pytest.mark.slow
def test_peers(shards: Path, tmp_path: Path) -> None:
    """Whoever is installed is checked and timed, whoever is not is listed; rows tell versions; no process, thread or
    file is left behind."""
    out, scratch = tmp_path / "rows.jsonl", tmp_path / "scratch"
    scratch.mkdir()
    turns = ["--seconds", "0.2", "--repeats", "1", "--batch-size", "32", "--out", out, "--scratch", scratch]
    text = run_ok("tools/bench.py", "peers", shards, *turns)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    missing = rows[0]["not_measured"]
    assert {row["contender"] for row in rows} | set(missing) == {peer.title for peer in PEERS.values()}
    assert {"torch DataLoader + Pillow", "webdataset + Pillow", "DALI, as its ImageNet example", "ours"} <= {
        row["contender"] for row in rows
    }
    assert all(row["median"] > 0 and row["peers"]["webdataset"] for row in rows)
    assert text.count("128 of 128 images, once each") == len(rows) and text.count("not measured: ") == len(
        missing
    )
    assert "--ffcv-python" in missing["FFCV"] and not list(scratch.iterdir())
    assert "--peers takes some of" in refuses("tools/bench.py", "peers", shards, "--peers", "[nobody]")
