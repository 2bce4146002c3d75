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
from tests.helpers import ROOT
from tools import doctor as program
from tools.checks.finding import Finding, answer, isolated, ok, probe
from tools.checks.gpu import (
    all_gpus,
    check_driver,
    check_gpus,
    check_links,
    check_peers,
    fits,
    has_jpeg_engines,
    runs_on,
)
from tools.checks.host import (
    cgroup_bytes,
    cgroup_cpus,
    check_cores,
    check_locked_memory,
    check_memory,
    check_open_files,
    check_page_cache,
    cpu_quota,
    memory_limit,
    read,
)
from tools.checks.nvidia_smi import Gpu, Nvidia, ask_nvidia, parse_driver_file, parse_topology
from tools.checks.shards import (
    check_disk,
    check_eigenbasis,
    check_file_system,
    check_mean_image,
    check_split,
    file_system,
    read_rate,
)
from tools.checks.software import check_compiler, check_dali, check_headers, check_torch, unmet

H100 = Gpu("NVIDIA H100 80GB HBM3", 86, (9, 0))
HEADER = (
    "\t" + "\t".join(f"\x1b[4mGPU{k}" for k in range(8)) + "\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m"
)
ROWS = [
    "\t".join([f"GPU{k}", *(" X " if j == k else "NV18" for j in range(8)), "PXB", "0-47", "0", "N/A"])
    for k in range(8)
]
LEGEND = "NIC0\t" + "PXB\t" * 8 + " X \n\nLegend:\n\n  X    = Self\n  NV#  = Connection traversing # NVLinks\n"
EIGHT = """#!/bin/sh
case "$*" in
  *compute_cap*) for k in 0 1 2 3 4 5 6 7; do echo "$k, NVIDIA H100 80GB HBM3, 81559, 550.54.15, 9.0"; done;;
  "topo -m") cat "$0.topo";;
  "") echo "| NVIDIA-SMI 550.54.15   Driver Version: 550.54.15   CUDA Version: 12.4  |";;
  *) exit 2;;
esac
"""
OLD = """#!/bin/sh
case "$*" in
  *compute_cap*) echo 'Field "compute_cap" is not a valid field to query.'; exit 2;;
  *query-gpu*) echo "0, Tesla V100-SXM2-16GB, 16160, 470.57.02";;
  *) echo "| NVIDIA-SMI 470.57.02    Driver Version: 470.57.02    CUDA Version: 11.4     |";;
esac
"""
BROKEN = "#!/bin/sh\necho 'NVIDIA-SMI has failed because it could not communicate with the driver.'; exit 9\n"


def torch_of(*gpus: tuple[str, int, list[int]], cuda: str | None = "12.6", **more: Any) -> dict[str, Any]:
    """What the probe tells of a PyTorch that sees these GPUs."""
    archs = ["sm_80", "sm_86", "sm_90", "compute_90"] if gpus else []
    found = {"version": "2.13.0", "cuda": cuda, "file": "/torch/__init__.py", "distributed": True, "cudnn": None}
    return found | {"told": [], "gpus": list(gpus), "peers": [], "nccl": "2.27.3", "archs": archs} | more


