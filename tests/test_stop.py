"""A wish to stop is heard from any process within about a second, at one step for all, and asked for only once."""

import os
import signal
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from train.stop import ECHO_S, SIGNALS, StopSignal, StopVote


@pytest.fixture
def handlers() -> Iterator[None]:
    """Puts signal handlers back."""
    before = [(number, signal.getsignal(number)) for number in SIGNALS]
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_signal(number: signal.Signals, handlers: None) -> None:
    """Each of them is a wish; the same once more at once, as Slurm sends it, is no other one."""
    stop = StopSignal()
    assert not stop()
    os.kill(os.getpid(), number)
    assert stop()
    for again in SIGNALS:
        os.kill(os.getpid(), again)
    assert stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_leaves_at_once(number: signal.Signals) -> None:
    """A signal that comes later ends the process as if there were no handler."""
    child = os.fork()
    if child == 0:
        StopSignal()
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(ECHO_S + 0.2)
        os.kill(os.getpid(), number)
        time.sleep(5)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == number


class Together:
    """Stands for the placements of several processes that ask in step: all see the largest of what was given."""

    world = 3

    def __init__(self) -> None:
        self.exchanges = 0
        self.others: tuple[int, int] = (0, -(10**9))

    def largest(self, *numbers: int) -> list[int]:
        """As `Placement.largest`."""
        self.exchanges += 1
        return [max(pair) for pair in zip(numbers, self.others, strict=True)]


def run(
    monkeypatch: pytest.MonkeyPatch, step_s: float, steps: int, **attributes: Any
) -> tuple[Together, list[float]]:
    """Ask after each of `steps` steps; returns the times of the exchanges."""
    placement, now = Together(), [0.0]
    for name, value in attributes.items():
        setattr(placement, name, value)
    monkeypatch.setattr("train.stop.perf_counter", lambda: now[0])
    vote, times = StopVote(placement, lambda: False), []  # type: ignore[arg-type]
    for _ in range(steps):
        now[0] += step_s
        before = placement.exchanges
        vote()
        if placement.exchanges > before:
            times.append(now[0])
    return placement, times


@pytest.mark.parametrize("step_s", [0.001, 0.05, 0.7, 3.0])
def test_exchanged_about_once_a_second(monkeypatch: pytest.MonkeyPatch, step_s: float) -> None:
    """However long a step is: within two seconds, or at every step; and not much more often than once a second."""
    placement, times = run(monkeypatch, step_s, int(30 / step_s))
    assert max(after - before for before, after in pairwise(times)) <= max(2.0, step_s * 1.001)
    assert placement.exchanges <= 30 + 12  # from one step to a second's worth by doubling


def test_the_slowest_process_decides_how_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that wishes to hear of it after two steps is heard by those that are faster."""
    placement, _ = run(monkeypatch, 0.001, 100, others=(0, -2))
    assert placement.exchanges >= 50


def test_wish_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wish of any process is everybody's from the next exchange on, for good; alone, one's own counts at once."""
    placement = Together()
    vote = StopVote(placement, lambda: False)  # type: ignore[arg-type]
    assert not vote()
    placement.others = (1, -1)
    vote.hurry()
    assert vote() and vote()
    wishes = iter([False, True])
    placement.world = 1
    alone = StopVote(placement, lambda: next(wishes))  # type: ignore[arg-type]
    assert [alone(), alone()] == [False, True]
