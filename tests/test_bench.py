"""The benchmark runs every contender on the same files and prints ratios from one run."""

import io
import json
from pathlib import Path

from PIL import Image

from tests.conftest import run_ok
from tools import bench_pack
from tools.ilsvrc import read_archives
from tools.make_demo import make_demo


def test_loader(shards: Path, tmp_path: Path) -> None:
    """Three rows, positive rates, a ratio each; rows on disk tell commit, hardware and versions."""
    out = tmp_path / "rows.jsonl"
    text = run_ok(
        "tools/bench.py", "loader", shards, "--seconds", "0.2", "--repeats", "2", "--batch-size", "32", "--out", out
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["contender"].split()[0] for row in rows] == ["libjpeg-turbo", "DALI", "loader"]
    for row in rows:
        assert (
            row["median"] > 0
            and len(row["values"]) == 2
            and row["versions"]["dali"]
            and row["cpu"]
            and row["contender"] in text
        )
    assert "1.00" in text


def test_lighting(shards: Path, tmp_path: Path) -> None:
    """The same graph with and without lighting: positive rates, and both ratios with their errors."""
    out = tmp_path / "rows.jsonl"
    arguments = ("--batches", "3", "--repeats", "2", "--batch-size", "32", "--out", out)
    text = run_ok("tools/bench.py", "lighting", shards, *arguments)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({row["contender"] for row in rows}) == len(rows) == 2
    assert all(row["median"] > 0 and len(row["values"]) == 2 for row in rows)
    for what in ("speed", "processor time"):
        assert float(text.split(f"{what} with lighting, of that without: ")[1].split()[0]) > 0


def test_pack(tmp_path: Path) -> None:
    """Six rows, positive rates, two tables with a reference each; nothing is left beside the images."""
    make_demo(tmp_path / "raw", photos=40)
    out = tmp_path / "rows.jsonl"
    text = run_ok("tools/bench.py", "pack", tmp_path / "raw", "--repeats", "1", "--workers", "2", "--out", out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({row["contender"] for row in rows}) == len(rows) == 6
    assert all(row["median"] > 0 and len(row["values"]) == 1 and row["images"] == 40 for row in rows)
    assert all(f"\n{row['contender']} " in text for row in rows) and text.count(" 1.00\n") >= 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw", "rows.jsonl"]


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


def test_plan(tmp_path: Path) -> None:
    """Planning a hundred thousand images is told in seconds and memory, which stays far below that of a Python object
    each."""
    output = run_ok("tools/bench.py", "plan", "--images", "100000", "--out", tmp_path / "plan.jsonl")
    assert "100000 images in 21841 archives" in output
    rows = [json.loads(line) for line in (tmp_path / "plan.jsonl").read_text().splitlines()]
    assert {row["contender"] for row in rows} == {"read the listing, s", "plan, s", "peak memory, GB"}
    assert all(row["median"] > 0 for row in rows)


def test_pca(shards: Path) -> None:
    """Decoding alone and with the sums, and how many times as long that takes."""
    output = run_ok("tools/bench.py", "pca", shards, "--repeats", "1")
    assert "decode + exact moments" in output and float(output.rsplit("takes ", 1)[1].split(" times")[0]) > 0
