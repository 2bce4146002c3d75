"""Memory of a process, by what the kernel counts; advice about GPUs; what is compiled."""

import pytest
import torch

from model.alexnet import AlexNet, AlexNetConfig
from pipeline.errors import UserError
from tests.helpers import run_ok, run_python
from train import device as device_module
from train.device import advise_on_gpus, can_compile, compile_model, pick_device

KEPT = """
import numpy as np
from tests.helpers import private_mb
from train.device import tune_malloc

if {keep}:
    tune_malloc()
blocks = [np.ones(1_000_000, np.uint8) for _ in range(200)]
full = private_mb()
del blocks
print(int(full - private_mb()))
"""


@pytest.mark.slow
def test_freed_memory_stays_with_the_process() -> None:
    """Of 200 MB in deleted tensors nearly all stay in the process; without `tune_malloc` glibc returns all."""
    given_back = [int(run_ok("-c", KEPT.format(keep=keep), run=run_python)) for keep in (False, True)]
    assert given_back[0] > 180 and given_back[1] < 10


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


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is trained uncompiled, on a GPU machine too."""
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    model = AlexNet(AlexNetConfig(channels=(2, 2, 2, 2, 2), fc_dim=2, num_classes=2))
    for device in (torch.device("cpu"), torch.device("cuda")):
        assert not can_compile(device) and compile_model(model, device) is model
    assert "normalize" not in vars(model)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert can_compile(torch.device("cuda"))
