"""The main job: stopped within an epoch and resumed, a run gives the very same weights; what it cannot do, it says."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from model.weights import read_weights
from pipeline.errors import UserError
from pipeline.files import read_json, write_json
from pipeline.loader import val_loader
from tests.helpers import (
    EPOCHS,
    ROOT,
    STEPS,
    TRAIN,
    files,
    final,
    look_at,
    refuses,
    rows_of,
    rows_without_times,
    run_here,
    run_ok,
    run_python,
    same_weights,
    small_run,
    start_python,
    train_refuses,
    wait_for,
)
from tools.export_weights import export_weights
from tools.packing.index import read_index
from train.checkpoint import find_checkpoint, load_checkpoint


@pytest.fixture(scope="module")
def undisturbed(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from start to end in one go, in this process; those that are compared with it have their own."""
    directory = tmp_path_factory.mktemp("undisturbed")
    assert "ten-view top-1 accuracy" in run_ok(*TRAIN, *small_run(few, directory))
    return directory


def start_until(step: int, few: Path, directory: Path) -> "subprocess.Popen[str]":
    """Start a run in a process of its own; returns when it has logged this step."""
    process = start_python(*TRAIN, *small_run(few, directory), stderr=subprocess.STDOUT)
    wait_for(lambda: any(row["step"] >= step for row in rows_of(directory)[-1:]), process)
    return process


def test_killed_stopped_and_continued(few: Path, undisturbed: Path, tmp_path: Path) -> None:
    """After kill -9 in the first epoch, and SIGTERM inside the second, which saves and leaves with 0, the same command
    goes on to bitwise the same weights and rows."""
    process = start_until(8, few, tmp_path)
    process.kill()
    process.communicate()
    process = start_until(STEPS + 4, few, tmp_path)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "resuming from" in output and "run the same command again" in output

    stopped = final(tmp_path)
    assert STEPS < stopped["step"] < 2 * STEPS  # type: ignore[operator]
    assert stopped["epoch"] == 1 and not same_weights(stopped, final(undisturbed))
    assert "resuming from" in run_ok(*TRAIN, *small_run(few, tmp_path))
    assert final(tmp_path)["step"] == EPOCHS * STEPS
    assert same_weights(final(tmp_path), final(undisturbed))
    assert rows_without_times(tmp_path) == rows_without_times(undisturbed)


@pytest.mark.slow
def test_full_disk(few: Path, undisturbed: Path, tmp_path: Path) -> None:
    """While nothing can be written, the run goes on and says so, and the last good checkpoint stays; when there is room
    again it saves again, and ends as if nothing had happened. The figures of all steps are there."""
    process = start_until(8, few, tmp_path)
    unlimited = resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
    good = find_checkpoint(tmp_path)
    time.sleep(1)  # some checkpoints and rows
    assert good and process.poll() is None and find_checkpoint(tmp_path) == good and load_checkpoint(good)
    before = len(rows_of(tmp_path))
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, unlimited)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "could not save" in output and f"the last good checkpoint is {good}" in output, output
    assert output.count("its rows are kept in memory") == output.count("could not save") == 1, output
    assert output.count("saving works again") == 1, output
    assert before < len(rows_of(tmp_path))
    assert same_weights(final(tmp_path), final(undisturbed))
    assert rows_without_times(tmp_path) == rows_without_times(undisturbed)


