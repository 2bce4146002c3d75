"""bench soak tells what a process holds, and that one which ends by itself is no soak."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from tests.helpers import run_ok, run_python
from tools.benchmarks.soak import Held, look_at, watch

HOLDER = """
import sys, threading
wait = threading.Event()
blocks, files = [], []
for line in sys.stdin:
    blocks.append(b"x" * 50_000_000)
    files += [open("/dev/null") for _ in range(7)]
    for _ in range(3):
        threading.Thread(target=wait.wait, daemon=True).start()
    print("held", flush=True)
"""


def test_what_a_process_holds() -> None:
    """Memory, threads and files are counted as they grow; a process that is gone ends the watch."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin and process.stdout
        seen: list[Held] = []
        for _ in range(3):
            process.stdin.write(b"more\n")
            process.stdin.flush()
            process.stdout.readline()
            seen.append(look_at(process.pid))
        assert min(watch(process, 1.0)) == 0
        process.kill()
        process.wait()
        assert watch(process, 1.0) == {}
    for before, after in pairwise(seen):
        assert after.resident_gb - before.resident_gb == pytest.approx(0.05, rel=0.1)
        assert (after.threads - before.threads, after.files - before.files) == (3, 7)


def test_training_that_ends(shards: Path) -> None:
    """Its own sentence is told."""
    done = run_python(
        "tools/bench.py", "soak", shards, "--minutes", "1", "--settings", "--model.num_classes 11"
    )
    assert done.returncode == 2 and "leave --model.num_classes 11 out" in done.stderr, done.stderr


@pytest.mark.slow
def test_soak(shards: Path, tmp_path: Path) -> None:
    """Half a minute: rows, a figure, and nothing that is left in the way."""
    out = tmp_path / "rows.jsonl"
    said = run_ok(
        "tools/bench.py", "soak", shards, "--minutes", "0.5", "--settings", "--run.save_every 9", "--out", out
    )
    assert "resident memory, once settled" in said and out.read_text().count("\n") == 6
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "rows.png"}
