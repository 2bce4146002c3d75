"""Worker processes that die are reported, whenever it happens, with the image that they died of."""

import os
import re
from pathlib import Path

import numpy as np

from tests.helpers import ROOT, jpeg, photo, run_ok, run_python, write

PROGRAM = """
import multiprocessing, os, signal, time
from multiprocessing.context import SpawnProcess
from tools.packing.pool import run_jobs

start = SpawnProcess.start

def slow_start(process):
    others = multiprocessing.active_children()
    start(process)
    if others:
        os.kill(others[0].pid, signal.SIGKILL)
        time.sleep(1)  # the pool sees it before it knows of the new process

if __name__ == "__main__":
    SpawnProcess.start = slow_start
    run_jobs(time.sleep, [0.1] * 10, [1] * 10, 2, "sleeping")
"""


def test_a_worker_dies_while_another_starts(tmp_path: Path) -> None:
    """The pool of the standard library would wait for the new one for ever."""
    (tmp_path / "program.py").write_text(PROGRAM)
    done = run_python(tmp_path / "program.py", timeout=20, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 1 and "DataError: a worker process died" in done.stderr, done.stderr


DEADLY = """
import os, signal, simplejpeg
decode = simplejpeg.decode_jpeg

def deadly(data, *arguments, **named):
    if b"deadly" in data:
        os.kill(os.getpid(), signal.SIGSEGV)
    return decode(data, *arguments, **named)

simplejpeg.decode_jpeg = deadly
"""


def test_deadly_images_are_named(tmp_path: Path) -> None:
    """By pack, adopt and verify, whose workers die of one: exit code 3, and the sentence has its name and the signal,
    but not the images that other workers were at."""
    image = jpeg(photo(np.random.default_rng(0)))
    for k in range(6):
        write(tmp_path / "raw" / "train" / "cat" / f"n{k}.jpg", image + (b"deadly" if k == 4 else b"sound."))
    options = ("--store", "original", "--val-fraction", "0", "--samples-per-shard", "2", "--workers", "2")
    run_ok("tools/make_shards.py", "pack", tmp_path / "raw", tmp_path / "shards", *options)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(DEADLY)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    adopted = (tmp_path / "shards" / "train", tmp_path / "adopted", "--split", "train", "--pattern", "*.tar")
    for command in (
        ("pack", tmp_path / "raw", tmp_path / "again", *options),
        ("adopt", *adopted, "--workers", "2"),
        ("verify", tmp_path / "shards", "--workers", "2"),
    ):
        done = run_python("tools/make_shards.py", *command, env=environment)
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 3 and "SIGSEGV" in last, done.stderr
        assert set(re.findall(r"n\d\.jpg", last)) == {"n4.jpg"}
