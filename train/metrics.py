"""What a run tells while it goes: rows in metrics.jsonl, and TensorBoard curves."""

import json
import os
import socket
import time
from pathlib import Path
from threading import Lock
from typing import Any

from tqdm import tqdm

from pipeline.files import write_bytes


class MetricsLog:
    """`RUN/metrics.jsonl`, one JSON object a line with `kind` ("train" or "eval") and `step`, and TensorBoard events.

    A full disk does not end a run: rows are kept in memory then, and written in their order as soon as they can be.
    """

    def __init__(self, run_dir: Path, step: int, epoch: int) -> None:
        """Go on after `step` updates and `epoch` finished epochs: rows of a future that was lost are cut."""
        self.path = run_dir / "metrics.jsonl"
        rows = [
            row
            for row in read_metrics(self.path)
            if row["step"] <= step and (row["kind"] != "eval" or row["epoch"] <= epoch)
        ]
        kept = "".join(json.dumps(row) + "\n" for row in rows).encode()
        write_bytes(self.path, kept)
        self._size = len(kept)
        self._file = self.path.open("r+b", buffering=0)
        self._pending: list[bytes] = []
        self._one_at_a_time = Lock()  # rows come from the training thread, `sync` from that of checkpoints
        self._curves: Curves | None = Curves(run_dir / "tensorboard", step)

    def write(self, kind: str, step: int, **values: float) -> None:
        """Append one row."""
        rounded = {
            name: float(f"{value:.6g}") if isinstance(value, float) else value
            for name, value in values.items()
        }
        with self._one_at_a_time:
            first_trouble = not self._pending
            self._pending.append((json.dumps({"kind": kind, "step": step, **rounded}) + "\n").encode())
            try:
                self._append()
            except OSError as error:
                if first_trouble:
                    tqdm.write(
                        f"cannot write {self.path} ({error.strerror}); going on, its rows are kept in memory"
                    )
        try:
            if self._curves:
                self._curves.write(kind, step, values)
        except OSError as error:  # what was written of the row ends the file for TensorBoard
            tqdm.write(f"no more TensorBoard curves: {error.strerror}")
            self._curves = None

    def sync(self) -> None:
        """Bring the rows to the disk itself: none is to be older than a checkpoint and missing. Raises `OSError` that
        names the file."""
        try:
            with self._one_at_a_time:
                self._append()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def _append(self) -> None:
        """Write what is not written yet. Raises `OSError`."""
        while self._pending:
            os.ftruncate(self._file.fileno(), self._size)  # half a row, of a try that failed
            os.lseek(self._file.fileno(), self._size, os.SEEK_SET)
            row = self._pending[0]
            written = 0
            while written < len(row):
                written += os.write(self._file.fileno(), row[written:])
            self._size += len(row)
            del self._pending[0]

    def close(self) -> None:
        """Close both. Raises `OSError` when rows would be lost."""
        with self._file:
            self.sync()


class Curves:
    """A TensorBoard events file. Rows are few: they are written at once, on the calling thread, as the thread of
    torch's SummaryWriter tells of a full disk by a traceback of its own.
    """

    def __init__(self, folder: Path, step: int) -> None:
        """Go on after `step` updates: TensorBoard leaves out what older files tell of later ones. Raises `OSError`."""
        from tensorboard.compat.proto.event_pb2 import SessionLog  # a quarter of a second

        folder.mkdir(exist_ok=True)
        self._path = folder / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._append(file_version="brain.Event:2")  # what TensorBoard's reader asks of a file's first record
        self._append(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Append one row. Raises `OSError`."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        points = [Summary.Value(tag=f"{kind}/{name}", simple_value=value) for name, value in values.items()]
        self._append(step=step, summary=Summary(value=points))

    def _append(self, **event: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        with self._path.open("ab") as file:
            RecordWriter(file).write(Event(wall_time=time.time(), **event).SerializeToString())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without lines that a kill cut off or a disk damaged; empty where there is no
    file."""
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("kind"), str):
            numbers = [row.get("step"), row.get("epoch")]
            rows += [row] if all(type(number) is int for number in numbers) else []
    return rows
