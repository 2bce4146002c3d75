"""Local response normalization equals the written-out formula, forward and backward, for both conventions, per
tower."""

from typing import Any

import pytest
import torch

from model.lrn import band_sum_by_convolution, band_sum_of_slices, local_response_norm

CASES = [(convention, towers) for convention in ("paper", "original") for towers in (1, 2)]


def by_hand(x: torch.Tensor, convention: str, towers: int) -> torch.Tensor:
    """The paper's formula, map by map; `original` divides alpha by n."""
    alpha = 1e-4 if convention == "paper" else 1e-4 / 5
    per_tower = x.shape[1] // towers
    maps = []
    for i in range(x.shape[1]):
        first = i // per_tower * per_tower
        around = range(max(first, i - 2), min(first + per_tower, i + 3))
        maps.append(x[:, i] / (2 + alpha * sum(x[:, j] ** 2 for j in around)) ** 0.75)
    return torch.stack(maps, 1)


def activations(*shape: int) -> torch.Tensor:
    """Float64 of a size at which the sum of squares matters: alpha * 5 * 100^2 = 5 against k = 2."""
    generator = torch.Generator().manual_seed(0)
    return 100 * torch.randn(shape, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(
    ("device", "band_sum"),
    [
        ("cpu", band_sum_by_convolution),
        ("cpu", band_sum_of_slices),
        pytest.param("cuda", band_sum_of_slices, marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize(("convention", "towers"), CASES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_equals_the_formula(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    band_sum: Any,
    convention: Any,
    towers: int,
    memory_format: torch.memory_format,
) -> None:
    """Values and gradients in float64, by a CPU's and by a GPU's way, in the memory format of the input; a gradient
    through autograd of the formula is the reference."""
    monkeypatch.setattr("model.lrn.band_sum_by_convolution", band_sum)
    x = activations(2, 12, 5, 4).to(device, memory_format=memory_format)
    weight = torch.randn_like(x)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, expected = local_response_norm(one, convention, towers), by_hand(two, convention, towers)
    torch.autograd.backward([got, expected], [weight, weight])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-10, atol=1e-12)
    assert got.is_contiguous(memory_format=memory_format)


def test_compiled_equals_eager() -> None:
    """Under torch.compile, forward and backward in float32, in channels-last memory, which is kept."""
    x = activations(2, 16, 7, 7).float().to(memory_format=torch.channels_last)
    # PyTorch does not quote its own path for the C++ compiler; where that has a space, tracing alone is tested.
    backend = "aot_eager" if " " in torch.__file__ else "inductor"
    compiled = torch.compile(local_response_norm, fullgraph=True, backend=backend)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, expected = compiled(one, "paper", 2), local_response_norm(two, "paper", 2)
    got.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(one.grad, two.grad)
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("convention", "towers"), CASES)
def test_half_precision_is_computed_in_float32(convention: str, towers: int, autocast: bool) -> None:
    """bfloat16 differs from float64 by the rounding of its output alone, forward and backward, under autocast too."""
    x = activations(2, 16, 4, 4).bfloat16().requires_grad_()
    weight = torch.randn(
        2, 16, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).bfloat16()
    exact = x.detach().double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = local_response_norm(x, convention, towers)  # type: ignore[arg-type]
    expected = by_hand(exact, convention, towers)
    torch.autograd.backward([got, expected], [weight, weight.double()])
    assert got.dtype == torch.bfloat16 and x.grad is not None and exact.grad is not None
    torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=0)
    # Terms of the gradient may cancel; what float32 leaves of them is small beside any of them.
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=2**-8, atol=1e-6)
