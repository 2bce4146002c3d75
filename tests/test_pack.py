"""Packing by many processes: whatever is killed, shared out or started twice, the result is that of one clean pack."""

import os
import random
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.files import read_json
from pipeline.shards import open_shards
from tests.helpers import ROOT, files, jpeg, photo, run_ok, run_python, start_python, tar_of, wait_for, write
from tools.make_shards import pack
from tools.packing.parts import find_part

SMALL = ("--samples-per-shard", "9", "--workers", "2")


def start(small: Path, shards: Path, *options: str) -> "subprocess.Popen[str]":
    """Start a pack in the background."""
    return start_python("tools/make_shards.py", "pack", small, shards, *SMALL, *options)


def test_parts_one_after_the_other(
    small: Path, clean: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each part packs its share; only the last one finds all shards there and writes the manifest."""
    for number, done in ((3, 3), (1, 7), (2, 10)):
        pack(small, tmp_path / "shards", samples_per_shard=9, workers=1, part=f"{number}/3")
        assert len(list((tmp_path / "shards").rglob("*.tar"))) == done
        assert (tmp_path / "shards" / "train" / "manifest.json").exists() == (done == 10)
        assert ("shards are left to other parts" in capsys.readouterr().out) == (done < 10)
    assert files(tmp_path / "shards") == clean


def test_parts_at_the_same_time(small: Path, clean: dict[str, bytes], tmp_path: Path) -> None:
    """Three processes with torchrun's environment share the work; one of them, or several, write the manifest."""
    processes = []
    for rank in range(3):
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
        command = ["tools/make_shards.py", "pack", small, tmp_path / "shards", *SMALL[:2]]
        processes.append(start_python(*command, env=environment))
    told = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], told
    assert files(tmp_path / "shards") == clean


