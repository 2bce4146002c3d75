"""Checkpoints: everything that a run needs to go on, and an evaluation to start, in one file.

    RUN/checkpoints/step-00000440.pt    written whole or not at all
    RUN/checkpoints/LATEST              the name of the newest whole one
    RUN/checkpoints/BEST                the name of the one with the lowest validation error

Weights are in the single-device layout. Only tensors and plain Python values are stored, so loading runs no code. A
file is a zip archive as `torch.save` writes it, whose comment is the SHA-256 of all bytes before it.
"""

import re
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import IO, Any, cast

import torch
from tqdm import tqdm

from pipeline.files import atomic_writer, write_bytes
from train.signed import SignedWriter, is_sound

FORMAT_VERSION = 1
NAME = r"step-\d{8}\.pt"


class CheckpointWriter:
    """Writes one checkpoint at a time, on a thread of its own.

    A checkpoint that cannot be written, because a disk is full, does not end a run: the one before stays the latest.
    """

    def __init__(self, run_dir: Path, keep: int, latest: Path | None = None) -> None:
        self._run_dir, self._keep = run_dir, keep
        self._told: set[str] = set()
        self._thread: Thread | None = None
        self._error: Exception | None = None
        self.latest = latest
        """The newest one that is whole."""

    @property
    def busy(self) -> bool:
        """Whether one is being written."""
        return self._thread is not None and self._thread.is_alive()

    def start(
        self, step: int, content: dict[str, Any], before: Callable[[], None], keep: Collection[int] = ()
    ) -> None:
        """Write `content`, none of whose tensors may change any more; `before` is called first. All but the newest ones
        and those of the steps in `keep` are removed then. The one before is written: `wait` has told."""
        assert not self.busy
        self._thread = Thread(target=self._write, args=(step, content, before, keep), name="checkpoint")
        self._thread.start()

    def _write(
        self, step: int, content: dict[str, Any], before: Callable[[], None], keep: Collection[int]
    ) -> None:
        try:
            before()
            self.latest = save_checkpoint(self._run_dir, step, content, self._keep, keep, self._tell_once)
        except Exception as error:  # of a thread nobody would hear
            self._error = error

    def _tell_once(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            tqdm.write(line)

    def wait(self) -> OSError | None:
        """Wait for the one that is being written. Returns what kept it from being written, once; raises what is a
        mistake of ours."""
        if self._thread:
            self._thread.join()
        error, self._thread, self._error = self._error, None, None
        if error is None or isinstance(error, OSError):
            return error
        raise error


def save_checkpoint(
    run_dir: Path,
    step: int,
    content: dict[str, Any],
    keep: int,
    keep_steps: Collection[int] = (),
    tell: Callable[[str], object] = tqdm.write,
) -> Path:
    """Write a checkpoint, point LATEST to it, and BEST if it is (`content["best"]` tells). Of those up to this step
    all but the newest `keep` and those of `keep_steps` are removed; one of a later step, from where somebody went back,
    stays until it is written anew. Returns its path. Raises `OSError`; then the one before stays the latest. What
    cannot be removed is told of.
    """
    directory = run_dir / "checkpoints"
    directory.mkdir(parents=True, exist_ok=True)
    path, latest, best = checkpoint_name(directory, step), directory / "LATEST", directory / "BEST"
    with atomic_writer(path) as file:
        signed = SignedWriter(file)
        try:
            torch.save({"format_version": FORMAT_VERSION, "step": step, **content}, cast(IO[bytes], signed))
        except RuntimeError as error:
            raise signed.error or error from None
        signed.sign()
    write_bytes(latest, f"{path.name}\n".encode())
    if content.get("best") and (best_path := checkpoint_name(directory, content["best"]["step"])).exists():
        write_bytes(best, f"{best_path.name}\n".encode())  # its own writing may have failed
    kept = {checkpoint_name(directory, number) for number in keep_steps}
    if best.is_file():
        kept.add(directory / (name := named_by(best)))
        if not re.fullmatch(NAME, name):
            tell(f"{best} names no checkpoint: none is kept as the best one until the run finds a better one")
    old = sorted(each for each in directory.glob("step-*.pt") if each <= path)[:-keep]
    abandoned = directory.glob("step-*.pt.tmp")  # of a process that was killed while it wrote
    for each in (*(each for each in old if each not in kept), *abandoned):
        try:
            each.unlink()
        except OSError as error:
            tell(f"cannot remove {each} ({error.strerror}); going on")
    return path


def named_by(pointer: Path) -> str:
    """What LATEST or BEST says."""
    return pointer.read_bytes().decode(errors="replace").strip()


def checkpoint_name(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return directory / f"step-{step:08d}.pt"


def step_of(checkpoint: Path) -> int:
    """The step that its name tells."""
    return int(checkpoint.stem.removeprefix("step-"))


def find_checkpoint(place: Path) -> Path | None:
    """The checkpoint that LATEST names in a run directory, without LATEST the newest one, or None.

    Raises `FileNotFoundError` when LATEST names none, `ValueError` when it is no file.
    """
    latest = place / "checkpoints" / "LATEST"
    if latest.is_dir():
        raise ValueError(
            f"{latest} is a folder; remove it, or write the name of a step-*.pt into a file of that name"
        )
    if not latest.is_file():
        found = sorted(
            latest.parent.glob("step-*.pt")
        )  # whole, each of them: a kill came before LATEST was written
        return found[-1] if found else None
    name = named_by(latest)
    if not re.fullmatch(NAME, name) or not (path := latest.with_name(name)).is_file():
        raise FileNotFoundError(
            f"{latest} names {name or 'nothing'}, which is missing; write the name of another step-*.pt into LATEST"
        )
    return path


def checkpoint_at_an_edge(newest: Path) -> Path:
    """The last checkpoint before `newest` that was written at the end of an epoch. Raises `ValueError` when none is
    kept."""
    for path in sorted(newest.parent.glob("step-*.pt"), reverse=True):
        content = read_content(path) if path < newest else None
        with suppress(KeyError, TypeError, IndexError):  # another program's
            if content and content["ranks"][0]["loader"]["ended"]:
                return path
    raise ValueError(
        f"{newest.parent} keeps none of an epoch's end, from where another number of processes could go on; let "
        "the run reach one as it is, or with a larger --run.keep"
    )


def checkpoint_path(place: Path) -> Path:
    """A checkpoint as users name it: the file, or a run directory, whose newest one is taken."""
    return (find_checkpoint(place) or place) if place.is_dir() else place


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Raises `FileNotFoundError` or `ValueError` when it is none or is damaged; the
    sentence offers the one before it."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is no file; give a checkpoint (RUN/checkpoints/step-*.pt) or a run directory"
        )
    content = read_content(path)
    if content is None:
        remedy = "give a sound step-*.pt"
        if re.fullmatch(NAME, path.name):
            older = (each for each in sorted(path.parent.glob("step-*.pt"), reverse=True) if each < path)
            sound = next((each for each in older if read_content(each)), None)
            remedy = "none before it is sound: put one back from a copy, or begin anew in another directory"
            if sound:
                remedy = (
                    f"the one before it is sound: echo {sound.name} > {path.parent}/LATEST resumes from there"
                )
        raise ValueError(f"{path} is damaged or no checkpoint of this program; {remedy}")
    if content["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {content['format_version']}, this program reads {FORMAT_VERSION}"
        )
    return content


def read_content(path: Path) -> dict[str, Any] | None:
    """What a checkpoint holds; None where it is damaged or none."""
    try:
        with path.open("rb") as file:
            if not is_sound(file):
                return None
            content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        return content if {"format_version", "step"} <= content.keys() else None
    except Exception:  # what is raised for damage depends on where it is
        return None
