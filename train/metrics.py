"""What a run tells while it goes: rows in metrics.jsonl, and TensorBoard curves."""

import json
import os
from contextlib import suppress
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
        from torch.utils.tensorboard import SummaryWriter

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
        self._board: Any = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def write(self, kind: str, step: int, **values: float) -> None:
        """Append one row."""
        rounded = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in values.items()}
        with self._one_at_a_time:
            first_trouble = not self._pending
            self._pending.append((json.dumps({"kind": kind, "step": step, **rounded}) + "\n").encode())
            try:
                self._append()
            except OSError as error:
                if first_trouble:
                    tqdm.write(f"cannot write {self.path} ({error.strerror}); going on, its rows are kept in memory")
        try:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)
        except OSError as error:  # of its thread, from some earlier row
            tqdm.write(f"no more TensorBoard curves: {error.strerror}")
            self._board = Unwritable()

    def sync(self) -> None:
        """Bring the rows to the disk itself: none is to be older than a checkpoint and missing. Raises `OSError`."""
        with self._one_at_a_time:
            self._append()
        os.fsync(self._file.fileno())

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
        with suppress(OSError):
            self._board.close()
        with self._file:
            self.sync()


class Unwritable:
    """Stands for a TensorBoard writer whose disk is full."""

    def add_scalar(self, *args: Any) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


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
