"""Whether the network waits: the figures of `bench train` are what made-up intervals and traces give by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import ROOT, run_ok
from tests.test_bench import rows_of
from tools.benchmarks.train import STEP, WAIT, WINDOW, read_timeline


def test_rates_efficiency_and_waits(few: Path, tmp_path: Path) -> None:
    """Loader, network and both have positive rates; efficiency is the median over turns."""
    out, config = tmp_path / "rows.jsonl", ROOT / "train/configs/quickstart.yaml"
    small = "--model.channels [8,16,16,16,16] --model.fc_dim 64 --train.compile false"
    turns = ["--seconds", "0.5", "--repeats", "2", "--out", out]
    text = run_ok("tools/bench.py", "train", few, "--recipe", config, "--settings", small, *turns)
    rows = rows_of(out)
    assert [row["contender"].split()[0] for row in rows] == ["loader", "network", "both,"]
    values = np.array([row["values"] for row in rows])
    efficiency = np.median(values[2] / values[:2].min(0))
    assert rows[0]["efficiency"] == pytest.approx(efficiency)
    assert f"min(loader, network): {efficiency:.2f}" in text
    assert f"bottleneck: the {'loader' if rows[0]['median'] < rows[1]['median'] else 'network'}" in text
    assert 0 < rows[0]["wait_percent"] < 100
    assert 0 < rows[0]["host_wait_percent"] + rows[0]["host_step_percent"] <= 100
    assert ("busy_percent" in rows[0]) == (rows[0]["gpu"] is not None)


def event(cat: str, name: str, ts: float, dur: float, stream: int = 0) -> dict[str, Any]:
    """An event as Chrome traces have them."""
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": {"stream": stream}}


HOST = [
    event("user_annotation", WINDOW, 1000, 2000),
    event("user_annotation", WAIT, 500, 100),  # before the window
    event("user_annotation", WAIT, 1000, 300),
    event("user_annotation", STEP, 1300, 600),
    event("user_annotation", WAIT, 2000, 100),
    event("user_annotation", STEP, 2100, 800),
]


def test_timeline_is_that_by_hand() -> None:
    """By hand: 2 steps of 1 ms; kernels of torch's stream are the network's, whatever their name; those of others the
    input's; what overlaps counts once as busy."""
    host = {"ms_per_step": 1.0, "host_wait_percent": 20, "host_step_percent": 70}
    assert read_timeline(HOST, 2) == host
    device = [
        event("kernel", "void at::native::vectorized_elementwise_kernel<4>", 1200, 100, 7),
        event("kernel", "sm90_xmma_fprop", 1300, 900, 7),
        event("kernel", "void dali::SliceFlipNormalize", 2100, 200, 21),  # half of it while the network's run
        event("kernel", "cub::DeviceScan", 2300, 100, 21),
        event("gpu_memcpy", "Memcpy HtoD", 2500, 60, 22),
        event("gpu_memset", "Memset", 2550, 50, 7),
        event("gpu_user_annotation", WINDOW, 1000, 2000, 7),  # is no work
        event("cuda_runtime", "cudaLaunchKernel", 1000, 2000),
    ]
    found = read_timeline(HOST + device, 2)
    gpu = {"busy": 65, "network_kernels": 50, "input_kernels": 15, "copies": 5, "idle": 35}
    assert found == pytest.approx(host | {f"{name}_percent": share for name, share in gpu.items()})
