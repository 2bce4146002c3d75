"""The search for the best knobs: candidates, and which of them wins. It measures nothing itself."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

from pipeline.settings import Speed
from pipeline.shards import DataError

SAME_P99, SAME_P99_MS = 0.1, 0.5
"""Waits whose 99th percentiles differ by less than this share, or by less than this, count as equal."""
SAME_MEAN, SAME_MEAN_MS = 0.01, 0.05
"""The same for their means."""


@dataclass(frozen=True)
class Knobs:
    """A candidate; see `pipeline.settings.Speed` and `DataConfig.decode`."""

    threads: int
    prefetch: int = Speed.prefetch
    affinity: bool = Speed.affinity
    read_ahead: int = Speed.read_ahead
    hw_decoder_load: float = Speed.hw_decoder_load
    decode: Literal["cpu", "gpu"] = "cpu"

    def speed(self) -> dict[str, Any]:
        """What goes under `data.speed`."""
        knobs = {name: value for name, value in asdict(self).items() if name != "decode"}
        if self.decode == "cpu":
            del knobs["hw_decoder_load"]
        return knobs


class Waits(NamedTuple):
    """How one candidate did."""

    images_per_s: float
    p50_ms: float
    p99_ms: float
    mean_ms: float
    """Of the time in which a batch was waited for."""
    batches: int
    """That were measured; with fewer than a hundred the 99th percentile is about the longest wait."""


class Trial(NamedTuple):
    """One row of the table."""

    knobs: Knobs
    waits: Waits | None
    """None where the candidate failed."""
    error: str = ""


def list_axes(cores: int, on_gpu: bool) -> list[list[dict[str, Any]]]:
    """What is tried besides the defaults, knob after knob: changes to the best candidate so far."""
    threads = sorted({1, max(cores // 2, 1), cores, cores * 3 // 2} - {Speed().num_threads})
    axes: list[list[dict[str, Any]]] = [
        [{"threads": number} for number in threads],
        [{"prefetch": batches} for batches in (1, 4, 8)],
        [{"affinity": True}],
        [{"read_ahead": batches} for batches in (2, 4)],
    ]
    if on_gpu:
        axes.append([{"hw_decoder_load": share} for share in (0.0, 0.3, 0.5, 0.8, 1.0)])
        # Decoding on the CPU wants every core, whatever was best for decoding on the GPU.
        axes.append([{"decode": "cpu"}, {"decode": "cpu", "threads": cores + 1}])
    return axes


def search(
    start: Knobs, axes: Sequence[Sequence[dict[str, Any]]], measure: Callable[[Knobs], Waits]
) -> tuple[list[Trial], Trial]:
    """Coordinate search.

    The lowest of several noisy figures is too low, so in the end the defaults and the best are measured once more, and
    these two figures decide.

    Args:
        start: The first candidate, the defaults.
        axes: Per knob the changes to try on the best candidate so far; on `start` as long as none succeeded.
        measure: Measures a candidate; a `RuntimeError` (DALI's and PyTorch's, as of memory) or `MemoryError` means that
            it failed, and the search goes on.

    Returns everything that was tried, in order, and the best of it. Raises `DataError` with the first reason when all
    failed.
    """
    trials: list[Trial] = []

    def attempt(knobs: Knobs) -> None:
        try:
            trials.append(Trial(knobs, measure(knobs)))
        except (RuntimeError, MemoryError) as error:
            trials.append(Trial(knobs, None, (str(error) or type(error).__name__).splitlines()[0]))

    attempt(start)
    for axis in axes:
        base = pick(trials).knobs if any(trial.waits for trial in trials) else start
        for change in axis:
            knobs = replace(base, **change)
            if all(trial.knobs != knobs for trial in trials):
                attempt(knobs)
    if not any(trial.waits for trial in trials):
        raise DataError(f"no setting works; with the defaults: {trials[0].error}")
    best = pick(trials)
    if trials[0].waits and best is not trials[0]:
        attempt(start)
        attempt(best.knobs)
        if any(trial.waits for trial in trials[-2:]):
            best = pick(trials[-2:])
    return trials, best


def pick(trials: Sequence[Trial]) -> Trial:
    """The best of those that did not fail, of which there must be one.

    Of those whose 99th percentile is about the lowest, those whose mean is about the lowest; of these the one that was
    tried first, for it is nearest to the defaults.
    """
    done = [(trial, trial.waits) for trial in trials if trial.waits]
    lowest = min(waits.p99_ms for _, waits in done)
    calm = [
        (trial, waits)
        for trial, waits in done
        if waits.p99_ms <= max(lowest * (1 + SAME_P99), lowest + SAME_P99_MS)
    ]
    mean = min(waits.mean_ms for _, waits in calm)
    return next(
        trial for trial, waits in calm if waits.mean_ms <= max(mean * (1 + SAME_MEAN), mean + SAME_MEAN_MS)
    )
