"""Checkpoints are whole, LATEST names the newest and BEST the best, old ones go, and damage is told with a remedy."""

import resource
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from train.checkpoint import (
    CheckpointWriter,
    checkpoint_at_an_edge,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)


def content(step: int, **more: object) -> dict[str, object]:
    """A small state."""
    weights = {"w": torch.full((50,), float(step))}
    return {"model": weights, "random": [{"cpu": torch.get_rng_state()}], **more}


def names(run: Path) -> list[str]:
    """What lies in a run's folder of checkpoints."""
    return sorted(path.name.removesuffix(".pt") for path in (run / "checkpoints").iterdir())


def test_save_find_load_keep(tmp_path: Path) -> None:
    """Three are kept of five; what comes back is what was saved."""
    assert find_checkpoint(tmp_path) is None
    for step in (1, 2, 30, 400, 5000):
        path = save_checkpoint(tmp_path, step, content(step), keep=3)
        assert find_checkpoint(tmp_path) == path
    assert names(tmp_path) == ["LATEST", "step-00000030", "step-00000400", "step-00005000"]
    loaded = load_checkpoint(path)
    assert loaded["step"] == 5000 and set(loaded["model"]["w"].tolist()) == {5000}


def test_best_and_chosen_ones_stay(tmp_path: Path) -> None:
    """Of five with one to keep: the newest, the best, and those that are to stay; one of a future that somebody left
    stays too."""
    for step in range(1, 6):
        best = {"step": min(step, 2), "top1_error": 1.0}
        save_checkpoint(tmp_path, step, content(step, best=best), keep=1, keep_steps=[1])
    assert names(tmp_path) == ["BEST", "LATEST", "step-00000001", "step-00000002", "step-00000005"]
    assert (tmp_path / "checkpoints" / "BEST").read_text() == "step-00000002.pt\n"
    best = {"step": 4, "top1_error": 0.5}  # whose file could not be written
    save_checkpoint(tmp_path, 6, content(6, best=best), keep=1)
    assert (tmp_path / "checkpoints" / "BEST").read_text() == "step-00000002.pt\n"
    assert names(tmp_path)[2:] == ["step-00000002", "step-00000006"]
    save_checkpoint(tmp_path, 3, content(3, best={"step": 2}), keep=1)
    assert names(tmp_path)[2:] == ["step-00000002", "step-00000003", "step-00000006"]
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000003.pt"


def test_best_that_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It keeps no run from saving: said once, and written anew when there is a best one."""
    writer = CheckpointWriter(tmp_path, keep=1)
    best = tmp_path / "checkpoints" / "BEST"
    best.parent.mkdir()
    best.write_bytes(b"\xff\xfe")
    for step in (1, 2):
        writer.start(step, content(step), before=lambda: None)
        assert writer.wait() is None
    assert capsys.readouterr().out.count(f"{best} names no checkpoint") == 1
    writer.start(3, content(3, best={"step": 3}), before=lambda: None)
    assert writer.wait() is None and best.read_text() == "step-00000003.pt\n" and not capsys.readouterr().out


def test_what_cannot_be_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An old checkpoint that cannot be removed is told of once; the new ones are saved, and other old ones go."""
    writer = CheckpointWriter(tmp_path, keep=1)
    for name in ("step-00000001.pt", "step-00000009.pt.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    for step in (2, 3, 4):
        writer.start(step, content(step), before=lambda: None)
        assert writer.wait() is None and writer.latest == find_checkpoint(tmp_path)
    assert names(tmp_path) == ["LATEST", "step-00000001", "step-00000004", "step-00000009.pt.tmp"]
    told = [Path(line.split()[2]).name for line in capsys.readouterr().out.splitlines()]
    assert told == ["step-00000001.pt", "step-00000009.pt.tmp"]


def test_any_flipped_byte(tmp_path: Path) -> None:
    """Whichever bit flips, the checkpoint is refused, and the one before it is offered."""
    before = save_checkpoint(tmp_path, 6, content(6), keep=3)
    path = save_checkpoint(tmp_path, 7, content(7), keep=3)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    checksum = range(len(whole) - 75, len(whole) - 60)
    for place in [*rng.integers(0, len(whole), 150).tolist(), *checksum, len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=rf"00000007.pt is damaged .* echo {before.name} > .*/LATEST resumes"
        ):
            load_checkpoint(path)


def test_damage(tmp_path: Path) -> None:
    """A checkpoint that was cut, of another version or without its file is refused; so is one that would run code."""
    path = save_checkpoint(tmp_path, 7, content(7), keep=3)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-1], b"", b"PK"):
        path.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"is damaged or no checkpoint of this program; none before it is sound"
        ):
            load_checkpoint(path)
    torch.save({"format_version": 1, "step": 1, "x": Path("/")}, path)
    with pytest.raises(ValueError, match="is damaged"):
        load_checkpoint(path)
    torch.save({"format_version": 99, "step": 1}, path)
    with pytest.raises(ValueError, match="format version 99"):
        load_checkpoint(path)
    torch.save({"format_version": 1, "step": 7, "x": 3}, path)  # of before there were checksums
    assert load_checkpoint(path)["x"] == 3
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"step-00000007\.pt, which is missing"):
        find_checkpoint(tmp_path)
    path = save_checkpoint(tmp_path, 8, {}, keep=3)
    path.with_name("LATEST").unlink()
    assert find_checkpoint(tmp_path) == path


