"""nvidia-smi is asked about the right GPU, for as long as it is wanted."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tools.benchmarks.utilization import name_of, utilization, watched

SMI = """#!/bin/sh
case "$*" in
  "--id=GPU-ab-12 --query-gpu=utilization.gpu --format=csv,noheader,nounits") echo 97;;
  "--id=GPU-mig "*) echo "[N/A]";;
  *) echo "No devices were found"; exit 6;;
esac
"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A fake nvidia-smi comes first on the PATH; returns what takes it away."""
    file = tmp_path / "nvidia-smi"
    file.write_text(SMI)
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return file.unlink


def test_utilization(smi: Callable[[], None]) -> None:
    """Polled while the block runs; nothing without a GPU, of one that is cut up, or without nvidia-smi."""
    with watched("GPU-ab-12", 0.01) as percents:
        deadline = time.monotonic() + 20
        while len(percents) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    polled = len(percents)
    time.sleep(0.1)
    assert polled >= 2 and percents == [97] * polled
    for gpu in (None, "GPU-mig"):
        with watched(gpu, 0.001) as percents:
            time.sleep(0.1)
        assert percents == []
    assert utilization("GPU-other") is None
    smi()
    assert utilization("GPU-ab-12") is None


def test_name_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is named by what no CUDA_VISIBLE_DEVICES changes."""
    properties = {0: SimpleNamespace(uuid="ab-12"), 1: SimpleNamespace()}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties[device.index])
    assert name_of(torch.device("cuda", 0)) == "GPU-ab-12" and name_of(torch.device("cuda", 1)) == "1"
    assert name_of(torch.device("cpu")) is None
