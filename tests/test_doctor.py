"""What a machine lacks is told in one line each with its remedy, whatever is broken, missing, odd or hanging there."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.shards import ShardSet, open_shards
from tests.helpers import DALI, ROOT, torch_of
from tools import doctor as program
from tools.checks.finding import Finding, answer, isolated, ok, probe
from tools.checks.host import check_open_files
from tools.checks.nvidia_smi import Nvidia
from tools.checks.shards import (
    check_disk,
    check_eigenbasis,
    check_file_system,
    check_mean_image,
    check_split,
    file_system,
    read_rate,
)
from tools.checks.software import check_compiler, check_headers, check_torch, unmet


@pytest.fixture
def broken(tmp_path: Path) -> dict[str, str]:
    """An environment where neither PyTorch nor DALI imports."""
    for name in ("torch", "nvidia/dali"):
        (tmp_path / "stub" / name).mkdir(parents=True)
        (tmp_path / "stub" / name / "__init__.py").write_text(
            f"raise ImportError('lib{name[:5]}.so is not there')\n"
        )
    (tmp_path / "stub" / "nvidia" / "__init__.py").touch()
    return {**os.environ, "PYTHONPATH": f"{tmp_path / 'stub'}:{ROOT}"}


def run_doctor(*arguments: str | Path, environment: dict[str, str] | None = None, limit: str = ":") -> Any:
    """Run the program as a user would, behind a shell command such as `ulimit`."""
    command = [
        "bash",
        "-c",
        f'{limit}; exec "$0" "$@"',
        sys.executable,
        "tools/doctor.py",
        *map(str, arguments),
    ]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, env=environment
    )


def test_the_whole_program(shards: Path) -> None:
    """With real libraries and sound shards there is no problem, exit code 0; --json has the documented keys."""
    done = run_doctor(shards, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert set(told) == {"findings", "versions"}
    assert all(list(row) == ["name", "status", "value", "remedy"] for row in told["findings"])
    assert all((row["status"] in ("warning", "problem")) == bool(row["remedy"]) for row in told["findings"])
    status = {row["name"]: row["status"] for row in told["findings"]}
    sound = (
        "PyTorch",
        "DALI",
        "packages",
        "training shards",
        "validation shards",
        "eigenbasis",
        "open files",
    )
    assert all(status[name] == "ok" for name in sound), told
    assert told["versions"]["dali"] == installed("nvidia-dali-cuda120")
    assert told["versions"]["torch"].split("+")[0] == installed("torch").split("+")[0]
    assert all(value is None or isinstance(value, str) for value in told["versions"].values())


def test_neither_torch_nor_dali(broken: dict[str, str], shards: Path) -> None:
    """Where nothing imports, both are named as problems, exit code 2, and all else is told all the same."""
    done = run_doctor(shards, environment=broken)
    assert done.returncode == 2 and not done.stderr
    lines = done.stdout.splitlines()
    for name, library in (("PyTorch", "libtorch"), ("DALI", "libnvidi")):
        (line,) = [line for line in lines if line.startswith(f"problem  {name} ")]
        assert "does not import: ImportError" in line and library in line
        assert "-> run make install" in lines[lines.index(line) + 1]
    assert any(line.startswith("ok       training shards") for line in lines)
    assert lines[-1].startswith("2 problems")


def test_too_few_open_files(broken: dict[str, str], shards: Path, tmp_path: Path) -> None:
    """A hard limit below shards and 256 is a problem, just at it is none; the soft limit does not count."""
    most = len(open_shards(shards, "train").tars) + 256
    for limit, status in ((f"ulimit -n {most - 1}", "problem"), (f"ulimit -n {most}; ulimit -Sn 100", "ok")):
        told = json.loads(run_doctor(shards, "--json", environment=broken, limit=limit).stdout)
        (row,) = [row for row in told["findings"] if row["name"] == "open files"]
        assert row["status"] == status and ("ulimit -n" in row["remedy"]) == (status == "problem")
    assert check_open_files(10**9, -1).status == "ok"  # RLIM_INFINITY


@pytest.mark.parametrize(
    ("body", "tells"),
    [
        ("import os; os.abort()", "signal 6"),
        ("import time; time.sleep(60)", "does not answer"),
        ("0 / 0", "ZeroDiv"),
    ],
)
def test_a_library_that_crashes_or_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, tells: str
) -> None:
    """A library that kills its process, never comes back or raises anything is a finding, soon."""
    (tmp_path / "torch.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    begun = time.monotonic()
    found = probe("torch", timeout_s=1)
    assert tells in found["error"] and time.monotonic() - begun < 3
    assert check_torch(found).status == "problem"


def test_file_systems() -> None:
    """The deepest mount counts, the last one of a place, and a space in its name; network disks are told."""
    mounts = "/dev/a / ext4 rw\nhost:/x /data nfs4 rw\ntmpfs /data/fast tmpfs rw\n"
    mounts += "x /a\\040b lustre rw\ny /a\\040b xfs rw\nodd"
    places = {
        "/home/x": "ext4",
        "/data/s": "nfs4",
        "/data/fast/s": "tmpfs",
        "/database": "ext4",
        "/a b/c": "xfs",
    }
    for path, kind in places.items():
        assert file_system(Path(path), mounts)[0] == kind, path
    assert file_system(Path("/x"), "") == ("unknown", "/")
    network = {kind for kind in ("ext4", "xfs", "overlay", "nfs", "nfs4", "lustre", "fuse.sshfs", "cifs", "9p")
               if check_file_system(kind, "/").status == "warning"}  # fmt: skip
    assert network == {"nfs", "nfs4", "lustre", "fuse.sshfs", "cifs", "9p"}


def test_a_check_that_fails_or_hangs() -> None:
    """It becomes a warning that says so; what is slow is left behind."""
    found = isolated(lambda: Finding("ok", str(1 // 0)))
    assert found.status == "warning" and "ZeroDivisionError" in found.value and found.remedy
    begun = time.monotonic()
    assert "no answer" in isolated(lambda: time.sleep(60) or ok(""), timeout_s=0.2).value
    assert time.monotonic() - begun < 2
    assert isinstance(answer(lambda: {}["a"]), KeyError)


def test_one_failing_check_among_all(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The others are still told, and a warning alone is exit code 0."""
    monkeypatch.setattr(
        program, "probe", {"torch": torch_of(cuda=None), "dali": DALI | {"decodes": "cpu"}}.__getitem__
    )
    monkeypatch.setattr(program, "ask_nvidia", lambda: Nvidia(error="nvidia-smi cannot be started"))
    monkeypatch.setattr(program, "check_headers", lambda: [][0])
    program.doctor(None, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("warning  Python headers") and "IndexError" in line for line in lines)
    assert any(line.startswith("ok       cores") or "warning  cores" in line for line in lines)