@pytest.mark.parametrize("named", [b"garbage", b"\xff\xfe", b"../../secret", b""])
def test_latest_is_no_path(tmp_path: Path, named: bytes) -> None:
    """LATEST holds the name of a checkpoint beside it and nothing else."""
    path = save_checkpoint(tmp_path, 7, {}, keep=3)
    path.with_name("LATEST").write_bytes(named)
    with pytest.raises(FileNotFoundError, match=r"LATEST names [^ ,]"):
        find_checkpoint(tmp_path)
    path.with_name("LATEST").unlink()
    path.with_name("LATEST").mkdir()
    with pytest.raises(ValueError, match="LATEST is a folder"):
        find_checkpoint(tmp_path)


def test_written_beside_the_caller(tmp_path: Path) -> None:
    """`start` returns while the checkpoint is being written, `wait` when it is."""
    writer, go_on = CheckpointWriter(tmp_path, keep=3), threading.Event()
    writer.start(1, content(1), before=lambda: go_on.wait(20) and None)
    assert writer.busy and find_checkpoint(tmp_path) is None
    threading.Timer(0.3, go_on.set).start()
    assert writer.wait() is None and not writer.busy
    assert find_checkpoint(tmp_path) == writer.latest == tmp_path / "checkpoints" / "step-00000001.pt"


def test_a_mistake_of_ours_is_not_swallowed(tmp_path: Path) -> None:
    """What the thread raises besides errors of the disk comes out of `wait`."""
    writer = CheckpointWriter(tmp_path, keep=3)
    writer.start(1, {"model": lambda: None}, before=lambda: None)  # cannot be pickled
    with pytest.raises(Exception, match="lambda"):
        writer.wait()
    assert writer.wait() is None


@pytest.mark.parametrize("limit", [1, 1000, 10_000, 100_000, 400_000])
def test_full_disk(tmp_path: Path, limit: int) -> None:
    """What cannot be written, because the disk is full at its beginning or in its midst, is told once; the checkpoint
    before stays the latest, and nothing half-written lies there."""
    writer = CheckpointWriter(tmp_path, keep=3)
    writer.start(1, content(1), before=lambda: None)
    assert writer.wait() is None
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        writer.start(2, content(2, large=torch.rand(100_000)), before=lambda: None)
        error = writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error and error.strerror == "File too large" and str(error.filename).endswith("step-00000002.pt")
    assert writer.wait() is None and names(tmp_path) == ["LATEST", "step-00000001"]
    assert writer.latest == find_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000001.pt"


@pytest.mark.parametrize("ranks", [[], {}, None, 3, [3], [{}], [{"loader": None}], [{"loader": {}}]])
def test_edges_in_what_others_wrote(tmp_path: Path, ranks: object) -> None:
    """A sound file whose positions are of another form is no epoch's end."""
    save_checkpoint(tmp_path, 1, content(1, ranks=[{"loader": {"ended": True}}]), keep=5)
    save_checkpoint(tmp_path, 2, content(2, ranks=ranks), keep=5)
    folder = tmp_path / "checkpoints"
    assert checkpoint_at_an_edge(folder / "step-00000003.pt") == folder / "step-00000001.pt"
