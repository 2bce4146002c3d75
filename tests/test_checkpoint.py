"""Checkpoints are whole or refused, LATEST and BEST name the right ones, old ones go; a run directory has one owner."""

import resource
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.alexnet import AlexNet, AlexNetConfig
from pipeline.eigenbasis import Eigenbasis
from pipeline.errors import UserError
from tests.helpers import shipped, start_python, wait_for
from train.checkpoint import (
    CheckpointWriter,
    RunDirectory,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from train.pretrained import init_from


def content(step: int, **more: object) -> dict[str, Any]:
    """A small state."""
    return {"model": {"w": torch.full((50,), float(step))}, "best": None, **more}


def names(run: Path) -> list[str]:
    """What lies in a run's directory of checkpoints."""
    return sorted(path.name.removesuffix(".pt") for path in (run / "checkpoints").iterdir())


def test_save_find_load_keep(tmp_path: Path) -> None:
    """The newest three are kept of five; what comes back is what was saved; without LATEST the newest is found."""
    assert find_checkpoint(tmp_path) is None
    for step in (1, 2, 30, 400, 5000):
        path = save_checkpoint(tmp_path, step, content(step), keep_last=3)
        assert find_checkpoint(tmp_path) == path
    assert names(tmp_path) == ["LATEST", "step-00000030", "step-00000400", "step-00005000"]
    loaded = load_checkpoint(path)
    assert loaded["step"] == 5000 and torch.equal(loaded["model"]["w"], torch.full((50,), 5000.0))
    path.with_name("LATEST").unlink()
    assert find_checkpoint(tmp_path) == path


def test_best_pinned_and_later_ones_stay(tmp_path: Path) -> None:
    """With one to keep: the newest, the best, pinned ones, and those of a later step stay; a best one that could not be
    written changes nothing, and what a kill left half-written goes."""
    for step in range(1, 6):
        best = {"step": min(step, 2), "top1_error": 1.0}
        save_checkpoint(tmp_path, step, content(step, best=best), keep_last=1, pinned_steps=[1])
    assert names(tmp_path) == ["BEST", "LATEST", "step-00000001", "step-00000002", "step-00000005"]
    best_file = tmp_path / "checkpoints" / "BEST"
    best_file.with_name("step-00000009.pt.tmp").write_bytes(b"half")
    save_checkpoint(tmp_path, 6, content(6, best={"step": 4}), keep_last=1)
    assert best_file.read_text() == "step-00000002.pt\n"
    save_checkpoint(tmp_path, 3, content(3, best={"step": 2}), keep_last=1)
    assert names(tmp_path)[2:] == ["step-00000002", "step-00000003", "step-00000006"]
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000003.pt"
    best_file.write_bytes(b"\xff\xfe")  # no run is kept from saving
    (best_file.parent / "step-00000005.pt").mkdir()  # cannot be removed
    save_checkpoint(tmp_path, 7, content(7, best={"step": 7}), keep_last=1)
    assert best_file.read_text() == "step-00000007.pt\n"
    assert names(tmp_path)[2:] == ["step-00000005", "step-00000007"]


def test_any_flipped_byte(tmp_path: Path) -> None:
    """Whichever byte flips, the checkpoint is refused and the one before is offered, or its content is the same. A file
    that was cut, is empty, would run code, or is of another format is refused, too."""
    before = save_checkpoint(tmp_path, 6, content(6), keep_last=3)
    path = save_checkpoint(tmp_path, 7, content(7), keep_last=3)
    intact, refused = path.read_bytes(), 0
    for place in range(len(intact)):
        damaged = bytearray(intact)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(path)
        except UserError as error:
            assert f"echo {before.name} > {path.parent}/LATEST" in str(error)
            refused += 1
        else:
            assert loaded["step"] == 7 and loaded["best"] is None, place
            assert torch.equal(loaded["model"]["w"], torch.full((50,), 7.0)), place
    assert refused > len(intact) / 2
    for damaged in (intact[: len(intact) // 2], intact[:-1], b"", b"PK"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged or not a checkpoint"):
            load_checkpoint(path)
    for state in ({"format_version": 2, "step": 1, "x": Path("/")}, [2], {"format_version": 99, "step": 1}):
        torch.save(state, path)
        with pytest.raises(UserError, match=r"step-00000007\.pt"):
            load_checkpoint(path)


@pytest.mark.parametrize("named", [b"step-00000008.pt", b"\xff\xfe", b"../../secret", None])
def test_latest_that_names_no_checkpoint(tmp_path: Path, named: bytes | None) -> None:
    """A missing one, another path, and a directory in its place are refused."""
    latest = save_checkpoint(tmp_path, 7, content(7), keep_last=3).with_name("LATEST")
    latest.unlink()
    latest.mkdir() if named is None else latest.write_bytes(named)  # type: ignore[func-returns-value]
    with pytest.raises(UserError, match="LATEST: expected a checkpoint's name"):
        find_checkpoint(tmp_path)


def test_a_checkpoint_of_version_01(tmp_path: Path) -> None:
    """It is not resumed from, in a sentence with --train.init_from, which takes its weights and settings under their
    old names; nor is its run directory."""
    config = AlexNetConfig(channels=(8, 16, 16, 16, 16), fc_dim=64, num_classes=3)
    model, basis = AlexNet(config), Eigenbasis(np.ones(3), np.ones(3), np.eye(3))
    saved = replace(shipped("paper"), model=config).to_json()
    saved["model"]["hidden"] = saved["model"].pop("fc_dim")
    augmentation = saved["data"]["augmentation"]
    augmentation["share_window"] = augmentation.pop("images_per_crop")
    augmentation |= {"jpeg_fancy_upsampling": True, "std": 2.0}
    state = {"format_version": 1, "config": saved, "model": model.state_dict(), "wnids": ["a", "b", "c"]}
    path = save_checkpoint(tmp_path, 7, {**state, "eigenbasis": basis.to_json()}, keep_last=1)
    (tmp_path / "lock").touch()
    for refused, named in ((partial(load_checkpoint, path), path), (RunDirectory(tmp_path).claim, tmp_path)):
        with pytest.raises(UserError, match=f"--train.init_from {named}"):
            refused()
    weights, _ = init_from(tmp_path, config, basis, 1.0, {})
    assert torch.equal(weights["fc8.weight"], model.fc8.weight)
    assert torch.equal(weights["conv1.weight"], model.conv1.weight / 2)  # for another std


@pytest.mark.parametrize("limit", [1, 100_000])
def test_full_disk(tmp_path: Path, limit: int, capsys: pytest.CaptureFixture[str]) -> None:
    """`start` returns while a checkpoint is being written, `finish` when it is. One that cannot be written, because the
    disk is full at its beginning or within it, raises `OSError` and is logged once; the one before stays the latest,
    nothing half-written lies there; then saving works again."""
    writer, resume = CheckpointWriter(tmp_path, keep_last=3), threading.Event()
    writer.start(1, content(1), before=lambda: resume.wait(20) and None)
    assert writer.busy and find_checkpoint(tmp_path) is None
    resume.set()
    writer.finish()
    assert not writer.busy
    large, limits = content(2, large=torch.rand(100_000)), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        for _ in range(2):
            writer.start(2, large, before=lambda: None)
            writer.log_save_error()
        writer.start(2, large, before=lambda: None)
        with pytest.raises(OSError, match="File too large") as raised:
            writer.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(raised.value.filename).endswith("step-00000002.pt")
    assert names(tmp_path) == ["LATEST", "step-00000001"] and writer.latest == find_checkpoint(tmp_path)
    assert capsys.readouterr().out.count(f"the last good checkpoint is {writer.latest}; free some space") == 1
    writer.start(2, large, before=lambda: None)
    writer.finish()
    assert writer.latest == find_checkpoint(tmp_path) and "saving works again" in capsys.readouterr().out


def test_one_run_at_a_time(tmp_path: Path) -> None:
    """While a process holds a directory another one is refused, at the claim and, where it did not exist then, when it
    is made; after kill -9 it is free. A claim alone makes nothing."""
    path, config = tmp_path / "run", shipped("quickstart")
    late = RunDirectory(path)
    late.claim()
    assert not path.exists()
    code = "import sys, time; from pathlib import Path; from train.checkpoint import RunDirectory\n"
    code += "from tests.helpers import shipped; run = RunDirectory(Path(sys.argv[1]))\n"
    first = start_python("-c", f"{code}run.prepare(shipped('quickstart')); time.sleep(60)", path)
    wait_for((path / "checkpoints").exists, first)
    for refused in (RunDirectory(path).claim, lambda: late.prepare(config)):
        with pytest.raises(UserError, match="another run is writing to"):
            refused()
    first.kill()
    first.communicate()
    RunDirectory(path).claim()
    late.prepare(config)


@pytest.mark.parametrize("name", ["notes.txt", "config.yaml"])
def test_another_programs_directory(tmp_path: Path, name: str) -> None:
    """Without a run's lock it is refused by name, and nothing is added; so is a file in its place."""
    (tmp_path / name).write_text("data: 1\n")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=f"{path}: not a run directory"):
            RunDirectory(path).claim()
    assert [each.name for each in tmp_path.iterdir()] == [name]


def test_what_cannot_be_written(tmp_path: Path) -> None:
    """A place or checkpoints that cannot be written are an error that names them, before training."""
    with pytest.raises(OSError, match="/proc/run"):
        RunDirectory(Path("/proc/run")).prepare(shipped("quickstart"))
    RunDirectory(tmp_path).prepare(shipped("quickstart"))
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "checkpoints").symlink_to("/proc")
    with pytest.raises(OSError, match="checkpoints"):
        RunDirectory(tmp_path).claim()


def test_lost_checkpoints(tmp_path: Path) -> None:
    """Where a row names a saved step and there is no checkpoint, the run is refused; killed before its first one, it
    starts again; other files next to a run's are no matter."""
    RunDirectory(tmp_path).prepare(shipped("quickstart"))
    metrics, row = tmp_path / "metrics.jsonl", '{"kind": "train", "step": 8, "epoch": 0}\n'
    metrics.write_text(row)
    (tmp_path / "train.log").touch()
    RunDirectory(tmp_path).claim()
    metrics.write_text(row + row.replace("}", ', "saved_step": 6}'))
    with pytest.raises(UserError, match=f"expected the checkpoint of step 6, found none.* remove {metrics}"):
        RunDirectory(tmp_path).claim()
    (tmp_path / "checkpoints" / "step-00000006.pt").touch()
    RunDirectory(tmp_path).claim()
