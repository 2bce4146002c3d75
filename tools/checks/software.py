"""tools/doctor.py's checks of libraries, and whether they fit each other and the driver."""

import importlib.metadata
import platform
import shutil
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

from tools.checks.finding import Finding, nothing, ok, one_line, problem, warning
from tools.checks.gpu import DRIVER_FOR_CUDA, OTHER_TORCH, fits
from tools.checks.nvidia_smi import Nvidia

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
INSTALL = "run make install"


def check_python(wanted: str) -> Finding:
    """Is it a version that this project is made for (a specifier such as ">=3.11,<3.14")?"""
    from packaging.specifiers import SpecifierSet

    text = f"{platform.python_version()}, {sys.executable}"
    if platform.python_version() in SpecifierSet(wanted, prereleases=True):
        return ok(text)
    return warning(
        text, f"this project is made for Python {wanted}: make .venv with PYTHON=python3.12 make install"
    )


def installed(name: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def unmet(requirements: list[str]) -> tuple[list[str], list[str]]:
    """Of requirements ("numpy>=2") those that are missing, and those that are there in another version; what is asked
    only by an extra or on another system does not count."""
    from packaging.requirements import Requirement

    missing, other = [], []
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = installed(requirement.name)
        if found is None:
            missing.append(requirement.name)
        elif not requirement.specifier.contains(found, prereleases=True):
            other.append(f"{requirement.name} {found} (wanted: {requirement.specifier})")
    return missing, other


def declared(project: Path = PROJECT) -> tuple[str, list[str]]:
    """What this project asks for, of Python and of packages: pyproject.toml tells, or where it was installed without
    its folder, the wheel."""
    if project.is_file():
        table = tomllib.loads(project.read_text())["project"]
        return table["requires-python"], table["dependencies"]
    wheel = importlib.metadata.metadata("alexnet-dali")
    return wheel["Requires-Python"], wheel.get_all("Requires-Dist") or []


def check_packages(requirements: list[str]) -> Finding:
    """Is everything there that this project asks for?"""
    missing, other = unmet(requirements)
    if missing:
        return problem("missing: " + ", ".join(missing), INSTALL)
    if other:
        return warning("of other versions: " + ", ".join(other), INSTALL)
    return ok("all that this project asks for")


def check_torch(torch: dict[str, Any]) -> Finding:
    """Does PyTorch import? Whether it can use the GPUs is told with them."""
    if "error" in torch:
        return problem(f"does not import: {one_line(torch['error'])}", INSTALL)
    cuda = f"built for CUDA {torch['cuda']}" if torch["cuda"] else "built without CUDA"
    if not torch["distributed"]:
        return warning(
            f"{torch['version']}, {cuda}, without torch.distributed", f"for several processes, {OTHER_TORCH}"
        )
    return ok(f"{torch['version']}, {cuda}" + (f", cuDNN {torch['cudnn']}" if torch["cudnn"] else ""))


def dali_distribution() -> str | None:
    """The wheel that DALI comes from; its name tells its CUDA."""
    names = (f"nvidia-dali-{build}" for build in ("cuda120", "cuda130", "cuda110"))
    return next((name for name in names if installed(name)), None)


def check_dali(dali: dict[str, Any], nvidia: Nvidia, gpu: bool) -> Finding:
    """Does DALI import, fit the driver and decode? A GPU counts where PyTorch can use it."""
    if "error" in dali:
        return problem(f"does not import: {one_line(dali['error'])}", INSTALL)
    cuda = dali["cuda"] // 1000
    text = f"{dali['version']}, built for CUDA {cuda}"
    if dali["decodes"] == ("gpu" if gpu else "cpu"):
        return ok(f"{text}; decodes a JPEG on the {dali['decodes'].upper()}")
    if gpu and nvidia.driver and not fits(nvidia.driver, cuda):
        needed = DRIVER_FOR_CUDA[cuda]
        return problem(
            f"{text}; driver {nvidia.driver} is too old", f"install an NVIDIA driver of {needed} or later"
        )
    if dali["decodes"] == "gpu":
        return ok(f"{text}; decodes a JPEG on the GPU, which PyTorch cannot use")
    why = one_line(dali.get("decode_error", "it sees no GPU"))
    return problem(f"{text}; does not decode a JPEG on the {'GPU' if gpu else 'CPU'}: {why}", INSTALL)


def check_nvimgcodec(codec: str | None, distribution: str | None) -> Finding:
    """Are nvImageCodec, DALI's decoder, and the other libraries those that this DALI asks for?"""
    if distribution is None:
        return nothing("DALI comes from no wheel that we know")
    missing, other = unmet(importlib.metadata.requires(distribution) or [])
    if missing or other:
        wrong = ", ".join([*(f"{name} is missing" for name in missing), *other])
        return warning(f"{distribution} asks for other libraries: {wrong}", INSTALL)
    return ok(f"{codec}, as {distribution} asks for it")


def check_nccl(torch: dict[str, Any]) -> Finding:
    """Which NCCL does PyTorch bring?"""
    return (
        ok(torch["nccl"])
        if torch.get("nccl")
        else nothing("none: several processes talk through gloo, on the CPU")
    )


def check_compiler(torch_file: str, gpu: bool) -> Finding:
    """Can torch.compile build what it writes? On a CPU in C++; on a GPU Triton builds a small C program. As
    `train.device.can_compile`, which imports PyTorch."""
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        return warning("none: the network runs uncompiled, more slowly", "install g++ (apt-get install g++)")
    if " " in torch_file and not gpu:
        return warning(
            f"{found}; PyTorch lies in a folder with a space in its name", "move this folder elsewhere"
        )
    return ok(found)


def check_headers(folder: str | None = None) -> Finding:
    """Are Python's headers there, which torch.compile's code includes?"""
    header = Path(folder or sysconfig.get_paths()["include"]) / "Python.h"
    if header.is_file():
        return ok(str(header))
    return warning(
        f"{header} is missing: torch.compile falls back", "install them (apt-get install python3-dev)"
    )
