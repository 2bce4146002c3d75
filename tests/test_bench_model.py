"""What the benchmark of the network times is what it says: the same sums in other ways, torchvision's layers; and it
survives the processes of its towers."""

import copy
import functools
import json
import multiprocessing
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from model.alexnet import AlexNet, AlexNetConfig
from tests.helpers import TORCHVISION
from tools.benchmarks import model as bench_model
from tools.benchmarks import towers
from tools.benchmarks.measure import Table
from tools.benchmarks.model import SplitConv2d, UnshuffledConv2d, torchvision_alexnet

SMALL = AlexNetConfig(channels=(8, 16, 16, 16, 16), hidden=64)
SMALL_ONE = AlexNetConfig(towers=1, channels=(4, 8, 8, 8, 16), hidden=64)


@pytest.mark.parametrize(
    ("kind", "layer", "shape"),
    [
        (SplitConv2d, nn.Conv2d(8, 12, 5, padding=2, groups=2), (2, 8, 9, 9)),
        (UnshuffledConv2d, nn.Conv2d(3, 6, 11, stride=4), (2, 3, 227, 227)),
    ],
)
def test_other_ways_are_the_same_sums(
    kind: type[nn.Conv2d], layer: nn.Conv2d, shape: tuple[int, ...]
) -> None:
    """Outputs and gradients, in float64."""
    layer = layer.double()
    other = copy.deepcopy(layer)
    other.__class__ = kind
    x = torch.randn(shape, dtype=torch.float64)
    outputs = [layer(x), other(x)]
    for each in outputs:
        each.square().sum().backward()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(other.weight.grad, layer.weight.grad, rtol=1e-10, atol=1e-10)


def test_torchvisions_layers() -> None:
    """Shapes of weights in its published state dict, in its order."""
    with torch.device("meta"):
        shapes = [tuple(p.shape) for p in torchvision_alexnet().parameters() if p.ndim > 1]
    assert shapes == list(TORCHVISION.values())


@pytest.mark.slow
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All three tables and the profile come, with a line for each contender; towers also with a verdict, what travels,
    and rows."""
    for module in (bench_model, towers):
        monkeypatch.setattr(module, "can_compile", lambda place: False)  # it takes long
    small = functools.partial(towers.measure_towers, two_towers=SMALL, one_gpu=SMALL_ONE)
    monkeypatch.setattr(towers, "measure_towers", small)
    bench_model.bench_model([1], "float32", 0.01, 1, "cpu", True, tmp_path / "rows.jsonl")
    lines = capsys.readouterr().out.splitlines()
    rates = [
        line
        for line in lines
        if line.startswith(("ours", "torch", "2.5 copies", "two towers,", "the paper's"))
    ]
    assert len(rates) == 3 + 4 + 2 and all(float(line.rsplit(maxsplit=4)[1]) > 0 for line in rates)
    assert any("convolution" in line for line in lines)
    assert any(line.startswith("the two-GPU net trains ") and line.endswith(" here") for line in lines)
    assert "each of the two sends 0.2 MB in a step (docs/towers.md)" in lines
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    (pair,) = (row for row in rows if row["contender"] == towers.TWO_DEVICES)
    assert len(rows) == 3 + 4 + 3 and pair["reference"] == towers.ONE_GPU and pair["not_measured"] == {}
    assert pair["bytes_sent_per_step"] == 4 * (256 * 13 * 13 + 9216 + 2 * 4096) + 4 * 500
    with pytest.raises(ValueError, match="at least 1"):
        bench_model.bench_model([0], "float32", 0.01, 1, "cpu", False, None)


def test_the_benchmark_outlives_its_processes() -> None:
    """One of the two is killed: the other goes on alone, steps of both end in a sentence, and nothing is left running;
    so does a process that fails or says nothing."""
    job = towers.Job(SMALL, SMALL_ONE, 1, torch.float32, on_gpu=False, compiles=False, threads=1)
    with towers.started(job, 60) as take_steps:
        both = sorted(multiprocessing.active_children(), key=lambda process: process.pid or 0)
        assert len(both) == 2 and take_steps(towers.TWO_DEVICES, 2) > 0
        both[1].kill()
        both[1].join()
        assert take_steps(towers.ONE_GPU, 1) > 0
        started = time.monotonic()
        with pytest.raises(towers.NotMeasuredError, match=r"process 1: ended|process 0: PeerLostError"):
            take_steps(towers.TWO_DEVICES, 1)
        assert time.monotonic() - started < 30
    assert not multiprocessing.active_children()
    for said, told in (
        ("ValueError: no", "process 0: ValueError: no"),
        (None, "process 0 has not answered for 0 s"),
    ):
        ours, theirs = multiprocessing.Pipe()
        if said:
            theirs.send(said)
        with pytest.raises(towers.NotMeasuredError, match=told):
            towers.answers([ours], 0.1)


def test_figures_of_towers() -> None:
    """The paper's net for one GPU has as many parameters as by hand; steps are counted; the claim holds in all turns,
    in none, or is undecided."""
    with torch.device("meta"):
        assert sum(p.numel() for p in AlexNet(towers.one_gpu_net()).parameters()) == 59_798_312
    asked: list[int] = []

    def take_steps(steps: int) -> float:
        asked.append(steps)
        return 0.01 * steps

    assert towers.steps_in(1.0, take_steps) == 100 and asked == [1, 4, 16, 64]
    assert towers.steps_in(0.001, take_steps) == 1
    turns = {"1.10 (1.10 to 1.10)": [2.2, 3.3], "0.58 (0.50 to 0.67)": [1.0, 2.0], "is undecided": [1.0, 6.0]}
    for verdict, rates in turns.items():
        table = Table("", "images/s", {towers.TWO_DEVICES: rates, towers.ONE_GPU: [2.0, 3.0]}, towers.ONE_GPU)
        told = towers.verdict(table)
        assert verdict in told and ("does not hold" in told) == (rates == [1.0, 2.0])


def test_two_gpus_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one of them there is a sentence and nothing is started."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(towers.NotMeasuredError, match="needs two GPUs"):
        towers.measure_towers(1, torch.float32, torch.device("cuda", 0), 0.01, 1)
