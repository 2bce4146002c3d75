"""Tell what a bug report needs and what has to be put right before training, on one screen.

    python tools/doctor.py [SHARDS] [--json]

A line for each finding: `ok`, `warning` (it works, but slowly, or not always), `problem` (training cannot run, or not
on the GPU that is there) or `-` (does not apply), and below it what to do. Exit code 2 if there is a problem, else 0.

`--json` prints one object instead: `findings`, a list of objects with `name`, `status`, `value` and `remedy` (empty
where there is nothing to do), and `versions`, an object of texts, null for what is not there.

It imports neither PyTorch nor DALI: a process of its own does that for each, so that one that is broken, crashes or
hangs is a finding as any other. A check that fails becomes a warning, and no question waits for ever.
"""

import json
import os
import platform
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.shards import ShardSet, open_shards
from tools.checks.finding import Finding, answer, isolated, one_line, probe
from tools.checks.gpu import all_gpus, check_driver, check_gpus, check_jpeg_engines, check_links, check_peers
from tools.checks.host import (
    check_cores,
    check_locked_memory,
    check_memory,
    check_open_files,
    check_page_cache,
    check_shared_memory,
    cores,
    free_bytes,
    memory_limit,
    read,
)
from tools.checks.nvidia_smi import Nvidia, ask_nvidia
from tools.checks.shards import (
    check_disk,
    check_eigenbasis,
    check_file_system,
    check_mean_image,
    check_split,
    file_system,
    shard_bytes,
)
from tools.checks.software import (
    check_compiler,
    check_dali,
    check_headers,
    check_nccl,
    check_nvimgcodec,
    check_packages,
    check_python,
    check_torch,
    dali_distribution,
    declared,
    installed,
)
from train.program import WRONG_INPUT, Parser, exit_with

Checks = list[tuple[str, Callable[[], Finding]]]


def doctor(shards: Path | None, as_json: bool) -> None:
    """Check everything, print what was found, and leave with exit code 2 if there is a problem."""
    with ThreadPoolExecutor() as pool:  # each ends by its own time limits
        asked, probes = pool.submit(ask_nvidia), pool.map(probe, ("torch", "dali"))
        torch, dali = probes
        nvidia = asked.result()
    checks = checks_of_machine(nvidia, torch, dali)
    if shards is not None:
        checks += checks_of_shards(shards.absolute(), len(torch.get("gpus", ())))
    findings = [(name, isolated(check)) for name, check in checks]
    if as_json:
        rows = [{"name": name, **finding._asdict()} for name, finding in findings]
        print(json.dumps({"findings": rows, "versions": versions(nvidia, torch, dali)}, indent=1))
    else:
        print(table(findings))
        if shards is None:
            print("give a folder of shards to check it as well: python tools/doctor.py SHARDS")
    sys.stdout.flush()
    if any(finding.status == "problem" for _, finding in findings):
        sys.exit(WRONG_INPUT)


def checks_of_machine(nvidia: Nvidia, torch: dict[str, Any], dali: dict[str, Any]) -> Checks:
    """Name and check, in the order in which they are told."""
    gpus, usable = all_gpus(nvidia, torch), len(torch.get("gpus", ()))
    codec, info = installed("nvidia-nvimgcodec-cu12"), read(Path("/proc/meminfo"))
    membership = read(Path("/proc/self/cgroup"))
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return [
        ("driver", partial(check_driver, nvidia)),
        ("GPUs", partial(check_gpus, nvidia, torch, os.environ.get("CUDA_VISIBLE_DEVICES"))),
        ("JPEG engines", partial(check_jpeg_engines, gpus)),
        ("peer access", partial(check_peers, gpus, torch)),
        ("NVLink", partial(check_links, gpus, nvidia.links)),
        ("Python", lambda: check_python(declared()[0])),
        ("packages", lambda: check_packages(declared()[1])),
        ("PyTorch", partial(check_torch, torch)),
        ("DALI", partial(check_dali, dali, nvidia, usable > 0)),
        ("nvImageCodec", lambda: check_nvimgcodec(codec, dali_distribution())),
        ("NCCL", partial(check_nccl, torch)),
        ("C++ compiler", partial(check_compiler, torch.get("file", ""), usable > 0)),
        ("Python headers", check_headers),
        ("cores", lambda: check_cores(*cores())),
        ("memory", lambda: check_memory(info, memory_limit(membership))),
        ("locked memory", lambda: check_locked_memory(locked, any(Path("/sys/class/infiniband").glob("*")))),
        ("/dev/shm", partial(check_shared_memory, Path("/dev/shm"), usable)),
    ]


