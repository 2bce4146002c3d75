"""Local response normalization across channels (Krizhevsky et al. 2012, section 3.3), forward and analytic backward.

    y_i = x_i / (k + a * sum of x_j^2 over the 5 channels j around i)^0.75,   k = 2

Two conventions: `paper`, a = 1e-4; `original`, the 2012 program, which divided alpha by the 5 channels, a = 2e-5, as
`torch.nn.functional.local_response_norm` does. Channels of the other tower are not neighbours.

With d = k + a B(x^2), B the band sum (symmetric in the channels), the gradient is one more band sum:
    dx = g d^-0.75 - 1.5 a x B(g x d^-1.75)
d^-0.75 is r * sqrt(r) with r = rsqrt(d), as `pow` is slow. float16 and bfloat16 are computed in float32. Inputs may be
channels-last; nothing is transposed.

Shape suffixes: N images, C channels, H and W height and width.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F

SIZE, K, ALPHA = 5, 2.0, 1e-4
"""Section 3.3 of the paper: n = 5 channels, k = 2, alpha = 1e-4; beta = 0.75 is written out below."""

Convention = Literal["paper", "original"]


def local_response_norm(x_NCHW: torch.Tensor, convention: Convention, towers: int = 1) -> torch.Tensor:
    """Normalize each activation by its neighbours in the same tower.

    Args:
        x_NCHW: any floating dtype and memory format; C divides by `towers`.
        convention: "paper" (alpha times the sum of 5) or "original" (alpha / 5).
        towers: number of groups of channels that do not see each other.

    Returns a tensor of the same shape, dtype and memory format.
    """
    alpha = ALPHA if convention == "paper" else ALPHA / SIZE
    result: torch.Tensor = LocalResponseNorm.apply(x_NCHW, alpha, towers)
    return result


class LocalResponseNorm(torch.autograd.Function):
    """The formula above; keeps only its input for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x_NCHW: torch.Tensor, alpha: float, towers: int) -> torch.Tensor:
        """Normalize (N, C, H, W); the result has the same shape."""
        ctx.save_for_backward(x_NCHW)
        ctx.alpha, ctx.towers = alpha, towers
        x = to_float32(x_NCHW)
        r = band_sum(x * x, towers, alpha, K).rsqrt_()
        return r.sqrt().mul_(r).mul_(x).to(x_NCHW.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Compute the gradient with respect to the input."""
        (x_NCHW,) = ctx.saved_tensors
        x, g = to_float32(x_NCHW), to_float32(grads[0])
        r = band_sum(x * x, ctx.towers, ctx.alpha, K).rsqrt_()
        scaled = r.sqrt().mul_(r).mul_(g)  # g d^-0.75
        band = band_sum(r.mul_(r).mul_(scaled).mul_(x), ctx.towers, 1.5 * ctx.alpha)
        return scaled.sub_(band.mul_(x)).to(x_NCHW.dtype), None, None


def to_float32(x: torch.Tensor) -> torch.Tensor:
    """Convert float16 and bfloat16 to float32; return other dtypes unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def band_sum(x_NCHW: torch.Tensor, towers: int, scale: float, offset: float = 0.0) -> torch.Tensor:
    """Compute `offset + scale * sum over the 5 channels around each`, within each tower, in the same memory format."""
    by_device = band_sum_of_slices if x_NCHW.is_cuda else band_sum_by_convolution
    return by_device(x_NCHW, towers, scale, offset)


def band_sum_by_convolution(x_NCHW: torch.Tensor, towers: int, scale: float, offset: float) -> torch.Tensor:
    """Compute it as a 1x1 convolution with a band matrix, the fastest way on a CPU."""
    channels = x_NCHW.shape[1] // towers
    index = torch.arange(channels, device=x_NCHW.device)
    band = ((index[:, None] - index[None, :]).abs() <= SIZE // 2).to(x_NCHW.dtype) * scale
    bias = torch.full((channels * towers,), offset, dtype=x_NCHW.dtype, device=x_NCHW.device)
    with torch.autocast("cpu", enabled=False):  # it would convolve in half precision
        return F.conv2d(x_NCHW, band.repeat(towers, 1)[:, :, None, None], bias, groups=towers)


def band_sum_of_slices(x_NCHW: torch.Tensor, towers: int, scale: float, offset: float) -> torch.Tensor:
    """Compute it as a sum of five shifted slices, which torch.compile fuses on a GPU, and which no TF32 rounds."""
    channels, reach = x_NCHW.shape[1] // towers, SIZE // 2
    padded = F.pad(x_NCHW.unflatten(1, (towers, channels)), (0, 0, 0, 0, reach, reach))
    total = padded.narrow(2, 0, channels)
    for shift in range(1, SIZE):
        total = total + padded.narrow(2, shift, channels)
    channels_last = x_NCHW.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return (offset + scale * total).flatten(1, 2).contiguous(memory_format=memory_format)
