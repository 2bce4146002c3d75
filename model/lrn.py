"""Local response normalization across maps (Krizhevsky et al. 2012, section 3.3), forward and analytic backward.

    y_i = x_i / (k + a * sum of x_j^2 over the 5 maps j around i)^0.75,   k = 2

Two conventions: `paper`, a = 1e-4 over the sum; `original`, the 2012 program, which divided alpha by the 5 maps: a =
2e-5, the rule of `torch.nn.functional.local_response_norm`. Neighbours never cross from one tower into the other.

With d = k + a B(x^2), B the band sum (symmetric in the maps), the gradient is one more band sum:
    dx = g d^-0.75 - 1.5 a x B(g x d^-1.75)
Five shifted slices are added instead of pooling over a transposed tensor, so memory may be channels-last and a compiler
fuses the whole into one loop. d^-0.75 is r * sqrt(r) with r = rsqrt(d): `pow` is slow. Half and bfloat16 are computed
in float32.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F

SIZE, K, ALPHA = 5, 2.0, 1e-4
"""Section 3.3 of the paper: n = 5 maps, k = 2, alpha = 1e-4; beta = 0.75 is written out below."""

Convention = Literal["paper", "original"]


def local_response_norm(x_NCHW: torch.Tensor, convention: Convention, towers: int = 1) -> torch.Tensor:
    """Normalize each activation by its neighbours in the same tower.

    Args:
        x_NCHW: any floating dtype and memory format; C divides by `towers`.
        convention: "paper" (alpha times the sum of 5) or "original" (alpha / 5).
        towers: number of groups of maps that do not see each other.

    Returns a tensor of the same shape, dtype and memory format.
    """
    alpha = ALPHA if convention == "paper" else ALPHA / SIZE
    result: torch.Tensor = LocalResponseNorm.apply(x_NCHW, alpha, towers)
    return result


class LocalResponseNorm(torch.autograd.Function):
    """The formula above; keeps only its input for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x_NCHW: torch.Tensor, alpha: float, towers: int) -> torch.Tensor:
        """(N, C, H, W) -> the same."""
        ctx.save_for_backward(x_NCHW)
        ctx.alpha, ctx.towers = alpha, towers
        x = widen(x_NCHW)
        return (x * inverse_power(x, alpha, towers)[1]).to(x_NCHW.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Gradient with respect to the input."""
        (x_NCHW,) = ctx.saved_tensors
        x, g = widen(x_NCHW), widen(grads[0])
        denominator, power = inverse_power(x, ctx.alpha, ctx.towers)
        band = band_sum(g * x * power / denominator, ctx.towers)
        return (g * power - 1.5 * ctx.alpha * x * band).to(x_NCHW.dtype), None, None


def widen(x: torch.Tensor) -> torch.Tensor:
    """At least float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def inverse_power(x_NCHW: torch.Tensor, alpha: float, towers: int) -> tuple[torch.Tensor, torch.Tensor]:
    """d = k + alpha B(x^2), and d^-0.75."""
    denominator = K + alpha * band_sum(x_NCHW * x_NCHW, towers)
    r = denominator.rsqrt()
    return denominator, r * r.sqrt()


def band_sum(x_NCHW: torch.Tensor, towers: int) -> torch.Tensor:
    """Sum over the 5 maps around each, within each tower."""
    channels, reach = x_NCHW.shape[1] // towers, SIZE // 2
    x = F.pad(x_NCHW.unflatten(1, (towers, channels)), (0, 0, 0, 0, reach, reach))
    total = x.narrow(2, 0, channels)
    for shift in range(1, SIZE):
        total = total + x.narrow(2, shift, channels)
    return total.flatten(1, 2)
