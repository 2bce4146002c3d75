"""FFCV as a contender: starts `ffcv_script.py` in FFCV's own environment, and asks it for batches."""

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from pipeline.lighting import Lighting
from tools.benchmarks.contenders.data import Batches, PeerData

FFCV_SCRIPT = Path(__file__).with_name("ffcv_script.py")


def ffcv_batches(data: PeerData) -> Batches:
    """FFCV in its own environment; batches that nobody looks at stay there."""
    file = data.scratch / "batch.npz"
    with ffcv_process(data) as ask:
        while True:
            ask(f"show {file}" if data.show else "next")
            if data.show:
                with np.load(file, allow_pickle=False) as batch:
                    yield torch.from_numpy(batch["images"]), torch.from_numpy(batch["labels"])
            else:
                yield None, None


def ffcv_decode(data: PeerData) -> Iterator[np.ndarray]:
    """Files decoded by FFCV."""
    file = data.scratch / "decoded.npy"
    with ffcv_process(data) as ask:
        ask(f"decode {file}")
    yield from np.load(file, allow_pickle=False)


@contextmanager
def ffcv_process(data: PeerData) -> Iterator[Callable[[str], None]]:
    """Start ffcv_script.py; yields a function that has it follow a line and waits for the answer."""
    lighting, settings = Lighting(), data.scratch / "ffcv.json"
    job = {
        "files": data.files,
        "mean": data.basis.mean.tolist(),
        "matrix": lighting.shift_matrix(data.basis).tolist(),
        "divisor": lighting.divisor,
        "batch_size": data.batch_size,
        "workers": data.workers,
        "show": data.show,
    }
    settings.write_text(json.dumps(job))
    command, log = [str(data.ffcv_python), str(FFCV_SCRIPT), str(settings)], data.scratch / "ffcv.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1
        )

    def answer() -> None:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise RuntimeError(f"FFCV ended: {log.read_text().strip().splitlines()[-1:]}")

    def ask(line: str) -> None:
        assert process.stdin is not None
        print(line, file=process.stdin)
        answer()

    try:
        answer()
        yield ask
    finally:
        process.kill()
        process.communicate()


def ffcv_versions(data: PeerData) -> dict[str, str]:
    """Versions in FFCV's environment."""
    if data.ffcv_python is None:
        raise ImportError("needs an environment of its own; name its interpreter by --ffcv-python")
    program = "import ffcv.loader, json; from importlib.metadata import version as v; "
    program += "print(json.dumps({n: v(n) for n in ('ffcv', 'numba', 'torch', 'numpy')}))"
    command = [str(data.ffcv_python), "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ImportError((done.stderr.strip().splitlines() or ["its interpreter fails"])[-1])
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise ImportError(f"{data.ffcv_python} is no Python") from None
    return {name if name == "ffcv" else f"{name} of ffcv": version for name, version in found.items()}
