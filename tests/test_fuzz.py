"""Whatever bytes a reader is given, it succeeds or says in one sentence what is wrong with which file, soon, in little
memory, and writes nowhere but where it is to; no input ends it, hangs it or gets a traceback out of it.

Each attack takes a number, draws an input from it (`tests/mutate.py` over sound files) and gives what is to be called;
calls go through `train.cli.exit_with`, the edge of our programs. They happen in processes of their own, so that a
crash or a hang is told with its number instead of ending the tests; `python -m tests.test_fuzz ATTACK NUMBER` repeats
one. Inputs that found something are tests of the part that they were refused by.
"""

import io
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.attacks import ATTACKS
from tests.helpers import ROOT
from tests.sound import Place, make_seeds
from train.cli import run_main

LIMIT_S = 60.0
"""For one input, which takes less than a second; on two busy cores, so that it is a hang that it finds."""
MEMORY_BYTES = 10**9
"""That a process may grow by."""
TOLD_AT_MOST = 1600
"""Characters of a sentence."""
SETTING = re.compile(
    r"error: ((Option|Group) '|.*(data|train|run|model|optimizer|parallel|resume)\.\w+|.*position in the data|--pat)"
)
"""What a sentence may name instead of a file: it may come from several."""


def snapshot(place: Place) -> dict[str, tuple[int, ...]]:
    """Everything around and in the input, but for the output."""
    found = {}
    for folder, names, files in os.walk(place.given.parent):
        if Path(folder) == place.out.parent:
            names[:] = [name for name in names if name != place.out.name]
        for name in (*names, *files):
            path = os.path.join(folder, name)  # noqa: PTH118 (names are odd)
            status = os.lstat(path)
            found[path] = (
                status.st_size if name in files else 0,
                status.st_mtime_ns * (name in files),
                status.st_mode,
            )
    return found


def outcome(call: Callable[[], object], place: Place) -> str:
    """What is wrong with how a program that makes this call ends; empty if nothing."""
    told = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True)
    printed = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True)
    try:
        with redirect_stderr(told), redirect_stdout(printed):
            run_main(call)
    except SystemExit as ended:
        code = ended.code
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)
        ours = next((each for each in reversed(last) if Path(each.filename).is_relative_to(ROOT)), last[-1])
        return f"{type(error).__name__}: {str(error)[:200]} (from {Path(ours.filename).name}:{ours.lineno})"
    text = told.buffer.getvalue().decode()  # type: ignore[attr-defined]
    output = printed.buffer.getvalue().decode()  # type: ignore[attr-defined]
    if odd := [line for line in output.splitlines() if not line.isprintable()]:
        return f"prints what a terminal may act on: {odd[0][:200]!r}"
    if code == 0:
        return f"succeeds, but complains: {text[:300]!r}" if text else ""
    line, named = text.removesuffix("\n"), (str(place.given), str(place.out))
    checks = {
        f"exit code {code}": code not in (2, 3),
        "no sentence": not line.startswith("error: ") or len(line) < 20,
        "not one line": len(line.splitlines()) != 1,
        "not printable": not line.isprintable(),
        f"{len(line)} characters": len(line) > TOLD_AT_MOST,
        "names no file": not any(map(str(line).__contains__, named)) and not SETTING.search(line),
    }
    return "; ".join(name for name, wrong in checks.items() if wrong) and (
        "; ".join(name for name, wrong in checks.items() if wrong) + f": {line[:300]!r}"
    )


def strike(name: str, number: int, place: Place) -> str:
    """Make one attack; what it found, empty if nothing."""
    attack = next(each for each in ATTACKS if each.__name__ == name)
    for folder in (place.given, place.out):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    calls = attack(random.Random(f"{name} {number}"), place)
    before = snapshot(place)
    for k, call in enumerate(calls):
        if wrong := outcome(call, place):
            return f"call {k}: {wrong}"
        if (after := snapshot(place)) != before:
            other = [path for path in {**before, **after} if before.get(path) != after.get(path)]
            return f"call {k}: changes or writes {other[0]!r}"
    grown = peak_bytes(resource.RUSAGE_SELF) - start_bytes()
    taken = max(grown, peak_bytes(resource.RUSAGE_CHILDREN))
    return f"takes {taken / 1e9:.1f} GB of memory" if taken > MEMORY_BYTES else ""


