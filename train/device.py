"""The device of a process: which GPU, precision, what is compiled, and advice about GPUs that are not used well."""

import ctypes
import os
import shutil
from pathlib import Path
from typing import cast

import torch

from model.alexnet import AlexNet
from model.towers import COMPILE_OPTIONS, TowerAlexNet
from pipeline.errors import UserError
from pipeline.machine import num_cores
from train.launch import local_rank


def pick_device(name: str) -> torch.device:
    """Pick the device for "auto", "cpu" or "cuda"; the n-th process of a machine gets its n-th GPU, made current.

    Raises `UserError` if "cuda" is given without a usable GPU, or for more processes than GPUs.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device cuda: {explain_missing_gpu()}; see docs/install.md, or take device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    index = local_rank(os.environ)
    if index >= torch.cuda.device_count():
        raise UserError(
            f"expected at most {torch.cuda.device_count()} processes, one for each GPU of this machine, got more; "
            "start fewer"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


SMALL_BATCH = 64
"""Images per forward pass on a GPU. With fewer, kernels are likely to finish faster than the host launches them."""


def advise_on_gpus(device: torch.device, world_size: int, images: int) -> str:
    """Return a line of advice if GPUs of this machine are unused or used badly, else an empty string.

    Args:
        device: Device of this run.
        world_size: Number of processes.
        images: Images of a forward pass in each process.
    """
    found = torch.cuda.device_count()
    if device.type == "cpu" and has_nvidia_gpu() and not torch.cuda.is_available():
        return f"warning: TRAINING ON THE CPU, though there is an NVIDIA GPU: {explain_missing_gpu()} (docs/install.md)"
    if device.type == "cuda" and world_size == 1 and found > 1:
        command = f"torchrun --standalone --nproc-per-node {found} -m train.run"
        return f"note: this run uses 1 of {found} GPUs; {command} with the same options uses all"
    if device.type == "cuda" and images < SMALL_BATCH:
        return (
            f"note: with {images} images per forward pass a GPU may finish kernels faster than the host launches them; "
            f"take {SMALL_BATCH} or more (--train.batch_size, or fewer processes)"
        )
    return ""


def explain_missing_gpu() -> str:
    """Explain why PyTorch sees no GPU."""
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is a build without CUDA; install one with it"
    if not has_nvidia_gpu():
        return "this machine has no NVIDIA GPU, or no driver for it"
    return (
        f"PyTorch {torch.__version__}, built for CUDA {torch.version.cuda}, cannot use the GPU: the driver may be too "
        "old; tools/doctor.py checks it"
    )


def has_nvidia_gpu() -> bool:
    """Return True if this machine has an NVIDIA GPU with a driver (under WSL, Windows's), also if PyTorch cannot use
    it."""
    paths = ("/proc/driver/nvidia/version", "/dev/nvidia0", "/usr/lib/wsl/lib/libcuda.so.1")
    return any(Path(path).exists() for path in paths)


def set_precision(deterministic: bool) -> str:
    """Set a GPU to multiply float32 in TF32 and to choose the fastest convolutions, or with `deterministic` to use only
    operations that repeat bit for bit. Returns a description. Raises `UserError` if CUBLAS_WORKSPACE_CONFIG forbids it.
    """
    torch.set_float32_matmul_precision("high")  # has no effect on a CPU
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        # cuBLAS reads this when it starts; the values are those that its documentation calls reproducible.
        if os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8") not in (":4096:8", ":16:8"):
            raise UserError("run.deterministic needs CUBLAS_WORKSPACE_CONFIG=:4096:8; set that, or unset it")
        torch.use_deterministic_algorithms(True)
    return "float32 products in TF32" + (", only operations that repeat bit for bit" if deterministic else "")


def tune_malloc() -> None:
    """Make glibc keep the memory of deleted tensors for the next ones.

    By default it returns them to the kernel, and each new one costs a page fault per 4 KiB: on two cores the quickstart
    trains 1.45 times as fast with this. Threads share two arenas per core instead of eight, as each keeps the most
    memory that it ever held; with one per core, DALI's uint8 crops came a tenth slower.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:  # glibc's alone
        trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # their numbers in malloc.h
        mallopt(arena_max, 2 * num_cores())
        mallopt(trim_threshold, 2**30)
        mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25)  # the limit of an older glibc


def compile_model(model: AlexNet, device: torch.device) -> torch.nn.Module:
    """Compile on a GPU the whole model, on a CPU only the response normalization, where it gains most. Without a
    compiler the model is returned as it is."""
    if not can_compile(device):
        return model
    if device.type == "cuda":
        keep_pooling_kernel()
        options = COMPILE_OPTIONS if isinstance(model, TowerAlexNet) else None
        return cast(torch.nn.Module, torch.compile(model, dynamic=False, options=options))
    torch._dynamo.config.suppress_errors = True  # without Python's headers: warn, and run uncompiled
    model.normalize = torch.compile(model.normalize, dynamic=False)  # type: ignore[method-assign]
    return model


def keep_pooling_kernel() -> None:
    """Keep torch's own kernel for the backward pass of max pooling, which gathers in channels-last memory.

    From torch 2.12 on, Inductor replaces it by float32 atomic additions into an NCHW buffer
    (_decomp/decompositions.py): 7.27 instead of 6.66 GB per step of 128 images, by the bytes of the compiled kernels.
    """
    from torch._decomp import decomposition_table
    from torch._inductor.decomposition import decompositions

    operator = torch.ops.aten.max_pool2d_with_indices_backward.default
    for table in (decomposition_table, decompositions):
        table.pop(operator, None)


def can_compile(device: torch.device) -> bool:
    """Return True if torch.compile finds its compiler: for a GPU, Triton calls one for C (triton/runtime/build.py); for
    a CPU, Inductor calls one for C++, which fails if there is a space in torch's path."""
    if device.type == "cuda":
        return bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))
    compiler = shutil.which("g++") or shutil.which("clang++")
    return compiler is not None and " " not in torch.__file__
