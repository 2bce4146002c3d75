"""Whatever is broken, missing, odd or hanging on a machine is a finding with its remedy, and sets the exit code."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.shards import ShardSet, open_shards
from tests.helpers import ROOT, run_ok, run_python, write
from tools import doctor as program
from tools.doctor import (
    Finding,
    check_cores,
    check_dali,
    check_disk,
    check_eigenbasis,
    check_gpus,
    check_split,
    probe,
    read_limits,
    run_check,
)

H100 = "NVIDIA H100 80GB HBM3, 86 GB, compute capability 9.0, JPEG engine"
DRIVER = {"version": "580.65.06", "cuda": "13.0", "gpus": [H100]}
TORCH: dict[str, Any] = {"version": "2.13.0", "cuda": "12.6", "gpus": [H100], "peers": 0}


def test_sound_machine_has_no_problem(shards: Path) -> None:
    """With real libraries and sound shards there is no problem, exit code 0; --json has the documented keys."""
    found = json.loads(run_ok("tools/doctor.py", shards, "--json", run=run_python))
    assert set(found) == {"findings", "system", "python", "driver", "torch", "dali"}
    assert all(list(row) == ["name", "status", "value", "remedy"] for row in found["findings"])
    assert all((row["status"] in ("warning", "problem")) == bool(row["remedy"]) for row in found["findings"])
    status = {row["name"]: row["status"] for row in found["findings"]}
    sound = ("PyTorch", "DALI", "packages", "train shards", "val shards", "eigenbasis")
    assert all(status[name] == "ok" for name in sound), found
    assert found["dali"]["version"] == installed("nvidia-dali-cuda120")
    assert found["torch"]["version"].split("+")[0] == installed("torch").split("+")[0]


def test_without_torch_and_dali_other_checks_run(shards: Path, tmp_path: Path) -> None:
    """Where neither imports, both are problems, exit code 2, and every other check still runs."""
    for name in ("torch", "nvidia", "nvidia/dali"):
        (tmp_path / name).mkdir()
        text = "" if name == "nvidia" else f"raise ImportError('lib{name[:5]}.so is not there')\n"
        (tmp_path / name / "__init__.py").write_text(text)
    done = run_python("tools/doctor.py", shards, env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert done.returncode == 2 and not done.stderr
    lines = done.stdout.splitlines()
    for name, library in (("PyTorch", "libtorch"), ("DALI", "libnvidi")):
        (line,) = [line for line in lines if line.startswith(f"problem  {name} ")]
        assert library in line and "make install" in lines[lines.index(line) + 1]
    assert any(line.startswith("ok       train shards") for line in lines)
    assert "problems: 2" in lines[-1]


@pytest.mark.parametrize(
    ("body", "reason"),
    [("import os; os.abort()", "signal 6"), ("import time; time.sleep(60)", "no answer")],
)
def test_library_that_crashes_or_hangs_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, reason: str
) -> None:
    """A library that kills its process or never returns is a finding, soon."""
    (tmp_path / "torch.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    start = time.monotonic()
    found = probe("torch", timeout_s=1)
    assert reason in found["error"] and time.monotonic() - start < 3
    assert program.check_torch(found).status == "problem"


NO_NVML, NONE, EIGHT = {"error": "no NVML"}, {"gpus": []}, {"gpus": [H100] * 8}


@pytest.mark.parametrize(
    ("driver", "torch", "has_module", "visible", "status"),
    [
        (NO_NVML, TORCH | NONE, False, None, "-"),
        (NO_NVML, TORCH | NONE, True, None, "warning"),
        (DRIVER, TORCH, True, None, "ok"),
        (DRIVER | EIGHT, TORCH | {"gpus": [H100] * 2, "peers": 2}, True, "0,1", "ok"),
        (DRIVER | EIGHT, TORCH | EIGHT | {"peers": 55}, True, None, "warning"),
        (DRIVER, TORCH | NONE, True, "", "-"),
        (DRIVER, TORCH | NONE | {"cuda": None}, True, None, "problem"),
        (DRIVER, TORCH | {"cuda_error": "no kernel image is available"}, True, None, "problem"),
    ],
)
def test_unused_gpu_is_a_problem_unless_hidden(
    driver: Any, torch: dict[str, Any], has_module: bool, visible: str | None, status: str
) -> None:
    """A GPU that is there and unused is a problem, unless it was hidden on purpose; a driver that does not answer is a
    warning, and so are GPUs that cannot reach each other."""
    found = check_gpus(driver, torch, has_module, visible)
    assert found.status == status and bool(found.remedy) == (status in ("warning", "problem"))


@pytest.mark.parametrize(
    ("decodes", "has_gpu", "status"),
    [("gpu", True, "ok"), ("cpu", False, "ok"), ("cpu", True, "problem"), (None, False, "problem")],
)
def test_dali_that_does_not_decode_where_pytorch_trains_is_a_problem(
    decodes: str | None, has_gpu: bool, status: str
) -> None:
    """DALI has to decode on the GPU where there is one that PyTorch uses, else on the CPU."""
    found = {"version": "2.4.0", "cuda": 12, "decodes": decodes, "decode_error": "no nvjpeg"}
    assert check_dali(found, has_gpu).status == status


def test_smallest_cgroup_quota_counts(tmp_path: Path) -> None:
    """The limits of a process's cgroup and of those around it are read; the smallest quota below the cores is a warning
    that names the threads to set, odd texts are no quota."""
    write(tmp_path / "job" / "cpu.max", b"400000 100000\n")
    write(tmp_path / "job" / "step" / "cpu.max", b"max 100000\n")
    (tmp_path / "membership").write_text("1:name=systemd:/x\n0::/job/step\n")
    texts = read_limits("cpu.max", tmp_path / "membership", tmp_path)
    assert texts == ["max 100000\n", "400000 100000\n", ""]
    found = check_cores(8, texts)
    assert found.status == "warning" and "--data.speed.threads 5" in found.remedy
    assert check_cores(4, texts).status == check_cores(8, ["", "x y", "100 0", "٣ ٣"]).status == "ok"


def test_unreadable_shards_are_problems(
    numbered_shards: Callable[..., ShardSet], shards: Path, tmp_path: Path
) -> None:
    """Shards that are missing, half-written or cut, and an eigenbasis or mean image of none or of other shards, are
    problems with a remedy each; an exception that nobody thought of is a warning."""
    found = run_check(lambda: Finding("ok", str(1 // 0)))
    assert found.status == "warning" and "ZeroDivisionError" in found.value and found.remedy
    train = numbered_shards(12, 3)
    assert check_split(tmp_path, "train").status == "ok"
    half, cut = tmp_path / "half", tmp_path / "cut"
    for copy in (half, cut):
        shutil.copytree(tmp_path / "train", copy / "train")
    (half / "train" / "manifest.json").unlink()
    os.truncate(cut / "train" / "train-000001.tar", 512)
    for place in (tmp_path / "none", half, cut):
        found = run_check(partial(check_split, place, "train"))
        assert found.status == "problem" and str(place) in found.value and found.remedy
    found = run_check(partial(check_eigenbasis, tmp_path, train))
    assert found.status == "problem" and "compute_pca" in found.remedy
    shutil.copy(shards / "pca.json", tmp_path)
    assert run_check(partial(check_eigenbasis, tmp_path, train)).status == "problem"
    whole, copy = open_shards(shards, "train"), tmp_path / "copy"
    assert check_eigenbasis(shards, whole).status == "ok"
    for tar in train.tars:
        os.truncate(tar, 512)
    found = run_check(partial(check_disk, train, 0))
    assert found.status == "problem" and "512 bytes" in found.value and found.remedy
    copy.mkdir()
    shutil.copy(shards / "pca.json", copy)
    np.save(copy / "mean_image.npy", np.zeros(3))
    found = run_check(partial(check_eigenbasis, copy, whole))
    assert found.status == "problem" and "mean_image.npy" in found.value


def test_missing_package_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing package is a problem, one of another version a warning; what others require does not count."""
    lines = [
        "other 1 requires numpy, which is not installed.",
        "alexnet-dali 0.1.0 has requirement numpy>=2, but ...",
    ]
    lines.append("nvidia-dali-cuda120 2.4.0 requires nvidia-nvimgcodec-cu12, which is not installed.")
    for count, status in ((1, "ok"), (2, "warning"), (3, "problem")):
        pip = subprocess.CompletedProcess([], 1, "\n".join(lines[:count]))
        monkeypatch.setattr(subprocess, "run", lambda *_, pip=pip, **__: pip)
        assert program.check_packages().status == status
