"""The wish to stop: a signal to any process, known to all of them between two steps."""

import signal
from collections.abc import Callable
from time import perf_counter
from types import FrameType

from train.placement import Placement

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGUSR1 is what Slurm users let it send before the time is over (docs/clusters.md)."""


ECHO_S = 1.0
"""A signal so soon after the first one is the same wish: Slurm, pre-empting a job without a grace time, was seen to
send SIGTERM twice within 13 ms, and torchrun passes on a Ctrl-C that the terminal has sent to everybody already."""


class StopSignal:
    """Turns the first of these signals into a wish to stop, asked for between steps; another one leaves at once."""

    def __init__(self) -> None:
        self._requested_at: float | None = None
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = perf_counter()
        if self._requested_at is None:
            self._requested_at = now
        elif now - self._requested_at > ECHO_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def __call__(self) -> bool:
        """Whether to stop."""
        return self._requested_at is not None


class StopVote:
    """Whether any process wishes to stop; asked by all of them at every step, exchanged about once a second.

    An exchange over gloo costs the host a fraction of a millisecond, which at a thousand steps a second would be much.
    The number of steps until the next one is agreed in the exchange itself, from the time that the last ones took.
    """

    INTERVAL_S = 1.0

    def __init__(self, placement: Placement, requested: Callable[[], bool]) -> None:
        self._placement, self._requested = placement, requested
        self._agreed = False
        self.hurry()

    def hurry(self) -> None:
        """Exchange at the next step: those that follow take another time than those before."""
        self._steps = self._left = 1
        self._since = perf_counter()

    def __call__(self) -> bool:
        """Whether to stop. All processes have to ask at the same steps."""
        if self._placement.world == 1:
            return self._requested()
        self._left -= 1
        if self._left == 0 and not self._agreed:
            now = perf_counter()
            affordable = int(self.INTERVAL_S * self._steps / max(now - self._since, 1e-6))
            # Twice as many at most: the first steps of a phase may be unlike those that follow.
            wish, negative = self._placement.largest(
                int(self._requested()), -max(1, min(affordable, 2 * self._steps))
            )
            self._agreed, self._since = bool(wish), now
            self._steps = self._left = -negative
        return self._agreed