SEEN = ("NVIDIA H100 80GB HBM3", 85_520_809_984, [9, 0])
DALI: dict[str, Any] = {"version": "2.4.0", "cuda": 12986, "decodes": "gpu"}


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Put a fake nvidia-smi first on the PATH."""

    def put(script: str) -> Path:
        file = tmp_path / "bin" / "nvidia-smi"
        file.parent.mkdir(exist_ok=True)
        file.write_text(script)
        file.chmod(0o755)
        Path(f"{file}.topo").write_text("\n".join([HEADER, *ROWS, LEGEND]))
        monkeypatch.setenv("PATH", f"{file.parent}:{os.environ['PATH']}")
        return file

    return put


@pytest.fixture
def broken(tmp_path: Path) -> dict[str, str]:
    """An environment where neither PyTorch nor DALI imports."""
    for name in ("torch", "nvidia/dali"):
        (tmp_path / "stub" / name).mkdir(parents=True)
        (tmp_path / "stub" / name / "__init__.py").write_text(f"raise ImportError('lib{name[:5]}.so is not there')\n")
    (tmp_path / "stub" / "nvidia" / "__init__.py").touch()
    return {**os.environ, "PYTHONPATH": f"{tmp_path / 'stub'}:{ROOT}"}


def run_doctor(*arguments: str | Path, environment: dict[str, str] | None = None, limit: str = ":") -> Any:
    """Run the program as a user would, behind a shell command such as `ulimit`."""
    command = ["bash", "-c", f'{limit}; exec "$0" "$@"', sys.executable, "tools/doctor.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, env=environment)


def test_the_whole_program(shards: Path) -> None:
    """With real libraries and sound shards there is no problem, exit code 0; --json has the documented keys."""
    done = run_doctor(shards, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert set(told) == {"findings", "versions"}
    assert all(list(row) == ["name", "status", "value", "remedy"] for row in told["findings"])
    assert all((row["status"] in ("warning", "problem")) == bool(row["remedy"]) for row in told["findings"])
    status = {row["name"]: row["status"] for row in told["findings"]}
    sound = ("PyTorch", "DALI", "packages", "training shards", "validation shards", "eigenbasis", "open files")
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
    [("import os; os.abort()", "signal 6"), ("import time; time.sleep(60)", "does not answer"), ("0 / 0", "ZeroDiv")],
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


def test_eight_gpus(smi: Callable[[str], Path]) -> None:
    """Driver, CUDA, GPUs and links are read from an 8-GPU machine; all of them in use is no warning."""
    smi(EIGHT)
    nvidia = ask_nvidia()
    assert (nvidia.driver, nvidia.cuda, nvidia.gpus) == ("550.54.15", "12.4", (H100,) * 8)
    assert nvidia.links == {(one, other): "NV18" for one in range(8) for other in range(one + 1, 8)}
    pairs = [[one, other] for one in range(8) for other in range(8) if one != other]
    torch = torch_of(*[SEEN] * 8, peers=pairs)
    assert check_driver(nvidia) == ok("550.54.15, CUDA up to 12.4")
    assert check_gpus(nvidia, torch, None) == ok("8 x NVIDIA H100 80GB HBM3, 86 GB, compute capability 9.0")
    assert check_links(all_gpus(nvidia, torch), nvidia.links) == ok("NV18 28 (pairs of 28)")
    assert check_peers(all_gpus(nvidia, torch), torch).status == "ok"
    assert check_peers(all_gpus(nvidia, torch), torch | {"peers": pairs[1:]}).status == "warning"
    assert "6 more are hidden" in check_gpus(nvidia, torch_of(SEEN, SEEN), "0,1").value


def test_an_old_driver(smi: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A driver too old for PyTorch's CUDA ends in code 2, with the version that it needs."""
    smi(OLD)
    assert ask_nvidia().gpus == (Gpu("Tesla V100-SXM2-16GB", 17, None),)
    found = {"torch": torch_of(), "dali": DALI | {"decodes": "cpu"}}
    monkeypatch.setattr(program, "probe", found.__getitem__)
    with pytest.raises(SystemExit) as ended:
        program.doctor(None, as_json=False)
    told = capsys.readouterr().out
    assert ended.value.code == 2
    assert "driver 470.57.02 is too old for PyTorch's CUDA 12.6" in told and "525.60.13 or later" in told
    assert check_dali(DALI | {"decodes": "cpu"}, ask_nvidia(), gpu=True).status == "problem"


def test_nvidia_smi_that_hangs(smi: Callable[[str], Path], tmp_path: Path) -> None:
    """It is cut, with its children, and the kernel's file tells the driver's version."""
    mark = f"61.{os.getpid()}"
    smi(f"#!/bin/sh\nsleep {mark}\necho done\n")
    module = tmp_path / "version"
    module.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs)\nGCC 12\n"
    )
    begun = time.monotonic()
    nvidia = ask_nvidia(timeout_s=0.5, driver_file=module)
    assert time.monotonic() - begun < 3
    assert nvidia.driver == "580.65.06" and "does not answer" in check_driver(nvidia).value
    while (left := [file for file in Path("/proc").glob("[0-9]*/cmdline") if mark in read(file)]) and (
        time.monotonic() - begun < 5  # what was killed takes a moment to go
    ):
        time.sleep(0.02)
    assert not left


