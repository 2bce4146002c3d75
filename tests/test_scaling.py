"""The scaling benchmark measures real batches whatever the number of samples, and its paper estimate is arithmetic that
can be done by hand."""

import json
import re
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.eigenbasis import Eigenbasis
from pipeline.reader import decoded_batches
from pipeline.shards import open_shards
from tests.helpers import run_ok
from tools.bench import scaling
from tools.benchmarks.figure import Panel, draw_panels
from tools.benchmarks.scaling import samples
from tools.benchmarks.scaling.bench import num_parameters
from tools.benchmarks.scaling.estimate import Constants, estimate
from tools.benchmarks.scaling.part import counted, up_to
from tools.benchmarks.scaling.samples import StartUp, make_links

TOO_MANY = 10**12
"""Samples: no machine holds their index."""


@pytest.mark.slow
def test_scaling(shards: Path, tmp_path: Path) -> None:
    """A row for each contender with what it was given, one for the estimate, a figure; the screen shows the same."""
    out = tmp_path / "rows.jsonl"
    lists = f"--threads [2] --ranks [2] --samples [20000,{TOO_MANY}] --gpu-rates [1000]"
    turns = "--epochs 2 --seconds .2 --repeats 1 --batch-size 32"
    text = run_ok("tools/bench.py", "scaling", shards, *lists.split(), *turns.split(), "--out", out)
    *rows, no_start, no_memory, paper = [json.loads(line) for line in out.read_text().splitlines()]
    found = {row["contender"]: row for row in rows}
    one, two = found["1 process, 1 thread"], found["2 processes, 1 thread each"]
    assert (one["processes"], one["threads"], two["processes"], two["threads"]) == (1, 1, 2, 1)
    assert set(found) == {one["contender"], two["contender"], "1 process, 2 threads"} | {
        *("start-up with 20000 samples", "memory with 20000 samples"),
        *("epochs 1 to 2", "memory behind epochs 1 to 2"),
    }
    for name, row in found.items():
        assert row["median"] > 0 and len(row["values"]) == 1 + ("epochs" in name) and row["unit"]
        assert f"\n{name} " in text
    start = found["start-up with 20000 samples"]
    stages = start["files_s"] + start["index_s"] + start["batch_s"]
    assert stages == pytest.approx(np.mean(start["values"])) and start["samples"] == 20000
    assert np.isfinite(found["memory behind epochs 1 to 2"]["growth_mb_per_epoch"])
    for row, what in ((no_start, "start-up"), (no_memory, "memory")):
        assert row["contender"] == f"{what} with {TOO_MANY} samples" and "median" not in row
        assert row["not_measured"].startswith("DALI's index takes about 455000.0 GB, ") and row["cores"] > 0
        assert f"not measured: {row['not_measured']}" in text
    # Memory with 1,281,167 samples was not measured, and no row claims it.
    assert paper["measured"]["process_gb"] is None and paper["estimates"][0]["loaders_gb"] is None
    assert paper["measured"]["images_per_core_s"] == one["images_per_core_s"] > 0
    (only,) = paper["estimates"]
    assert only["cores_per_gpu"] == pytest.approx(1000 / one["images_per_core_s"])
    assert (
        "nothing here was measured on a GPU" in text
        and paper["benchmark"] == "scaling"
        and paper["cores"] > 0
    )
    with Image.open(tmp_path / "rows.png") as figure:
        assert figure.format == "PNG" and figure.width > 800


def test_estimate() -> None:
    """Sixty-four GPUs of 10,000 images/s, by hand: 640,000 images/s of 25 kB are 16 GB/s; ILSVRC-2012 lasts 2.00 s;
    2 * 63/64 of 60,965,224 floats are 480.1 MB, 78.125 times a second 37.5 GB."""
    constants = Constants(images_per_core_s=2000, image_bytes=25e3, parameters=60_965_224, process_gb=0.9)
    found = estimate(10_000, constants)
    assert found.cores_per_gpu == pytest.approx(5)
    assert found.read_gb_per_s == pytest.approx(16)
    assert found.epoch_s == pytest.approx(1_281_167 / 640_000)
    assert found.allreduce_gb_per_step == pytest.approx(0.480101139)
    assert found.allreduce_gb_per_s == pytest.approx(37.5079015)
    assert found.page_cache_gb == pytest.approx(32.029175)
    assert found.loaders_gb == pytest.approx(57.6)
    # One GPU has nobody to exchange gradients with; two send all of them once.
    assert estimate(10_000, constants, gpus=1).allreduce_gb_per_step == 0
    assert estimate(10_000, constants, gpus=2).allreduce_gb_per_step == pytest.approx(4 * 0.060965224)
    assert num_parameters() == 60_965_224


