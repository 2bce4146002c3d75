"""How benchmarks measure: contenders in turn, medians and ratios on the screen, rows with hardware and versions, and a
figure beside them."""

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.files import check_writable
from pipeline.machine import num_cores
from pipeline.shards import IMAGE_SIDE, ClassName, ShardSet
from tools.checks.nvidia_smi import ask_nvidia

if TYPE_CHECKING:
    import torch

STEPS_ON_A_GPU = 20
"""Between two waits for the GPU, so that the host runs ahead of it."""
Draw = Callable[[list["Table"], Path, str], None]
"""Draws tables into a PNG file, with a caption."""
GENERATED = "n9"
"""How the made-up wnids of `tools/make_demo.py` begin; those of WordNet begin with n0 or n1."""


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


def describe(shards: ShardSet) -> str:
    """Which data it was, for people: "1600 generated images of 256x256, 32 kB each, in 2 shards"."""
    size = "stored size" if shards.any_size else f"{IMAGE_SIDE}x{IMAGE_SIDE}"
    kilobytes = sum(Path(tar).stat().st_size for tar in shards.tars) / shards.num_samples / 1000
    images = f"{shards.num_samples} {images_of(shards.classes)} of {size}"
    return f"{images}, {kilobytes:.0f} kB each, in {len(shards.tars)} shards"


def images_of(classes: Sequence[ClassName]) -> str:
    """What to call images of these classes: "generated images" where `tools/make_demo.py` made them up."""
    return "generated images" if all(name.wnid.startswith(GENERATED) for name in classes) else "images"


def check_out(out: Path | None) -> None:
    """Find out before the measurement whether rows can be written behind it. Raises `ValueError`, `OSError`."""
    if out and out.suffix != ".jsonl":
        raise ValueError(f"--out {out} is a file of JSON lines: call it .jsonl; a figure, .png, comes beside it")
    if out:
        check_writable(out.with_suffix(".png"))
        check_writable(out)
        if out.exists():
            out.open("a").close()


def record(
    out: Path,
    subcommand: str,
    tables: list[Table],
    data: str,
    settings: Mapping[str, Any],
    each: Mapping[str, Mapping[str, Any]] | None = None,
    also: Sequence[Mapping[str, Any]] = (),
    draw: Draw | None = None,
) -> None:
    """Append one JSON row per contender with what a reader needs to judge and repeat it, and a figure beside it.

    Args:
        out: File of JSON lines; its figure has the suffix .png, and shows this run alone.
        subcommand: Of `tools/bench.py`.
        tables: What was measured.
        data: On which data, as `describe` says it.
        settings: What every row has besides.
        each: What a contender's row has besides.
        also: Rows of what is no contender, or was not measured.
        draw: Makes the figure; by default with a bar for each contender.
    """
    from tools.benchmarks.figure import draw_tables  # not above: contenders' processes import this file, and are timed

    about = surroundings(subcommand) | {"data": data, **settings}
    with out.open("a") as file:
        for table in tables:
            for name, values in table.measured.items():
                row = {"contender": name, "median": statistics.median(values), "unit": table.unit, "values": values}
                more = {"table": table.title, "ratio": table.ratio(name), "reference": table.reference}
                file.write(json.dumps(row | more | dict((each or {}).get(name, {})) | about) + "\n")
        for extra in also:
            file.write(json.dumps(dict(extra) | about) + "\n")
    on_gpu = about["gpu"] and about.get("device", "cuda") != "cpu"
    machine = about["gpu"] if on_gpu else f"{about['cpu']}, {about['cores']} cores, no GPU"
    (draw or draw_tables)(
        tables, out.with_suffix(".png"), f"bench {subcommand} on {data}; {machine}; {about['commit'][:7]}"
    )


def surroundings(subcommand: str) -> dict[str, Any]:
    """Commit, command, hardware and versions."""
    import nvidia.dali
    import torch

    return {
        "benchmark": subcommand,
        "commit": commit(),
        "command": shlex.join(["python", "tools/bench.py", *sys.argv[1:]]),
        "cpu": processor(),
        "cores": num_cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "driver": ask_nvidia().driver,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "dali": nvidia.dali.__version__,
            **{name: version(name) for name in ("simplejpeg", "numpy", "pillow")},
        },
    }


def commit() -> str:
    """Of the code that was measured; "-dirty" behind it where a file of it was changed. Empty outside of git."""
    git = ["git", "-C", str(Path(__file__).resolve().parents[2])]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    code = ["pipeline", "model", "train", "tools"]
    changed = head and subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *code], check=False).returncode
    return f"{head}-dirty" if changed else head


def processor() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
