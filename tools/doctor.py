"""Check this machine for training, and print what a bug report needs, on one screen.

    python tools/doctor.py [SHARDS] [--json]

A line per check: `ok`, `warning` (it works, but slowly, or not always), `problem` (training fails, or cannot use the
GPU) or `-` (does not apply), and below it the remedy. Exit code 2 if there is a problem, else 0.

`--json` prints one object: `findings`, a list of objects with `name`, `status`, `value` and `remedy` (may be empty);
strings `system` and `python`; and the results of the probes `driver`, `torch` and `dali`.

It imports neither PyTorch nor DALI: tools/doctor_probe.py does, in one process for each, so that a library that is
broken, crashes or hangs is a finding. A check that raises becomes a warning.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, NamedTuple

try:
    import numpy as np

    from pipeline.eigenbasis import Eigenbasis
    from pipeline.errors import DataError
    from pipeline.machine import num_cores, raise_open_file_limit
    from pipeline.reader import SampleReader
    from pipeline.settings import Speed
    from pipeline.shards import ShardSet, open_shards
    from train.cli import WRONG_INPUT, Parser, run_main
except ModuleNotFoundError as error:
    sys.stderr.write(
        f"error: this Python has no {error.name}; run `make install` once, then .venv/bin/python tools/doctor.py\n"
    )
    sys.exit(2)

TIMEOUT_S = 120.0
"""Limit of a probe: importing PyTorch or DALI reads gigabytes, perhaps from a slow disk."""
INSTALL = "run make install"
BUILDS = "install PyTorch's build for this driver and GPU (docs/install.md has the commands)"
READ_S, READ_SAMPLES = 2.0, 32
"""Seconds of reading to measure the disk, and samples per read."""
GPU_IMAGES_PER_S, CPU_IMAGES_PER_S = 10_000, 500
"""A slower disk gets a warning: about the speed of training on a GPU (docs/storage.md), and on a CPU."""
CGROUP = Path("/sys/fs/cgroup")


class Finding(NamedTuple):
    """Result of one check."""

    status: Literal["ok", "warning", "problem", "-"]
    value: str
    remedy: str = ""
    """May be empty."""


ProbeResult = dict[str, Any]
"""Output of a probe; `error` if it failed."""


def doctor(shards: Path | None, as_json: bool) -> None:
    """Run all checks, print the findings, and exit with code 2 if there is a problem."""
    with ThreadPoolExecutor() as pool:
        driver, torch, dali = pool.map(probe, ("driver", "torch", "dali"))
    gpus, train = len(torch.get("gpus") or ()), None
    if shards:
        with suppress(OSError, ValueError):  # check_split reports it
            train = open_shards(shards, "train")
    has_module, visible = Path("/proc/driver/nvidia").exists(), os.environ.get("CUDA_VISIBLE_DEVICES")
    checks: dict[str, Callable[[], Finding]] = {
        "GPUs": lambda: check_gpus(driver, torch, has_module, visible),
        "packages": check_packages,
        "PyTorch": lambda: check_torch(torch),
        "DALI": lambda: check_dali(dali, gpus > 0),
        "C++ compiler": check_compiler,
        "cores": lambda: check_cores(num_cores(), read_limits("cpu.max")),
        "memory": lambda: check_memory(train),
        "/dev/shm": lambda: check_shared_memory(gpus),
    }
    if shards:
        checks |= {f"{split} shards": partial(check_split, shards, split) for split in ("train", "val")}
    if shards and train:
        checks["eigenbasis"] = partial(check_eigenbasis, shards, train)
        checks["disk"] = partial(check_disk, train, gpus)
    findings = {name: run_check(check) for name, check in checks.items()}
    if as_json:
        rows = [{"name": name, **finding._asdict()} for name, finding in findings.items()]
        content = {"findings": rows, "system": platform.platform(), "python": platform.python_version()}
        print(json.dumps(content | {"driver": driver, "torch": torch, "dali": dali}, indent=1))
    else:
        for name, finding in findings.items():
            print(f"{finding.status:<9}{name:<14}{' '.join(finding.value.split())[:400]}")
            if finding.remedy:
                print(f"{'':<23}-> {finding.remedy}")
        counts = Counter(finding.status for finding in findings.values())
        print(f"problems: {counts['problem']}, warnings: {counts['warning']}")
    sys.stdout.flush()
    if any(finding.status == "problem" for finding in findings.values()):
        sys.exit(WRONG_INPUT)


def check_gpus(driver: ProbeResult, torch: ProbeResult, has_module: bool, visible: str | None) -> Finding:
    """Check that NVML works and PyTorch runs on the GPUs, and that these have peer access.

    Args:
        driver: What NVML says.
        torch: What PyTorch says.
        has_module: Whether the kernel module is loaded.
        visible: CUDA_VISIBLE_DEVICES.
    """
    usable = torch.get("gpus") or []
    gpus = usable or driver.get("gpus") or []
    if not gpus and has_module:
        remedy = "in a container, add the driver's `utility` libraries; else see dmesg, reload the driver or reboot"
        return Finding("warning", f"NVML fails: {driver.get('error', 'it lists no GPU')}", remedy)
    if not gpus:
        return Finding("-", "none: trains on the CPU")
    text = "; ".join(f"{count} x {gpu}" for gpu, count in Counter(gpus).items())
    text += f"; driver {driver['version']}, CUDA up to {driver['cuda']}" if "version" in driver else ""
    if "error" in torch:  # check_torch reports it
        return Finding("-", text)
    if not usable and visible in ("", "-1"):
        return Finding("-", f"{text}; hidden by CUDA_VISIBLE_DEVICES: trains on the CPU")
    if not usable or "cuda_error" in torch:
        reason = torch.get("cuda_error", "no reason given" if torch["cuda"] else "it is built without CUDA")
        value = f"{text}; this PyTorch cannot use them: {reason}"
        return Finding("problem", value, f"see CUDA_VISIBLE_DEVICES and dmesg; or {BUILDS}")
    peers, pairs = torch["peers"], len(usable) * (len(usable) - 1)
    if peers < pairs:
        value = f"{text}; {peers} of {pairs} ordered pairs have peer access, the others copy through the host"
        remedy = "some GPUs lack it; else disable IOMMU or ACS. If NCCL hangs, set NCCL_P2P_DISABLE=1"
        return Finding("warning", value, remedy)
    return Finding("ok", text)


def check_packages() -> Finding:
    """Check that the requirements of this project and of DALI are installed, in matching versions."""
    pip = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    lines = [line for line in pip.stdout.splitlines() if line.startswith(("alexnet-dali ", "nvidia-dali-"))]
    if lines:
        missing = any("not installed" in line for line in lines)
        return Finding("problem" if missing else "warning", " ".join(lines), INSTALL)
    return Finding("ok", f"all requirements, in {sys.prefix}")


def check_torch(torch: ProbeResult) -> Finding:
    """Check that PyTorch imports."""
    if "error" in torch:
        return Finding("problem", f"does not import: {torch['error']}", INSTALL)
    cuda = f"for CUDA {torch['cuda']}" if torch["cuda"] else "without CUDA"
    return Finding("ok", f"{torch['version']}, built {cuda}")


def check_dali(dali: ProbeResult, has_gpu: bool) -> Finding:
    """Check that DALI imports, and decodes where PyTorch trains."""
    if "error" in dali:
        return Finding("problem", f"does not import: {dali['error']}", INSTALL)
    text = f"{dali['version']}, built for CUDA {dali['cuda']}"
    if dali["decodes"] == "gpu" or (dali["decodes"] == "cpu" and not has_gpu):
        return Finding("ok", f"{text}; decodes a JPEG on the {dali['decodes'].upper()}")
    why = dali.get("decode_error", "it sees no GPU")
    remedy = f"install a newer driver (docs/install.md), or {INSTALL}"
    return Finding("problem", f"{text}; decodes no JPEG on the {'GPU' if has_gpu else 'CPU'}: {why}", remedy)


def check_compiler() -> Finding:
    """Check for the C++ compiler and Python headers that torch.compile needs."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if compiler and header.is_file():
        return Finding("ok", f"{compiler}, {header}")
    missing = f"no {header if compiler else 'g++ or clang++'}: the network runs uncompiled, slower"
    return Finding("warning", missing, f"apt-get install {'python3-dev' if compiler else 'g++'}")


