"""What steps cost and gave since the last row of metrics, read without stopping the device in between."""

from collections import deque
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch

from train.placement import Placement


class Mark(NamedTuple):
    """When a step happened. On a GPU the instants are CUDA events, but for `next_ms`."""

    last_end: Any
    """End of the step before; None behind a pause."""
    start: Any
    end: Any
    next_ms: float
    """The host's time in the loader."""
    saving: bool
    """Whether a checkpoint was being written meanwhile."""


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
        self._marks: list[Mark] = []
        self._start: Any = None
        self._last_end: Any = None
        self._host_end: float | None = None
        self._next_ms = 0.0

    def _now(self) -> Any:
        if not self._on_gpu:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start_step(self) -> None:
        """A batch is there."""
        self._next_ms = 0.0 if self._host_end is None else (perf_counter() - self._host_end) * 1e3
        self._start = self._now()

    def end_step(
        self, loss: torch.Tensor, correct: torch.Tensor, batch: Any = None, saving: bool = False
    ) -> None:
        """The update is done (on a GPU: queued).

        Args:
            loss: mean loss, a scalar on the device.
            correct: number of correct answers, likewise.
            batch: kept until the device is done with it: its memory is DALI's, who may use it again once it is let go.
            saving: whether a checkpoint is being written meanwhile.
        """
        self._loss += loss
        self._correct += correct
        self._steps += 1
        end = self._now()
        self._marks.append(Mark(self._last_end, self._start, end, self._next_ms, saving))
        self._last_end = end
        self._in_flight.append((end, batch))
        if len(self._in_flight) > self.AHEAD:
            oldest, _ = self._in_flight.popleft()
            if self._on_gpu:
                oldest.synchronize()
        self._host_end = perf_counter()

    def pause(self) -> None:
        """What comes until the next step (evaluation, saving) is not the step's time."""
        self._last_end = self._host_end = None

    def loss_sum(self) -> float:
        """Sum of the losses so far, each the mean over replicas; not finite as soon as one was not. Synchronizes; all
        processes have to ask."""
        return self._placement.total(self._loss).item() / self._placement.num_replicas

    def read(self, batch_size: int) -> dict[str, float]:
        """Figures of a row (errors and wait_percent in percent, times in ms); what follows goes into the next one.

        `saving_step_ms_p50` is there only where a checkpoint was being written.
        """
        if self._on_gpu:
            torch.cuda.synchronize()
        marks = [mark for mark in self._marks if mark.last_end is not None]
        waits = np.array([self._ms(mark.last_end, mark.start) for mark in marks] or [0.0])
        # Steps behind a pause have no wait; less than all are timed at all where a resume fell into the window.
        steps = np.array([self._ms(mark.last_end or mark.start, mark.end) for mark in self._marks] or [0.0])
        saving = np.array([mark.saving for mark in self._marks] or [False])
        total_ms = waits.sum() + sum(self._ms(mark.start, mark.end) for mark in self._marks)
        figures = {
            "loss": self.loss_sum() / self._steps,
            "top1_error": 100
            - 100 * self._placement.total(self._correct).item() / (self._steps * batch_size),
            "images_per_s": len(self._marks) * batch_size / total_ms * 1e3,
            "step_ms_p50": float(np.percentile(steps, 50)),
            "wait_ms_p50": float(np.percentile(waits, 50)),
            "wait_ms_p99": float(np.percentile(waits, 99)),
            "wait_percent": float(waits.sum() / total_ms * 100),
            "next_ms_p50": float(np.percentile([mark.next_ms for mark in marks] or [0.0], 50)),
        }
        if saving.any():
            figures["saving_step_ms_p50"] = float(np.percentile(steps[saving], 50))
        self._marks.clear()
        self._loss.zero_()
        self._correct.zero_()
        self._steps = 0
        return figures

    def state_dict(self) -> dict[str, Any]:
        """Loss and errors since the last row, so that a resumed run writes the rows of an undisturbed one."""
        return {
            "loss": self._loss.clone().cpu(),
            "correct": self._correct.clone().cpu(),
            "steps": self._steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._loss.copy_(state["loss"])
        self._correct.copy_(state["correct"])
        self._steps = state["steps"]

    def _ms(self, first: Any, second: Any) -> float:
        """Milliseconds between two instants."""
        return float(first.elapsed_time(second)) if self._on_gpu else (second - first) * 1e3