def opened(shards: Path, split: str = "train") -> Any:
    """The shards or the error."""
    return answer(lambda: open_shards(shards, split))


def test_shards_that_do_not_open(numbered_shards: Callable[..., ShardSet], tmp_path: Path) -> None:
    """Missing, a file, half-written, cut: a problem with its remedy each; sound ones are ok."""
    numbered_shards(12, 3)
    assert check_split(tmp_path, "train", opened(tmp_path)).status == "ok"
    file, half, cut = tmp_path / "file", tmp_path / "half", tmp_path / "cut"
    file.write_text("x")
    for copy in (half, cut):
        shutil.copytree(tmp_path / "train", copy / "train")
    (half / "train" / "manifest.json").unlink()
    with (cut / "train" / "train-000001.tar").open("r+b") as tar:
        tar.truncate(512)
    cases = {
        tmp_path / "none": "does not exist",
        file: "is a file",
        half: "no manifest.json",
        cut: "has 512 bytes",
    }
    for place, tells in cases.items():
        found = check_split(place, "train", opened(place))
        assert found.status == "problem" and tells in found.value and found.remedy, place
        assert check_eigenbasis(place, None).status == "-"
    assert check_split(tmp_path, "train", TimeoutError("no answer within 30 s")).status == "problem"


def test_eigenbasis_and_mean_image(
    numbered_shards: Callable[..., ShardSet], shards: Path, tmp_path: Path
) -> None:
    """pca.json of no or of other shards is a problem that names the command; a wrong mean image is a warning."""
    train = numbered_shards(4, 1)
    assert "compute_pca" in check_eigenbasis(tmp_path, train).remedy
    shutil.copy(shards / "pca.json", tmp_path)
    assert "other shards" in check_eigenbasis(tmp_path, train).value
    assert check_eigenbasis(shards, open_shards(shards, "train")).status == "ok"
    assert check_mean_image(tmp_path, train).status == "-"
    np.save(tmp_path / "mean_image.npy", np.zeros(3))
    assert check_mean_image(tmp_path, train).status == "warning"


def test_reading_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more bytes are read than asked for, give or take a chunk a file, and not for longer; odd sizes are read to
    their end."""
    files = []
    for number in range(20):
        file = tmp_path / f"{number}.tar"
        file.write_bytes(bytes(9 * 2**20 + 12345 if number == 0 else 1000))
        files.append(str(file))
    counts: list[int] = []
    real = os.preadv

    def count(*arguments: Any) -> int:
        counts.append(real(*arguments))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", count)
    assert read_rate(files[:1]) and sum(counts) == 9 * 2**20 + 12345
    counts.clear()
    assert read_rate(files[:1], at_most_bytes=2**20) and sum(counts) <= 4 * 2**20
    counts.clear()
    assert read_rate(files) and len(counts) == 3 + 7  # eight of the twenty
    assert read_rate(files, at_most_s=0) is None and read_rate([]) is None


def test_rate_in_images(numbered_shards: Callable[..., ShardSet], monkeypatch: pytest.MonkeyPatch) -> None:
    """Images/s are MB/s over the mean size of an image; many GPUs ask for more."""
    train = numbered_shards(40, 2)
    size = sum(Path(tar).stat().st_size for tar in train.tars) / 40
    monkeypatch.setattr("tools.checks.shards.read_rate", lambda files: program_rate(size * 25_000))
    assert "25,000 images/s" in check_disk(train, "ext4", 1).value
    assert [check_disk(train, "ext4", gpus).status for gpus in (0, 1, 2, 3)] == ["ok", "ok", "ok", "warning"]
    assert check_disk(train, "tmpfs", 8).status == check_disk(None, "ext4", 0).status == "-"


def program_rate(bytes_per_s: float) -> Any:
    """A measured rate."""
    from tools.checks.shards import Rate

    return Rate(bytes_per_s, direct=True)


def test_packages_and_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing and what is of another version are told apart; extras and other systems do not count."""
    asked = ["numpy>=2", "numpy>=99", "no-such-thing", "other; extra == 'dev'", "w; sys_platform == 'win32'"]
    missing, other = unmet(asked)
    assert missing == ["no-such-thing"] and len(other) == 1 and ">=99" in other[0]
    assert check_headers(str(tmp_path)).status == "warning"
    assert check_compiler("/a b/torch/__init__.py", gpu=False).status == "warning"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_compiler("/torch/__init__.py", gpu=False).status == "warning"
