"""Worker processes that die are told of, whenever it happens."""

import os
import re
import signal
from pathlib import Path

import pytest

from tests.helpers import ROOT, run_python

PROGRAM = """
import multiprocessing, os, signal, time
from multiprocessing.context import SpawnProcess
from tools.packing.pool import as_they_finish

start = SpawnProcess.start

def slow_start(process):
    others = multiprocessing.active_children()
    start(process)
    if others:
        os.kill(others[0].pid, signal.SIGKILL)
        time.sleep(1)  # the pool sees it before it knows of the new process

if __name__ == "__main__":
    SpawnProcess.start = slow_start
    list(as_they_finish(time.sleep, [0.1] * 10, 2))
"""


def test_a_worker_dies_while_another_starts(tmp_path: Path) -> None:
    """The pool of the standard library would wait for the new one for ever."""
    (tmp_path / "program.py").write_text(PROGRAM)
    done = run_python(tmp_path / "program.py", timeout=20, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 1 and "DataError: a worker process died" in done.stderr, done.stderr


DYING = """
import os, signal, sys, time
from tools.packing.pool import as_they_finish, name_work

def work(number):
    name_work(f"image {number}")
    if number == 7:
        os.kill(os.getpid(), int(sys.argv[1]))
    time.sleep(0.05)

if __name__ == "__main__":
    list(as_they_finish(work, range(20), 3))
"""


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_the_image_that_a_worker_died_of_is_named(tmp_path: Path, number: signal.Signals) -> None:
    """With the signal; the images that others were at are not."""
    (tmp_path / "program.py").write_text(DYING)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = run_python(tmp_path / "program.py", str(int(number)), timeout=60, env=environment)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and number.name in last and re.findall(r"image \d+", last) == ["image 7"], done.stderr