def checks_of_shards(shards: Path, gpus: int) -> Checks:
    """The same for a folder of shards."""
    opened = {split: answer(partial(open_shards, shards, split)) for split in ("train", "val")}
    train = opened["train"] if isinstance(opened["train"], ShardSet) else None
    hung = isinstance(opened["train"], TimeoutError)
    if not train and not hung and not shards.is_dir():
        return [("shards", partial(check_split, shards, "train", opened["train"]))]
    # Adopted shards are links to where their bytes lie.
    place = shards if hung else Path(train.tars[0]).resolve() if train else shards.resolve()
    kind, mount = file_system(place, read(Path("/proc/mounts")))
    limit = memory_limit(read(Path("/proc/self/cgroup")))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = max((len(each.tars) for each in opened.values() if isinstance(each, ShardSet)), default=None)
    return [
        ("training shards", partial(check_split, shards, "train", opened["train"])),
        ("validation shards", partial(check_split, shards, "val", opened["val"])),
        ("eigenbasis", partial(check_eigenbasis, shards, train)),
        ("mean image", partial(check_mean_image, shards, train)),
        ("open files", partial(check_open_files, most, hard)),
        ("file system", partial(check_file_system, kind, mount)),
        ("disk", partial(check_disk, train, kind, gpus)),
        (
            "page cache",
            lambda: check_page_cache(
                free_bytes(read(Path("/proc/meminfo")), limit), shard_bytes(train) if train else None
            ),
        ),
    ]


def versions(nvidia: Nvidia, torch: dict[str, Any], dali: dict[str, Any]) -> dict[str, str | None]:
    """What a bug report needs of versions."""
    found = {
        "system": platform.platform(),
        "python": platform.python_version(),
        "driver": nvidia.driver,
        "driver_cuda": nvidia.cuda,
        "torch": torch.get("version"),
        "torch_cuda": torch.get("cuda"),
        "cudnn": torch.get("cudnn"),
        "nccl": torch.get("nccl"),
        "dali": dali.get("version"),
        "nvimgcodec": installed("nvidia-nvimgcodec-cu12"),
        "numpy": installed("numpy"),
    }
    return {name: None if value is None else str(value) for name, value in found.items()}


def table(findings: list[tuple[str, Finding]]) -> str:
    """A line for each, the remedy below, and how many want one."""
    lines = []
    for name, finding in findings:
        lines.append(f"{finding.status:<9}{name:<19}{one_line(finding.value, at_most=400)}")
        if finding.remedy:
            lines.append(f"{'':<28}-> {finding.remedy}")
    count = {
        status: sum(finding.status == status for _, finding in findings) for status in ("problem", "warning")
    }
    told = [f"{number} {status}{'s' * (number != 1)}" for status, number in count.items()]
    return "\n".join([*lines, ", ".join(told)])


def main() -> None:
    """Read the command line, and check."""
    about = (__doc__ or "").partition("\n\n")[0] + " Exit code 2 if there is a problem."
    parser = Parser(prog="doctor.py", description=about)
    parser.add_argument("shards", nargs="?", type=Path, help="Folder of shards to check as well.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    arguments = parser.parse_args()
    doctor(arguments.shards, arguments.json)


if __name__ == "__main__":
    exit_with(main)
