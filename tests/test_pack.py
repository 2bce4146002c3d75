"""Packing by many processes: whatever is killed, shared out or started twice, the result is that of one clean pack."""

import os
import random
import signal
import subprocess
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT, files, refuses, run_ok, run_python, start_python, tar_of, wait_for, write
from tools.make_shards import pack
from tools.packing.plan import Options, find_part

SMALL = ("--samples-per-shard", "9", "--val-fraction", "0", "--workers", "2")


def start(raw: Path, shards: Path, *more: str, **options: Any) -> "subprocess.Popen[str]":
    """Start a pack in the background, the leader of its process group."""
    command = ("tools/make_shards.py", "pack", raw, shards, *SMALL, *more)
    return start_python(*command, start_new_session=True, **options)


def pack_here(small: Path, shards: Path, **options: object) -> None:
    """The same pack in this process."""
    pack(small, shards, **{"samples_per_shard": 9, "val_fraction": 0, "workers": 1, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("ranks", [("0", "1", "2"), (None, None)])
def test_packers_at_the_same_time(
    small: Path, clean: dict[str, bytes], tmp_path: Path, ranks: tuple[str | None, ...]
) -> None:
    """Processes with torchrun's environment share the work, and one of them, or several, write the manifest; so does
    the same command twice, by mistake. The result is that of one."""
    processes = []
    for rank in ranks:
        place = {"RANK": rank, "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"} if rank else {}
        processes.append(start(small, tmp_path / "shards", "--workers", "1", env={**os.environ, **place}))
    output = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(ranks), output
    assert files(tmp_path / "shards") == clean


def test_parts_one_after_the_other(
    small: Path, clean: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each part packs its share; only the last one finds all shards there and writes the manifest."""
    for number, done in ((3, 3), (1, 7), (2, 10)):
        pack_here(small, tmp_path / "shards", part=f"{number}/3")
        assert len(list((tmp_path / "shards").rglob("*.tar"))) == done
        assert (tmp_path / "shards" / "train" / "manifest.json").exists() == (done == 10)
        assert ("shards are left to other parts" in capsys.readouterr().out) == (done < 10)
    assert files(tmp_path / "shards") == clean


def test_damaged_notes_are_written_again(small: Path, clean: dict[str, bytes], tmp_path: Path) -> None:
    """A shard whose NAME.json is empty, cut or of another form is packed again."""
    pack_here(small, tmp_path / "shards", part="1/2")
    tars = sorted((tmp_path / "shards").rglob("*.tar"))
    for tar, note in zip(tars, (b"", b"[]", b"{}", b"[1]", b"x" * 99), strict=True):
        tar.with_suffix(".json").write_bytes(note)
    pack_here(small, tmp_path / "shards")
    assert files(tmp_path / "shards") == clean


@pytest.mark.parametrize(
    ("part", "environment", "expected"),
    [
        (None, {}, (0, 1)),
        ("1/4", {}, (0, 4)),
        ("0/4", {}, (3, 4)),
        (None, {"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, (1, 2)),
        (None, {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6"}, (5, 6)),
        (None, {"SLURM_PROCID": "0", "SLURM_NTASKS": "6"}, (0, 1)),  # a batch script, before any srun
        ("1/1", {"RANK": "1", "WORLD_SIZE": "2"}, (0, 1)),
    ],
)
def test_parts_come_from_the_option_or_the_environment(
    part: str | None, environment: dict[str, str], expected: tuple[int, int]
) -> None:
    """Counted from 0 or from 1, n parts are n different ones; others are refused by name."""
    assert find_part(part, environment)[:2] == expected
    for wrong in ("5/4", "1/0", "1/2/3", "-1/4"):
        with pytest.raises(ValueError, match="--part"):
            find_part(wrong, environment)


def test_another_pack_is_refused(small: Path, tmp_path: Path) -> None:
    """Who packs into a half-used folder with another option reads which one, and what it was; other classes are
    refused, and shards without their plan, of which nobody knows what they are. Nothing is written."""
    shards = tmp_path / "shards"
    pack_here(small, shards, part="1/2", workers=1)
    before = files(shards)
    for option in ("--seed", "--samples-per-shard", "--quality"):
        message = refuses("tools/make_shards.py", "pack", small, shards, *SMALL, option, "7")
        was = {**asdict(Options()), "samples_per_shard": 9}[option[2:].replace("-", "_")]
        assert f"got 7; give {option} {was} to" in message
    for tar in small.glob("*.tar"):
        write(tmp_path / "other" / tar.name.replace("n0", "n1"), tar_of({f"{tar.stem}_1.JPEG": b"x"}))
    with pytest.raises(ValueError, match="other classes"):
        pack_here(tmp_path / "other", shards)
    assert files(shards) == before
    (shards / "train" / "plan.json").unlink()
    with pytest.raises(ValueError, match=r"expected plan\.json or manifest\.json"):
        pack_here(small, shards, seed=1)
    assert files(shards) == {name: data for name, data in before.items() if name != "train/plan.json"}


def test_two_packers_with_other_options(small: Path, clean: dict[str, bytes], tmp_path: Path) -> None:
    """Of two that start at the same time on the same new folder, one refuses and the other packs as if alone."""
    processes = [start(small, tmp_path / "shards", "--seed", str(seed)) for seed in (2012, 1)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 2], errors
    refused = 0 if processes[0].returncode else 1
    assert "--seed" in errors[refused]
    assert (files(tmp_path / "shards") == clean) == (refused == 1)
    assert run_ok("tools/make_shards.py", "verify", tmp_path / "shards")


def group_lives(group: int) -> bool:
    """Whether a process group has a member."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("source", "size", "kills"), [("small", "1", 3), pytest.param("raw", "3", 50, marks=pytest.mark.slow)]
)
def test_kills(request: pytest.FixtureRequest, tmp_path: Path, source: str, size: str, kills: int) -> None:
    """Three kill -9 among 90 shards, or fifty of the demo's pack in shards of three, each after a finished shard and
    before the last one: no process is left, and a last run gives the bytes of a clean pack, nothing else."""
    raw, shards, generator = request.getfixturevalue(source), tmp_path / "shards", random.Random(0)
    options = (*SMALL, "--samples-per-shard", size)
    for _ in range(kills):
        before = len(list(shards.glob("*/*.json")))
        process = start(raw, shards, *options)
        wait_for(lambda: len(list(shards.glob("*/*-*.json"))) > before, process)  # noqa: B023
        time.sleep(generator.uniform(0, 0.05))
        assert process.poll() is None, "the pack ended before the kill: make it longer"
        process.kill()
        process.communicate()
        wait_for(lambda: not group_lives(process.pid), seconds=20)  # noqa: B023
        assert not (shards / "train" / "manifest.json").exists()
    assert "packed" in run_ok("tools/make_shards.py", "pack", raw, shards, *options)
    run_ok("tools/make_shards.py", "pack", raw, tmp_path / "clean", *options, "--workers", "1")
    assert files(shards) == files(tmp_path / "clean")


def find_workers(process: "subprocess.Popen[str]") -> list[int]:
    """Process ids of the pool's workers."""
    found = []
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        try:
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(int(pid))
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            pass
    return found


@pytest.mark.parametrize("number", [1, 2])
def test_a_killed_worker(small: Path, clean: dict[str, bytes], tmp_path: Path, number: int) -> None:
    """Also while the other one starts, when the standard library's pool would wait for ever: the packer says so in a
    sentence, exit code 3, and the next run resumes."""
    process = start(small, tmp_path / "shards")
    wait_for(lambda: list(tmp_path.glob("shards/train/plan.json")), process)
    wait_for(lambda: len(find_workers(process)) >= number, process)
    os.kill(find_workers(process)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 3 and "a worker process died" in errors and "Traceback" not in errors
    run_ok("tools/make_shards.py", "pack", small, tmp_path / "shards", *SMALL)
    assert files(tmp_path / "shards") == clean


@pytest.mark.parametrize("delay_s", [0.0, 1.0])
def test_ctrl_c(small: Path, tmp_path: Path, delay_s: float) -> None:
    """Whenever it comes, also while workers start: one line, exit code 130, no process left."""
    # A shell's background jobs ignore the signal.
    restore = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = start(small, tmp_path / "shards", "--samples-per-shard", "1", preexec_fn=restore)
    assert process.stdout is not None
    process.stdout.readline()  # the layout is named
    time.sleep(delay_s)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "error: interrupted\n")
    wait_for(lambda: not group_lives(process.pid), seconds=10)


LIMITED = """
import resource, sys, runpy
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.argv = ["make_shards.py", "pack", *sys.argv[2:]]
if __name__ == "__main__":
    runpy.run_path("tools/make_shards.py", run_name="__main__")
"""


def test_a_full_disk(small: Path, clean: dict[str, bytes], tmp_path: Path) -> None:
    """A write that fails is one sentence that names the file, exit code 2; no broken shard; with space it resumes."""
    sizes = sorted(len(data) for name, data in clean.items() if name.endswith(".tar"))
    assert sizes[-2] < sizes[-1]
    (tmp_path / "limited.py").write_text(LIMITED)
    # Nor could the process write what coverage has measured of it.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    command = [tmp_path / "limited.py", str(sizes[-2]), small, tmp_path / "shards", *SMALL]
    done = run_python(*command, env={**environment, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and "free some space" in done.stderr and ".tar" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    written = files(tmp_path / "shards")
    assert not [name for name in written if name.endswith(".tmp")]
    tars = {name: data for name, data in written.items() if name.endswith(".tar")}
    assert tars.items() <= clean.items()
    run_ok("tools/make_shards.py", "pack", small, tmp_path / "shards", *SMALL)
    assert files(tmp_path / "shards") == clean
