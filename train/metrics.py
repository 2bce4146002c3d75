"""What a run tells while it goes: rows in metrics.jsonl, TensorBoard curves, and what its steps cost."""

import json
from collections import deque
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from pipeline.files import write_bytes
from train.placement import Placement


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
    """The rows of a metrics.jsonl, up to a line that was cut off by a kill; empty where there is no file."""
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError):
            break
        if not (isinstance(row, dict) and {"kind", "step", "epoch"} <= row.keys()):
            break
        rows.append(row)
    return rows


class StepMeter:
    """What happened since the last log row: loss, errors, and how long the device computed and waited for batches.

    On a GPU the instants are CUDA events, and like loss and errors they are read at log steps only. The host is held to
    at most two steps ahead of the device, so that memory is bounded.
    """

    AHEAD = 2

    def __init__(self, device: torch.device, placement: Placement) -> None:
        self._placement = placement
        self._on_gpu = device.type == "cuda"
        self._loss = torch.zeros((), device=device)
        self._correct = torch.zeros((), dtype=torch.int64, device=device)
        self._steps = 0
        self._in_flight: deque[tuple[Any, Any]] = deque()
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

    def end_step(self, loss: torch.Tensor, correct: torch.Tensor, batch: Any = None) -> None:
        """The update is done (on a GPU: queued).

        Args:
            loss: mean loss, a scalar on the device.
            correct: number of correct answers, likewise.
            batch: kept until the device is done with it: its memory is DALI's, who may use it again once it is let go.
        """
        self._loss += loss
        self._correct += correct
        self._steps += 1
        end = self._now()
        self._marks.append((self._last_end, self._start, end))
        self._last_end = end
        self._in_flight.append((end, batch))
        if len(self._in_flight) > self.AHEAD:
            oldest, _ = self._in_flight.popleft()
            if self._on_gpu:
                oldest.synchronize()

    def pause(self) -> None:
        """What comes until the next step (evaluation, saving) is not the step's time."""
        self._last_end = None

    def loss_sum(self) -> float:
        """Sum of the losses so far, each the mean over replicas; not finite as soon as one was not. Synchronizes; all
        processes have to ask."""
        return self._placement.total(self._loss).item() / self._placement.num_replicas

    def read(self, batch_size: int) -> dict[str, float]:
        """Figures of a row (errors and wait_percent in percent); what follows goes into the next one."""
        if self._on_gpu:
            torch.cuda.synchronize()
        timed = len(self._marks)  # less than the steps where a resume fell into the window
        waits = np.array([self._ms(last, start) for last, start, _ in self._marks if last is not None] or [0.0])
        total_ms = waits.sum() + sum(self._ms(start, end) for _, start, end in self._marks)
        figures = {
            "loss": self.loss_sum() / self._steps,
            "top1_error": 100 - 100 * self._placement.total(self._correct).item() / (self._steps * batch_size),
            "images_per_s": timed * batch_size / total_ms * 1e3,
            "wait_ms_p50": float(np.percentile(waits, 50)),
            "wait_ms_p99": float(np.percentile(waits, 99)),
            "wait_percent": float(waits.sum() / total_ms * 100),
        }
        self._marks.clear()
        self._loss.zero_()
        self._correct.zero_()
        self._steps = 0
        return figures

    def state_dict(self) -> dict[str, Any]:
        """Loss and errors since the last row, so that a resumed run writes the rows of an undisturbed one."""
        return {"loss": self._loss.cpu(), "correct": self._correct.cpu(), "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._loss.copy_(state["loss"])
        self._correct.copy_(state["correct"])
        self._steps = state["steps"]

    def _ms(self, first: Any, second: Any) -> float:
        """Milliseconds between two instants."""
        return float(first.elapsed_time(second)) if self._on_gpu else (second - first) * 1e3
