"""Checkpoints are whole, LATEST names the newest, old ones go, and damage is told."""

from pathlib import Path

import pytest
import torch

from train.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint


def test_save_find_load_keep(tmp_path: Path) -> None:
    """Three are kept of five; what comes back is what was saved."""
    assert find_checkpoint(tmp_path) is None
    for step in (1, 2, 30, 400, 5000):
        path = save_checkpoint(
            tmp_path,
            step,
            {"model": {"w": torch.full((2,), float(step))}, "random": [{"cpu": torch.get_rng_state()}]},
            keep=3,
        )
        assert find_checkpoint(tmp_path) == path
    assert [p.name for p in sorted(path.parent.iterdir())] == [
        "LATEST",
        "step-00000030.pt",
        "step-00000400.pt",
        "step-00005000.pt",
    ]
    content = load_checkpoint(path)
    assert content["step"] == 5000 and content["model"]["w"].tolist() == [5000, 5000]


def test_damage(tmp_path: Path) -> None:
    """A checkpoint that was cut, of another version or without its file is refused; so is one that would run code."""
    path = save_checkpoint(tmp_path, 7, {"model": {"w": torch.zeros(1000)}}, keep=3)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"PK"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            load_checkpoint(path)
    torch.save({"format_version": 1, "step": 1, "x": Path("/")}, path)
    with pytest.raises(ValueError, match="is damaged"):
        load_checkpoint(path)
    torch.save({"format_version": 99}, path)
    with pytest.raises(ValueError, match="format version 99"):
        load_checkpoint(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"step-00000007\.pt, which is missing"):
        find_checkpoint(tmp_path)
    path = save_checkpoint(tmp_path, 8, {}, keep=3)
    path.with_name("LATEST").unlink()
    assert find_checkpoint(tmp_path) == path


@pytest.mark.parametrize("content", [b"garbage", b"\xff\xfe", b"../../secret", b""])
def test_latest_is_no_path(tmp_path: Path, content: bytes) -> None:
    """LATEST holds the name of a checkpoint beside it and nothing else."""
    path = save_checkpoint(tmp_path, 7, {}, keep=3)
    path.with_name("LATEST").write_bytes(content)
    with pytest.raises(FileNotFoundError, match="LATEST names"):
        find_checkpoint(tmp_path)
