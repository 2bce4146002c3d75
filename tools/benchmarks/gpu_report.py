"""One page about this machine, to be attached to an issue or committed: doctor, GPU tests and benchmarks on generated
photographs, each in a process of its own. On a CPU it runs through and lists what only a GPU could show."""

import shlex
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import NamedTuple

from pipeline.files import write_bytes
from pipeline.shards import DataError
from tools.benchmarks.record import surroundings

ROOT = Path(__file__).resolve().parents[2]
PHOTOS = {"cuda": 4000, "cpu": 1000}
"""Enough that no file stays in a core's cache, few enough to be made in seconds."""


class Part(NamedTuple):
    """A command of the report."""

    title: str
    arguments: list[str]
    """Of this Python."""


class Outcome(NamedTuple):
    """How a part ended."""

    part: Part
    result: str
    """"ok", or why there is no more."""
    seconds: float
    output: str


def write_gpu_report(out: Path, minutes: float) -> None:
    """See `tools/bench.py report`. Raises `DataError` at the end where a part failed."""
    if minutes <= 0:
        raise ValueError(f"--minutes must be positive, not {minutes:g}")
    import torch

    out.mkdir(parents=True, exist_ok=True)
    gpus, deadline = torch.cuda.device_count(), monotonic() + 60 * minutes
    place = "cuda" if gpus else "cpu"
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(dir=out, prefix="data-") as data:
        for part in parts(place, Path(data), out):
            left = deadline - monotonic()
            print(f"{part.title} ...", flush=True)
            outcomes.append(
                run_part(part, left) if left > 0 else Outcome(part, "left out: no time was left", 0.0, "")
            )
            print(f"  {outcomes[-1].result} ({outcomes[-1].seconds:.0f} s)", flush=True)
            write_bytes(
                out / "report.md", page(outcomes, gpus).encode()
            )  # also of a run that is ended in between
    print(f"{out / 'report.md'}; rows of the benchmarks in {out}/*.jsonl")
    failed = [each.part.title for each in outcomes if each.result.startswith("failed")]
    if failed:
        raise DataError(f"{', '.join(failed)} failed; {out / 'report.md'} has what they printed")


def parts(place: str, data: Path, out: Path) -> list[Part]:
    """All commands, in the order of their worth."""
    raw, shards, rows = data / "raw", data / "shards", ["--repeats", "2", "--seconds", "2"]

    def bench(subcommand: str, *arguments: str) -> list[str]:
        return ["tools/bench.py", subcommand, *arguments, *rows, "--out", str(out / f"{subcommand}.jsonl")]

    def training(batch: int) -> Part:
        settings = ["--settings", f"--train.batch_size {batch}", "--profile"]
        return Part(f"bench train, {batch} images", bench("train", str(shards), *settings))

    sizes = (128, 1024) if place == "cuda" else (32,)
    return [
        Part("photographs", ["tools/make_demo.py", str(raw), "--photos", str(PHOTOS[place])]),
        Part("pack", ["tools/make_shards.py", "pack", str(raw), str(shards)]),
        Part("eigenbasis", ["tools/compute_pca.py", str(shards)]),
        Part("doctor", ["tools/doctor.py", str(shards)]),
        Part("pytest -m gpu", ["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]),
        *map(training, sizes),
        Part("bench loader", bench("loader", str(shards))),
        Part("bench model", bench("model", "--batch-sizes", f"[{','.join(map(str, sizes))}]")),
    ]


def run_part(part: Part, seconds: float) -> Outcome:
    """Run a part for so long at most."""
    started = monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *part.arguments], cwd=ROOT, timeout=seconds, check=False, text=True, errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        result, output = (
            "ok" if done.returncode == 0 else f"failed with exit code {done.returncode}",
            done.stdout,
        )
    except subprocess.TimeoutExpired as error:
        result, output = "cut off: no time was left", (error.stdout or b"").decode(errors="replace")
    return Outcome(part, result, monotonic() - started, output)


def page(outcomes: list[Outcome], gpus: int) -> str:
    """The report as Markdown."""
    about = surroundings("report")
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    machine = {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "commit": about["commit"] or "not a git checkout",
        "GPU": f"{gpus} x {about['gpu']}, driver {about['driver']}" if gpus else "none",
        "host": f"{about['cpu']}, {about['cores']} cores, {about['memory_gb']} GB",
        "versions": versions,
    }
    lines = ["# GPU report", "", *(f"* {name}: {value}" for name, value in machine.items()), ""]
    for missing in left_out(gpus):
        lines.append(f"* left out: {missing}")
    lines += ["", "| part | result | s |", "|---|---|---|"]
    lines += [f"| {each.part.title} | {each.result} | {each.seconds:.0f} |" for each in outcomes]
    for each in outcomes:
        command = shlex.join(["python", *each.part.arguments])
        lines += ["", f"## {each.part.title}", "", "```text", f"$ {command}", each.output.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def left_out(gpus: int) -> list[str]:
    """What this machine cannot show."""
    if gpus == 0:
        return [
            "GPU tests (they skip themselves), batches of 128 and 1,024, GPU utilization and idle times: there is no "
            "GPU that PyTorch can use; what follows was measured on the CPU",
            "two towers over NCCL: that takes two GPUs",
        ]
    return ["two towers: that takes two GPUs"] if gpus == 1 else []
