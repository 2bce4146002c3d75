"""What remains of a measurement: rows with data, hardware and versions, and a figure beside them."""

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
from typing import Any

from pipeline.files import check_writable
from pipeline.machine import num_cores
from pipeline.shards import IMAGE_SIDE, ClassName, ShardSet
from tools.benchmarks.measure import Table
from tools.doctor import probe

Draw = Callable[[list[Table], Path, str], None]
"""Draws tables into a PNG file, with a caption."""
GENERATED = "n9"
"""How the made-up wnids of `tools/make_demo.py` begin; those of WordNet begin with n0 or n1."""


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
        raise ValueError(
            f"--out {out} is a file of JSON lines: call it .jsonl; a figure, .png, comes beside it"
        )
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
    from tools.benchmarks.figure import (
        draw_tables,
    )  # not above: contenders' processes import this file, and are timed

    about = surroundings(subcommand) | {"data": data, **settings}
    with out.open("a") as file:
        for table in tables:
            for name, values in table.measured.items():
                row = {
                    "contender": name,
                    "median": statistics.median(values),
                    "unit": table.unit,
                    "values": values,
                }
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
        "driver": probe("driver").get("version"),
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
    head = subprocess.run(
        [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    code = ["pipeline", "model", "train", "tools"]
    changed = head and subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *code], check=False).returncode
    return f"{head}-dirty" if changed else head


def processor() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
