"""How benchmarks measure: contenders in turn, medians and ratios on the screen."""

import statistics
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

STEPS_ON_A_GPU = 20
"""Between two waits for the GPU, so that the host runs ahead of it."""


class Table(NamedTuple):
    """What was measured in turn, and is compared."""

    title: str
    """What the contenders do."""
    unit: str
    """Of every value: "images/s", "s", "GB"."""
    measured: dict[str, list[float]]
    """By contender, one value a turn."""
    reference: str
    """Whose ratio is 1.00."""

    def ratio(self, name: str) -> float:
        """Of a contender to the reference, median over the turns."""
        pairs = zip(self.measured[name], self.measured[self.reference], strict=True)
        return statistics.median(a / b for a, b in pairs)

    def show(self) -> None:
        """Print medians, spreads and ratios."""
        width = max(40, *map(len, self.measured))
        print(f"{self.title:<{width}} {'median':>10} {'min':>10} {'max':>10}  ratio   ({self.unit})")
        for name, values in self.measured.items():
            figures = " ".join(f"{number(f(values)):>10}" for f in (statistics.median, min, max))
            print(f"{name:<{width}} {figures}  {self.ratio(name):.2f}")


def number(value: float) -> str:
    """Four digits, or as many as there are before the point."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def rate(
    step: Callable[[], Any], images_per_step: int, seconds: float, begin: Callable[[], Any] = lambda: None
) -> float:
    """Images per second of calling `step` for about `seconds`, behind an uncounted quarter of that: batches that were
    made ahead are no speed, and contenders before us may still be making theirs. Calls `begin` between the two."""
    begun = perf_counter()
    while perf_counter() - begun < seconds / 4:
        step()
    begin()
    steps, started, elapsed = 0, perf_counter(), 0.0
    while elapsed < seconds:
        step()
        steps, elapsed = steps + 1, perf_counter() - started
    return steps * images_per_step / elapsed


def timed(
    step: Callable[[], Any],
    images: int,
    seconds: float,
    place: "torch.device",
    begin: Callable[[], Any] = lambda: None,
) -> Callable[[], float]:
    """Measures images per second as `rate` does, the GPU's work included."""

    import torch

    def steps_on_a_gpu() -> None:
        for _ in range(STEPS_ON_A_GPU):
            step()
        torch.cuda.synchronize(place)

    if place.type == "cuda":
        return lambda: rate(steps_on_a_gpu, STEPS_ON_A_GPU * images, seconds, begin)
    return lambda: rate(step, images, seconds, begin)


def take_turns(contenders: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Measure each contender `repeats` times, in turn, after a first round that is thrown away. Every other round goes
    backwards, so that no place in the order is an advantage."""
    measured: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, measure in list(contenders.items())[:: 1 if turn % 2 else -1]:
            value = measure()
            if turn > 0:
                measured[name].append(value)
    return measured
