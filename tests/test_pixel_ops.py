"""Normalization against the formula."""

import numpy as np
import pytest
import torch

from pipeline.pixel_ops import normalize


@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize("stds", [(1.0, 1.0, 1.0), (1.1, 58.4, 0.3)])
def test_normalize_is_the_formula(stds: tuple[float, float, float], with_offset: bool) -> None:
    """(x - mean) / std - offset in float64, for every level, another mean for each window, every other mirrored; torch
    keeps its threads."""
    rng, threads = np.random.default_rng(0), torch.get_num_threads()
    windows = np.arange(4 * 16 * 8 * 3).reshape(4, 16, 8, 3).astype(np.uint8)
    means = rng.uniform(-50, 300, (4, 3)).astype(np.float32)
    offset = rng.uniform(-9, 9, (16, 8, 3)).astype(np.float32)
    out = torch.full(windows.shape, torch.nan)
    normalize(
        torch.from_numpy(windows),
        np.array([False, True, False, True]),
        means,
        np.array(stds),
        torch.from_numpy(offset) if with_offset else None,
        out,
    )
    seen = windows.astype(np.float64)
    seen[1::2] = seen[1::2, :, ::-1]
    expected = (seen - means[:, None, None]) / stds - with_offset * offset
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=3e-4)
    assert torch.get_num_threads() == threads
