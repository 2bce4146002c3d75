"""Write a report about this machine for an issue: doctor, GPU tests and benchmarks on generated photographs, each in
its own process. Without a GPU it lists the parts that need one."""

import shlex
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any

from pipeline.errors import DataError
from pipeline.files import write_bytes
from tools.benchmarks import common


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
    gpus, deadline = torch.cuda.device_count(), monotonic() + 60 * minutes
    left_out = "GPU tests, batches of 128 and 1,024, towers over NCCL, GPU utilization, idle times (no GPU for PyTorch)"
    left_out = "nothing" if gpus > 1 else "two towers (one GPU)" if gpus else left_out
    machine = common.describe_environment("report") | {"gpus": gpus, "left out": left_out}
    machine["versions"] = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    head = ["# GPU report", "", f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", ""]
    head += [f"* {name}: {value}" for name, value in machine.items()]
    rows, sections, failed = [], [], []
    with tempfile.TemporaryDirectory(dir=out, prefix="data-") as data:
        for title, command in list_parts(gpus, Path(data), out).items():
            print(f"{title} ...", flush=True)
            started = monotonic()
            result, output = run_part(command, deadline - started)
            rows.append(f"| {title} | {result} | {monotonic() - started:.0f} |")
            print(f"  {result} ({monotonic() - started:.0f} s)", flush=True)
            failed += [title] if result.startswith("failed") else []
            typed = shlex.join(["python", *command])
            sections += ["", f"## {title}", "", "```text", f"$ {typed}", output.rstrip(), "```"]
            page = "\n".join([*head, "", "| part | result | s |", "|---|---|---|", *rows, *sections])
            write_bytes(out / "report.md", f"{page}\n".encode())  # after each part, as the run may be stopped
    print(f"{out / 'report.md'}; rows of the benchmarks in {out}/*.jsonl")
    if failed:
        raise DataError(f"{', '.join(failed)}: failed; see their output in {out / 'report.md'}")


def list_parts(gpus: int, data: Path, out: Path) -> dict[str, list[str]]:
    """List the report's commands by title, the most informative ones first."""
    raw, shards = str(data / "raw"), str(data / "shards")
    # More than a core's cache holds, and made in seconds.
    photos, sizes = ("4000", (128, 1024)) if gpus else ("1000", (32,))

    def bench(name: str, *arguments: str) -> list[str]:
        turns = ["--repeats", "2", "--seconds", "2", "--out", str(out / f"{name}.jsonl")]
        return ["tools/bench.py", name, *arguments, *turns]

    trainings = {
        f"bench train, {size} images": bench("train", shards, "--settings", f"--train.batch_size {size}")
        for size in sizes
    }
    return {
        "photographs": ["tools/make_demo.py", raw, "--photos", photos],
        "pack": ["tools/make_shards.py", "pack", raw, shards],
        "eigenbasis": ["tools/compute_pca.py", shards],
        "doctor": ["tools/doctor.py", shards],
        "pytest -m gpu": ["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"],
        **trainings,
        "bench loader": bench("loader", shards),
        "bench model": bench("model", "--batch-sizes", str(list(sizes))),
    }


def run_part(command: list[str], seconds: float) -> tuple[str, str]:
    """Run a command of this Python, at most `seconds`. Returns "ok" or why it failed, and its output."""
    if seconds <= 0:
        return "left out: no time was left", ""
    pipe, stdout, devnull = subprocess.PIPE, subprocess.STDOUT, subprocess.DEVNULL
    options: dict[str, Any] = {"cwd": common.ROOT, "stdin": devnull, "stdout": pipe, "stderr": stdout}
    try:
        process = subprocess.run([sys.executable, *command], timeout=seconds, check=False, **options)
    except subprocess.TimeoutExpired as error:
        return "cut off: no time was left", (error.stdout or b"").decode(errors="replace")
    result = "ok" if process.returncode == 0 else f"failed with exit code {process.returncode}"
    return result, process.stdout.decode(errors="replace")
