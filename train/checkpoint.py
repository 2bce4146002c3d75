"""Checkpoints, each one file with everything that a run needs to resume, and the run directory.

    RUN/run.lock                        marks a run directory; locked by the run that writes to it
    RUN/checkpoints/step-00000440.pt    written whole or not at all
    RUN/checkpoints/LATEST              name of the newest one
    RUN/checkpoints/BEST                name of the one with the lowest validation error

Weights are stored for one device, whatever `parallel.mode` was. Files hold only tensors and plain Python values, so
loading runs no code. `torch.save` writes a zip archive with a CRC of each member.
"""

import re
import zipfile
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from threading import Thread
from typing import Any, BinaryIO

import torch
import yaml

from pipeline.errors import UserError
from pipeline.files import atomic_writer, open_locked, write_bytes
from train.cli import REMEDIES, log
from train.config import Config, refuse_old_run
from train.metrics import read_metrics

FORMAT_VERSION = 2
"""Format of checkpoints. Runs resume from this one; of format 1 (version 0.1) train/pretrained.py reads the weights."""
NAME = r"step-\d{8}\.pt"


class CheckpointWriter:
    """Writes one checkpoint at a time on a thread. If it cannot be written, as the disk is full, the run continues and
    the previous checkpoint stays the latest."""

    def __init__(self, run_dir: Path, keep_last: int) -> None:
        self._run_dir, self._keep_last = run_dir, keep_last
        self._thread: Thread | None = None
        self._error: Exception | None = None
        self._logged_error: OSError | None = None
        self.latest: Path | None = None
        """Path of the newest complete checkpoint."""

    @property
    def busy(self) -> bool:
        """True while a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def start(
        self,
        step: int,
        content: dict[str, Any],
        before: Callable[[], None],
        pinned_steps: Collection[int] = (),
    ) -> None:
        """Start to write `content`, whose tensors must not change any more. `before` is called first, on the thread.

        Waits until the previous checkpoint is written.
        """
        self.log_save_error()
        self._thread = Thread(
            target=self._write, args=(step, content, before, pinned_steps), name="checkpoint"
        )
        self._thread.start()

    def _write(
        self, step: int, content: dict[str, Any], before: Callable[[], None], pinned_steps: Collection[int]
    ) -> None:
        try:
            before()
            self.latest = save_checkpoint(self._run_dir, step, content, self._keep_last, pinned_steps)
        except Exception as error:  # `finish` raises it
            self._error = error

    def finish(self) -> None:
        """Wait until the last checkpoint is written. Raises `OSError` if it could not be."""
        if self._thread is None:
            return
        self._thread.join()
        error, self._thread, self._error = self._error, None, None
        if error:
            raise error
        if self._logged_error:
            log(f"saving works again: {self.latest}")
            self._logged_error = None

    def log_save_error(self) -> None:
        """Wait until the last checkpoint is written; log an error of the disk once, not at every try."""
        try:
            self.finish()
        except OSError as error:
            if self._logged_error is None or error.errno != self._logged_error.errno:
                log(
                    f"could not save: {error.filename}: {error.strerror}; the last good checkpoint is "
                    f"{self.latest or 'none'}; {REMEDIES.get(error.errno or 0, 'check the disk')}"
                )
                self._logged_error = error


def save_checkpoint(
    run_dir: Path, step: int, content: dict[str, Any], keep_last: int, pinned_steps: Collection[int] = ()
) -> Path:
    """Write a checkpoint, point LATEST to it, and BEST to `content["best"]["step"]`. Returns its path.

    Of the checkpoints up to this step all but the newest `keep_last`, the best and `pinned_steps` are removed. Those of
    later steps, left from before a resume, stay until they are written again. Raises `OSError`; LATEST then still names
    the previous checkpoint.
    """
    directory = run_dir / "checkpoints"
    directory.mkdir(parents=True, exist_ok=True)
    path, best = build_checkpoint_path(directory, step), directory / "BEST"
    with atomic_writer(path) as file:
        write_archive(file, {"format_version": FORMAT_VERSION, "step": step, **content})
    write_bytes(directory / "LATEST", f"{path.name}\n".encode())
    if content.get("best"):
        best_path = build_checkpoint_path(directory, content["best"]["step"])
        if best_path.exists():  # writing it may have failed
            write_bytes(best, f"{best_path.name}\n".encode())
    pinned = {build_checkpoint_path(directory, number) for number in pinned_steps}
    if best.is_file():
        pinned.add(directory / read_pointer(best))
    old = sorted(each for each in directory.glob("step-*.pt") if each <= path)[:-keep_last]
    leftovers = directory.glob("step-*.pt.tmp")  # of a process that was killed while it wrote
    for each in (*(each for each in old if each not in pinned), *leftovers):
        with suppress(OSError):
            each.unlink()
    return path


def write_archive(file: BinaryIO, content: dict[str, Any]) -> None:
    """Call `torch.save`, and raise the `OSError` of a full disk that torch turns into a `RuntimeError`."""
    try:
        torch.save(content, file)
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or error from None


def read_pointer(pointer: Path) -> str:
    """Read the checkpoint's name from LATEST or BEST."""
    return pointer.read_bytes().decode(errors="replace").strip()


