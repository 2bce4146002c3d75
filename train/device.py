"""How a process uses its device: which one, how memory is kept, what is compiled, what has to repeat to the bit."""

import ctypes
import os
import shutil
from pathlib import Path
from typing import cast

import torch

from model.alexnet import AlexNet
from model.towers import COMPILE_OPTIONS, TowerAlexNet
from pipeline.machine import num_cores
from train.launch import local_rank


def pick_device(name: str) -> torch.device:
    """The device behind "auto", "cpu" or "cuda", the n-th GPU for the n-th process of a machine.

    Raises `ValueError` when a GPU is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device cuda: {why_no_gpu()}; see docs/install.md, or take device cpu")
    place = local_rank(os.environ)
    if name != "cpu" and place >= torch.cuda.device_count() > 0:
        raise ValueError(
            f"this machine has {torch.cuda.device_count()} GPUs and more processes than that; start one for each"
        )
    return torch.device("cuda", place) if name != "cpu" and torch.cuda.is_available() else torch.device("cpu")


def gpu_advice(device: torch.device, world: int, images: int) -> list[str]:
    """What to tell of GPUs that are there and are not used, or not well.

    Args:
        device: What the run computes on.
        world: Number of its processes.
        images: Of an update, in each process.
    """
    found = torch.cuda.device_count()
    if device.type == "cpu" and has_nvidia_gpu() and not torch.cuda.is_available():
        return [
            f"warning: TRAINING ON THE CPU, though this machine has an NVIDIA GPU: {why_no_gpu()} (docs/install.md)"
        ]
    if device.type == "cuda" and world == 1 and found > 1:
        start = f"torchrun --standalone --nproc-per-node {found} -m train.run"
        return [f"note: this run uses 1 of {found} GPUs; {start} and the same options use all"]
    if device.type == "cuda" and images < MANY_IMAGES:
        return [
            f"note: {images} images a GPU at a time are few: the GPU computes faster than the host launches kernels; "
            f"take {MANY_IMAGES} or more (--train.batch_size, or fewer processes)"
        ]
    return []


MANY_IMAGES = 64
"""At a time on a GPU, below which the host's 2.4 ms of launches a step bind (docs/tuning.md)."""


def why_no_gpu() -> str:
    """Why PyTorch sees no GPU."""
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is a build without CUDA; install one with it"
    if not has_nvidia_gpu():
        return "this machine has no NVIDIA GPU, or no driver for it"
    return (
        f"PyTorch {torch.__version__} is made for CUDA {torch.version.cuda}, for which the driver is too old, or which "
        "it cannot reach; tools/doctor.py says what it sees"
    )


def has_nvidia_gpu() -> bool:
    """Whether the kernel, or that of Windows under WSL, knows of an NVIDIA GPU, whatever PyTorch thinks."""
    places = ("/proc/driver/nvidia/version", "/dev/nvidia0", "/usr/lib/wsl/lib/libcuda.so.1")
    return any(Path(place).exists() for place in places)


def set_arithmetic(deterministic: bool) -> str:
    """Let a GPU multiply float32 in TF32 and choose the fastest convolutions, or, `deterministic`, only such as give
    the same bits every time. Returns what it did, for people. Raises `ValueError` where the environment forbids it."""
    torch.set_float32_matmul_precision("high")  # a CPU computes in float32 all the same
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        # cuBLAS reads this when it starts; the value is one of the two that its documentation calls reproducible.
        if os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8") not in (":4096:8", ":16:8"):
            raise ValueError("run.deterministic needs CUBLAS_WORKSPACE_CONFIG=:4096:8; set that, or unset it")
        torch.use_deterministic_algorithms(True)
    return "float32 products in TF32" + (", only operations that repeat to the bit" if deterministic else "")


def tune_malloc() -> None:
    """Let glibc keep the memory of freed tensors for the next ones, for as long as the process lives.

    By itself it returns them to the kernel, and each new one costs a page fault per 4 KiB: on two cores the quickstart
    trains 1.45 times as fast with this. Threads share two arenas for each core, not eight: every arena keeps the
    most that it ever held, and DALI's batches come from now this thread, now that. With one a core, uint8 windows
    came a tenth slower.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:  # glibc's alone
        trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # their numbers in malloc.h
        mallopt(arena_max, 2 * num_cores())
        mallopt(trim_threshold, 2**30)
        mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25)  # older ones take no more


def compiled(model: AlexNet, device: torch.device) -> torch.nn.Module:
    """What of the network pays to compile: all of it on a GPU; on a CPU the normalization, which is its slow
    layer. Where compiling cannot work the network stays as it is."""
    if not can_compile(device):
        language = "C" if device.type == "cuda" else "C++"
        print(f"not compiling: no {language} compiler, or PyTorch lies in a folder with a space in its name")
        return model
    if device.type == "cuda":
        keep_pooling_kernel()
        options = COMPILE_OPTIONS if isinstance(model, TowerAlexNet) else None
        return cast(torch.nn.Module, torch.compile(model, dynamic=False, options=options))
    torch._dynamo.config.suppress_errors = True  # without Python's headers: warn, and run uncompiled
    model.normalize = torch.compile(model.normalize, dynamic=False)  # type: ignore[method-assign]
    return model


def keep_pooling_kernel() -> None:
    """Let the compiled backward pass of max pooling gather, in channels-last memory.

    torch 2.12 began to decompose it into a scatter of float32 atomics into NCHW scratch (_decomp/decompositions.py):
    7.27 GB a step of 128 images instead of 6.66, by the bytes of the compiled kernels.
    """
    from torch._decomp import decomposition_table
    from torch._inductor.decomposition import decompositions

    operator = torch.ops.aten.max_pool2d_with_indices_backward.default
    for table in (decomposition_table, decompositions):
        table.pop(operator, None)


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works: for a GPU, Triton calls a C compiler (triton/runtime/build.py); for a CPU, Inductor
    a C++ compiler, without quoting its own path."""
    if device.type == "cuda":
        return bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))
    compiler = shutil.which("g++") or shutil.which("clang++")
    return compiler is not None and " " not in torch.__file__
