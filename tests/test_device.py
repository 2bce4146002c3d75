"""Memory of a process, by what the kernel and glibc count; advice about GPUs; what is compiled."""

import os

import pytest
import torch

from model.alexnet import AlexNet, AlexNetConfig
from pipeline.errors import UserError
from tests.helpers import run_python
from train import device as device_module
from train.device import advise_on_gpus, can_compile, compile_model, pick_device

KEPT = """
import ctypes, os, re, threading

os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # with many cores a dozen threads would say nothing
import numpy as np
from pipeline.machine import resident_bytes
from train.device import tune_malloc

def arenas():
    libc = ctypes.CDLL(None)
    libc.fopen.restype = ctypes.c_void_p
    file = libc.fopen(b"{path}", b"w")
    libc.malloc_info(0, ctypes.c_void_p(file))
    libc.fclose(ctypes.c_void_p(file))
    return len(re.findall("<heap nr", open("{path}").read()))

def hold():
    block = np.ones(10_000, np.uint8)
    together.wait()
    del block

if {keep}:
    tune_malloc()
blocks = [np.ones(1_000_000, np.uint8) for _ in range(200)]
full = resident_bytes()
del blocks
together = threading.Barrier(12)
threads = [threading.Thread(target=hold) for _ in range(12)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(full - resident_bytes(), arenas())
"""


def test_freed_memory_stays_with_the_process(tmp_path: object) -> None:
    """Of 200 MB that are freed nearly all stay, and a dozen threads share two arenas a core; without `tune_malloc`
    glibc keeps nothing and gives each thread an arena."""
    returned, arenas = {}, {}
    for keep in (False, True):
        process = run_python("-c", KEPT.format(keep=keep, path=f"{tmp_path}/arenas"))
        assert process.returncode == 0, process.stderr
        returned[keep], arenas[keep] = map(int, process.stdout.split())
    assert returned[False] > 190e6 and returned[True] < 10e6
    cores = min(2, len(os.sched_getaffinity(0)))
    assert arenas[True] <= 2 * cores and (arenas[False] >= 12 or arenas[False] == 8 * cores)


@pytest.mark.parametrize(("cuda", "named"), [(None, "without CUDA"), ("13.0", "CUDA 13.0")])
def test_a_gpu_that_is_not_used(monkeypatch: pytest.MonkeyPatch, cuda: str | None, named: str) -> None:
    """It is warned of, with what PyTorch lacks, and refused where it was asked for; a machine without one hears
    nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(device_module, "has_nvidia_gpu", lambda: True)
    advice = advise_on_gpus(torch.device("cpu"), 1, 32)
    assert "ON THE CPU" in advice and named in advice
    with pytest.raises(UserError, match=named):
        pick_device("cuda")
    monkeypatch.setattr(device_module, "has_nvidia_gpu", lambda: False)
    assert advise_on_gpus(torch.device("cpu"), 1, 32) == "" and pick_device("auto").type == "cpu"


def test_gpus_that_are_used_badly(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of several, and few images at a time, are worth a line; a full one is not."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    gpu = torch.device("cuda", 0)
    assert "1 of 8" in advise_on_gpus(gpu, 1, 1024) and "--nproc-per-node 8" in advise_on_gpus(gpu, 1, 1024)
    assert [bool(advise_on_gpus(gpu, 8, images)) for images in (16, 63, 64, 128)] == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The network is trained uncompiled, on a GPU machine too."""
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    model = AlexNet(AlexNetConfig(channels=(2, 2, 2, 2, 2), fc_dim=2, num_classes=2))
    assert not can_compile(torch.device(kind)) and compile_model(model, torch.device(kind)) is model
    assert "normalize" not in vars(model)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert can_compile(torch.device("cuda"))
