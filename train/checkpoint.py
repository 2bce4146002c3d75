"""Checkpoints: everything that a run needs to go on, and an evaluation to start, in one file.

    RUN/checkpoints/step-00000440.pt    written whole or not at all
    RUN/checkpoints/LATEST              the name of the newest whole one

Weights are in the single-device layout. Only tensors and plain Python values are stored, so loading runs no code.
"""

import re
from pathlib import Path
from typing import Any

import torch

from pipeline.files import atomic_writer, write_bytes

FORMAT_VERSION = 1


def save_checkpoint(run_dir: Path, step: int, content: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint, point LATEST to it, and remove all but the newest `keep`. Returns its path."""
    directory = run_dir / "checkpoints"
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"step-{step:08d}.pt"
    with atomic_writer(path) as file:
        torch.save({"format_version": FORMAT_VERSION, "step": step, **content}, file)
    write_bytes(directory / "LATEST", f"{path.name}\n".encode())
    for old in sorted(directory.glob("step-*.pt"))[:-keep]:
        if old != path:
            old.unlink()
    for abandoned in directory.glob("step-*.pt.tmp"):  # of a process that was killed while it wrote
        abandoned.unlink()
    return path


def find_checkpoint(place: Path) -> Path | None:
    """The checkpoint that LATEST names in a run directory, without LATEST the newest one, or None.

    Raises `FileNotFoundError` when LATEST names none.
    """
    latest = place / "checkpoints" / "LATEST"
    if not latest.is_file():
        found = sorted(latest.parent.glob("step-*.pt"))  # whole, each of them: a kill came before LATEST was written
        return found[-1] if found else None
    name = latest.read_bytes().decode(errors="replace").strip()
    if not re.fullmatch(r"step-\d{8}\.pt", name) or not (path := latest.with_name(name)).is_file():
        raise FileNotFoundError(
            f"{latest} names {name}, which is missing; write the name of another step-*.pt into LATEST"
        )
    return path


def checkpoint_at_an_edge(newest: Path) -> Path:
    """The last checkpoint before `newest` that was written at the end of an epoch. Raises `ValueError` when none is
    kept."""
    for path in sorted(newest.parent.glob("step-*.pt"), reverse=True):
        if path < newest and load_checkpoint(path)["ranks"][0]["loader"]["ended"]:
            return path
    raise ValueError(
        f"{newest.parent} keeps none of an epoch's end, from where another number of processes could go on; let "
        "the run reach one as it is, or with a larger --run.keep"
    )


def checkpoint_path(place: Path) -> Path:
    """A checkpoint as users name it: the file, or a run directory, whose newest one is taken."""
    return (find_checkpoint(place) or place) if place.is_dir() else place


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Raises `FileNotFoundError` or `ValueError` when it is none or is damaged."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; give a checkpoint (RUN/checkpoints/step-*.pt) or a run directory")
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        version = content["format_version"]
    except Exception:  # what torch raises for damage depends on where it is
        raise ValueError(f"{path} is damaged or no checkpoint of this program; use an older step-*.pt") from None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version}, this program reads {FORMAT_VERSION}")
    return content
