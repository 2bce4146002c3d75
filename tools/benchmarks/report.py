"""Run programs as the parts of a page, `OUT/report.md`, each in its own process: `bench all` and `bench report`."""

import shlex
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from math import inf
from pathlib import Path
from time import monotonic
from typing import Any

from pipeline.errors import DataError
from pipeline.files import write_bytes
from tools.benchmarks import common


def bench_all(
    shards: Path,
    raw: Path | None = None,
    pixels: Path | None = None,
    out: Path = Path("benchmarks"),
    ffcv_python: Path | None = None,
    slipstream_python: Path | None = None,
) -> None:
    """Run all benchmarks, each in its own process. One that fails does not stop the others.

    Args:
        shards: Folder written by make_shards and compute_pca.
        raw: Folder of raw images, for pack (default: no pack).
        pixels: Pixel store of these shards, for peers (default: JPEGs alone).
        out: Folder for rows, a file per benchmark, and report.md.
        ffcv_python: Python of an environment with FFCV, for peers.
        slipstream_python: The same with slipstream.
    """
    folder = str(shards.resolve())
    options = {"pixels": pixels, "ffcv-python": ffcv_python, "slipstream-python": slipstream_python}
    given = [text for name, path in options.items() if path for text in (f"--{name}", str(path.absolute()))]
    data = {"loader": [folder], "peers": [folder, *given], "train": [folder], "model": []}
    words = data | ({"pack": [str(raw.resolve())]} if raw else {})
    run_parts({f"bench {name}": bench(out, name, *words[name]) for name in words}, out, inf)


def write_report(out: Path = Path("gpu-report"), minutes: float = 10.0) -> None:
    """Write a report about this machine's GPUs, on generated photographs: doctor, GPU tests, loader, model, training.

    Without a GPU it measures the CPU and lists what it leaves out.

    Args:
        out: Folder to write into.
        minutes: Time limit; later parts are left out.
    """
    import torch

    common.check_options(None, minutes=minutes)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.resolve(), prefix="data-") as data:
        run_parts(list_parts(torch.cuda.device_count(), Path(data), out), out, minutes)


def list_parts(gpus: int, data: Path, out: Path) -> dict[str, list[str]]:
    """List the report's commands by title, the most informative ones first."""
    raw, shards, brief = str(data / "raw"), str(data / "shards"), ("--repeats", "2", "--seconds", "2")
    # More than a core's cache holds, and made in seconds.
    photos, sizes = ("4000", (128, 1024)) if gpus else ("1000", (32,))
    parts = {
        "photographs": ["tools/make_demo.py", raw, "--photos", photos],
        "pack": ["tools/make_shards.py", "pack", raw, shards],
        "eigenbasis": ["tools/compute_pca.py", shards],
        "doctor": ["tools/doctor.py", shards],
        "pytest -m gpu": ["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"],
    }
    for size in sizes:
        settings = ("--settings", f"--train.batch_size {size}")
        parts[f"bench train, {size} images"] = bench(out, "train", shards, *settings, *brief)
    parts["bench loader"] = bench(out, "loader", shards, *brief)
    return parts | {"bench model": bench(out, "model", "--batch-sizes", str(list(sizes)), *brief)}


def bench(out: Path, name: str, *arguments: str) -> list[str]:
    """Return the command of a benchmark, whose rows go to OUT/NAME.jsonl."""
    return ["tools/bench.py", name, *arguments, "--out", str((out / f"{name}.jsonl").resolve())]


def run_parts(parts: dict[str, list[str]], out: Path, minutes: float) -> None:
    """Run commands of this Python, by title, and write report.md after each, as the program may be stopped.

    Raises `DataError` at the end when some failed; running out of time is no failure.
    """
    import torch

    out.mkdir(parents=True, exist_ok=True)
    gpus, deadline = torch.cuda.device_count(), monotonic() + 60 * minutes
    left_out = "GPU tests, batches of 128 and 1,024, towers over NCCL, GPU utilization, idle times (no GPU for PyTorch)"
    left_out = "nothing" if gpus > 1 else "two towers (one GPU)" if gpus else left_out
    machine = common.describe_environment() | {"gpus": gpus, "left out": left_out}
    head = [f"# Report of {datetime.now(UTC):%Y-%m-%d %H:%M} UTC", ""]
    head += [*(f"* {name}: {value}" for name, value in machine.items()), ""]
    rows, sections, failed = ["| part | result | s |", "|---|---|---|"], [""], []
    for title, command in parts.items():
        typed, started = shlex.join(["python", *command]), monotonic()
        print(f"\n{title}: {typed}", flush=True)
        result, output = run_part(command, deadline - started)
        print(f"{output.rstrip()}\n{result} ({monotonic() - started:.0f} s)", flush=True)
        rows.append(f"| {title} | {result} | {monotonic() - started:.0f} |")
        sections += [f"## {title}", "", "```text", f"$ {typed}", output.rstrip(), "```", ""]
        failed += [title] if result.startswith("failed") else []
        write_bytes(out / "report.md", "\n".join([*head, *rows, *sections]).encode())
    print(f"\n{out / 'report.md'}; rows of the benchmarks in {out}/*.jsonl")
    if failed:
        raise DataError(f"{', '.join(failed)}: failed; see their output in {out / 'report.md'}")


def run_part(command: list[str], seconds: float) -> tuple[str, str]:
    """Run a command of this Python, at most `seconds`. Returns "ok" or why it failed, and its output."""
    if seconds <= 0:
        return "left out: no time was left", ""
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "cwd": common.ROOT}
    limit = None if seconds == inf else seconds
    try:
        done = subprocess.run([sys.executable, *command], timeout=limit, stdin=subprocess.DEVNULL, **options)
    except subprocess.TimeoutExpired as error:
        return "cut off: no time was left", (error.stdout or b"").decode(errors="replace")
    result = "ok" if done.returncode == 0 else f"failed with exit code {done.returncode}"
    return result, done.stdout.decode(errors="replace")