@pytest.mark.parametrize(
    ("part", "environment", "expected"),
    [
        (None, {}, (0, 1)),
        ("1/4", {}, (0, 4)),
        ("4/4", {}, (3, 4)),
        ("0/4", {}, (3, 4)),
        (None, {"RANK": "0", "WORLD_SIZE": "2"}, (0, 2)),
        (None, {"RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),
        (None, {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6"}, (5, 6)),
        (None, {"SLURM_PROCID": "0", "SLURM_NTASKS": "6"}, (0, 1)),  # a batch script, before any srun
        (None, {"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, (1, 2)),
        ("1/1", {"RANK": "1", "WORLD_SIZE": "2"}, (0, 1)),
    ],
)
def test_parts_come_from_the_option_or_the_environment(
    part: str | None, environment: dict[str, str], expected: tuple[int, int]
) -> None:
    """Counted from 0 or from 1, n parts are n different ones."""
    assert find_part(part, environment)[:2] == expected


@pytest.mark.parametrize("part", ["5/4", "1/0", "x", "1/2/3", "-1/4", "a/b", "1/"])
def test_wrong_parts(part: str) -> None:
    """They are refused by name."""
    with pytest.raises(ValueError, match="--part"):
        find_part(part, {})


def test_two_packers_by_mistake(small: Path, clean: dict[str, bytes], tmp_path: Path) -> None:
    """The same command twice at the same time: they share, and the result is that of one."""
    processes = [start(small, tmp_path / "shards") for _ in range(2)]
    output = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], output
    assert files(tmp_path / "shards") == clean


def test_two_packers_with_other_options(small: Path, clean: dict[str, bytes], tmp_path: Path) -> None:
    """Of two that start at the same time on the same new folder, one refuses and the other packs as if alone."""
    processes = [start(small, tmp_path / "shards", "--seed", str(seed)) for seed in (2012, 1)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 2], errors
    refused = 0 if processes[0].returncode else 1
    assert "with other options" in errors[refused]
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
    pack(small, tmp_path / "clean", samples_per_shard=1, workers=1)
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
    """kill -9 leaves no process behind."""
    process = start(small, tmp_path / "shards", "--samples-per-shard", "1")
    wait_for(lambda: list(tmp_path.glob("shards/train/*.tar")), process)
    children = children_of(process)
    process.kill()
    process.communicate()
    assert len(children) >= 2
    wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children), seconds=20)


def test_a_killed_worker(small: Path, clean: dict[str, bytes], tmp_path: Path) -> None:
    """The packer says so in a sentence, exit code 3, and the next run goes on."""
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
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
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
    """A write that fails is one sentence that names the file, exit code 2; no broken shard; with space it goes on."""
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
        assert files(tmp_path / "shards")[str(tar.relative_to(tmp_path / "shards"))] == clean[f"train/{tar.name}"]
    run_ok("tools/make_shards.py", "pack", small, tmp_path / "shards", *SMALL)
    assert files(tmp_path / "shards") == clean


def test_an_output_that_cannot_be_written(small: Path) -> None:
    """One sentence, exit code 2."""
    done = run_python("tools/make_shards.py", "pack", small, "/proc/shards", *SMALL)
    assert done.returncode == 2 and "/proc/shards" in done.stderr and len(done.stderr.splitlines()) == 1


def test_undecodable_images(tmp_path: Path) -> None:
    """One stops the pack with archive, name and key; --on-bad skip leaves it out, lists it, and the counts add up, even
    where nothing is left of a shard."""
    raw, shards = tmp_path / "raw", tmp_path / "shards"
    rng = np.random.default_rng(0)
    good = {f"n00000011_{n}.JPEG": jpeg(photo(rng, 100, 120)) for n in range(6)}
    bad = {"n00000011_bad.JPEG": b"no image", "n00000011_0b.JPEG": b""}
    write(raw / "n00000011.tar", tar_of({**good, **bad}))
    with pytest.raises(ValueError, match=r"_(bad|0b)\.JPEG in .*n00000011\.tar \(key n00000011_(bad|0b)\): not decod"):
        pack(raw, shards, samples_per_shard=1, workers=1)
    assert not list(shards.rglob("*.tmp")) and not (shards / "train" / "manifest.json").exists()
    pack(raw, shards, samples_per_shard=1, workers=1, on_bad="skip")
    manifest = read_json(shards / "train" / "manifest.json")
    assert manifest["num_samples"] == 6 == len(manifest["shards"]) == len(list(shards.rglob("*.tar")))
    assert sorted(row["key"] for row in manifest["skipped"]) == ["n00000011_0b", "n00000011_bad"]
    assert all("not decodable" in row["reason"] for row in manifest["skipped"])
    assert open_shards(shards, "train").num_samples == 6
    before = files(shards)
    pack(raw, shards, samples_per_shard=1, workers=1, on_bad="skip")
    assert files(shards) == before


def test_damaged_notes_are_written_again(small: Path, clean: dict[str, bytes], tmp_path: Path) -> None:
    """A shard whose NAME.json is empty, cut or lies about its number is packed again."""
    shards = tmp_path / "shards"
    pack(small, shards, samples_per_shard=9, workers=1, part="1/2")
    tars = sorted(shards.rglob("*.tar"))
    for tar, note in zip(tars, (b"", b"[]", b"{}", None, b"x" * 99), strict=True):
        path = tar.with_suffix(".json")
        path.write_bytes(path.read_bytes().replace(b'"samples": 9', b'"samples": 8') if note is None else note)
    pack(small, shards, samples_per_shard=9, workers=1)
    assert files(shards) == clean


def test_a_split_without_its_plan_is_refused(small: Path, tmp_path: Path) -> None:
    """Nobody knows of what its shards are; with another seed half of them would be wrong."""
    shards = tmp_path / "shards"
    pack(small, shards, samples_per_shard=9, workers=1, part="1/2")
    (shards / "train" / "plan.json").unlink()
    before = files(shards)
    with pytest.raises(ValueError, match=r"no plan\.json or manifest\.json"):
        pack(small, shards, samples_per_shard=9, workers=1, seed=1)
    for note in shards.rglob("*-*.json"):  # the same, if somebody writes a plan by hand
        note.write_bytes(note.read_bytes().replace(b'"plan": "', b'"plan": "0'))
    (shards / "train" / "plan.json").write_bytes(b'{"plan": "x"}')
    with pytest.raises(ValueError, match="with other options"):
        pack(small, shards, samples_per_shard=9, workers=1)
    assert files(shards).keys() == {*before, "train/plan.json"}


def test_packers_share_the_work(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that another packer has written since this one began is not written again."""
    from tools import make_shards

    shards = tmp_path / "shards"
    real, written = make_shards.run_units, []

    def run_units(*arguments: object) -> object:
        monkeypatch.setattr(make_shards, "run_units", real)
        pack(small, shards, samples_per_shard=9, workers=1, part="1/2")  # the other one
        written.append({path.name: path.stat().st_mtime_ns for path in shards.rglob("*.tar")})
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(make_shards, "run_units", run_units)
    pack(small, shards, samples_per_shard=9, workers=1)
    after = {path.name: path.stat().st_mtime_ns for path in shards.rglob("*.tar")}
    assert len(written[0]) == 5 and len(after) == 10 and written[0].items() <= after.items()


def test_two_packers_with_other_classes(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that comes second is refused, and classes.json is that of the first."""
    from tools import make_shards

    other = tmp_path / "other"
    for tar in small.glob("*.tar"):
        write(other / tar.name.replace("n0", "n1"), tar_of({f"{tar.stem}_1.JPEG": b"x"}))
    real = make_shards.claim

    def claim(shards: Path, *arguments: object) -> None:
        monkeypatch.setattr(make_shards, "claim", real)
        pack(small, shards, samples_per_shard=9, workers=1)
        real(shards, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(make_shards, "claim", claim)
    with pytest.raises(ValueError, match="other classes"):
        pack(other, tmp_path / "shards", samples_per_shard=9, workers=1)
    names = [row["wnid"] for row in read_json(tmp_path / "shards" / "classes.json")["classes"]]
    assert names == ["n00000011", "n00000022", "n00000033"]


def test_nothing_but_undecodable_images(tmp_path: Path) -> None:
    """There is no such thing as an empty pack."""
    write(tmp_path / "raw" / "n00000011.tar", tar_of({"a.JPEG": b"no image"}))
    with pytest.raises(ValueError, match="not one image of train"):
        pack(tmp_path / "raw", tmp_path / "shards", workers=1, on_bad="skip")


def test_an_archive_that_changes_while_it_is_packed(small: Path, tmp_path: Path) -> None:
    """Cut short after it was listed: exit code 3, one sentence; no image of it is skipped as undecodable."""
    raw = tmp_path / "raw"
    raw.mkdir()
    for tar in small.glob("*.tar"):
        (raw / tar.name).write_bytes(tar.read_bytes())
    program = """
import sys
from pathlib import Path
import tools.make_shards as make_shards
from train.program import exit_with
raw, shards = map(Path, sys.argv[1:])
real = make_shards.claim
def claim(*arguments):
    real(*arguments)
    (raw / "n00000022.tar").write_bytes((raw / "n00000022.tar").read_bytes()[:20000])
make_shards.claim = claim
if __name__ == "__main__":
    exit_with(lambda: make_shards.pack(raw, shards, workers=1, on_bad="skip"))
"""
    done = run_python("-c", program, raw, tmp_path / "shards")
    assert done.returncode == 3 and "n00000022.tar ends inside" in done.stderr
    assert not (tmp_path / "shards" / "train" / "manifest.json").exists()


def test_store_original(small: Path, tmp_path: Path) -> None:
    """Every file goes in as it is; programs that take 256x256 images say so."""
    pack(small, tmp_path / "shards", store="original", samples_per_shard=9, workers=1)
    expected = {}
    for path in small.glob("*.tar"):
        with tarfile.open(path) as tar:
            expected |= {m.name.removesuffix(".JPEG"): tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    found = {}
    for path in (tmp_path / "shards" / "train").glob("*.tar"):
        with tarfile.open(path) as tar:
            jpegs = [member for member in tar if member.name.endswith(".jpg")]
            found |= {m.name.removesuffix(".jpg"): tar.extractfile(m).read() for m in jpegs}  # type: ignore[union-attr]
    assert found == expected
    # Statistics are of what the pipeline makes of them, the squares that crop256 stores, but for its JPEGs.
    run_ok("tools/compute_pca.py", tmp_path / "shards")
    pack(small, tmp_path / "squares", quality=100, subsampling="444", workers=1)
    run_ok("tools/compute_pca.py", tmp_path / "squares")
    ours, squares = (read_json(tmp_path / name / "pca.json") for name in ("shards", "squares"))
    np.testing.assert_allclose(ours["mean"], squares["mean"], atol=0.2)
    np.testing.assert_allclose(ours["axis_stddev"], squares["axis_stddev"], rtol=0.01)


def test_dry_run(small: Path, clean: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It writes nothing, and is right about the number of shards and, to a tenth, about their size."""
    pack(small, tmp_path / "shards", samples_per_shard=9, workers=1, dry_run=True)
    line = next(line for line in capsys.readouterr().out.splitlines() if "GB" in line)
    assert "90 images in 10 shards" in line and not (tmp_path / "shards").exists()
    size = sum(len(data) for name, data in clean.items() if name.endswith(".tar"))
    assert float(line.split("about ")[1].split(" GB")[0]) == pytest.approx(size / 1e9, rel=0.1, abs=0.005)


def test_a_slow_source_is_told(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Below the limit the packer says what it means in hours, and the remedy."""
    from tools import make_shards

    monkeypatch.setattr(make_shards, "random_read_rate", lambda listing, readers: 0.05)
    pack(small, tmp_path / "shards", workers=1, dry_run=True)
    assert "0 images a second when read at random, which is 0.5 hours" in capsys.readouterr().out
