"""Worker processes that die are reported, whenever it happens."""

import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest

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


DYING = """
import os, signal, sys, time
from tools.packing.pool import run_jobs, set_current_item

def work(number):
    set_current_item(f"image {number}")
    if number == 7:
        os.kill(os.getpid(), int(sys.argv[1]))
    time.sleep(0.05)

if __name__ == "__main__":
    run_jobs(work, range(20), [1] * 20, 3, "working")
"""


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_the_image_that_a_worker_died_of_is_named(tmp_path: Path, number: signal.Signals) -> None:
    """With the signal; the images that others were at are not."""
    (tmp_path / "program.py").write_text(DYING)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = run_python(tmp_path / "program.py", str(int(number)), timeout=60, env=environment)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and number.name in last and re.findall(r"image \d+", last) == ["image 7"], (
        done.stderr
    )


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
    """By pack, adopt and verify, whose workers die of one: exit code 3, and the sentence has its name."""
    image = jpeg(photo(np.random.default_rng(0)))
    for k in range(6):
        write(tmp_path / "raw" / "train" / "cat" / f"n{k}.jpg", image + (b"deadly" if k == 4 else b"sound."))
    pack = ("tools/make_shards.py", "pack", tmp_path / "raw", tmp_path / "shards", "--store", "original")
    options = ("--val-fraction", "0", "--samples-per-shard", "2", "--workers", "2")
    run_ok(*pack, *options)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(DEADLY)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    again = ("tools/make_shards.py", "pack", tmp_path / "raw", tmp_path / "again", "--store", "original")
    adopt = (
        "tools/make_shards.py",
        "adopt",
        tmp_path / "shards" / "train",
        tmp_path / "adopted",
        "--split",
        "train",
    )
    for command in (
        (*again, *options),
        (*adopt, "--pattern", "*.tar", "--workers", "2"),
        ("tools/make_shards.py", "verify", tmp_path / "shards", "--workers", "2"),
    ):
        done = run_python(*command, env=environment)
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 3 and "SIGSEGV" in last and "n4.jpg" in last, done.stderr