def read_limits(name: str, membership: Path = Path("/proc/self/cgroup"), root: Path = CGROUP) -> list[str]:
    """Read a limit of this process's cgroup (version 2) and of its parents, which apply as well.

    In a container the path in /proc/self/cgroup, "0::/a/b", may be the host's; the container's limits are at the root.
    """
    own = Path(read_text(membership).rpartition("0::/")[2].partition("\n")[0])
    return [read_text(root / folder / name) for folder in (own, *own.parents)]


def read_text(path: Path) -> str:
    """Read a small file; empty if it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def check_cores(usable: int, quotas: list[str]) -> Finding:
    """Check that the cgroup quotas (cpu.max: "QUOTA PERIOD" in microseconds) allow all cores that DALI uses."""
    found = [re.fullmatch(r"(\d+) ([1-9]\d*)\s*", text, re.ASCII) for text in quotas]
    quota = min((int(match[1]) / int(match[2]) for match in found if match), default=usable)
    text = f"{usable} of {os.cpu_count()}"
    if quota >= usable:
        return Finding("ok", text)
    remedy = f"set --data.speed.threads {max(1, round(quota)) + 1}, or get more cores"
    return Finding("warning", f"{text}, but a cgroup allows the time of {quota:.3g}", remedy)


def check_memory(train: ShardSet | None) -> Finding:
    """Check that a training process (1 GB for the quickstart) and the training shards fit in memory."""
    info = dict(re.findall(r"^(\w+):\s+(\d+) kB$", read_text(Path("/proc/meminfo")), re.MULTILINE))
    limits = [int(text) for text in read_limits("memory.max") if text.strip().isdecimal()]
    free, total = (min([1024 * int(info[name]), *limits]) for name in ("MemAvailable", "MemTotal"))
    text, size = f"{free / 1e9:.1f} GB free of {total / 1e9:.1f}", sum_shard_bytes(train) if train else 0
    text += f", training shards {size / 1e9:.2f} GB" if size else ""
    if free < 2e9:
        return Finding("warning", text, "stop other programs, or get more memory")
    if size > 0.9 * free:
        remedy = "a fast disk, --data.shuffle blocks, or more memory (docs/storage.md)"
        return Finding("warning", f"{text}: every epoch reads the disk again", remedy)
    return Finding("ok", text)


def check_shared_memory(gpus: int) -> Finding:
    """Check for 1 GB of /dev/shm, which NCCL needs for several GPUs (Docker's default is 64 MiB)."""
    size = shutil.disk_usage("/dev/shm").total
    if gpus > 1 and size < 1e9:
        return Finding("warning", f"{size / 1e9:.2f} GB", "in a container, give it --shm-size 1g")
    return Finding("ok", f"{size / 1e9:.2f} GB")


def check_split(shards: Path, split: str) -> Finding:
    """Check that a split opens, and that the limit of open files allows all of its shards."""
    opened = open_shards(shards, split)
    raise_open_file_limit(len(opened.tars))
    size = f"{opened.num_samples:,} images in {len(opened.tars)} shards"
    return Finding("ok", f"{size}, {len(opened.classes)} classes")


def check_eigenbasis(shards: Path, train: ShardSet) -> Finding:
    """Check that pca.json, and mean_image.npy where it exists, were computed from these shards."""
    with_image = (shards / "mean_image.npy").exists()
    Eigenbasis.load(shards / "pca.json", train.manifest_sha256, with_mean_image=with_image)
    return Finding("ok", "pca.json" + (" and mean_image.npy" if with_image else ", no mean_image.npy"))


def check_disk(train: ShardSet, gpus: int) -> Finding:
    """Check that the shards' disk is fast enough for `data.shuffle global`."""
    samples_per_s = measure_disk(train, threads=Speed.reader_queue_depth * max(gpus, 1))
    text = f"{samples_per_s:,.0f} samples/s in random order"
    needed = GPU_IMAGES_PER_S * gpus or CPU_IMAGES_PER_S
    if samples_per_s < needed:
        remedy = "use a faster, local disk, or --data.shuffle blocks (docs/storage.md)"
        return Finding("warning", f"{text}; expected at least {needed:,}", remedy)
    return Finding("ok", text)


def measure_disk(train: ShardSet, threads: int, seconds: float = READ_S) -> float:
    """Read random samples of up to eight evenly spaced shards, dropped from the page cache if possible, as the loaders
    do. Returns samples per second. Raises `DataError`."""
    few = train.only(range(0, len(train.tars), -(-len(train.tars) // 8)))
    for name in few.tars:
        with Path(name).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    rows = np.random.default_rng().permutation(few.num_samples)
    start = perf_counter()

    def read(rows: np.ndarray) -> int:
        if perf_counter() > start + seconds:
            return 0
        reader.release(reader.read(rows))
        return len(rows)

    with (
        closing(SampleReader(few, random=True)) as reader,
        ThreadPoolExecutor(threads) as pool,
    ):
        total = sum(pool.map(read, np.split(rows, range(READ_SAMPLES, len(rows), READ_SAMPLES))))
    return total / (perf_counter() - start)


def sum_shard_bytes(train: ShardSet) -> int:
    """Add up the sizes of all shards."""
    return sum(Path(tar).stat().st_size for tar in train.tars)


def run_check(check: Callable[[], Finding]) -> Finding:
    """Run a check. An error of input or data is a problem, with the remedy after its semicolon; any other exception is
    a warning."""
    try:
        return check()
    except (OSError, ValueError, DataError) as error:
        problem, _, remedy = str(error).rpartition("; ")
        return Finding(
            "problem", problem or remedy, remedy if problem else "set its permissions, or make it again"
        )
    except Exception as error:
        reason = f"cannot be checked: {type(error).__name__}: {error}"
        return Finding("warning", reason, "please report this as a bug")


def probe(name: str, timeout_s: float = TIMEOUT_S) -> ProbeResult:
    """Run tools/doctor_probe.py; `error` is why a library cannot be used. A process that hangs is killed, but not
    waited for: in a driver call it may never end."""
    command = [sys.executable, str(Path(__file__).with_name("doctor_probe.py")), name]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "errors": "replace"}
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, text=True, **pipes)
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return {"error": f"no answer within {timeout_s:.0f} s"}
    last = output.rstrip().rpartition("\n")[2]
    if last.startswith('{"probe"'):
        return dict(json.loads(last))
    code = process.returncode
    return {"error": f"ended by signal {-code}" if code < 0 else f"exit code {code}: {last}"}


def main() -> None:
    """Read the command line and run the checks."""
    description = (__doc__ or "").partition("\n\n")[0] + " Exit code 2 if there is a problem."
    parser = Parser(prog="python tools/doctor.py", description=description)
    parser.add_argument("shards", nargs="?", type=Path, help="Folder of shards to check.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    options = parser.parse_args()
    run_main(lambda: doctor(options.shards, options.json))


if __name__ == "__main__":
    main()
