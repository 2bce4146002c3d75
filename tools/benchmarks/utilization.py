"""GPU utilization as NVML has it and nvidia-smi tells it: the share of its last sample period, a sixth of a second to a
second long, in which any kernel ran, however small."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

import torch

EVERY_S = 0.2
TIMEOUT_S = 5.0
"""For one answer of nvidia-smi."""


def name_of(device: torch.device) -> str | None:
    """What nvidia-smi calls a GPU of this process, whichever of them CUDA_VISIBLE_DEVICES leaves; None for a CPU."""
    if device.type != "cuda":
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return f"GPU-{uuid}" if uuid else str(device.index or 0)


@contextmanager
def watched(gpu: str | None, every_s: float = EVERY_S) -> Iterator[list[float]]:
    """Yields a list that a thread fills with utilizations in percent, about one every `every_s`, while the block runs.
    It stays empty without a GPU (None), and ends where nvidia-smi does not tell."""
    percents: list[float] = []
    ended = Event()

    def poll() -> None:
        while gpu is not None and not ended.wait(every_s):
            percent = utilization(gpu)
            if percent is None:
                break
            percents.append(percent)

    thread = Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield percents
    finally:
        ended.set()
        thread.join()


def utilization(gpu: str) -> float | None:
    """Of a GPU, in percent, now; None where nvidia-smi does not tell: it is missing, or the GPU is cut up (MIG)."""
    query = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--id={gpu}", *query],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return float(done.stdout) if done.stdout.strip().isdecimal() else None