def test_what_a_finished_run_leaves(few: Path, undisturbed: Path) -> None:
    """Configuration, metrics, events, checkpoints, pictures and the page; it learned."""
    names = {path.name for path in undisturbed.iterdir()}
    pictures = {"curves.png", "kernels.png", "augmentation.png"}
    others = {"config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "run.lock", "report.html"}
    assert names == others | pictures
    assert all((undisturbed / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)
    rows = rows_of(undisturbed)
    train, evals = ([row for row in rows if row["kind"] == kind] for kind in ("train", "eval"))
    assert [row["step"] for row in evals] == [STEPS, 2 * STEPS, 3 * STEPS]
    assert [row["step"] for row in train] == list(range(4, EPOCHS * STEPS + 1, 4))
    assert train[-1]["loss"] < train[0]["loss"]
    assert all(row["images_per_s"] > 0 and row["wait_ms_p99"] >= 0 for row in train)


@pytest.mark.browser
def test_the_page_of_a_finished_run(undisturbed: Path, tmp_path: Path) -> None:
    """In a browser it shows every section and picture, on a phone too, and complains of nothing."""
    page = (undisturbed / "report.html").read_text(encoding="utf-8")
    found, console = look_at({page: 1280, page + "<!-- narrow -->": 400}, tmp_path)
    assert [each["width"] for each in found] == [1280, 400] and not console
    for each in found:
        assert len(each["sections"]) == 7 and each["images"] >= 20 and not each["broken"]
        assert each["scroll"] <= each["width"] and not each["outside"]


def test_a_finished_run_again(few: Path, undisturbed: Path) -> None:
    """It only evaluates, and `train.evaluate` on the checkpoint, with another batch size, prints what it prints."""
    before = final(undisturbed)
    again = run_ok(*TRAIN, *small_run(few, undisturbed))
    assert same_weights(before, final(undisturbed))
    run_lines = [" ".join(line.split()) for line in again.splitlines() if "accuracy" in line]
    evaluated = run_ok("-m", "train.evaluate", undisturbed, few, "--batch-size", "50", "--device", "cpu")
    assert len(run_lines) == 4 and all(line in evaluated for line in run_lines)
    assert f"{read_json(few / 'val' / 'manifest.json')['num_samples']} images" in evaluated


def test_validation_images_alone(few: Path, undisturbed: Path, tmp_path: Path) -> None:
    """A folder of `val` and `classes.json` is verified and evaluated on as one with training images; what needs these
    says so; of other classes it names the first."""
    shutil.copytree(few / "val", tmp_path / "val")
    shutil.copy(few / "classes.json", tmp_path)
    with_train, alone = (
        run_ok("-m", "train.evaluate", undisturbed, each, "--device", "cpu") for each in (few, tmp_path)
    )
    assert with_train == alone and "all valid" in run_ok("tools/make_shards.py", "verify", tmp_path)
    assert "10, 0 without an image" in run_ok("tools/make_shards.py", "stats", tmp_path)
    assert "only validation images" in train_refuses(*small_run(tmp_path, tmp_path / "run"))
    with pytest.raises(FileNotFoundError, match="pass basis= to val_loader"):
        val_loader(tmp_path, batch_size=8, device="cpu")
    content = read_json(few / "classes.json")
    wnid = content["classes"][3]["wnid"]
    content["classes"][3]["wnid"] += "0"
    write_json(tmp_path / "classes.json", content)
    assert f"class 3 is {wnid}, got {wnid}0;" in refuses("-m", "train.evaluate", undisturbed, tmp_path)


@pytest.mark.slow
def test_eigenbasis_elsewhere(
    few: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the shards' folder may not be written, the refusals' commands make the file elsewhere, with the mean image
    next to it, and nothing in the folder. A run resumes with the file from any place, but with another content not."""
    shards, run, file = tmp_path / "shards", tmp_path / "run", tmp_path / "new" / "few.json"
    shards.mkdir()
    for name in ("train", "val", "classes.json"):
        (shards / name).symlink_to(few / name)
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: path != shards and access(path, mode)
    )  # root may always
    message = train_refuses(*small_run(shards, run))
    command, _, option = message.partition("; run ")[2].partition(", train with ")
    run_ok(*command.replace("FILE", str(file)).split())
    options = option.partition(" (")[0].replace("FILE", str(file)).split()
    message = train_refuses(*small_run(shards, run, *options, "--data.augmentation.mean", "image"))
    run_ok(*message.partition("; run ")[2].replace("SHARDS", str(shards)).split())
    assert np.load(file.with_name("mean_image.npy")).shape == (256, 256, 3)
    shutil.copytree(undisturbed, run)
    assert "resuming" in run_ok(*TRAIN, *small_run(shards, run, *options))
    moved = file.rename(tmp_path / "moved.json")
    assert f"{file}: " in train_refuses("--run.dir", run)
    assert "resuming" in run_ok(*TRAIN, "--run.dir", run, "--data.eigenbasis", moved)
    write_json(moved, read_json(moved) | {"mean": [0.0, 0.0, 0.0]})
    message = train_refuses("--run.dir", run)
    assert f"another eigenbasis than {moved}; " in message
    assert {path.name for path in shards.iterdir()} == {"train", "val", "classes.json"}


@pytest.mark.slow
def test_resumed_by_its_folder_alone(few: Path, tmp_path: Path) -> None:
    """`--run.dir DIR`, from any folder, goes on with the configuration that was saved, the number of classes included;
    options come on top. What a schedule says of epochs to come may change, of those that have begun it may not."""
    options = ("--optimizer.schedule", "steps", "--optimizer.steps", "[1]", "--train.epochs", "2")
    relative = os.path.relpath(few, ROOT)
    words = small_run(Path(relative), tmp_path, *options)
    out = run_ok(*TRAIN, *(each for each in words if each not in ("--model.num_classes", "10")))
    assert "10 classes" in out and "epoch 2 step" in out
    saved = (tmp_path / "config.yaml").read_text()
    assert f"shards: {ROOT / relative}" in saved and "num_classes: 10" in saved
    assert "accuracy" in run_ok(*TRAIN, f"--run.dir={tmp_path}")
    for name, value in (("optimizer.steps", "[]"), ("train.epochs", "1")):
        assert f"{name}: " in train_refuses("--run.dir", str(tmp_path), f"--{name}", value)
    more = ["--optimizer.steps", "[1, 2]", "--train.epochs", "3"]
    assert "resuming from" in run_ok(*TRAIN, "--run.dir", str(tmp_path), *more)
    assert final(tmp_path)["step"] == 3 * STEPS
    rates = {row["epoch"]: row["lr"] for row in rows_of(tmp_path) if row["kind"] == "train"}
    assert rates == {0: 0.005, 1: pytest.approx(0.0005), 2: pytest.approx(0.00005)}


def test_another_seed(few: Path, undisturbed: Path, tmp_path: Path) -> None:
    """It gives other weights. Without a terminal the log has epoch, step, loss, rate, images a second and wait of every
    train row."""
    out = run_ok(*TRAIN, *small_run(few, tmp_path, "--train.epochs", "1", "--train.seed", "6"))
    after_one_epoch = load_checkpoint(undisturbed / "checkpoints" / f"step-{STEPS:08d}.pt")
    assert final(tmp_path)["step"] == STEPS and not same_weights(final(tmp_path), after_one_epoch)
    pattern = r"^epoch 1 step (\S+) loss (\S+) lr (\S+) (\S+) images/s wait (\S+) %$"
    lines = [[float(each.replace(",", "")) for each in found] for found in re.findall(pattern, out, re.M)]
    rows = [row for row in rows_of(tmp_path) if row["kind"] == "train"]
    assert len(lines) == len(rows) == STEPS // 4
    for (step, loss, lr, speed, wait), row in zip(lines, rows, strict=True):
        assert (step, lr) == (row["step"], row["lr"]) and loss == pytest.approx(row["loss"], abs=1e-3)
        assert speed == pytest.approx(row["images_per_s"], abs=1)
        assert wait == pytest.approx(row["wait_percent"], abs=0.1)


def test_export(few: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The tool writes what the checkpoint holds, as safetensors; other suffixes and names are refused."""
    out, folder = (tmp_path / name for name in ("weights.safetensors", "folder.safetensors"))
    assert f"{EPOCHS * STEPS}.pt" in run_ok("tools/export_weights.py", undisturbed, out)
    config, state, *_ = read_weights(out)
    assert (config.conv_channels, config.num_classes) == ((8, 16, 16, 16, 16), 10)
    saved = final(undisturbed)["model"]
    assert all(torch.equal(state[name], tensor) for name, tensor in saved.items())  # type: ignore[attr-defined]
    with safe_open(out, "pt") as file:
        mean = read_json(few / "pca.json")["mean"]
        assert json.loads(file.metadata()["input"]) == {"mean": mean, "std": 1.0}
    folder.mkdir()
    for name in ("out.pth", folder.name):
        with pytest.raises(UserError, match=re.escape(name)):
            export_weights(undisturbed, tmp_path / name)
    with pytest.raises(UserError, match=r"model.variant"):
        export_weights(undisturbed, tmp_path / "names.safetensors", "torchvision")
    assert {path.name for path in tmp_path.iterdir()} == {out.name, folder.name}


Change = Callable[[Any], object]
CHANGES: dict[str, tuple[str, Change]] = {
    "nothing": ("optimizer", lambda value: {}),
    "NaN": ("model", lambda weights: weights | {"fc8.bias": torch.full((10,), torch.nan)}),
    "another model": ("model", lambda weights: weights | {"fc8.bias": torch.zeros(11)}),
    "other classes": ("wnids", lambda names: ["n00000000", *names[1:]]),
    "another pca.json": ("eigenbasis", lambda basis: basis | {"mean": [0.0, 0.0, 0.0]}),
}


@pytest.mark.parametrize(("part", "change"), CHANGES.values(), ids=CHANGES)
def test_odd_checkpoints(few: Path, undisturbed: Path, tmp_path: Path, part: str, change: Change) -> None:
    """A checkpoint of which a part does not fit is refused by its name, before anything is written."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    path, before = find_checkpoint(run), (run / "metrics.jsonl").read_bytes()
    assert path
    content = load_checkpoint(path)
    torch.save(content | {part: change(content[part])}, path)
    assert str(path) in train_refuses(*small_run(few, run))
    assert (run / "metrics.jsonl").read_bytes() == before


def test_runs_that_do_not_start(few: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Another configuration, shards without pca.json, and all that does not fit the data at once: refused in one
    sentence, and files are left as they were."""
    bare, new = tmp_path / "bare", tmp_path / "new"
    bare.mkdir()
    for name in ("train", "val", "classes.json"):
        (bare / name).symlink_to(few / name)
    wrong = ("--model.num_classes", "11", "--data.augmentation.mean", "image", "--train.batch_size", "1000")
    cases: list[tuple[Path, Path, tuple[str, ...], tuple[str, ...]]] = [
        (few, undisturbed, ("--optimizer.lr", "0.1"), ("optimizer.lr: expected 0.005",)),
        (few, undisturbed, ("--model.num_classes", "11"), ("has 10 classes",)),
        (bare, new, (), ("compute_pca",)),
        (few, new, wrong, ("--model.num_classes 11", "--mean-image", "539")),
    ]
    for shards, run, more, named in cases:
        before = files(run)
        message = train_refuses(*small_run(shards, run, *more))
        assert all(each in message for each in named), message
        assert files(run) == before and run.exists() == bool(before)


@pytest.mark.slow
def test_disk_full_at_the_end(few: Path, tmp_path: Path) -> None:
    """Where the last checkpoint cannot be written, that is an error with code 2; an earlier one stays the latest."""
    process = start_until(8, few, tmp_path)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and "free some space" in output, output
    assert load_checkpoint(find_checkpoint(tmp_path) or tmp_path)["step"] > 0


def test_divergence(few: Path, tmp_path: Path) -> None:
    """A rate that is far too high, after an epoch of a good one, ends with code 4, says between which steps and which
    checkpoint is the last good one; no weights that are not finite are saved."""
    jump = ["--optimizer.schedule", "manual", "--optimizer.changes", "[{epoch: 1, lr: 1e9}]"]
    done = run_here(*TRAIN, *small_run(few, tmp_path, *jump, "--run.save_minutes", "9"))
    assert done.returncode == 4 and "Traceback" not in done.stderr
    path = find_checkpoint(tmp_path)
    assert path == tmp_path / "checkpoints" / f"step-{STEPS:08d}.pt" and str(path) in done.stderr
    first, last = (int(step) for step in re.findall(r"in steps (\d+) to (\d+)", done.stderr)[0])
    assert STEPS < first <= last <= first + 3
    assert all(tensor.isfinite().all() for tensor in load_checkpoint(path)["model"].values())


def damage(split: str, sample: int, few: Path, shards: Path) -> tuple[Path, bytes, str, int]:
    """Copy shards and cut one image short; returns its archive with the bytes of before, its name and its offset.

    Over other damage DALI 2.4's decoder was seen to crash, in one try of ten."""
    shutil.copytree(few, shards)
    tar = sorted((shards / split).glob("*.tar"))[-1]
    [(_, offset, size, name), _] = read_index(tar.with_suffix(".idx"))[sample]
    intact = tar.read_bytes()
    tar.write_bytes(intact[: offset + size // 2] + bytes(size - size // 2) + intact[offset + size :])
    return tar, intact, name.removesuffix(".jpg"), offset


def test_damaged_data(few: Path, tmp_path: Path) -> None:
    """An image that was damaged after packing stops the run with code 3 and its name, saved where it was."""
    copy, run = tmp_path / "shards", tmp_path / "run"
    tar, _, name, offset = damage("train", 100, few, copy)
    done = run_python(*TRAIN, *small_run(copy, run))
    assert done.returncode == 3 and "Traceback" not in done.stderr
    assert f"{name} at offset {offset} of {tar}" in done.stderr
    assert 0 < final(run)["step"] < STEPS  # type: ignore[operator]


@pytest.mark.slow
def test_skipped_data_resumes(few: Path, tmp_path: Path) -> None:
    """With `data.on_corrupt: skip` a damaged image is named and counted in its row, and a run that is stopped and
    resumed ends with bitwise the weights and rows of one that is not."""
    _, _, name, _ = damage("train", 100, few, tmp_path / "shards")
    skip, runs = ("--data.on_corrupt", "skip"), [tmp_path / each for each in ("undisturbed", "stopped")]
    output = run_ok(*TRAIN, *small_run(tmp_path / "shards", runs[0], *skip))
    assert f"skipped: {name} at offset" in output
    assert sum(row.get("skipped", 0) for row in rows_of(runs[0])) == output.count("skipped: ") > 0
    process = start_python(*TRAIN, *small_run(tmp_path / "shards", runs[1], *skip))
    wait_for(lambda: any(row["step"] >= STEPS + 4 for row in rows_of(runs[1])[-1:]), process)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 0 and STEPS < final(runs[1])["step"] < EPOCHS * STEPS  # type: ignore[operator]
    run_ok(*TRAIN, *small_run(tmp_path / "shards", runs[1], *skip))
    assert (
        same_weights(*map(final, runs))
        and [*map(rows_without_times, runs)].count(rows_without_times(runs[0])) == 2
    )


@pytest.mark.slow
def test_damaged_validation_data(few: Path, tmp_path: Path) -> None:
    """A damaged validation image costs nothing of the epoch before: it is saved, and resuming begins with the
    evaluation; with `on_corrupt: skip` that leaves the image out, names it and counts it."""
    run = small_run(tmp_path / "shards", tmp_path / "run", "--train.epochs", "1")
    _, _, name, _ = damage("val", 7, few, tmp_path / "shards")
    done = run_python(*TRAIN, *run)
    assert done.returncode == 3 and name in done.stderr
    assert final(tmp_path / "run")["step"] == STEPS and final(tmp_path / "run")["epoch"] == 0
    output = run_ok(*TRAIN, *run, "--data.on_corrupt", "skip")
    assert f"step {STEPS})" in output and f"skipped: {name} at offset" in output
    rows = rows_of(tmp_path / "run")
    assert [row["kind"] for row in rows] == ["train"] * (STEPS // 4) + ["eval"] and rows[-1]["skipped"] == 1


@pytest.mark.gpu
def test_on_a_gpu(few: Path, tmp_path: Path) -> None:
    """The same run on a GPU, compiled and in bfloat16, learns and reports."""
    more = ["--run.device", "cuda", "--train.compile", "true", "--train.precision", "bf16"]
    assert "ten-view top-1 accuracy" in run_ok(*TRAIN, *small_run(few, tmp_path, *more))
    rows = [row for row in rows_of(tmp_path) if row["kind"] == "train"]
    assert rows[-1]["loss"] < 1.5 < rows[0]["loss"] and all(row["wait_ms_p99"] >= 0 for row in rows)
