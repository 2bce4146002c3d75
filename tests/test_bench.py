"""The benchmark runs every contender on the same files and prints ratios from one run."""

import io
import itertools
import json
from pathlib import Path
from time import sleep

import numpy as np
import pytest
from PIL import Image

from pipeline.eigenbasis import Eigenbasis
from tests.helpers import ROOT, jpeg, photo, refuses, run_here, run_ok, run_python
from tools.benchmarks import pack as bench_pack
from tools.benchmarks.loader import Windows
from tools.benchmarks.measure import rate
from tools.make_demo import make_demo
from tools.packing.layouts import read_archives


def test_loader(few: Path, tmp_path: Path) -> None:
    """Four rows, positive rates, a ratio each; rows on disk tell data, commit, hardware and versions; a figure comes
    beside them."""
    out = tmp_path / "rows.jsonl"
    text = run_ok(
        "tools/bench.py",
        "loader",
        few,
        "--seconds",
        "0.2",
        "--repeats",
        "1",
        "--batch-size",
        "32",
        "--out",
        out,
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["contender"].split()[0] for row in rows] == ["libjpeg-turbo", "uint8", "loader:", "torch"]
    for row in rows:
        assert (
            row["median"] > 0
            and len(row["values"]) == 1
            and row["versions"]["dali"]
            and row["cpu"]
            and row["data"].startswith("539 generated images of 256x256, ")
            and row["contender"] in text
        )
    assert "1.00" in text
    with Image.open(tmp_path / "rows.png") as figure:
        assert figure.format == "PNG" and figure.width > 800


def test_train(few: Path, tmp_path: Path) -> None:
    """Loader, network and both: positive rates; efficiency, waiting, what binds and where the time goes are told, on
    the screen and in the rows."""
    out, small = (
        tmp_path / "rows.jsonl",
        "--model.channels [8,16,16,16,16] --model.hidden 64 --train.compile false",
    )
    config = ROOT / "train/configs/quickstart.yaml"
    turns = ["--seconds", "0.5", "--repeats", "2", "--profile", "--out", out]
    text = run_ok("tools/bench.py", "train", few, "--recipe", config, "--settings", small, *turns)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["contender"].split()[0] for row in rows] == ["loader", "network", "both,"]
    loader, network, both = (row["median"] for row in rows)
    turn_by_turn = np.array([row["values"] for row in rows])
    efficiency = np.median(turn_by_turn[2] / turn_by_turn[:2].min(0))
    assert min(loader, network, both) > 0 and rows[0]["efficiency"] == pytest.approx(efficiency)
    assert f"real / min(loader, network): {efficiency:.2f}" in text
    assert f"p50 {rows[0]['wait_ms_p50']:.2f} ms" in text and 0 < rows[0]["wait_percent"] < 100
    assert f"the {'loader' if loader < network else 'network'} binds" in text
    parts = [rows[0][f"host_{part}_percent"] for part in ("wait", "step", "rest")]
    assert (
        sum(parts) == pytest.approx(100)
        and min(parts[:2]) > 0
        and "where 10 training steps spend their time" in text
    )
    if rows[0]["gpu"] is None:
        assert rows[0]["gpu_utilization_percent"] is None and "busy_percent" not in rows[0]
    else:
        assert rows[0]["busy_percent"] + rows[0]["idle_percent"] == pytest.approx(100)


def test_the_plain_loader_makes_the_same_batches(plain_basis: Eigenbasis) -> None:
    """What the loader is compared with does as much work: windows of the image, minus the mean, some flipped, relit."""
    pixels = photo(np.random.default_rng(0))
    (mirrored, plain) = (0, 0)
    for window, _ in itertools.islice(Windows([jpeg(pixels, quality=100, subsampling=0)], plain_basis), 30):
        assert window.shape == (224, 224, 3) and window.dtype == np.float32
        grey, wanted = window.mean(2) * 1.1, pixels.mean(2) - plain_basis.mean.mean()
        best = []
        for view in (grey, grey[:, ::-1]):  # up to the shift of lighting, and a level of the JPEG
            spread = [
                np.ptp(view[::16, ::16] - wanted[top : top + 224, left : left + 224][::16, ::16])
                for top in range(33)
                for left in range(33)
            ]
            best.append(min(spread))
        assert min(best) < 6
        plain, mirrored = plain + (best[0] < best[1]), mirrored + (best[1] < best[0])
    assert plain > 5 and mirrored > 5


def test_lighting(few: Path, tmp_path: Path) -> None:
    """The same graph with and without lighting: positive rates, and both ratios with their errors."""
    out = tmp_path / "rows.jsonl"
    arguments = ("--batches", "3", "--repeats", "2", "--batch-size", "32", "--out", out)
    text = run_ok("tools/bench.py", "lighting", few, *arguments)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({row["contender"] for row in rows}) == len(rows) == 2
    assert all(row["median"] > 0 and len(row["values"]) == 2 for row in rows)
    for what in ("speed", "processor time"):
        assert float(text.split(f"{what} with lighting, of that without: ")[1].split()[0]) > 0


