"""What a run tells while it goes: rows in metrics.jsonl, TensorBoard curves, and the clock of its steps."""

import json
from collections import deque
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from pipeline.files import write_bytes


class MetricsLog:
    """`RUN/metrics.jsonl`, one JSON object a line with `kind` ("train" or "eval") and `step`, and TensorBoard
    events."""

    def __init__(self, run_dir: Path, step: int, epoch: int) -> None:
        """Go on after `step` updates and `epoch` finished epochs: rows of a future that was lost are cut."""
        from torch.utils.tensorboard import SummaryWriter

        self.path = run_dir / "metrics.jsonl"
        rows = [
            row
            for row in read_metrics(self.path)
            if row["step"] <= step and (row["kind"] != "eval" or row["epoch"] <= epoch)
        ]
        write_bytes(self.path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        self._file = self.path.open("a")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def write(self, kind: str, step: int, **values: float) -> None:
        """Append one row."""
        rounded = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in values.items()}
        self._file.write(json.dumps({"kind": kind, "step": step, **rounded}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without a last line that was cut off by a kill; empty where there is no file."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class StepClock:
    """Times steps as the device sees them: how long it computed, how long it waited for a batch.

    On a GPU the instants are CUDA events, read at log steps only; on a CPU they are the host's time. The host is held
    to at most two steps ahead of the device, so that memory is bounded.
    """

    AHEAD = 2

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._ends: deque[Any] = deque(maxlen=self.AHEAD + 1)
        self._marks: list[tuple[Any, Any, Any]] = []
        self._start: Any = None
        self._last_end: Any = None

    def _now(self) -> Any:
        if not self._on_gpu:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start_step(self) -> None:
        """A batch is there."""
        self._start = self._now()

    def end_step(self) -> None:
        """The update is done (on a GPU: queued)."""
        end = self._now()
        self._marks.append((self._last_end, self._start, end))
        self._last_end = end
        self._ends.append(end)
        if self._on_gpu and len(self._ends) > self.AHEAD:
            self._ends[0].synchronize()

    def pause(self) -> None:
        """What comes until the next step (evaluation, saving) is not the step's time."""
        self._last_end = None

    def read(self, batch_size: int) -> dict[str, float]:
        """Figures since the last call: images_per_s, wait_ms_p50, wait_ms_p99, wait_percent. Synchronizes."""
        if self._on_gpu:
            torch.cuda.synchronize()
        waits = np.array([self._ms(last, start) if last is not None else 0.0 for last, start, _ in self._marks])
        computes = np.array([self._ms(start, end) for _, start, end in self._marks])
        waited = np.array([last is not None for last, _, _ in self._marks])
        self._marks.clear()
        measured = waits[waited] if waited.any() else np.zeros(1)
        total = waits.sum() + computes.sum()
        return {
            "images_per_s": len(computes) * batch_size / total * 1e3,
            "wait_ms_p50": float(np.percentile(measured, 50)),
            "wait_ms_p99": float(np.percentile(measured, 99)),
            "wait_percent": float(waits.sum() / total * 100),
        }

    def _ms(self, first: Any, second: Any) -> float:
        """Milliseconds between two instants."""
        return float(first.elapsed_time(second)) if self._on_gpu else (second - first) * 1e3
