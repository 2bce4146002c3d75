"""Packing by many processes: whatever is killed, shared out or started twice, the result is that of one clean pack."""

import os
import random
import signal
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.helpers import ROOT, files, refuses, run_ok, run_python, start_python, wait_for
from tools.make_shards import pack
from tools.packing.plan import Options

SMALL = ("--samples-per-shard", "9", "--val-fraction", "0", "--workers", "2")


def start(small: Path, shards: Path, *options: str) -> "subprocess.Popen[str]":
    """Start a pack in the background."""
    return start_python("tools/make_shards.py", "pack", small, shards, *SMALL, *options)


def test_parts_at_the_same_time(small: Path, clean: dict[str, bytes], tmp_path: Path) -> None:
    """Three processes with torchrun's environment share the work; one of them, or several, write the manifest."""
    processes = []
    for rank in range(3):
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
        command = ["tools/make_shards.py", "pack", small, tmp_path / "shards", *SMALL[:4]]
        processes.append(start_python(*command, env=environment))
    message = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], message
    assert files(tmp_path / "shards") == clean


def test_two_packers_by_mistake(small: Path, clean: dict[str, bytes], tmp_path: Path) -> None:
    """The same command twice at the same time: they share, and the result is that of one."""
    processes = [start(small, tmp_path / "shards") for _ in range(2)]
    output = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], output
    assert files(tmp_path / "shards") == clean


def test_other_options_are_named(small: Path, tmp_path: Path) -> None:
    """Who packs into a half-used folder with another option reads which one, and what it was; nothing is written."""
    assert run_python("tools/make_shards.py", "pack", small, tmp_path / "s", "--part", "1/2").returncode == 0
    before = files(tmp_path / "s")
    for option in ("--seed", "--samples-per-shard", "--quality"):
        message = refuses("tools/make_shards.py", "pack", small, tmp_path / "s", option, "7")
        assert f"got 7; give {option} {asdict(Options())[option[2:].replace('-', '_')]} to" in message
    assert files(tmp_path / "s") == before


def test_two_packers_with_other_options(small: Path, clean: dict[str, bytes], tmp_path: Path) -> None:
    """Of two that start at the same time on the same new folder, one refuses and the other packs as if alone."""
    processes = [start(small, tmp_path / "shards", "--seed", str(seed)) for seed in (2012, 1)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 2], errors
    refused = 0 if processes[0].returncode else 1
    assert "--seed" in errors[refused]
    assert (files(tmp_path / "shards") == clean) == (refused == 1)
    assert run_ok("tools/make_shards.py", "verify", tmp_path / "shards")


def kill_often(raw: Path, shards: Path, kills: int, options: tuple[str, ...]) -> None:
    """Start the pack and kill -9 it, so many times, each time after it has finished a shard and before the last one."""
    generator = random.Random(0)
    for _ in range(kills):
        before = len(list(shards.glob("*/*.json")))
        process = start(raw, shards, *options)
        wait_for(lambda: len(list(shards.glob("*/*-*.json"))) > before, process)  # noqa: B023
        time.sleep(generator.uniform(0, 0.05))
        assert process.poll() is None, "the pack ended before the kill: make it longer"
        process.kill()
        process.communicate()
        assert not (shards / "train" / "manifest.json").exists()
    assert "packed" in run_ok("tools/make_shards.py", "pack", raw, shards, *SMALL, *options)


def test_kills(small: Path, clean: dict[str, bytes], tmp_path: Path) -> None:
    """Three kills among 90 shards, then a last run: the bytes of a clean pack, nothing else."""
    options = ("--samples-per-shard", "1")
    kill_often(small, tmp_path / "shards", 3, options)
    pack(small, tmp_path / "clean", samples_per_shard=1, val_fraction=0, workers=1)
    assert files(tmp_path / "shards") == files(tmp_path / "clean")