@pytest.mark.slow
def test_pack(tmp_path: Path) -> None:
    """Six rows, positive rates, two tables with a reference each; nothing is left beside the images."""
    make_demo(tmp_path / "raw", photos=40)
    out = tmp_path / "rows.jsonl"
    text = run_ok(
        "tools/bench.py", "pack", tmp_path / "raw", "--repeats", "1", "--workers", "2", "--out", out
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({row["contender"] for row in rows}) == len(rows) == 6
    assert all(row["median"] > 0 and len(row["values"]) == 1 and row["images"] == 40 for row in rows)
    assert all(f"\n{row['contender']} " in text for row in rows) and text.count(" 1.00\n") >= 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw", "rows.jsonl", "rows.png"]


def test_plain_packers(tmp_path: Path) -> None:
    """The baseline's images are 256x256 and the copy's bytes are the raw ones: they do the work that they stand for."""
    make_demo(tmp_path / "raw", photos=20)
    images = list(read_archives(tmp_path / "raw").splits["train"])
    for image in images:
        with Image.open(io.BytesIO(bench_pack.crop_with_pillow(image))) as packed:
            assert (packed.size, packed.mode, packed.format) == ((256, 256), "RGB", "JPEG")
    assert bench_pack.copy_images(images, tmp_path / "copy") == sum(image.size for image in images)
    assert (tmp_path / "copy").read_bytes() == b"".join(image.read() for image in images)
    assert bench_pack.codec_rate(images) > 0


def test_processes_of_packers_start_at_once() -> None:
    """Their start is a part of what is timed, and make_shards' is not: they import little."""
    code = "import sys, tools.benchmarks.pack; print([name for name in ('torch', 'matplotlib') if name in sys.modules])"
    assert run_ok("-c", code, run=run_python) == "[]\n"


def test_plan(tmp_path: Path) -> None:
    """Planning fifty thousand images is told in seconds and memory, which stays far below that of a Python object
    each."""
    output = run_ok(
        "tools/bench.py", "plan", "--images", "50000", "--repeats", "1", "--out", tmp_path / "plan.jsonl"
    )
    assert "50000 made-up names in 21841 archives" in output
    rows = [json.loads(line) for line in (tmp_path / "plan.jsonl").read_text().splitlines()]
    assert {row["contender"] for row in rows} == {"read the listing", "plan", "memory at most"}
    assert all(row["median"] > 0 for row in rows)


@pytest.mark.slow
def test_all(few: Path, tmp_path: Path) -> None:
    """Each runs by its own command, with rows and a figure; what cannot run is named, and the others still do; a wrong
    name is found before any."""
    text = run_ok("tools/bench.py", "all", few, "--only", '["pca", "pack"]', "--out", tmp_path / "rows")
    assert "pack: not measured, it needs --raw" in text and f"bench.py pca {few} --out" in text
    assert {path.name for path in (tmp_path / "rows").iterdir()} == {"pca.jsonl", "pca.png"}
    done = run_here("tools/bench.py", "all", few, "--only", '["pca", "speed"]', "--out", tmp_path / "other")
    assert done.returncode == 2 and "not speed" in done.stderr and not (tmp_path / "other").exists()
    done = run_here(
        "tools/bench.py", "all", few, "--only", '["pack"]', "--raw", tmp_path, "--out", tmp_path / "a"
    )
    assert done.returncode == 2 and done.stderr.endswith(
        "error: pack failed, see above; --only pack repeats one of them\n"
    )


def test_what_is_timed_begins_behind_the_warm_up() -> None:
    """A quarter of the time is not counted; what is told of the steps, such as their waits, begins where counting
    does."""
    told: list[str] = []
    images_per_s = rate(
        lambda: (sleep(0.01), told.append("step")), 5, 0.4, begin=lambda: told.append("begin")
    )
    warm_up, counted = told.index("begin"), len(told) - told.index("begin") - 1
    assert told.count("begin") == 1 and 1 <= warm_up <= 11 and counted >= warm_up
    assert images_per_s <= 5 / 0.01 and images_per_s == pytest.approx(5 * counted / 0.4, rel=0.3)


def test_pca(few: Path) -> None:
    """Decoding alone and with the sums, and how many times as long that takes; a set of one batch is no set to time."""
    told = refuses("tools/bench.py", "pca", few, "--batch-size", "539")
    assert "539 images, no second batch; take a smaller --batch-size" in told
    output = run_ok("tools/bench.py", "pca", few, "--repeats", "1")
    assert "decode + exact moments" in output and float(output.rsplit("takes ", 1)[1].split(" times")[0]) > 0
