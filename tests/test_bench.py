"""A benchmark measures what it says: images by the clock and by the CPU time of all processes that work for it."""

import io
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from time import process_time, sleep

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from pipeline.shards import open_shards
from tests.helpers import TORCHVISION, refuses, run_ok
from tools.benchmarks import common, model, pack, reader
from tools.benchmarks.common import Rate
from tools.make_demo import make_demo

TURNS = ("--seconds", "0.2", "--repeats", "2", "--out")


def rows_of(path: Path) -> list[dict]:
    """The rows of a benchmark, each with positive rates and with what it takes to repeat it."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        second = "p99" if row["unit"] == "ms" else "per_cpu_s"
        assert row["median"] > 0 and len(row["values"]) == len(row[f"values_{second}"])
        assert min(row[f"values_{second}"]) > 0
        assert row["versions"]["torch"] and row["cpu"] and row["command"] and "commit" in row
    return rows


@pytest.mark.slow
def test_loader_has_a_row_for_each_contender(few: Path, tmp_path: Path) -> None:
    """A row for each contender, with ratios to libjpeg-turbo alone; the loader's rows with and without lighting. Loops
    are timed while samples are read, no faster than they should be. A wrong option is named before anything is
    measured."""
    text = run_ok("tools/bench.py", "loader", few, "--batch-size", "32", *TURNS, tmp_path / "rows.jsonl")
    rows = rows_of(tmp_path / "rows.jsonl")
    names = " ".join(row["contender"].split()[0] for row in rows)
    assert names == "libjpeg-turbo uint8 loader: loader: compute_pca: our DALI's alone while"
    assert all(row["contender"] in text and row["data"].startswith("539 generated images, ") for row in rows)
    assert rows[0]["ratio"] == 1 and rows[3]["contender"].endswith("(strength 0)")
    assert rows[5]["ratio_per_cpu_s"] > 0 and 1000 < rows[8]["samples_per_s"] < 31_000
    assert "--repeats" in refuses("tools/bench.py", "loader", few, "--repeats", "0")


@pytest.mark.slow
def test_loader_measures_a_pixel_store_next_to_numpy(few: Path, tmp_path: Path) -> None:
    """Of a pixel store the rows are relative to numpy's copies; DALI's reader yields crops of the stored pixels."""
    run_ok("tools/make_shards.py", "decode", few, tmp_path / "pixels")
    options = ("--batch-size", "32", *TURNS, tmp_path / "rows.jsonl")
    run_ok("tools/bench.py", "loader", tmp_path / "pixels", *options)
    names = " ".join(row["contender"].split()[0] for row in rows_of(tmp_path / "rows.jsonl"))
    assert names == "numpy uint8 uint8 loader: loader: compute_pca: our DALI's alone while"
    shards = open_shards(tmp_path / "pixels", "train")
    images, labels = next(reader.read_with_dali(shards, 2, crop=True))
    stored = [
        (s["npy"], int(s["cls"]))
        for s in webdataset.WebDataset(list(shards.tars), shardshuffle=False).decode()
    ]
    for crop, label in zip(images, labels, strict=True):
        corner = bytes(np.array(crop)[0].tobytes())
        same_class = (image for image, cls in stored if cls == int(bytes(np.array(label))))
        assert any(corner in image.tobytes() for image in same_class)


@pytest.mark.slow
def test_pack_contenders_pack_all_images_and_remove_them(tmp_path: Path) -> None:
    """Every contender packs all images, and removes what it wrote; the baseline makes 256x256 JPEGs of each."""
    make_demo(tmp_path / "raw", photos=40)
    run_ok("tools/bench.py", "pack", tmp_path / "raw", "--repeats", "1", "--out", tmp_path / "rows.jsonl")
    rows = rows_of(tmp_path / "rows.jsonl")
    assert len({row["contender"] for row in rows}) == len(rows) == 4
    assert all(row["images"] == 40 for row in rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw", "rows.jsonl"]
    for image in pack.list_images(tmp_path / "raw"):
        with Image.open(io.BytesIO(pack.crop_with_pillow(image))) as packed:
            assert (packed.size, packed.mode, packed.format) == ((256, 256), "RGB", "JPEG")


def test_cpu_time_is_that_of_all_processes() -> None:
    """A child's CPU time counts while it runs and once after it has ended."""
    code = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True); time.sleep(60)"
    before, own = common.read_cpu_seconds(), process_time()
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    child.stdout.readline()  # type: ignore[union-attr]
    running = common.read_cpu_seconds() - before - (process_time() - own)
    assert 0.4 < running < 0.7
    child.kill()
    child.wait()
    ended = common.read_cpu_seconds() - before - (process_time() - own)
    assert running - 0.05 < ended < 0.7


def test_turns_go_back_and_forth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other round is backwards, and the first one does not count; ratios are those of the same turn. Of a
    measurement a quarter of the time does not count, either."""
    monkeypatch.setattr(common, "SETTLE_S", 0)
    order: list[str] = []

    def contender(name: str) -> Rate:
        order.append(name)
        return Rate(len(order), 2.0 * len(order))

    rates = common.interleave({name: partial(contender, name) for name in "abc"}, 2)
    assert "".join(order) == "cbaabccba"
    assert rates["a"] == [(4, 8), (9, 18)] and rates["c"] == [(6, 12), (7, 14)]
    common.report_rates("", rates, "a", tmp_path / "rows.jsonl", data="numbers")
    row = rows_of(tmp_path / "rows.jsonl")[2]
    assert (row["contender"], row["values"], row["median_per_cpu_s"]) == ("c", [6, 7], 13)
    assert row["ratio"] == pytest.approx((6 / 4 + 7 / 9) / 2) and row["data"] == "numbers"
    naps: list[float] = []
    rate = common.measure(lambda: (sleep(0.01 if naps else 0.1), naps.append(1)), 5, 0.4)  # a slow first step
    assert rate.per_s == pytest.approx(5 * (len(naps) - 1) / 0.4, rel=0.3) and rate.per_s <= 500


def test_loops_are_compared_turn_by_turn(tmp_path: Path) -> None:
    """Medians and 99th percentiles of each turn, their medians, and the medians of their ratios, by hand."""
    alone = np.outer([1, 2, 10], np.arange(101.0))
    times = {reader.ALONE: alone, reader.READING: alone * [[3], [1], [2]]}
    reader.report_loops(times, 7.0, tmp_path / "rows.jsonl", {})
    row = rows_of(tmp_path / "rows.jsonl")[1]
    assert (row["values"], row["values_p99"]) == ([150, 100, 1000], [297, 198, 1980])
    assert (row["median"], row["p99"], row["ratio"], row["p99_ratio"]) == (150, 297, 2, 2)


@pytest.mark.slow
def test_model_has_a_row_for_each_contender(tmp_path: Path) -> None:
    """Two tables with a row for each contender, of which torchvision's has its published shapes, in their order."""
    with torch.device("meta"):
        shapes = [tuple(p.shape) for p in model.build_torchvision_alexnet().parameters() if p.ndim > 1]
    assert shapes == list(TORCHVISION.values())
    model.bench_model([1], "float32", 0.05, 1, tmp_path / "rows.jsonl")
    rows = rows_of(tmp_path / "rows.jsonl")
    tables = ["training steps, batch 1", "two towers, batch 1"]
    assert list(dict.fromkeys(row["table"] for row in rows)) == tables
    assert [row["contender"] for row in rows[-3:]] == [model.TWO_DEVICES, model.ONE_GPU, model.ONE_DEVICE]
