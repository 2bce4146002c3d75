"""NVIDIA's driver, GPUs and their links: what does not fit is told with its remedy, and what works is ok, whatever
nvidia-smi says or does."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import DALI, torch_of
from tools import doctor as program
from tools.checks.finding import Finding, ok
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
from tools.checks.host import read
from tools.checks.nvidia_smi import Gpu, Nvidia, ask_nvidia, parse_driver_file, parse_topology
from tools.checks.software import check_dali

H100 = Gpu("NVIDIA H100 80GB HBM3", 86, (9, 0))
HEADER = (
    "\t"
    + "\t".join(f"\x1b[4mGPU{k}" for k in range(8))
    + "\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m"
)
ROWS = [
    "\t".join([f"GPU{k}", *(" X " if j == k else "NV18" for j in range(8)), "PXB", "0-47", "0", "N/A"])
    for k in range(8)
]
LEGEND = (
    "NIC0\t" + "PXB\t" * 8 + " X \n\nLegend:\n\n  X    = Self\n  NV#  = Connection traversing # NVLinks\n"
)
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


SEEN = ("NVIDIA H100 80GB HBM3", 85_520_809_984, [9, 0])


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
        (
            Nvidia("550.54.15", gpus=(H100,)),
            torch_of(SEEN, cuda="13.0"),
            None,
            "ok",
        ),  # forward compatibility package
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
def test_a_gpu_that_cannot_be_used(
    nvidia: Nvidia, torch: dict[str, Any], visible: str | None, status: str
) -> None:
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
    assert (
        "no nvjpeg" in check_dali(DALI | {"decodes": None, "decode_error": "no nvjpeg"}, new, gpu=True).value
    )


def test_versions_that_fit() -> None:
    """Minimum drivers are compared as numbers; code for a GPU goes up within its major version, PTX beyond it."""
    assert (
        fits("525.60.13", 12) and not fits("525.60.9", 12) and not fits("525.8.99", 12) and fits("1000.1", 12)
    )
    assert fits("580.65.06", 13) and not fits("575.57.08", 13) and fits("1", 99)
    assert [capability for capability in ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
            if has_jpeg_engines(capability)] == [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]  # fmt: skip
    assert (
        runs_on((8, 6), ["sm_80"])
        and not runs_on((8, 0), ["sm_86"])
        and not runs_on((9, 0), ["sm_80", "sm_86"])
    )
    assert (
        runs_on((9, 0), ["compute_80"]) and runs_on((12, 1), ["sm_120"]) and not runs_on((10, 3), ["sm_100a"])
    )
    assert not runs_on((7, 0), ["compute_80", "odd"])
    assert (
        parse_driver_file("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug")
        == "535.104.05"
    )
    assert parse_driver_file("something else") is None


def test_topology_over_pcie() -> None:
    """Without NVLink the ways over PCIe are told; a text that is no table is no link."""
    links = parse_topology(
        "\tGPU0\tGPU1\tCPU Affinity\nGPU0\t X \tPHB\t0-63\nGPU1\tPHB\t X \t0-63\n\nLegend:\n"
    )
    assert links == {(0, 1): "PHB"}
    assert check_links([H100, H100], links).value.startswith("none: PHB 1")
    assert parse_topology("topo is not supported") == {} and check_links([H100, H100], {}).status == "-"
