"""How a process keeps memory, by what the kernel and glibc count in one of its own; what is told of GPUs."""

import os

import pytest
import torch

from model.alexnet import AlexNet, AlexNetConfig
from tests.helpers import run_python
from train import device as device_module
from train.device import can_compile, gpu_advice

KEPT = """
import ctypes, os, re, threading

os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # with many cores a dozen threads would say nothing
import numpy as np
from pipeline.machine import resident_bytes
from train.device import tune_malloc

def arenas():
    libc = ctypes.CDLL(None)
    libc.fopen.restype = ctypes.c_void_p
    file = libc.fopen(b"{told}", b"w")
    libc.malloc_info(0, ctypes.c_void_p(file))
    libc.fclose(ctypes.c_void_p(file))
    return len(re.findall("<heap nr", open("{told}").read()))

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


def test_freed_memory_is_kept_in_few_places(tmp_path: object) -> None:
    """Of 200 MB that are freed nearly all stay with the process, and a dozen threads share two arenas for each core; by
    itself glibc keeps nothing and gives each thread an arena."""
    given_back, arenas = {}, {}
    for keep in (False, True):
        process = run_python("-c", KEPT.format(keep=keep, told=f"{tmp_path}/arenas"))
        assert process.returncode == 0, process.stderr
        given_back[keep], arenas[keep] = map(int, process.stdout.split())
    assert given_back[False] > 190e6 and given_back[True] < 10e6
    cores = min(2, len(os.sched_getaffinity(0)))
    assert arenas[True] <= 2 * cores and (arenas[False] >= 12 or arenas[False] == 8 * cores)


@pytest.mark.parametrize(("cuda", "named"), [(None, "without CUDA"), ("13.0", "CUDA 13.0")])
def test_a_gpu_that_is_not_used(monkeypatch: pytest.MonkeyPatch, cuda: str | None, named: str) -> None:
    """Is told loudly, with what PyTorch lacks; a machine without one hears nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    for there in (True, False):
        monkeypatch.setattr(device_module, "has_nvidia_gpu", lambda there=there: there)
        advice = gpu_advice(torch.device("cpu"), 1, 32)
        assert len(advice) == there and all("ON THE CPU" in line and named in line for line in advice)


def test_gpus_that_are_used_badly(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of several, and few images at a time, are worth a line each; a full one is not."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    place = torch.device("cuda", 0)
    (line,) = gpu_advice(place, 1, 1024)
    assert "1 of 8" in line and "torchrun --standalone --nproc-per-node 8" in line
    assert [len(gpu_advice(place, 8, images)) for images in (16, 63, 64, 128)] == [1, 1, 0, 0]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The network is trained uncompiled, on a GPU machine too."""
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    model = AlexNet(AlexNetConfig(channels=(2, 2, 2, 2, 2), fc_dim=2, num_classes=2))
    assert not can_compile(torch.device(kind)) and compiled(model, torch.device(kind)) is model
    assert "normalize" not in vars(model)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert can_compile(torch.device("cuda"))
