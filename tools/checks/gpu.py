"""tools/doctor.py's checks of GPUs and their driver.

They take what was asked: `Nvidia`, what nvidia-smi tells, and what tools/checks/probe.py tells of PyTorch and DALI.
"""

import re
from typing import Any

from tools.checks.finding import Finding, nothing, ok, one_line, problem, warning
from tools.checks.nvidia_smi import Gpu, Nvidia

DRIVER_FOR_CUDA = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
"""The oldest Linux driver that runs programs of a CUDA major version (CUDA Toolkit release notes, table of minimum
drivers for minor version compatibility). DALI's cuda120 wheel is a program of CUDA 12."""
OTHER_TORCH = "install PyTorch's build for this driver and GPU (docs/install.md has the commands)"


def version(text: str) -> tuple[int, ...]:
    """Its numbers, to compare: "525.60.13" is (525, 60, 13)."""
    return tuple(int(number) for number in re.findall(r"\d+", text))


def fits(driver: str, cuda_major: int) -> bool:
    """Whether a driver runs programs of this CUDA; of one that we do not know, yes."""
    needed = DRIVER_FOR_CUDA.get(cuda_major)
    return needed is None or version(driver) >= version(needed)


def has_jpeg_engines(capability: tuple[int, int]) -> bool:
    """Whether GPUs of this compute capability decode JPEGs beside their SMs (NVJPG). nvJPEG's documentation, section
    "Hardware acceleration", lists A100 and A30 (8.0; not the other Ampere cards, 8.6), Ada (8.9), Hopper (9.0),
    Blackwell (10 and 12) and Jetson Thor (11)."""
    return capability == (8, 0) or capability >= (8, 9)


def runs_on(capability: tuple[int, int], archs: list[str]) -> bool:
    """Whether a PyTorch built for `archs` ("sm_80", "compute_90") has code for a GPU: machine code of the same major
    and no newer minor version ("sm_90a": of just that one), or PTX of any earlier one."""
    major, minor = capability
    for arch in archs:
        kind, _, digits = arch.partition("_")
        number = re.match(r"\d+", digits)
        if not number:
            continue
        theirs = divmod(int(number.group()), 10)
        same = theirs == capability if digits.endswith("a") else theirs[0] == major and theirs[1] <= minor
        if same if kind == "sm" else theirs <= capability:
            return True
    return not archs


def check_driver(nvidia: Nvidia) -> Finding:
    """Is there a driver?"""
    if nvidia.error and nvidia.driver:
        return warning(
            f"{nvidia.driver}; {nvidia.error}", "make nvidia-smi work: in a container, give it `utility`"
        )
    if nvidia.driver:
        return ok(nvidia.driver + (f", CUDA up to {nvidia.cuda}" if nvidia.cuda else ""))
    if "cannot be started" in nvidia.error:
        return nothing("none (no nvidia-smi)")
    return warning(
        nvidia.error or "nvidia-smi lists no GPU", "see dmesg; reload the driver or restart the machine"
    )


def all_gpus(nvidia: Nvidia, torch: dict[str, Any]) -> list[Gpu]:
    """Those that PyTorch sees; where it sees none, those of the driver."""
    seen = [
        Gpu(name, round(size / 1e9), (major, minor)) for name, size, (major, minor) in torch.get("gpus", ())
    ]
    return seen or list(nvidia.gpus)


def check_gpus(nvidia: Nvidia, torch: dict[str, Any], visible: str | None) -> Finding:
    """Which ones are there, and can PyTorch use them? `visible` is CUDA_VISIBLE_DEVICES."""
    gpus = all_gpus(nvidia, torch)
    if not gpus and not nvidia.driver:
        return nothing("none: trains on the CPU")
    text, cuda = describe(gpus) or "not listed", torch.get("cuda")
    if "error" in torch:
        return ok(text) if gpus else nothing(text)  # the line on PyTorch tells
    if cuda is None:
        return problem(f"{text}; this PyTorch is built without CUDA", OTHER_TORCH)
    if not torch["gpus"] and visible in ("", "-1"):
        return nothing(f"{text}; hidden by CUDA_VISIBLE_DEVICES: trains on the CPU")
    if not torch["gpus"] and nvidia.driver and not fits(nvidia.driver, version(cuda)[0]):
        needed = DRIVER_FOR_CUDA[version(cuda)[0]]
        return problem(
            f"{text}; driver {nvidia.driver} is too old for PyTorch's CUDA {cuda}",
            f"install an NVIDIA driver of {needed} or later, or {OTHER_TORCH}",
        )
    foreign = [gpu.name for gpu in gpus if gpu.capability and not runs_on(gpu.capability, torch["archs"])]
    if foreign:
        return problem(
            f"{text}; this PyTorch has no code for {foreign[0]} ({' '.join(torch['archs'])})", OTHER_TORCH
        )
    if not torch["gpus"] or "cuda_error" in torch:
        why = (
            one_line("; ".join([*torch["told"], torch.get("cuda_error", "")]).strip("; "))
            or "without a reason"
        )
        return problem(f"{text}; PyTorch cannot use them: {why}", "see dmesg; check CUDA_VISIBLE_DEVICES")
    hidden = len(nvidia.gpus) - len(gpus)
    return ok(text + (f"; {hidden} more are hidden from this process" if hidden > 0 else ""))


def describe(gpus: list[Gpu]) -> str:
    """ "8 x NVIDIA H100 80GB HBM3, 86 GB, compute capability 9.0", kind by kind."""
    kinds: dict[Gpu, int] = {}
    for gpu in gpus:
        kinds[gpu] = kinds.get(gpu, 0) + 1
    return "; ".join(
        f"{count} x {gpu.name}, {gpu.gb} GB"
        + (f", compute capability {gpu.capability[0]}.{gpu.capability[1]}" if gpu.capability else "")
        for gpu, count in kinds.items()
    )


def check_jpeg_engines(gpus: list[Gpu]) -> Finding:
    """Do the GPUs decode JPEGs beside their SMs?"""
    if not gpus or gpus[0].capability is None:
        return nothing("unknown" if gpus else "no GPU")
    if has_jpeg_engines(gpus[0].capability):
        return ok("yes, by its compute capability; data.speed.hw_decoder_load sets their share")
    return nothing("none, by its compute capability: its SMs decode")


def check_peers(gpus: list[Gpu], torch: dict[str, Any]) -> Finding:
    """Do GPUs reach each other's memory?"""
    if len(torch.get("gpus", ())) < 2:
        return nothing("one GPU" if gpus else "no GPU")
    count = len(torch["gpus"])
    reach, pairs = len(torch["peers"]), count * (count - 1)
    if reach == pairs:
        return ok(f"all {count} GPUs reach each other's memory")
    return warning(
        f"{reach} of {pairs} ordered pairs of GPUs reach each other's memory; the others copy through the host's",
        "some GPUs cannot do it; else switch off the IOMMU or ACS. NCCL hangs? Set NCCL_P2P_DISABLE=1",
    )


def check_links(gpus: list[Gpu], links: dict[tuple[int, int], str] | None) -> Finding:
    """How are GPUs linked?"""
    if not links:
        return nothing("unknown" if len(gpus) > 1 else "one GPU" if gpus else "no GPU")
    ways = {way: sum(each == way for each in links.values()) for way in sorted(set(links.values()))}
    text = ", ".join(f"{way} {count}" for way, count in ways.items()) + f" (pairs of {len(links)})"
    if any(way.startswith("NV") for way in ways):
        return ok(text)
    return nothing(f"none: {text}, ways over PCIe")
