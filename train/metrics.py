"""Metrics of a run: time per step, loss and accuracy; rows in metrics.jsonl and TensorBoard; two warnings.

`metrics.jsonl` holds one JSON object a line with `kind` ("train" or "eval"), `step` and `epoch`.
"""

import json
import math
import os
from collections import deque
from contextlib import suppress
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.files import write_bytes
from train.cli import log
from train.distributed import Distributed


class StepTiming(NamedTuple):
    """Start and end of a step: CUDA events on a GPU, else seconds."""

    last_end: Any
    """End of the previous step; None after a gap (`StepMeter.mark_gap`)."""
    start: Any
    end: Any
    data_time_ms: float
    """The host's time in the loader."""
    saving: bool
    """True if a checkpoint was being written meanwhile."""


class StepMeter:
    """Collects time per step, loss and accuracy on the device, until a log step reads them. Lets the host run at most
    two steps ahead of the device, so that memory is bounded."""

    MAX_STEPS_IN_FLIGHT = 2

    def __init__(self, device: torch.device, distributed: Distributed) -> None:
        self._distributed = distributed
        self._on_gpu = device.type == "cuda"
        self._loss = torch.zeros((), device=device)
        self._correct = torch.zeros((), dtype=torch.int64, device=device)
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._steps = 0
        self._in_flight: deque[tuple[Any, Any]] = deque()
        self._timings: list[StepTiming] = []
        self._start: Any = None
        self._last_end: Any = None
        self._host_end: float | None = None
        self._data_time_ms = 0.0

    def _now(self) -> Any:
        if not self._on_gpu:
            return perf_counter()
        # Waiting for a blocking event leaves the core to the loader.
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record()
        return event

    def start_step(self) -> None:
        """Mark the start of a step; call when its batch has come."""
        self._data_time_ms = 0.0 if self._host_end is None else (perf_counter() - self._host_end) * 1e3
        self._start = self._now()

    def end_step(
        self,
        loss: torch.Tensor,
        correct: torch.Tensor,
        batch: Any = None,
        saving: bool = False,
        skipped: torch.Tensor | int = 0,
    ) -> None:
        """Mark the end of a step; call after the update (on a GPU: when it is queued).

        Args:
            loss: Mean loss, a scalar on the device.
            correct: Number of correct predictions, a scalar on the device.
            batch: The batch, which is held until the GPU has used it, as DALI owns its buffer.
            saving: Whether a checkpoint was being written meanwhile.
            skipped: Number of damaged samples in the batch, a scalar on the device.
        """
        self._loss += loss
        self._correct += correct
        self._skipped += skipped
        self._steps += 1
        end = self._now()
        self._timings.append(StepTiming(self._last_end, self._start, end, self._data_time_ms, saving))
        self._last_end = end
        self._in_flight.append((end, batch))
        if len(self._in_flight) > self.MAX_STEPS_IN_FLIGHT:
            oldest, _ = self._in_flight.popleft()
            if self._on_gpu:
                oldest.synchronize()
        self._host_end = perf_counter()

    def mark_gap(self) -> None:
        """Exclude the time until the next step (evaluation, saving) from the waits and from images/s."""
        self._last_end = self._host_end = None

    def loss_sum(self) -> float:
        """Sum the losses since the last row, averaged over replicas; not finite if any of them was not. A collective
        that waits for the device."""
        return self._distributed.all_reduce_sum(self._loss).item() / self._distributed.num_replicas

    def read(self, batch_size: int) -> dict[str, float]:
        """Compute the values of a row (errors and wait_percent in percent, times in ms), and start the next row.

        `saving_step_ms_p50` is included only if a checkpoint was being written, `skipped` only if samples were skipped.
        """
        if self._on_gpu:
            torch.cuda.synchronize()
        follow = [each for each in self._timings if each.last_end is not None]
        waits = np.array([self._ms(each.last_end, each.start) for each in follow] or [0.0])
        # Steps after a gap have no wait; after a resume only the later steps of a row were timed.
        steps = np.array([self._ms(each.last_end or each.start, each.end) for each in self._timings] or [0.0])
        saving = np.array([each.saving for each in self._timings] or [False])
        total_ms = waits.sum() + sum(self._ms(each.start, each.end) for each in self._timings)
        counts = torch.stack([self._correct, self._skipped])
        correct, skipped = self._distributed.all_reduce_sum(counts).tolist()
        values = {
            "loss": self.loss_sum() / self._steps,
            "top1_error": 100 - 100 * correct / max(self._steps * batch_size - skipped, 1),
            "images_per_s": len(self._timings) * batch_size / total_ms * 1e3,
            "step_ms_p50": float(np.percentile(steps, 50)),
            "wait_ms_p50": float(np.percentile(waits, 50)),
            "wait_ms_p99": float(np.percentile(waits, 99)),
            "wait_percent": float(waits.sum() / total_ms * 100),
            "data_time_ms_p50": float(np.percentile([each.data_time_ms for each in follow] or [0.0], 50)),
        }
        if skipped:
            values["skipped"] = skipped
        if saving.any():
            values["saving_step_ms_p50"] = float(np.percentile(steps[saving], 50))
        self._timings.clear()
        self._loss.zero_()
        self._correct.zero_()
        self._skipped.zero_()
        self._steps = 0
        return values

    def state_dict(self) -> dict[str, Any]:
        """Return loss and accuracy since the last row, so that a resumed run writes an uninterrupted run's rows."""
        sums = {"loss": self._loss, "correct": self._correct, "skipped": self._skipped}
        return {name: value.clone().cpu() for name, value in sums.items()} | {"steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state`."""
        self._loss.copy_(state["loss"])
        self._correct.copy_(state["correct"])
        self._skipped.copy_(state["skipped"])
        self._steps = state["steps"]

    def _ms(self, first: Any, second: Any) -> float:
        """Compute the milliseconds between two marks."""
        return float(first.elapsed_time(second)) if self._on_gpu else (second - first) * 1e3


class MetricsLog:
    """`RUN/metrics.jsonl` and TensorBoard events.

    A full disk does not end a run: rows are kept in memory and written in order when there is space again.
    """

    def __init__(self, run_dir: Path, step: int, epoch: int) -> None:
        """Open the log after `step` updates and `epoch` finished epochs; rows of later steps are cut."""
        from torch.utils.tensorboard import SummaryWriter

        self.path = run_dir / "metrics.jsonl"
        rows = [
            row
            for row in read_metrics(self.path)
            if row["step"] <= step and (row["kind"] != "eval" or row["epoch"] <= epoch)
        ]
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        write_bytes(self.path, content)
        self._size = len(content)
        self._file = self.path.open("r+b", buffering=0)
        self._pending: list[bytes] = []
        self._lock = Lock()  # rows come from the training thread, `sync` from that of checkpoints
        self._curves: Any = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def write(self, kind: str, step: int, **values: float) -> None:
        """Append one row."""
        rounded = {
            name: float(f"{value:.6g}") if isinstance(value, float) else value
            for name, value in values.items()
        }
        with self._lock:
            first_error = not self._pending
            self._pending.append((json.dumps({"kind": kind, "step": step, **rounded}) + "\n").encode())
            try:
                self._append()
            except OSError as error:
                if first_error:
                    log(f"cannot write {self.path} ({error.strerror}); its rows are kept in memory meanwhile")
        try:
            for name, value in values.items() if self._curves else ():
                self._curves.add_scalar(f"{kind}/{name}", value, step)
        except OSError as error:  # raised by the writer's thread
            log(f"TensorBoard curves end here: {error.strerror}")
            self._curves = None

    def sync(self) -> None:
        """Flush rows to disk before a checkpoint is written, so that none of its past can be lost.

        Raises `OSError` with the file's name.
        """
        try:
            with self._lock:
                self._append()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def _append(self) -> None:
        """Write the rows that are kept in memory. Raises `OSError`."""
        while self._pending:
            os.ftruncate(self._file.fileno(), self._size)  # removes half a row of a failed try
            row, written = self._pending[0], 0
            while written < len(row):  # a full disk takes a part of the row, then raises
                written += os.pwrite(self._file.fileno(), row[written:], self._size + written)
            self._size += written
            del self._pending[0]

    def close(self) -> None:
        """Close file and curves. Raises `OSError` when rows would be lost."""
        with self._file:
            self.sync()
        if self._curves:
            with suppress(OSError):  # raised by the writer's thread
                self._curves.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics.jsonl, except lines that were cut off or damaged; none without a file."""
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


class Warnings:
    """Warns that the run is input-bound, at most once per epoch, and once that the loss does not fall."""

    WINDOW = 500
    """Steps over which the wait for input is averaged."""
    HIGH_WAIT = 20.0
    """Percent of the time from which the wait is reported."""
    PATIENCE = 3000
    """Steps after which a loss of still ln(classes) is reported. With N(0, .01) weights it is normal that the loss
    hardly falls in the first one or two thousand steps."""

    def __init__(self, classes: int) -> None:
        self._chance_loss, self._epoch, self._stalled = math.log(classes), -1, False
        self._steps, self._waited = 0, 0.0

    def check(self, step: int, epoch: int, steps: int, values: dict[str, float]) -> None:
        """Check the values of a row over `steps` steps; log a warning if needed."""
        self._steps, self._waited = self._steps + steps, self._waited + steps * values["wait_percent"]
        if self._steps >= self.WINDOW:
            percent = self._waited / self._steps
            if percent > self.HIGH_WAIT and epoch != self._epoch:
                self._epoch = epoch
                log(f"input-bound: waited {percent:.0f} % of {self._steps} steps; see tools/tune_pipeline.py")
            self._steps, self._waited = 0, 0.0
        if step >= self.PATIENCE and not self._stalled and abs(values["loss"] / self._chance_loss - 1) < 0.01:
            self._stalled = True
            log(
                f"the loss is still that of guessing, {self._chance_loss:.2f}, after {step} steps; check "
                "data.augmentation.std (1 for 2012's weights), optimizer.lr, model.variant, and that train/ and val/ "
                "number classes alike (tools/make_shards.py stats)"
            )