def build_checkpoint_path(directory: Path, step: int) -> Path:
    """Build the path of the checkpoint of a step."""
    return directory / f"step-{step:08d}.pt"


def find_checkpoint(run_dir: Path) -> Path | None:
    """Find the checkpoint that LATEST names in a run directory, or without LATEST the newest one; None without any.

    Raises `UserError` when LATEST is not a file with the name of a checkpoint.
    """
    latest = run_dir / "checkpoints" / "LATEST"
    if not latest.exists():  # a kill may have come before it was written
        return max(latest.parent.glob("step-*.pt"), default=None)
    name = read_pointer(latest) if latest.is_file() else "a directory"
    if not re.fullmatch(NAME, name) or not (path := latest.with_name(name)).is_file():
        raise UserError(
            f"{latest}: expected a checkpoint's name, got {name!r}; write that of a step-*.pt into it"
        )
    return path


def resolve_checkpoint(path: Path) -> Path:
    """Return the checkpoint that a user names: the file, or of a run directory the newest one."""
    return (find_checkpoint(path) or path) if path.is_dir() else path


def load_checkpoint(path: Path, formats: Collection[int] = (FORMAT_VERSION,)) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Raises `FileNotFoundError` or `UserError` when it is none, damaged or of another
    format."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected a checkpoint (RUN/checkpoints/step-*.pt) or a run directory"
        )
    content = read_archive(path)
    if content is None:
        older = (each for each in sorted(path.parent.glob("step-*.pt"), reverse=True) if each < path)
        intact = next((each for each in older if re.fullmatch(NAME, path.name) and read_archive(each)), None)
        remedy = "give an intact step-*.pt, or start again in another directory"
        if intact:
            remedy = f"the one before is intact: echo {intact.name} > {path.parent}/LATEST resumes from there"
        raise UserError(f"{path} is damaged or not a checkpoint of this program; {remedy}")
    if content["format_version"] not in formats:
        remedy = "give another --run.dir"
        if content["format_version"] == 1:
            remedy = f"start a new run from its weights: --train.init_from {path}, and another --run.dir"
        raise UserError(
            f"{path}: expected checkpoint format {FORMAT_VERSION}, got {content['format_version']}; {remedy}"
        )
    return content


def read_archive(path: Path) -> dict[str, Any] | None:
    """Read the content of a checkpoint; None if it is damaged or not a checkpoint."""
    try:
        with path.open("rb") as file:
            with zipfile.ZipFile(file) as archive:
                if archive.testzip() is not None:
                    return None
            file.seek(0)
            content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        return content if {"format_version", "step"} <= content.keys() else None
    except Exception:  # zipfile and torch raise many kinds for damaged files
        return None


class RunDirectory:
    """The directory of a run, locked by rank 0 from the start of the run to its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: BinaryIO | None = None

    def claim(self) -> None:
        """Lock an existing run directory, before anything is written.

        Raises `UserError` or `OSError` if the directory is not a run's, if another run writes to it, or if its
        checkpoints are missing or cannot be written.
        """
        names = {each.name for each in self.path.iterdir()} if self.path.is_dir() else set()
        refuse_old_run(self.path)
        if (self.path.exists() and not self.path.is_dir()) or (names and "run.lock" not in names):
            found = f" ({min(names)})" if names else ""
            raise UserError(
                f"{self.path}: not a run directory{found}; give a --run.dir that is new, empty or a run's"
            )
        if not names:
            return
        self._hold()
        checkpoints, metrics = self.path / "checkpoints", self.path / "metrics.jsonl"
        if checkpoints.is_dir():
            with TemporaryFile(dir=checkpoints):  # raises if the folder is read-only
                pass
        saved = [row for row in read_metrics(metrics) if "saved_step" in row]
        if saved and find_checkpoint(self.path) is None:
            raise UserError(
                f"{checkpoints}: expected the checkpoint of step {saved[-1]['saved_step']}, found none; put it back, "
                f"give another --run.dir, or remove {metrics} to start again"
            )

    def _hold(self) -> None:
        """Take the lock, which is released when this process ends."""
        if self._lock is None:
            try:
                self._lock = open_locked(self.path / "run.lock", wait=False)
            except BlockingIOError:
                raise UserError(
                    f"another run is writing to {self.path}; wait until it has ended, or give another --run.dir"
                ) from None

    def prepare(self, config: Config) -> None:
        """Make the directory and write the resolved configuration. Raises `UserError` or `OSError`."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._hold()
        content = config.to_json()
        for name in ("shards", "eigenbasis"):  # a resume may start elsewhere
            if path := getattr(config.data, name):
                content["data"][name] = str(path.absolute())
        write_bytes(self.path / "config.yaml", yaml.safe_dump(content, sort_keys=False).encode())
        (self.path / "checkpoints").mkdir(exist_ok=True)
