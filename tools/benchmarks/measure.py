"""How benchmarks measure: contenders in turn, medians and ratios on the screen, rows with hardware and versions."""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

STEPS_ON_A_GPU = 20
"""Between two waits for the GPU, so that the host runs ahead of it."""


def rate(step: Callable[[], Any], images_per_step: int, seconds: float) -> float:
    """Images per second of calling `step` for about `seconds`, behind an uncounted quarter of that: batches that were
    made ahead are no speed, and contenders before us may still be making theirs."""
    begun = perf_counter()
    while perf_counter() - begun < seconds / 4:
        step()
    steps, started, elapsed = 0, perf_counter(), 0.0
    while elapsed < seconds:
        step()
        steps, elapsed = steps + 1, perf_counter() - started
    return steps * images_per_step / elapsed


def timed(step: Callable[[], Any], images: int, seconds: float, place: "torch.device") -> Callable[[], float]:
    """Measures images per second, the GPU's work included."""

    import torch

    def steps_on_a_gpu() -> None:
        for _ in range(STEPS_ON_A_GPU):
            step()
        torch.cuda.synchronize(place)

    if place.type == "cuda":
        return lambda: rate(steps_on_a_gpu, STEPS_ON_A_GPU * images, seconds)
    return lambda: rate(step, images, seconds)


def take_turns(contenders: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Measure each contender `repeats` times, in turn, after a first round that is thrown away. Every other round goes
    backwards, so that no place in the order is an advantage."""
    measured: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, measure in list(contenders.items())[:: 1 if turn % 2 else -1]:
            value = measure()
            if turn > 0:
                measured[name].append(value)
    return measured


def show(measured: dict[str, list[float]], unit: str, reference: str) -> None:
    """Print a table of medians, spreads and the ratio to `reference`, turn by turn."""
    width = max(40, *map(len, measured))
    print(f"{'':<{width}} {'median':>10} {'min':>10} {'max':>10}  ratio   ({unit})")
    for name, values in measured.items():
        ratio = statistics.median(a / b for a, b in zip(values, measured[reference], strict=True))
        figures = f"{statistics.median(values):>10.0f} {min(values):>10.0f} {max(values):>10.0f}"
        print(f"{name:<{width}} {figures}  {ratio:.2f}")


def record(out: Path, subcommand: str, measured: dict[str, list[float]], settings: dict[str, Any]) -> None:
    """Append one JSON row per contender with what a reader needs to judge and repeat it."""
    import nvidia.dali
    import simplejpeg
    import torch

    root = Path(__file__).resolve().parents[2]
    git = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    about = {
        "benchmark": subcommand,
        "commit": git.stdout.strip(),
        "command": " ".join(["python", "tools/bench.py", *sys.argv[1:]]),
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "dali": nvidia.dali.__version__,
            "simplejpeg": simplejpeg.__version__,
        },
        **settings,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        for name, values in measured.items():
            row = {"contender": name, "median": statistics.median(values), "values": values, **about}
            file.write(json.dumps(row) + "\n")


def processor() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
