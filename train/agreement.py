"""What all processes of a run have to have in common, so that one that differs is told before the first step."""

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import nvidia.dali
import torch

from train.config import flatten
from train.state import TrainState

ROOMS = ("pipeline", "model", "train")


def facts(state: TrainState, checkpoint: Path | None) -> dict[str, Any]:
    """Name -> value, as this process sees it. Where shards and runs lie may differ, what is in them may not."""
    config = {
        name: value
        for name, value in flatten(state.config.to_json()).items()
        if name not in ("data.shards", "run.dir", "train.weights") and not name.startswith("data.speed.")
    }
    return {
        "the number of processes": state.placement.world,
        "the newest checkpoint in run.dir": checkpoint.name if checkpoint else "none",
        **config,
        "train/manifest.json": state.train_shards.manifest_sha256[:12],
        "val/manifest.json": state.val_shards.manifest_sha256[:12],
        "pca.json": short_hash(json.dumps(state.basis.to_json(), sort_keys=True).encode()),
        "the program's source": source_hash(),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "DALI": nvidia.dali.__version__,
        "the device": state.device.type,
    }


def source_hash() -> str:
    """Of the code that decides what a run computes."""
    root = Path(__file__).resolve().parents[1]
    files = sorted(path for room in ROOMS for path in (root / room).glob("*.py"))
    return short_hash(b"\0".join(path.name.encode() + b"\0" + path.read_bytes() for path in files))


def short_hash(content: bytes) -> str:
    """Enough of a SHA-256 to tell two contents apart."""
    return hashlib.sha256(content).hexdigest()[:12]