@pytest.mark.slow
def test_fifty_kills(raw: Path, tmp_path: Path) -> None:
    """Fifty kills of the demo's pack in shards of three."""
    options = ("--samples-per-shard", "3")
    kill_often(raw, tmp_path / "shards", 50, options)
    run_ok("tools/make_shards.py", "pack", raw, tmp_path / "clean", *options)
    assert files(tmp_path / "shards") == files(tmp_path / "clean")


def children_of(process: "subprocess.Popen[str]") -> list[str]:
    """Process ids."""
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


def test_workers_die_with_the_packer(small: Path, tmp_path: Path) -> None:
    """kill -9 leaves no process."""
    process = start(small, tmp_path / "shards", "--samples-per-shard", "1")
    wait_for(lambda: list(tmp_path.glob("shards/train/*.tar")), process)
    children = children_of(process)
    process.kill()
    process.communicate()
    assert len(children) >= 2
    wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children), seconds=20)


def test_a_killed_worker(small: Path, clean: dict[str, bytes], tmp_path: Path) -> None:
    """The packer says so in a sentence, exit code 3, and the next run resumes."""
    process = start(small, tmp_path / "shards")
    wait_for(lambda: list(tmp_path.glob("shards/train/plan.json")), process)

    def workers() -> list[str]:
        return [pid for pid in children_of(process) if b"spawn_main" in command_of(pid)]

    wait_for(lambda: len(workers()) == 2, process)
    os.kill(int(workers()[0]), signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 3 and "a worker process died" in errors and "Traceback" not in errors
    run_ok("tools/make_shards.py", "pack", small, tmp_path / "shards", *SMALL)
    assert files(tmp_path / "shards") == clean


def command_of(pid: str) -> bytes:
    """Command line of a process; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def group_lives(group: int) -> bool:
    """Whether a process group has a member."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("delay_s", [0.0, 0.5, 1.0])
def test_ctrl_c(small: Path, tmp_path: Path, delay_s: float) -> None:
    """Whenever it comes, also while workers start: one line, exit code 130, no process left, and the next run goes
    on."""
    command = ["tools/make_shards.py", "pack", small, tmp_path / "shards", "--samples-per-shard", "1"]
    process = start_python(
        *command,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a shell's background jobs ignore it
    )
    assert process.stdout is not None
    process.stdout.readline()  # the layout is named
    time.sleep(delay_s)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "error: interrupted\n")
    wait_for(lambda: not group_lives(process.pid), seconds=10)


def test_a_full_disk(small: Path, clean: dict[str, bytes], tmp_path: Path) -> None:
    """A write that fails is one sentence that names the file, exit code 2; no broken shard; with space it resumes."""
    sizes = sorted(len(data) for name, data in clean.items() if name.endswith(".tar"))
    assert sizes[-2] < sizes[-1]
    program = f"""
import resource, sys, runpy
resource.setrlimit(resource.RLIMIT_FSIZE, ({sizes[-2]}, {sizes[-2]}))
sys.argv = ["make_shards.py", "pack", *sys.argv[1:]]
if __name__ == "__main__":
    runpy.run_path("tools/make_shards.py", run_name="__main__")
"""
    (tmp_path / "limited.py").write_text(program)
    command = [tmp_path / "limited.py", small, tmp_path / "shards", *SMALL]
    # Nor could the process write what coverage has measured of it.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    done = run_python(*command, env={**environment, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and "free some space" in done.stderr and ".tar" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list((tmp_path / "shards").rglob("*.tmp"))
    for tar in (tmp_path / "shards").rglob("*.tar"):
        assert (
            files(tmp_path / "shards")[str(tar.relative_to(tmp_path / "shards"))]
            == clean[f"train/{tar.name}"]
        )
    run_ok("tools/make_shards.py", "pack", small, tmp_path / "shards", *SMALL)
    assert files(tmp_path / "shards") == clean


def test_an_output_that_cannot_be_written(small: Path) -> None:
    """One sentence, exit code 2."""
    done = run_python("tools/make_shards.py", "pack", small, "/proc/shards", *SMALL)
    assert done.returncode == 2 and "/proc/shards" in done.stderr and len(done.stderr.splitlines()) == 1