def test_links(shards: Path, tmp_path: Path) -> None:
    """A set of links is one that every reader takes, of exactly so many samples: the pixels of one shard again and
    again, whatever is left over in the last."""
    train = open_shards(shards, "train")
    each = max(train.samples)
    make_links(train, shards, 2 * each + 7, tmp_path / "set")
    linked = open_shards(tmp_path / "set", "train")
    Eigenbasis.load(tmp_path / "set" / "pca.json", linked.manifest_sha256)
    assert linked.samples == (each, each, 7) and linked.num_samples == 2 * each + 7
    images = np.concatenate([batch.numpy() for batch in decoded_batches(linked, 64, 2)])
    assert (images[:each] == images[each : 2 * each]).all() and (images[:7] == images[2 * each :]).all()
    assert len(np.unique(images[:each].reshape(each, -1), axis=0)) > each / 2  # not one image again and again


def test_what_fails_is_told(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A size that fails is tried once and has the reason in its rows; the others are measured."""
    tried = []

    def start(_: object, folder: Path, batch_size: int) -> StartUp:
        tried.append(open_shards(folder, "train").num_samples)
        if tried[-1] == 65:
            raise BrokenProcessPool("a process was ended")
        return StartUp(1, 2, batch_size, 0.5, 1)

    monkeypatch.setattr(samples, "in_new_process", start)
    part, memory = samples.scale_samples(shards, [64, 65], batch_size=32, repeats=2)
    assert tried == [65, 64, 64, 64] and memory == {64: 0.5}
    assert [table.measured for table in part.tables] == [
        {"start-up with 64 samples": [35, 35]},
        {"memory with 64 samples": [0.5, 0.5]},
    ]
    assert [row["not_measured"] for row in part.missing] == ["a process was ended"] * 2


def test_wrong_options(shards: Path, tmp_path: Path) -> None:
    """Each is named in one sentence, before anything is measured."""
    wrong = {
        "--threads": {"threads": [0]},
        "--ranks": {"ranks": []},
        "--samples takes a list of numbers from 128 on": {"samples": [100]},
        "--epochs must be at least 2": {"epochs": 1},
        "--workers is for packing, which needs --raw": {"workers": [1]},
        "--gpu-rates": {"gpu_rates": [0.0]},
        "--repeats must be at least 1": {"repeats": 0},
        "--seconds positive": {"seconds": 0.0},
        "--batch-size must be at least 1": {"batch_size": 0},
        "take a smaller --batch-size, or fewer --ranks": {"ranks": [100]},
        "call it .jsonl": {"out": tmp_path / "rows.csv"},
    }
    for sentence, options in wrong.items():
        with pytest.raises(ValueError, match=re.escape(sentence)):
            scaling(shards, **options)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json"):
        scaling(tmp_path)


def test_numbers_and_words() -> None:
    """Every number on few cores, doublings on many; one of a thing and several."""
    assert (up_to(2), up_to(2, 2), up_to(1, 2)) == ([1, 2], [1, 2, 3, 4], [1, 2, 3])
    assert up_to(6, 2) == [1, 2, 4, 6, 7, 8]
    words = [
        counted(number, what)
        for number, what in ((1, "thread"), (2, "thread"), (1, "process"), (2, "process"))
    ]
    assert words == ["1 thread", "2 threads", "1 process", "2 processes"]


def test_panels(tmp_path: Path) -> None:
    """Curves over one decade or none, and one panel alone, are drawn."""
    curves = {"one": {10: [0.1, 0.2], 1000: [5.0]}, "other": {10: [0.1, 0.1]}}
    for name, panels in (("one", [Panel("time", "s", "samples", curves, ideal=True)]), ("log", [])):
        many = panels or [Panel("time", "s", "samples", curves, log=True)] * 3
        draw_panels(many, tmp_path / f"{name}.png", "caption")
        with Image.open(tmp_path / f"{name}.png") as figure:
            assert figure.size[0] == 1200 and figure.size[1] > 300
