"""Probe the NVIDIA driver, PyTorch or DALI on this machine; prints one line of JSON.

    python tools/doctor_probe.py driver|torch|dali

tools/doctor.py starts one process for each, so that a library that crashes or hangs is a finding. It does not import
this project.
"""

import argparse
import io
import json
import warnings
from contextlib import suppress
from typing import Any


def probe_driver() -> dict[str, Any]:
    """Return the driver's version, the newest CUDA that it supports, and its GPUs by `describe_gpu`."""
    import pynvml

    pynvml.nvmlInit()
    cuda, gpus = pynvml.nvmlSystemGetCudaDriverVersion_v2(), []
    for handle in map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount())):
        size = 0
        with suppress(pynvml.NVMLError):  # a GPU that shares the host's memory
            size = pynvml.nvmlDeviceGetMemoryInfo(handle).total
        capability = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        gpus.append(describe_gpu(pynvml.nvmlDeviceGetName(handle), size, capability))
    version = pynvml.nvmlSystemGetDriverVersion()
    return {"version": version, "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}", "gpus": gpus}


def describe_gpu(name: str, size: int, capability: tuple[int, int]) -> str:
    """Describe a GPU by name, memory and compute capability.

    nvJPEG's documentation, section "Hardware acceleration", lists those that decode JPEGs next to their SMs: A100 and
    A30 (8.0; not the other Ampere cards, 8.6), Ada (8.9), Hopper (9.0), Blackwell (10 and 12) and Jetson Thor (11).
    """
    engine = ", JPEG engine" if capability == (8, 0) or capability >= (8, 9) else ""
    return f"{name}, {size / 1e9:.0f} GB, compute capability {capability[0]}.{capability[1]}{engine}"


def probe_torch() -> dict[str, Any]:
    """Return PyTorch's versions, the GPUs that run a kernel, the number of ordered pairs with peer access, and CUDA's
    error."""
    import torch

    info: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda, "gpus": [], "peers": 0}
    with warnings.catch_warnings(record=True) as caught:  # PyTorch warns why CUDA cannot be used
        warnings.simplefilter("always")
        try:
            numbers = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
            if torch.version.cuda:
                info["cudnn"] = torch.backends.cudnn.version()
                info["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
            for number in numbers:
                torch.ones(1, device=f"cuda:{number}").add_(1).item()
                gpu = torch.cuda.get_device_properties(number)
                info["gpus"].append(describe_gpu(gpu.name, gpu.total_memory, (gpu.major, gpu.minor)))
            pairs = [(a, b) for a in numbers for b in numbers if a != b]
            info["peers"] = sum(torch.cuda.can_device_access_peer(a, b) for a, b in pairs)
        except Exception as error:
            info["cuda_error"] = f"{type(error).__name__}: {error}"
    if caught and not info["gpus"]:
        info.setdefault("cuda_error", "; ".join(str(each.message) for each in caught))
    return info


def probe_dali() -> dict[str, Any]:
    """Return DALI's versions, and the device that decodes a JPEG: a GPU if it finds one, else the CPU."""
    import nvidia.dali as dali

    backend: Any = dali.backend  # compiled: without types
    info: dict[str, Any] = {"version": dali.__version__, "cuda": backend.__cuda_version__ // 1000}
    info |= {"nvimgcodec": backend.GetNvimgcodecVersion(), "decodes": None}
    has_gpu = False
    with suppress(RuntimeError):  # no driver
        has_gpu = backend.GetCUDADeviceCount() > 0
    try:
        decode_jpeg(has_gpu)
        info["decodes"] = "gpu" if has_gpu else "cpu"
    except Exception as error:
        info["decode_error"] = f"{type(error).__name__}: {error}"
    return info


def decode_jpeg(on_gpu: bool) -> None:
    """Decode an image of one colour. Raises `ValueError` when the colour is wrong."""
    import numpy as np
    from nvidia.dali import Pipeline, fn
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 100, 50)).save(file, "JPEG")
    encoded = np.frombuffer(file.getvalue(), np.uint8)
    pipe = Pipeline(batch_size=1, num_threads=1, device_id=0 if on_gpu else None, prefetch_queue_depth=1)
    with pipe:
        source = fn.external_source(source=lambda: [encoded], batch=True)
        pipe.set_outputs(fn.decoders.image(source, device="mixed" if on_gpu else "cpu"))
    pipe.build()
    (images,) = pipe.run()
    pixels_HWC = np.asarray((images.as_cpu() if on_gpu else images).at(0)).astype(int)
    if pixels_HWC.shape != (64, 64, 3) or np.abs(pixels_HWC - (200, 100, 50)).max() > 4:
        raise ValueError("expected (200, 100, 50), got another colour")


if __name__ == "__main__":
    probes = {"driver": probe_driver, "torch": probe_torch, "dali": probe_dali}
    parser = argparse.ArgumentParser(description="Probe one library for tools/doctor.py.")
    parser.add_argument("name", choices=probes)
    name = parser.parse_args().name
    try:
        result = probes[name]()
    except BaseException as error:  # an import may raise or exit
        result = {"error": f"{type(error).__name__}: {error}"}
    print("\n" + json.dumps({"probe": name, **result}), flush=True)
