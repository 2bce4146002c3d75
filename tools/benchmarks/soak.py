"""bench soak: what a training process holds, hour after hour, as the kernel tells it from outside."""

import math
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import monotonic, sleep
from typing import NamedTuple

from pipeline.shards import open_shards
from tools.benchmarks.figure import Panel, draw_panels
from tools.benchmarks.measure import Table
from tools.benchmarks.record import check_out, describe, record
from train.metrics import read_metrics

ENDLESS = 10**6
"""Epochs: more than anybody waits for."""
PATIENCE_S = 120
"""How long a process may take to save and leave."""
SETTLED = 0.25
"""Share of the time after which nothing may grow any more: libraries are loaded, caches filled, files open."""


FIRST, SECOND = "first half, median", "second half, median"


class Held(NamedTuple):
    """What a process holds at a moment."""

    resident_gb: float
    threads: int
    files: int
    """Open ones, with sockets, pipes and what is mapped by a handle."""


def bench_soak(shards: Path, recipe: str, settings: str, minutes: float, out: Path | None) -> None:
    """See `tools/bench.py soak`. Raises `ValueError` where training ends by itself."""
    if not 0 < minutes < math.inf:
        raise ValueError(f"--minutes must be positive, not {minutes}")
    train = open_shards(shards, "train")
    check_out(out)
    print(f"{describe(train)}; {minutes:g} minutes of {recipe}, {settings or 'as it is'}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        run_dir, log = Path(scratch) / "run", Path(scratch) / "log"
        words = ["--config", recipe, "--train.epochs", str(ENDLESS), *settings.split()]
        words += ["--data.shards", str(shards), "--run.dir", str(run_dir)]
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "train.run", *words], stdout=output, stderr=output
            )
            try:
                moments = watch(process, 60 * minutes)
                process.send_signal(signal.SIGTERM)
                code = process.wait(PATIENCE_S)
            finally:
                process.kill()
                process.wait()
        if code or not moments:
            raise ValueError(
                f"training ended by itself, with code {code}: {' '.join(log.read_text().split()[-60:])}"
            )
        rows = read_metrics(run_dir / "metrics.jsonl")
        done = {
            "steps": max((row["step"] for row in rows), default=0),
            "epochs": sum(row["kind"] == "eval" for row in rows),
            "checkpoints_kept": len(list((run_dir / "checkpoints").glob("step-*.pt"))),
            "run_dir_mb": sum(path.stat().st_size for path in run_dir.rglob("*") if path.is_file()) / 1e6,
        }
        shutil.rmtree(run_dir)
    print(", ".join(f"{name} {value:,.0f}" for name, value in done.items()))
    settled = [held for second, held in moments.items() if second >= SETTLED * 60 * minutes]
    half = len(settled) // 2
    tables = []
    for place, (title, unit) in enumerate(
        (("resident memory", "GB"), ("threads", "threads"), ("open files", "files"))
    ):
        early, late = (
            statistics.median(held[place] for held in part) for part in (settled[:half], settled[half:])
        )
        tables.append(Table(f"{title}, once settled", unit, {FIRST: [early], SECOND: [late]}, FIRST))
        tables[-1].show()
    if out:
        counts = {"threads": curve(moments, 1), "open files": curve(moments, 2)}
        panels = [
            Panel("resident memory of training", "GB", "seconds", {"resident": curve(moments, 0)}),
            Panel("its threads and open files", "number", "seconds", counts),
        ]
        about = {
            "shards": train.manifest_sha256,
            "minutes": minutes,
            "settings": settings,
            "recipe": recipe,
            **done,
        }
        data = describe(train)
        record(
            out, "soak", tables, data, about, draw=lambda _, path, caption: draw_panels(panels, path, caption)
        )


def curve(moments: dict[int, Held], place: int) -> dict[int, list[float]]:
    """One of the three figures by second."""
    return {second: [float(held[place])] for second, held in moments.items()}


def watch(process: "subprocess.Popen[bytes]", seconds: float) -> dict[int, Held]:
    """Look at a process about 200 times in so many seconds; by second. Ends early where the process does, empty."""
    moments: dict[int, Held] = {}
    begun = monotonic()
    while (passed := monotonic() - begun) < seconds:
        sleep(max(0.5, seconds / 200))
        try:
            moments[round(passed)] = look_at(process.pid)
        except (KeyError, OSError):  # it is ending just now: its memory goes before its number
            process.wait()
        if process.poll() is not None:
            return {}
    return moments


def look_at(pid: int) -> Held:
    """What a process holds now."""
    place = Path("/proc") / str(pid)
    status = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines())
    files = len(list((place / "fd").iterdir()))
    return Held(int(status["VmRSS"].split()[0]) * 1024 / 1e9, int(status["Threads"]), files)
