"""The part of tools/doctor.py that imports PyTorch or DALI; prints one line of JSON.

A program of its own, started by `tools.checks.finding.probe`. It imports nothing of ours.
"""

import io
import json
import sys
import warnings
from typing import Any


def probe_torch() -> dict[str, Any]:
    """Versions, and what PyTorch sees of the GPUs: [name, bytes, compute capability], and the pairs that reach each
    other's memory."""
    import torch

    found: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda, "file": torch.__file__}
    found |= {
        "told": [],
        "gpus": [],
        "peers": [],
        "nccl": None,
        "archs": [],
        "cudnn": None,
        "distributed": False,
    }
    try:
        found["distributed"] = torch.distributed.is_available()
        with warnings.catch_warnings(record=True) as told:  # why CUDA cannot be used is told as a warning
            warnings.simplefilter("always")
            numbers = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
        found["told"] = [str(each.message) for each in told]
        if torch.version.cuda:
            found["cudnn"] = torch.backends.cudnn.version()
            found["archs"] = torch.cuda.get_arch_list()
            found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        about = [torch.cuda.get_device_properties(number) for number in numbers]
        found["gpus"] = [[each.name, each.total_memory, [each.major, each.minor]] for each in about]
        pairs = [(one, other) for one in numbers for other in numbers if one != other]
        found["peers"] = [pair for pair in pairs if torch.cuda.can_device_access_peer(*pair)]
        for number in numbers:
            torch.ones(1, device=f"cuda:{number}").add_(1).item()  # a kernel runs
    except Exception as error:
        found["cuda_error"] = f"{type(error).__name__}: {error}"
    return found


def probe_dali() -> dict[str, Any]:
    """Versions, and whether DALI decodes a JPEG: on a GPU where it sees one, else on the CPU."""
    import nvidia.dali as dali

    backend: Any = dali.backend  # compiled: without types

    found: dict[str, Any] = {"version": dali.__version__, "cuda": backend.__cuda_version__, "decodes": None}
    try:
        found["nvimgcodec"] = backend.GetNvimgcodecVersion()
        found["decodes"] = decode(gpu=sees_gpu())
    except Exception as error:
        found["decode_error"] = f"{type(error).__name__}: {error}"
    return found


def sees_gpu() -> bool:
    """Whether DALI does; it raises where there is no driver."""
    import nvidia.dali

    backend: Any = nvidia.dali.backend
    try:
        return bool(backend.GetCUDADeviceCount() > 0)
    except RuntimeError:
        return False


def decode(gpu: bool) -> str:
    """Decode an image of one colour on a GPU or the CPU; returns which. Raises when it comes out in another colour."""
    import numpy as np
    from nvidia.dali import Pipeline, fn
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 100, 50)).save(file, "JPEG")
    encoded = np.frombuffer(file.getvalue(), np.uint8)
    pipe = Pipeline(batch_size=1, num_threads=1, device_id=0 if gpu else None, prefetch_queue_depth=1)
    with pipe:
        source = fn.external_source(source=lambda: [encoded], batch=True)
        pipe.set_outputs(fn.decoders.image(source, device="mixed" if gpu else "cpu"))
    pipe.build()
    (images,) = pipe.run()
    pixels_HWC = np.asarray((images.as_cpu() if gpu else images).at(0)).astype(int)
    if pixels_HWC.shape != (64, 64, 3) or np.abs(pixels_HWC - (200, 100, 50)).max() > 4:
        raise ValueError("an image of one colour comes out in another")
    return "gpu" if gpu else "cpu"


if __name__ == "__main__":
    name = sys.argv[1]
    try:
        result = {"torch": probe_torch, "dali": probe_dali}[name]()
    except BaseException as error:  # a library may do anything when it is imported
        result = {"error": f"{type(error).__name__}: {error}"}
    print("\n" + json.dumps({"probe": name, **result}), flush=True)