def peak_bytes(of: int) -> int:
    """The most memory that this process held, or one of its children."""
    return 1024 * resource.getrusage(of).ru_maxrss


@cache
def start_bytes() -> int:
    """Memory at the beginning."""
    return peak_bytes(resource.RUSAGE_SELF)


def work(name: str, numbers: Sequence[int], seeds: Path, folder: Path, tell: "Connection[Any, Any]") -> None:
    """Make some attacks in this process, telling of each before and after it."""
    start_bytes()
    torch.set_num_threads(1)
    place = Place(seeds, folder / "deep" / "er" / "given", folder / "deep" / "er" / "out")
    cwd = folder / "deep" / "er" / "cwd"
    cwd.mkdir(parents=True, exist_ok=True)
    os.chdir(cwd)
    with (folder.with_suffix(".log")).open("ab") as log:  # what C libraries tell
        os.dup2(log.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.fsync = lambda file: None  # no power is lost here
    for number in numbers:
        tell.send((number, None))
        tell.send((number, strike(name, number, place)))


def attack(name: str, numbers: Sequence[int], seeds: Path, folder: Path) -> tuple[int, list[str]]:
    """Make attacks in processes of their own. Returns how many, and what they found."""
    context, found, done = multiprocessing.get_context("forkserver"), [], 0
    context.set_forkserver_preload(["tests.test_fuzz", "scipy.io", "pyarrow.parquet"])
    todo = list(numbers)
    while todo and len(found) < 10:
        ours, theirs = context.Pipe(False)
        process = context.Process(target=work, args=(name, todo, seeds, folder / name, theirs))
        process.start()
        theirs.close()
        told, number, first = "", todo[0], True
        try:
            while True:
                if not ours.poll(LIMIT_S + (30 if first else 0)):  # the first one loads libraries
                    told = f"is not done after {LIMIT_S:.0f} s"
                    break
                number, wrong = ours.recv()
                if wrong is not None:
                    done, first = done + 1, False
                    todo.remove(number)
                    if wrong:
                        told = wrong
                        break
        except EOFError:
            process.join()
            if todo:
                told = f"ends its process with code {process.exitcode}"
        process.kill()
        process.join()
        if told:
            found.append(f"python -m tests.test_fuzz {name} {number}: {told}")
            if number in todo:
                done += 1
                todo.remove(number)
        elif not todo:
            break
    return done, found


def attack_all(seeds: Path, folder: Path, which: int) -> tuple[dict[str, int], list[str]]:
    """Attack every reader, on two cores. Returns how many inputs each had, and what they found."""
    jobs = [(each.__name__, counts[which]) for each, counts in ATTACKS.items() if counts[which]]
    jobs.sort(key=lambda job: -job[1])
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda job: attack(job[0], range(job[1]), seeds, folder), jobs))
    return {name: done for (name, _), (done, _) in zip(jobs, results, strict=True)}, [
        each for _, found in results for each in found
    ]


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sound files."""
    folder = tmp_path_factory.mktemp("seeds")
    make_seeds(folder)
    return folder


def test_a_few_hundred_inputs(seeds: Path, tmp_path: Path) -> None:
    """The first inputs of each attack."""
    counts, found = attack_all(seeds, tmp_path, 0)
    assert not found and sum(counts.values()) >= 250, found


@pytest.mark.slow
def test_ten_thousand_inputs(seeds: Path, tmp_path: Path) -> None:
    """All of them."""
    started = time.monotonic()
    counts, found = attack_all(seeds, tmp_path, 1)
    print(f"{sum(counts.values())} inputs in {time.monotonic() - started:.0f} s: {counts}")
    assert not found and sum(counts.values()) >= 10_000, found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as here:
        sound = Path(here, "seeds")
        sound.mkdir()
        make_seeds(sound)
        for each in map(int, sys.argv[2:]):
            found = strike(sys.argv[1], each, Place(sound, Path(here, "a/b/given"), Path(here, "a/b/out")))
            print(each, found or "nothing")
