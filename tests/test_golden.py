"""Golden data: what no change of the code's form may change by a bit.

    python -m tests.test_golden        # records tests/golden.json anew, for a change that is meant to alter numbers

They hold for the versions and the kind of CPU that they were recorded with: pixels depend on the decoder, losses on the
instructions that torch picks. Elsewhere the same commands run on the commit that recorded them, in a worktree.
"""

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers import ROOT

GOLDEN = ROOT / "tests" / "golden.json"
STEPS = 44
"""Of the quickstart's first epoch."""
FREE = ("options", "plan", "versions", "format_version", "manifest_sha256", "samples_sha256")
"""Fields of manifests and of pca.json that name options, versions and tables: what they come to is in the others."""


def surroundings() -> dict[str, str]:
    """What bits depend on besides the code."""
    cpu = Path("/proc/cpuinfo").read_text()
    flags = sorted(set(re.findall(r"\b(?:avx|amx|fma|sse4)\w*", re.search(r"^flags.*$", cpu, re.M)[0])))  # type: ignore[index]
    libraries = ("torch", "nvidia-dali-cuda120", "simplejpeg", "pillow", "numpy")
    about = {name: version(name).partition("+")[0] for name in libraries} | {"machine": platform.machine()}
    return about | {"cpu": " ".join([*re.findall(r"vendor_id\s*: (.*)", cpu)[:1], *flags])}


def sha(data: bytes) -> str:
    """SHA-256."""
    return hashlib.sha256(data).hexdigest()


def measure(root: Path, scratch: Path, packed: Path | None = None) -> dict[str, Any]:
    """The demo packed with its eigenbasis, an epoch of the quickstart and its evaluation, by the programs of a
    checkout; `packed` are the shards where they are there already."""

    def run(*words: str | Path) -> str:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
        command = [sys.executable, "-m", *map(str, words)]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    shards, directory, weights = packed or scratch / "shards", scratch / "run", scratch / "w.safetensors"
    if packed is None:
        run("tools.make_demo", scratch / "raw")
        run("tools.make_shards", "pack", scratch / "raw", shards, "--samples-per-shard", "180")
        run("tools.compute_pca", shards)
    recipe = ["--config", "train/configs/quickstart.yaml", "--run.device", "cpu", "--run.log_every", "1"]
    place = ["--data.shards", shards, "--run.dir", directory]
    run("train.run", *recipe, *place, "--train.epochs", "1", "--optimizer.steps", "[]")
    run("tools.export_weights", directory, weights)
    evaluation = run("train.evaluate", directory, shards, "--device", "cpu")
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in load_file(weights).items()}
    files = sorted([*shards.glob("*/*.tar"), *shards.glob("*/*.idx"), shards / "classes.json"])
    found: dict[str, Any] = {str(path.relative_to(shards)): sha(path.read_bytes()) for path in files}
    for name in ("train/manifest.json", "val/manifest.json", "pca.json"):
        content = json.loads((shards / name).read_text())
        rest = {name: value for name, value in content.items() if name not in FREE}
        found[name] = sha(json.dumps(rest, sort_keys=True).encode())
    return {
        "files": found,
        "losses": [row["loss"] for row in rows if row["kind"] == "train"],
        "weights": sha(b"".join(name.encode() + tensors[name].tobytes() for name in sorted(tensors))),
        "evaluation": re.findall(r"^(.*) accuracy: (.*) %$", evaluation, re.MULTILINE),
    }


def recorded(scratch: Path) -> dict[str, Any]:
    """The golden data for these surroundings."""
    golden = json.loads(GOLDEN.read_text())
    if golden["surroundings"] == surroundings():
        return dict(golden["data"])
    worktree = scratch / "golden"
    git = ["git", "-C", str(ROOT), "worktree"]
    add = [*git, "add", "--detach", worktree, golden["commit"]]
    if subprocess.run(add, capture_output=True, check=False).returncode:
        pytest.skip(f"recorded on another machine, and commit {golden['commit']} is not in this clone")
    try:
        return measure(worktree, scratch / "by golden")
    finally:
        subprocess.run([*git, "remove", "--force", worktree], check=True)


def test_golden(demo: Path, tmp_path: Path) -> None:
    """Shards, eigenbasis, the losses of the quickstart's first epoch, the weights after it and its evaluation are those
    that were recorded, bit for bit."""
    now = json.loads(json.dumps(measure(ROOT, tmp_path / "now", demo / "shards")))
    golden = json.loads(json.dumps(recorded(tmp_path)))
    assert len(now["losses"]) == STEPS and len(now["files"]) == 24 and len(now["evaluation"]) == 4
    assert now["losses"] == golden["losses"]
    assert now == golden


if __name__ == "__main__":
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
    with tempfile.TemporaryDirectory() as scratch:
        content = {"commit": head, "surroundings": surroundings(), "data": measure(ROOT, Path(scratch))}
    GOLDEN.write_text(json.dumps(content, indent=1) + "\n")