def test_nvidia_smi_that_is_missing_or_fails(
    smi: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No nvidia-smi is no problem: training runs on the CPU. One that fails is told."""
    file = smi(BROKEN)
    assert "could not communicate" in check_driver(ask_nvidia(driver_file=tmp_path / "none")).value
    file.unlink()
    monkeypatch.setenv("PATH", str(file.parent))
    nvidia = ask_nvidia(driver_file=tmp_path / "none")
    assert check_driver(nvidia).status == "-"
    assert check_gpus(nvidia, torch_of(cuda=None), None) == Finding("-", "none: trains on the CPU")


@pytest.mark.parametrize(
    ("nvidia", "torch", "visible", "status"),
    [
        (Nvidia("580.65.06", gpus=(H100,)), torch_of(SEEN, cuda="13.0"), None, "ok"),
        (Nvidia("550.54.15", gpus=(H100,)), torch_of(SEEN, cuda="13.0"), None, "ok"),  # forward compatibility package
        (Nvidia("550.54.15", gpus=(H100,)), torch_of(cuda="13.0"), None, "problem"),
        (Nvidia("580.65.06", gpus=(H100,)), torch_of(cuda=None), None, "problem"),
        (Nvidia("580.65.06", gpus=(H100,)), torch_of(told=["no device"]), None, "problem"),
        (Nvidia("580.65.06", gpus=(H100,)), torch_of(), "", "-"),
        (Nvidia("580.65.06", gpus=(H100,)), torch_of(SEEN, cuda_error="RuntimeError: lost"), None, "problem"),
        (Nvidia("580.65.06"), torch_of(("V100", 16 * 10**9, [7, 0])), None, "problem"),
        (Nvidia("470.57.02", error="no nvidia-smi"), torch_of(), None, "problem"),
        (Nvidia(error="no nvidia-smi"), torch_of(SEEN), None, "ok"),
        (Nvidia("580.65.06", gpus=(H100,)), {"error": "ImportError"}, None, "ok"),
    ],
)
def test_a_gpu_that_cannot_be_used(nvidia: Nvidia, torch: dict[str, Any], visible: str | None, status: str) -> None:
    """A GPU that is there and unused is a problem, unless it was hidden on purpose; what works is ok whatever tables
    say."""
    assert check_gpus(nvidia, torch, visible).status == status


def test_dali_and_its_gpu() -> None:
    """DALI has to decode where PyTorch trains."""
    new, old = Nvidia("580.65.06"), Nvidia("470.57.02")
    assert check_dali(DALI, new, gpu=True).status == "ok"
    assert check_dali(DALI | {"decodes": "cpu"}, new, gpu=False).status == "ok"
    assert check_dali(DALI | {"decodes": "cpu"}, new, gpu=True).status == "problem"
    assert "too old" in check_dali(DALI | {"decodes": None, "decode_error": "no"}, old, gpu=True).value
    assert "no nvjpeg" in check_dali(DALI | {"decodes": None, "decode_error": "no nvjpeg"}, new, gpu=True).value


def test_versions_that_fit() -> None:
    """Minimum drivers are compared as numbers; code for a GPU goes up within its major version, PTX beyond it."""
    assert fits("525.60.13", 12) and not fits("525.60.9", 12) and not fits("525.8.99", 12) and fits("1000.1", 12)
    assert fits("580.65.06", 13) and not fits("575.57.08", 13) and fits("1", 99)
    assert [capability for capability in ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
            if has_jpeg_engines(capability)] == [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]  # fmt: skip
    assert runs_on((8, 6), ["sm_80"]) and not runs_on((8, 0), ["sm_86"]) and not runs_on((9, 0), ["sm_80", "sm_86"])
    assert runs_on((9, 0), ["compute_80"]) and runs_on((12, 1), ["sm_120"]) and not runs_on((10, 3), ["sm_100a"])
    assert not runs_on((7, 0), ["compute_80", "odd"])
    assert parse_driver_file("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug") == "535.104.05"
    assert parse_driver_file("something else") is None


def test_topology_over_pcie() -> None:
    """Without NVLink the ways over PCIe are told; a text that is no table is no link."""
    links = parse_topology("\tGPU0\tGPU1\tCPU Affinity\nGPU0\t X \tPHB\t0-63\nGPU1\tPHB\t X \t0-63\n\nLegend:\n")
    assert links == {(0, 1): "PHB"}
    assert check_links([H100, H100], links).value.startswith("none: PHB 1")
    assert parse_topology("topo is not supported") == {} and check_links([H100, H100], {}).status == "-"


def test_cgroups(tmp_path: Path) -> None:
    """The smallest limit of a process's cgroup and those around it holds, in both versions; odd texts are no limit."""
    assert cgroup_cpus("250000 100000\n") == 2.5
    assert all(cgroup_cpus(text) is None for text in ("max 100000", "-1 100000", "", " ", "1", "100 0", "x y", "٣ ٣ ٣"))
    assert cgroup_bytes("1024\n") == 1024
    assert all(cgroup_bytes(text) is None for text in ("max", "", "9223372036854771712", "-1", "²"))
    new = tmp_path / "new"
    (new / "job" / "step").mkdir(parents=True)
    (new / "job" / "cpu.max").write_text("400000 100000\n")
    (new / "job" / "step" / "cpu.max").write_text("max 100000\n")
    (new / "job" / "memory.max").write_text("8000000000\n")
    assert cpu_quota("0::/job/step\n", new) == 4 and memory_limit("0::/job/step\n", new) == 8e9
    assert cpu_quota("0::/elsewhere\n", new) is None and cpu_quota("", new) is None and cpu_quota("odd", new) is None
    old = tmp_path / "old"
    for name, value in {"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"}.items():
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        (old / name).write_text(value + "\n")
    (old / "memory" / "docker" / "a").mkdir(parents=True)
    (old / "memory" / "docker" / "a" / "memory.limit_in_bytes").write_text("5000000\n")
    (old / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    membership = "4:memory:/docker/a\n3:cpu,cpuacct:/docker/a\n0::/\n"
    assert cpu_quota(membership, old) == 1.5 and memory_limit(membership, old) == 5_000_000


def test_cores_and_memory() -> None:
    """A quota below the cores names the threads to set; memory that is unknown is no warning."""
    assert check_cores(8, 8, None).status == check_cores(8, 8, 8.0).status == "ok"
    assert "--data.speed.threads 3" in check_cores(64, 64, 2.0).remedy
    info = "MemTotal:       65000000 kB\nMemAvailable:   60000000 kB\n"
    assert check_memory(info, None).status == "ok" and check_memory(info, 10**9).status == "warning"
    assert check_memory("odd", None).status == check_memory("", 5).status == "-"
    assert check_page_cache(10**10, 10**9).status == "ok" and check_page_cache(10**9, 10**10).status == "warning"
    assert check_locked_memory(2**23, infiniband=True).status == "warning"
    assert check_locked_memory(2**23, infiniband=False).status == check_locked_memory(-1, True).status == "ok"


def test_file_systems() -> None:
    """The deepest mount counts, the last one of a place, and a space in its name; network disks are told."""
    mounts = "/dev/a / ext4 rw\nhost:/x /data nfs4 rw\ntmpfs /data/fast tmpfs rw\n"
    mounts += "x /a\\040b lustre rw\ny /a\\040b xfs rw\nodd"
    places = {"/home/x": "ext4", "/data/s": "nfs4", "/data/fast/s": "tmpfs", "/database": "ext4", "/a b/c": "xfs"}
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
    monkeypatch.setattr(program, "probe", {"torch": torch_of(cuda=None), "dali": DALI | {"decodes": "cpu"}}.__getitem__)
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
    cases = {tmp_path / "none": "does not exist", file: "is a file", half: "no manifest.json", cut: "has 512 bytes"}
    for place, tells in cases.items():
        found = check_split(place, "train", opened(place))
        assert found.status == "problem" and tells in found.value and found.remedy, place
        assert check_eigenbasis(place, None).status == "-"
    assert check_split(tmp_path, "train", TimeoutError("no answer within 30 s")).status == "problem"


def test_eigenbasis_and_mean_image(numbered_shards: Callable[..., ShardSet], shards: Path, tmp_path: Path) -> None:
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
