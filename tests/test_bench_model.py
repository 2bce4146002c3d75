"""What the benchmark of the network times is what it says: the same sums in other ways, and torchvision's layers."""

import copy

import pytest
import torch
from torch import nn

from tests.test_alexnet import TORCHVISION
from tools.benchmarks import model as bench_model
from tools.benchmarks.model import SplitConv2d, UnshuffledConv2d, torchvision_alexnet


@pytest.mark.parametrize(
    ("kind", "layer", "shape"),
    [
        (SplitConv2d, nn.Conv2d(8, 12, 5, padding=2, groups=2), (2, 8, 9, 9)),
        (UnshuffledConv2d, nn.Conv2d(3, 6, 11, stride=4), (2, 3, 227, 227)),
    ],
)
def test_other_ways_are_the_same_sums(kind: type[nn.Conv2d], layer: nn.Conv2d, shape: tuple[int, ...]) -> None:
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


def test_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both tables and the profile come, with a line for each contender."""
    monkeypatch.setattr(bench_model, "can_compile", lambda place: False)  # it takes long
    bench_model.bench_model([1], "float32", 0.01, 1, "cpu", True, None)
    lines = capsys.readouterr().out.splitlines()
    rates = [line for line in lines if line.startswith(("ours", "torch", "2.5 copies"))]
    assert len(rates) == 3 + 4 and all(float(line.rsplit(maxsplit=4)[1]) > 0 for line in rates)
    assert any("convolution" in line for line in lines)
    with pytest.raises(ValueError, match="at least 1"):
        bench_model.bench_model([0], "float32", 0.01, 1, "cpu", False, None)
