"""What the NVIDIA driver tells through nvidia-smi: its version, the GPUs and how they are linked."""

import re
from pathlib import Path
from typing import NamedTuple

from tools.checks.finding import TIMEOUT_S, one_line, run_command

QUERY = ["index", "name", "memory.total", "driver_version", "compute_cap"]


class Gpu(NamedTuple):
    """One GPU."""

    name: str
    gb: int
    """Memory in GB (10^9 bytes)."""
    capability: tuple[int, int] | None
    """None where an old nvidia-smi does not tell."""


class Nvidia(NamedTuple):
    """What the driver tells."""

    driver: str | None = None
    """Its version; None: there is none."""
    cuda: str | None = None
    """The newest CUDA that it knows by itself."""
    gpus: tuple[Gpu, ...] = ()
    links: dict[tuple[int, int], str] | None = None
    """Between GPUs: "NV18" is 18 NVLinks, "SYS", "NODE", "PHB", "PXB" and "PIX" are ways over PCIe, longest first."""
    error: str = ""
    """Why nvidia-smi told nothing."""


def ask_nvidia(
    timeout_s: float = TIMEOUT_S, driver_file: Path = Path("/proc/driver/nvidia/version")
) -> Nvidia:
    """Ask nvidia-smi; the kernel module's file tells the driver's version where that is missing."""
    ask = ["nvidia-smi", "--format=csv,noheader,nounits"]
    code, rows = run_command([*ask, "--query-gpu=" + ",".join(QUERY)], timeout_s)
    if code not in (0, None):  # those of drivers before 510 do not know compute_cap
        code, rows = run_command([*ask, "--query-gpu=" + ",".join(QUERY[:-1])], timeout_s)
    if code != 0:
        module = parse_driver_file(driver_file.read_text()) if driver_file.is_file() else None
        return Nvidia(driver=module, error=one_line(rows) or f"nvidia-smi ended with code {code}")
    driver, gpus = parse_gpus(rows)
    cuda = re.search(r"CUDA Version:\s*([\d.]+)", run_command(["nvidia-smi"], timeout_s)[1])
    links = parse_topology(run_command(["nvidia-smi", "topo", "-m"], timeout_s)[1]) if len(gpus) > 1 else None
    return Nvidia(driver, cuda.group(1) if cuda else None, gpus, links)


def parse_gpus(rows: str) -> tuple[str | None, tuple[Gpu, ...]]:
    """Driver and GPUs from nvidia-smi's CSV of `QUERY`, with or without its last column; other lines are skipped."""
    driver, gpus = None, []
    for row in rows.splitlines():
        fields = [field.strip() for field in row.split(",")]
        if len(fields) < 4 or not fields[0].isdecimal():
            continue
        mebibytes, driver = re.sub(r"\D", "", fields[2]), fields[3]
        capability = re.fullmatch(r"(\d+)\.(\d+)", fields[4]) if len(fields) > 4 else None
        gpus.append(
            Gpu(
                fields[1],
                round(int(mebibytes or 0) * 2**20 / 1e9),
                (int(capability[1]), int(capability[2])) if capability else None,
            )
        )
    return driver, tuple(gpus)


def parse_driver_file(text: str) -> str | None:
    """The driver's version from /proc/driver/nvidia/version."""
    found = re.search(r"Kernel Module\D*?(?:x86_64|aarch64)?\s+(\d+\.\d+(?:\.\d+)?)\s", text)
    return found.group(1) if found else None


def parse_topology(text: str) -> dict[tuple[int, int], str]:
    """(GPU, GPU) to the way between them, from `nvidia-smi topo -m`, whose header is underlined by escape codes."""
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line).split() for line in text.splitlines()]
    header: list[str] = next((line for line in lines if line[:1] == ["GPU0"] and "X" not in line), [])
    columns = [int(name[3:]) for name in header if re.fullmatch(r"GPU\d+", name)]
    rows = {
        int(line[0][3:]): line[1:]
        for line in lines
        if line and re.fullmatch(r"GPU\d+", line[0]) and "X" in line
    }
    return {
        (one, other): way
        for one, ways in rows.items()
        for other, way in zip(columns, ways, strict=False)
        if one < other
    }
